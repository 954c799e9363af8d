"""Names on a NATS server: what a run is called there, and what each role may publish and subscribe.

    stream     sop_<namespace>_<topic>
    subject    sop.<namespace>.<topic>.<sender>      sender: name of the identity, `anyone` without one
    inbox      _INBOX.<sender>.>                     answers and deliveries; nobody hears those of others
    consumer   <sender>                              one per identity and topic

A server that is given `subjects_of` for every identity lets a robot write its own episodes and signs of life, read
policies, and nothing else. `nats_bus` uses no subject that is not named here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sop.core.events import TOPIC_ACTORS, TOPIC_EPISODES, TOPIC_LEARNER, TOPIC_POLICIES

TOPICS = (TOPIC_EPISODES, TOPIC_POLICIES, TOPIC_ACTORS, TOPIC_LEARNER)
"""Topics of a run; the owner makes their streams."""
WRITES: Mapping[str, tuple[str, ...]] = {
    "learner": (TOPIC_POLICIES, TOPIC_LEARNER),
    "robot": (TOPIC_EPISODES, TOPIC_ACTORS),
    "evaluator": (),
    "release": (),
    "observer": (),
}
"""Role -> topics on which it speaks, under its own name."""
READS: Mapping[str, tuple[str, ...]] = {
    "learner": TOPICS,
    "robot": (TOPIC_POLICIES,),
    "evaluator": TOPICS,
    "release": TOPICS,
    "observer": TOPICS,
}
"""Role -> topics that it hears."""
MAKERS = ("learner",)
"""Roles that make streams and change how long they keep."""
ANYONE = "anyone"
"""Sender without an identity; `name_token` gives it to no identity."""
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """Subjects that a server lets somebody use; wildcards as NATS writes them. Everything else is refused."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def check_namespace(namespace: str) -> None:
    """Refuse what is not a namespace.

    Raises:
        ValueError: not 1 to 64 characters of A-Z a-z 0-9 _ -.
    """
    if not _NAMESPACE.fullmatch(namespace):
        raise ValueError(f"namespace {namespace[:80]!r} must be 1 to 64 characters of A-Z a-z 0-9 _ -")


def name_token(name: str) -> str:
    """An identity's name as one token of a subject: what would split it or mean `ANYONE` is escaped, so that no two
    names share a token."""
    return f"={name}" if name == ANYONE else name.replace(".", "=2E")


def stream_of(namespace: str, topic: str) -> str:
    """Stream of a topic. No two pairs share one: the part behind the last `_` is the topic, escaped."""
    return f"sop_{namespace}_{_topic_token(topic)}"


def subject_of(namespace: str, topic: str, sender: str) -> str:
    """Subject on which a sender (a token) publishes; `*` for all of them, which is what the stream collects."""
    return f"sop.{namespace}.{_topic_token(topic)}.{sender}"


def inbox_of(sender: str) -> str:
    """Prefix of the subjects on which a sender (a token) is answered."""
    return f"_INBOX.{sender}"


def subjects_of(namespace: str, role: str, name: str) -> Permissions:
    """What the server's configuration must allow an identity.

    Args:
        namespace: of the run.
        role: one of `identity.ROLES`.
        name: of the identity.

    Raises:
        ValueError: no namespace, or an unknown role.
    """
    check_namespace(namespace)
    if role not in WRITES:
        raise ValueError(f"role {role!r} is none of {', '.join(sorted(WRITES))}")
    sender = name_token(name)
    publish = [subject_of(namespace, topic, sender) for topic in WRITES[role]]
    for topic in READS[role]:
        stream = stream_of(namespace, topic)
        publish += [
            f"$JS.API.STREAM.INFO.{stream}",
            f"$JS.API.DIRECT.GET.{stream}",
            *(f"$JS.API.CONSUMER.{verb}.{stream}.{sender}" for verb in ("CREATE", "INFO", "DELETE", "MSG.NEXT")),
            f"$JS.ACK.{stream}.{sender}.>",
        ]
    if role in MAKERS:
        publish += [
            f"$JS.API.STREAM.{verb}.{stream_of(namespace, topic)}" for topic in TOPICS for verb in ("CREATE", "UPDATE")
        ]
    return Permissions(publish=tuple(publish), subscribe=(f"{inbox_of(sender)}.>",))


def _topic_token(topic: str) -> str:
    return topic.replace("_", "=5F").replace(".", "=2E")
