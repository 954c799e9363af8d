"""What travels on the bus: small facts in the past tense, as JSON. They carry keys, never data.

A lost event costs latency, never data: episodes and policies are found in the store; the rest are signs of life.
Times are UTC nanoseconds since the epoch; durations across machines are as good as their clocks.
"""

from typing import TypeVar

import msgspec

from sop.core.errors import InvalidRecord

TOPIC_EPISODES = "episodes"
TOPIC_POLICIES = "policies"
TOPIC_ACTORS = "actors"
TOPIC_LEARNER = "learner"


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Base of all events; `encode` writes the name of the class into the field `event`."""


class EpisodeCommitted(Event, frozen=True, kw_only=True, tag=True):
    """An episode is in the store, whole."""

    key: str
    outcome: str
    """`Outcome` of the episode."""
    ended_utc_ns: int
    """When the robot finished the episode."""
    spooled_utc_ns: int | None = None
    """When it was durable on the robot's disk; None when the robot does not know any more."""
    committed_utc_ns: int
    """When the store had it."""


class PolicyPublished(Event, frozen=True, kw_only=True, tag=True):
    """A policy is in the store, manifest included."""

    version: int
    manifest: str
    published_utc_ns: int


class ChannelChanged(Event, frozen=True, kw_only=True, tag=True):
    """A channel has a newer signed state in the store; travels on the topic of the policies."""

    channel: str
    sequence: int
    state: str
    """Key of the signed state."""
    published_utc_ns: int


class PolicySwapped(Event, frozen=True, kw_only=True, tag=True):
    """An actor acts with another policy since this moment."""

    actor_id: str
    version: int
    published_utc_ns: int
    """When the learner handed the weights over to be published: `PolicyTimes.published_utc_ns`."""
    staged_utc_ns: int
    swapped_utc_ns: int


class ActorReported(Event, frozen=True, kw_only=True, tag=True):
    """Sign of life of an actor, once a second or so."""

    actor_id: str
    state: str
    task: str
    policy_version: int | None
    newest_version: int | None
    """Newest version that the actor knows to be published."""
    episodes: int
    successes: int
    interventions: int
    human_steps: int
    steps: int
    spooled: int
    """Episodes that wait on the robot's disk."""
    overruns: int
    """Control steps that came late."""
    gated: int = 0
    """Actions that the safety gate changed."""
    nonfinite: int = 0
    """Commands that were not finite: the robot held instead."""
    stops: int = 0
    """Controlled stops of the safety gate."""
    problem: str
    """The last refusal or error, empty when there is none."""
    utc_ns: int


ALL_LEARNED = "all learned: indexing what still comes"
"""`LearnerReported.state` of a learner that has learned all there is to and stays until it is stopped."""


class LearnerReported(Event, frozen=True, kw_only=True, tag=True):
    """Sign of life of the learner, once a second or so."""

    state: str
    learner_step: int
    steps_per_s: float
    busy: float
    """Share of the time in which it was not waiting for a batch (pauses at the data cap excluded)."""
    version: int
    loss: float
    online_episodes: int
    offline_episodes: int
    quarantined: int
    online_share: dict[str, float]
    """Task -> omega_on."""
    episodes: dict[str, int]
    """Task -> episodes of the fleet."""
    interventions: dict[str, int]
    """Task -> interventions in them."""
    episode_to_sampleable_p50_s: float
    utc_ns: int


AnyEvent = EpisodeCommitted | PolicyPublished | ChannelChanged | PolicySwapped | ActorReported | LearnerReported
E = TypeVar("E", bound=Event)


def encode_event(event: AnyEvent) -> bytes:
    """JSON bytes of an event."""
    return msgspec.json.encode(event)


def decode_event(data: bytes, kind: type[E]) -> E:
    """Read an event of the given kind; fields and types are checked.

    Raises:
        InvalidRecord: not JSON, another event, or a field is missing or of another type.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRecord(kind.__name__, str(error)) from error
