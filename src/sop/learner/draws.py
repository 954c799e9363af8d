"""The draw log: what the weights learned from since the policy that is in the store; becomes a version's lineage."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sop.buffer import EpisodeIndex, IngestedEpisode
from sop.core.experience import Batch, Windows
from sop.core.lineage import LearnedEpisode, Lineage, StepDraw

MAX_ARRIVALS = 10_000
"""Episodes that wait for their first draw and whose way here is remembered; of older ones the stamps are lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedBatch:
    """What is noted of a batch whose payload several ranks had; fields as in `Batch`."""

    windows: Windows
    loss_weight: npt.NDArray[np.float32]
    advantage_indicator: npt.NDArray[np.int8] | None
    label_version: int
    policy_version: npt.NDArray[np.int64]
    content_hash: str
    """`sop.core.experience.shared_hash` of the parts."""


class _Arrival(NamedTuple):
    """What the index does not keep of an episode on its way to its first draw."""

    spooled_utc_ns: int | None
    uploaded_utc_ns: int | None
    operators: tuple[str, ...]


def _opinions(batch: Batch | LearnedBatch) -> dict[str, Any]:
    """The labels of a batch as fields of `StepDraw`, when they cannot be computed again."""
    if not batch.label_version:
        return {}
    indicator = batch.advantage_indicator
    return {
        "label_version": batch.label_version,
        "loss_weight": batch.loss_weight.copy(),
        "advantage_indicator": None if indicator is None else indicator.copy(),
    }


class DrawLog:
    """Notes every draw. The learner's use of it:

        log.arrived(row, episode)                  # indexed
        fresh = log.drawn(step, batch)             # learned from
        publisher.publish(weights, facts, log.hand_over())
        log.forget(published_step)                 # before a checkpoint: versions in the store tell it from here on
        arrays = log.arrays()

    Not thread-safe: the learner owns it. Costs about a microsecond per window.

    Args:
        index: names the episodes that windows refer to.
        utc_ns: UTC nanoseconds.
    """

    def __init__(self, index: EpisodeIndex, utc_ns: Callable[[], int] = time.time_ns) -> None:
        self._index = index
        self._utc_ns = utc_ns
        self._arrivals: dict[int, _Arrival] = {}
        self._seen = np.zeros(1024, np.bool_)
        self._draws: list[StepDraw] = []
        self._learned: list[LearnedEpisode] = []
        self._handed_over_step = -1

    def arrived(self, row: int, episode: IngestedEpisode) -> None:
        """An episode in which windows start got a row of the index; of others no draw will ever come."""
        operators = tuple(sorted({mark.operator for mark in episode.encoded.interventions}))
        self._arrivals[row] = _Arrival(episode.spooled_utc_ns, episode.uploaded_utc_ns, operators)
        if len(self._arrivals) > MAX_ARRIVALS:
            del self._arrivals[next(iter(self._arrivals))]

    def drawn(self, learner_step: int, batch: Batch | LearnedBatch) -> list[LearnedEpisode]:
        """A step learned from a batch; returns the episodes that no step before had drawn from."""
        rows = batch.windows.episode
        keys = tuple(self._index.keys(rows))
        self._draws.append(
            StepDraw(
                learner_step=learner_step,
                keys=keys,
                starts=batch.windows.start.copy(),
                batch_hash=batch.content_hash,
                **_opinions(batch),
            )
        )
        self._grow(int(rows.max()) + 1)
        new = np.unique(rows[~self._seen[rows]])
        self._seen[new] = True
        learned = [self._learn(int(row), learner_step) for row in new]
        self._learned += learned
        return learned

    def hand_over(self) -> Lineage:
        """What was drawn since the last call: the lineage of the snapshot that is published now."""
        after = self._handed_over_step
        lineage = Lineage(
            draws=tuple(draw for draw in self._draws if draw.learner_step > after),
            learned=tuple(episode for episode in self._learned if episode.learner_step > after),
        )
        if self._draws:
            self._handed_over_step = self._draws[-1].learner_step
        return lineage

    def forget(self, published_step: int) -> None:
        """Versions up to this learner step are in the store with their lineage."""
        self._draws = [draw for draw in self._draws if draw.learner_step > published_step]
        self._learned = [episode for episode in self._learned if episode.learner_step > published_step]

    def arrays(self) -> dict[str, npt.NDArray[np.uint8]]:
        """The state as bytes: what is not forgotten, and one bit per row of the index (drawn from or not)."""
        self._grow(len(self._index))
        lineage = Lineage(draws=tuple(self._draws), learned=tuple(self._learned)).encode()
        return {"lineage": np.frombuffer(lineage, np.uint8), "seen": np.packbits(self._seen[: len(self._index)])}

    def restore(
        self, arrays: Mapping[str, npt.NDArray[np.uint8]], published_step: int, *, same_rows: bool = True
    ) -> None:
        """Go on where `arrays` were taken.

        Args:
            arrays: the state.
            published_step: learner step of the newest version that the state descends from: what was drawn after
                it belongs to the next version.
            same_rows: the index holds the rows that it held then; if not, episodes count as new once more.
        """
        self._handed_over_step = published_step
        if "lineage" not in arrays:  # a checkpoint from before there was lineage
            return
        lineage = Lineage.decode(arrays["lineage"].tobytes())
        self._draws, self._learned = list(lineage.draws), list(lineage.learned)
        self.forget(published_step)
        if not same_rows:
            return
        seen = np.unpackbits(arrays["seen"], count=len(self._index)).astype(np.bool_)
        self._grow(len(seen))
        self._seen[: len(seen)] = seen

    def _learn(self, row: int, learner_step: int) -> LearnedEpisode:
        facts, arrival = self._index.row(row), self._arrivals.pop(row, None)
        return LearnedEpisode(
            key=facts.key,
            task=facts.task,
            policy_version=facts.policy_version,
            human_steps=facts.human_steps,
            operators=None if arrival is None else arrival.operators,
            learner_step=learner_step,
            recorded_utc_ns=facts.end_utc_ns,
            spooled_utc_ns=None if arrival is None else arrival.spooled_utc_ns,
            uploaded_utc_ns=None if arrival is None else arrival.uploaded_utc_ns,
            indexed_utc_ns=facts.indexed_utc_ns,
            sampled_utc_ns=self._utc_ns(),
        )

    def _grow(self, size: int) -> None:
        if size > len(self._seen):
            self._seen = np.concatenate((self._seen, np.zeros(max(size - len(self._seen), len(self._seen)), np.bool_)))
