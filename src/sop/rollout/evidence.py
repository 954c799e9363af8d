"""What happened with which version on which robot, from stored episodes, and how two arms of a fleet compare.

    round      canary a    canary b    control c    control d
      0          ep           ep          ep           ep       compared
      1          ep           ep          ep           ep       compared
      2          ep                       ep           ep       waits for canary b

Episodes are compared in rounds: the k-th episode of every robot since the trial began, once all robots have it, in
the order of the robots' names. Not in the order of arrival: there a quick success would overtake a slow failure, and a
test that may be stopped at any moment must not be shown its numbers in an order that depends on them. It also makes
the comparison a function of what is stored: a controller that starts anew comes to the same result. Within the
compared rounds the i-th episode of a task in one arm meets the i-th in the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from sop.core import layout
from sop.core.codec import MAX_EPISODE_BYTES, EncodedEpisode, Header, content_hash
from sop.core.episode import Outcome, SafetyCounts
from sop.core.errors import InvalidRecord
from sop.transport import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFacts:
    """What a canary is judged by: the part of an episode's header that counts."""

    robot: str
    sequence: int
    version: int | None
    task: str
    success: bool | None
    """The policy did it by itself; None for an aborted or unreadable episode, which counts for neither arm."""
    intervened: bool
    """Somebody took over at least once."""
    steps: int
    safety: SafetyCounts | None
    """None: this robot does not count, so nothing is known."""
    end_utc_ns: int


class EpisodeSource(Protocol):
    """Where facts come from, robot by robot, in the order of sequence numbers."""

    def next_sequence(self, robot: str) -> int:
        """The number after the newest stored episode of a robot, 0 without any. Blocks."""
        ...

    def read(self, robot: str, first: int) -> Iterator[EpisodeFacts]:
        """Facts of episodes `first`, `first + 1`, ... as far as there is no gap. Blocks."""
        ...


class StoredEpisodes:
    """`EpisodeSource` of a store: one listing per robot, each episode read once.

    An object that is no readable episode of its robot counts as an episode without outcome and without safety counts.

    Args:
        store: where the run's episodes are.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def next_sequence(self, robot: str) -> int:
        """See `EpisodeSource`."""
        return max((key.sequence for key in self._keys(robot, 0)), default=-1) + 1

    def read(self, robot: str, first: int) -> Iterator[EpisodeFacts]:
        """See `EpisodeSource`."""
        for key in self._keys(robot, first):
            if key.sequence > first:
                return
            if key.sequence == first:
                yield self._facts(key)
                first += 1

    def _keys(self, robot: str, first: int) -> Iterator[layout.EpisodeKey]:
        folder = f"{layout.EPISODES}/{robot}/"
        for key in self._store.keys(folder, after=f"{folder}{first:08d}"):
            try:
                yield layout.EpisodeKey.parse(key)
            except InvalidRecord:
                continue

    def _facts(self, key: layout.EpisodeKey) -> EpisodeFacts:
        header = self._header(key)
        if header is None:
            return EpisodeFacts(
                robot=key.actor_id, sequence=key.sequence, version=None, task="", success=None, intervened=False,
                steps=key.num_steps, safety=None, end_utc_ns=0,
            )  # fmt: skip
        aborted, helped = header.outcome is Outcome.ABORTED, bool(header.interventions)
        return EpisodeFacts(
            robot=key.actor_id,
            sequence=key.sequence,
            version=header.policy_version,
            task=header.task,
            success=None if aborted else header.outcome is Outcome.SUCCESS and not helped,
            intervened=helped,
            steps=key.num_steps,
            safety=header.safety,
            end_utc_ns=header.end_utc_ns,
        )

    def _header(self, key: layout.EpisodeKey) -> Header | None:
        """The header of an episode; None when the object is not what its key says."""
        data = self._store.get(str(key), slice(0, MAX_EPISODE_BYTES + 1))
        try:
            header = EncodedEpisode(data, trusted=False).header
        except InvalidRecord:
            return None
        same = (header.actor_id, header.sequence) == (key.actor_id, key.sequence)
        return header if same and content_hash(data) == key.episode_id else None
