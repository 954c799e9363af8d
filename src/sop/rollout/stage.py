"""One stage of a trial: from which episodes on it compares, and what it takes over from the stage before.

    channels/canary/<sequence>.json      belongs to the channel's state with the same number

Created once, by the controller that first looks at a state with a candidate. What was recorded before that is not
compared: a control episode counts only when it is concurrent. A crash between state and record costs some episodes.
"""

import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from sop.core import layout
from sop.core.channel import ChannelState
from sop.core.errors import AlreadyExists, InvalidRecord, NotFound
from sop.rollout.comparison import Arms, Comparison, ComparisonState, Limits
from sop.rollout.evidence import EpisodeSource
from sop.transport import ObjectStore

RECORDS = "canary"
"""Folder of the records, beside those of the channels."""
MAX_RECORD_BYTES = 16 << 20
"""Room for the names of 100,000 robots; what is larger is refused unread."""


class StageRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a stage needs beside the episodes."""

    manifest_hash: str
    """Of the candidate."""
    candidate: int
    """Version."""
    stable: int
    """Version."""
    candidate_robots: tuple[str, ...]
    control_robots: tuple[str, ...]
    first: dict[str, int]
    """Robot -> its first sequence number that counts."""
    carried: ComparisonState | None = None
    """What earlier stages of the same trial have shown."""


class Stages:
    """Comparisons of the states with a candidate. Keeps the one of the newest state in memory, as a cache and no more.

    Args:
        store: where the records are.
        episodes: facts of episodes.
        tasks: that are compared.
        limits: what is bet against.
        execution_horizon: steps per inference.
    """

    def __init__(
        self,
        store: ObjectStore,
        episodes: EpisodeSource,
        *,
        tasks: Sequence[str],
        limits: Limits,
        execution_horizon: int,
    ) -> None:
        self._store = store
        self._episodes = episodes
        self._tasks = tuple(tasks)
        self._limits = limits
        self._horizon = execution_horizon
        self._cached: tuple[int, Comparison] | None = None

    def compared(self, state: ChannelState) -> Comparison:
        """The comparison of a state's stage with every episode there is now. Blocks for the store; reads each episode
        once as long as this object lives.

        Raises:
            ValueError: the state has no candidate.
            InvalidRecord: the stage's record is damaged; names its key.
        """
        if self._cached is None or self._cached[0] != state.sequence:
            self._cached = state.sequence, self._begun(self._record(state))
        comparison = self._cached[1]
        self._feed(comparison)
        return comparison

    def _record(self, state: ChannelState) -> StageRecord:
        """The stage's record, made now if nobody has looked at the state before."""
        key = layout.channel_state(RECORDS, state.sequence)
        with contextlib.suppress(NotFound):
            return self._read(key)
        with contextlib.suppress(AlreadyExists):  # another controller was quicker: its record holds
            self._store.put(key, msgspec.json.encode(self._make(state)))
        return self._read(key)

    def _make(self, state: ChannelState) -> StageRecord:
        if state.candidate is None or state.stable is None:
            raise ValueError(f"state {state.sequence} has no candidate: there is nothing to compare")
        before = self._before(state)
        seen: Mapping[str, int] = {}
        if before is not None:
            seen = {robot: progress.next_sequence for robot, progress in before.progress.items()}
        robots = (*state.candidate_robots, *state.control_robots)
        return StageRecord(
            manifest_hash=state.candidate.manifest_hash,
            candidate=state.candidate.version,
            stable=state.stable.version,
            candidate_robots=state.candidate_robots,
            control_robots=state.control_robots,
            first={robot: seen[robot] if robot in seen else self._episodes.next_sequence(robot) for robot in robots},
            carried=None if before is None else before.state(),
        )

    def _before(self, state: ChannelState) -> Comparison | None:
        """The stage before of the same trial, with every episode there is now; None for the first stage."""
        sequence = state.sequence - 1
        if self._cached is not None and self._cached[0] == sequence:
            arms = self._cached[1].arms
            same = state.candidate is not None and arms.candidate == state.candidate.version
            comparison = self._cached[1] if same else None
        else:
            comparison = self._again(state, layout.channel_state(RECORDS, sequence))
        if comparison is not None:
            self._feed(comparison)
        return comparison

    def _again(self, state: ChannelState, key: str) -> Comparison | None:
        try:
            record = self._read(key)
        except NotFound:
            return None
        same = state.candidate is not None and record.manifest_hash == state.candidate.manifest_hash
        return self._begun(record) if same else None

    def _begun(self, record: StageRecord) -> Comparison:
        arms = Arms(
            candidate=record.candidate,
            stable=record.stable,
            canaries=record.candidate_robots,
            controls=record.control_robots,
            first=record.first,
            execution_horizon=self._horizon,
        )
        return Comparison(arms, self._tasks, self._limits, record.carried)

    def _feed(self, comparison: Comparison) -> None:
        for robot, progress in comparison.progress.items():
            for facts in self._episodes.read(robot, progress.next_sequence):
                comparison.add(facts)

    def _read(self, key: str) -> StageRecord:
        """Read a record.

        Raises:
            NotFound: there is none.
            InvalidRecord: too large, or not a record.
        """
        data = self._store.get(key, slice(0, MAX_RECORD_BYTES + 1))
        if len(data) > MAX_RECORD_BYTES:
            raise InvalidRecord(key, f"has more than {MAX_RECORD_BYTES} bytes")
        try:
            return msgspec.json.decode(data, type=StageRecord)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRecord(key, str(error)) from error
