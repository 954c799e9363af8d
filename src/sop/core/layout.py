"""The store's layout: every key of a run, written and read here and nowhere else.

    run.json                                         created once
    episodes/<actor_id>/<sequence>-<steps>-<hash>.arrow          online buffer
    demonstrations/<actor_id>/<sequence>-<steps>-<hash>.arrow    offline buffer
    policies/<version>/weights.safetensors                       full: all tensors that travel
    policies/<version>/keyframe.packed, delta-<base>.packed      packed: stands alone; builds on version <base>
    policies/<version>/lineage.arrow.zst                         what it learned from since its parent
    policies/<version>/signature.json                            who vouches for the manifest, when policies are signed
    policies/<version>/manifest.json                             last: without it there is no policy
    channels/<channel>/<sequence>.json                           what the robots of a channel run, signed
    leases/<role>/<token>.json, <token>-<beat>.json              who is the learner
    checkpoints/<learner_step>/...                               state.json last
    evaluations/<version>/<name>.json
    index/<labels id>/<first row>-<rows>-<hash>.arrow           rows of the learner's index; checkpoints name them
    quarantine/<key of the bad episode>.json         why it was refused
    screened/<key of the episode>.json               why it is stored but not learned from
    labels/<algorithm>/<version>/<episode hash>.arrow    sidecars: numbers per step that a learning rule computed

Numbers are zero-padded so that the order of keys is the order of numbers. The key of an episode carries
what recovery needs (actor, sequence, steps, content hash): a listing alone rebuilds the index.
"""

import re
from dataclasses import dataclass

from sop.core.episode import ACTOR_ID
from sop.core.errors import InvalidRecord

RUN = "run.json"
EPISODES = "episodes"
DEMONSTRATIONS = "demonstrations"
POLICIES = "policies"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
INDEX = "index"
QUARANTINE = "quarantine"
SCREENED = "screened"
LABELS = "labels"
CHANNELS = "channels"
LEASES = "leases"
LAB_ACTOR = "lab-"
"""Actor ids with this prefix recorded the demonstrations that were there before the fleet started."""
BASE_ACTOR = "base-"
"""Actor ids with this prefix recorded rollouts of the base policy before the fleet started; nobody corrected them."""

_EPISODE_KEY = re.compile(
    rf"(?P<folder>{EPISODES}|{DEMONSTRATIONS})/(?P<actor_id>{ACTOR_ID})/"
    r"(?P<sequence>[0-9]{8})-(?P<steps>[0-9]{5,9})-(?P<hash>[0-9a-f]{32})\.arrow"
)
_SEGMENT_KEY = re.compile(
    rf"{INDEX}/(?P<labels>[0-9a-f]{{32}})/(?P<first>[0-9]{{10}})-(?P<count>[0-9]{{5}})-(?P<hash>[0-9a-f]{{32}})\.arrow"
)


@dataclass(frozen=True, slots=True)
class EpisodeKey:
    """What the key of an episode says. `str(key)` is the key; `EpisodeKey.parse` is its inverse."""

    folder: str
    """`episodes` (online) or `demonstrations` (offline)."""
    actor_id: str
    sequence: int
    num_steps: int
    episode_id: str
    """Content hash: 32 hexadecimal digits."""

    def __str__(self) -> str:
        return f"{self.folder}/{self.actor_id}/{self.sequence:08d}-{self.num_steps:05d}-{self.episode_id}.arrow"

    @classmethod
    def parse(cls, key: str) -> "EpisodeKey":
        """Read a key.

        Raises:
            InvalidRecord: the text is not the key of an episode.
        """
        match = _EPISODE_KEY.fullmatch(key)
        if match is None:
            raise InvalidRecord("key", f"not the key of an episode: {key!r}")
        return cls(match["folder"], match["actor_id"], int(match["sequence"]), int(match["steps"]), match["hash"])


@dataclass(frozen=True, slots=True)
class SegmentKey:
    """What the key of a segment of the index says. `str(key)` is the key; `SegmentKey.parse` is its inverse."""

    labels: str
    """What the window starts depend on: 32 hexadecimal digits."""
    first: int
    """Its first row."""
    count: int
    """Its number of rows."""
    content_hash: str
    """32 hexadecimal digits."""

    def __str__(self) -> str:
        return f"{INDEX}/{self.labels}/{self.first:010d}-{self.count:05d}-{self.content_hash}.arrow"

    @classmethod
    def parse(cls, key: str) -> "SegmentKey":
        """Read a key.

        Raises:
            InvalidRecord: the text is not the key of a segment.
        """
        match = _SEGMENT_KEY.fullmatch(key)
        if match is None:
            raise InvalidRecord("key", f"not the key of a segment of the index: {key!r}")
        return cls(match["labels"], int(match["first"]), int(match["count"]), match["hash"])


def before_fleet(actor_id: str) -> bool:
    """Whether an actor recorded what was there before the fleet started: demonstrations, or base rollouts."""
    return actor_id.startswith((LAB_ACTOR, BASE_ACTOR))


def from_lab(key: str) -> bool:
    """Whether the episode under a key was there before the fleet started."""
    return before_fleet(key.split("/")[1])


def policy_folder(version: int) -> str:
    """Folder of a published policy."""
    return f"{POLICIES}/{version:08d}"


def policy_manifest(version: int) -> str:
    """Key of a published policy's manifest: written last, so a policy without one does not exist."""
    return f"{policy_folder(version)}/manifest.json"


def policy_signature(version: int) -> str:
    """Key of the signed statement about a published policy: written before the manifest that it names."""
    return f"{policy_folder(version)}/signature.json"


def channel_state(channel: str, sequence: int) -> str:
    """Key of a signed state of a channel."""
    return f"{CHANNELS}/{channel}/{sequence:08d}.json"


def policy_weights(version: int) -> str:
    """Key of a published policy's tensors."""
    return f"{policy_folder(version)}/weights.safetensors"


def policy_lineage(version: int) -> str:
    """Key of what a published policy learned since its parent."""
    return f"{policy_folder(version)}/lineage.arrow.zst"


def checkpoint_folder(learner_step: int) -> str:
    """Folder of a learner's checkpoint."""
    return f"{CHECKPOINTS}/{learner_step:08d}"


def evaluation(version: int, name: str) -> str:
    """Key of the result of an evaluation called `name` of a policy version."""
    return f"{EVALUATIONS}/{version:08d}/{name}.json"


def quarantine(key: str) -> str:
    """Key of the note that says why the object under `key` was refused."""
    return f"{QUARANTINE}/{key}.json"


def screened(key: str) -> str:
    """Key of the note that says why the episode under `key` is not learned from."""
    return f"{SCREENED}/{key}.json"


def sidecar(algorithm: str, version: int, episode_id: str) -> str:
    """Key of the numbers that a version of an algorithm's model gave to the steps of an episode."""
    return f"{LABELS}/{algorithm}/{version:04d}/{episode_id}.arrow"


def version_of(key: str) -> int:
    """Number in the second part of a key of a policy, checkpoint or evaluation."""
    return int(key.split("/")[1])
