"""A learning rule of one's own: clone the faster half of each task's successes. `python examples/fastest_half.py`"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sop.algorithms import ALGORITHMS, AlgorithmKind, Imitation, make_algorithm
from sop.algorithms.base import demonstration_labels, ignored_labels, is_usable_demonstration
from sop.core.episode import Outcome
from sop.core.experience import Collection, Library, Source, StepLabels, StoredEpisode


@dataclass(frozen=True, slots=True, kw_only=True)
class FastestHalfSettings:
    """Settings of `FastestHalf`."""

    slow_weight: float = 0.05
    """Weight of the slower half: not 0, because a weight that was positive has to stay positive."""


class FastestHalf(Imitation):
    """Demonstrations, and successes that took no longer than the median of their task so far."""

    collection = Collection.ON_POLICY

    def __init__(self, settings: FastestHalfSettings, control_hz: float) -> None:  # noqa: ARG002
        self._slow_weight = settings.slow_weight
        self._steps: dict[str, list[int]] = {}
        self._limits: dict[str, float] = {}
        self._version = 0

    def indexed(self, episode: StoredEpisode, source: Source) -> None:
        """Take note of how long a success took; no label changes yet."""
        if episode.outcome is Outcome.SUCCESS and source is Source.ONLINE:
            self._steps.setdefault(episode.task, []).append(episode.num_steps)

    def refresh(self, learner_step: int, library: Library) -> bool:  # noqa: ARG002
        """The medians of now; whether one has moved."""
        before, self._limits = self._limits, {task: float(np.median(steps)) for task, steps in self._steps.items()}
        moved = self._limits != before
        self._version += moved
        return moved

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        """One segment per run of one controller, so that no window mixes policy and person."""
        if is_usable_demonstration(episode):
            return demonstration_labels(episode.num_steps)
        if episode.outcome is not Outcome.SUCCESS:
            return ignored_labels(episode.num_steps)
        slow = episode.num_steps > self._limits.get(episode.task, np.inf)
        weight = np.full(episode.num_steps, self._slow_weight if slow else 1.0, np.float32)
        segment = np.cumsum(np.diff(episode.controller, prepend=episode.controller[0]) != 0, dtype=np.int32)
        return StepLabels(loss_weight=weight, segment=segment, can_start=weight > 0, label_version=self._version)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        steps = {task: list(numbers) for task, numbers in self._steps.items()}
        return {"steps": steps, "limits": self._limits, "version": self._version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the checkpoint was made."""
        self._steps, self._limits, self._version = dict(state["steps"]), dict(state["limits"]), state["version"]


ALGORITHMS["fastest_half"] = AlgorithmKind(FastestHalfSettings, FastestHalf)

if __name__ == "__main__":
    from sop.testing.contracts.algorithm import ALGORITHM_RULES, CONTROL_HZ

    for rule in ALGORITHM_RULES:
        rule(lambda: make_algorithm("fastest_half", {"slow_weight": 0.1}, CONTROL_HZ))
        print("kept:", rule.__name__.replace("_", " "))
