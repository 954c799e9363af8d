"""Which frames a fit sees: every step with a target, drawn so that no task and no outcome is forgotten.

Shapes: N draws, T steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sop.core.errors import RunError
from sop.core.experience import StoredEpisode
from sop.values.returns import ends_in_success


@dataclass(frozen=True, slots=True)
class Frames:
    """References to N steps with their targets."""

    episode: npt.NDArray[np.int64]
    """[N] position of the episode in the list that was given."""
    step: npt.NDArray[np.int64]
    """[N] step of the episode."""
    target: npt.NDArray[np.float32]
    """[N] normalised return, finite."""

    def __len__(self) -> int:
        return len(self.step)


class FrameTable:
    """All steps that have a target, in groups: task, and within it whether the step led to success.

    A draw takes every task equally often, within it every group that is not empty with equal probability, within
    that every step (of whatever episode) with equal probability. Nothing is decoded here.

    Args:
        episodes: read once, in order.
        targets: [T] per episode, NaN where a step has none.
        balance_outcomes: False makes one group per task.

    Raises:
        RunError: no step has a target.
    """

    def __init__(
        self, episodes: Sequence[StoredEpisode], targets: Sequence[npt.NDArray[np.float32]], *, balance_outcomes: bool
    ) -> None:
        found: dict[str, dict[bool, list[Frames]]] = {}
        for index, (episode, target) in enumerate(zip(episodes, targets, strict=True)):
            good = ends_in_success(episode) if balance_outcomes else np.zeros(len(target), np.bool_)
            for success in (True, False):
                step = np.flatnonzero(np.isfinite(target) & (good == success))
                if step.size:
                    frames = Frames(np.full(step.size, index), step, target[step])
                    found.setdefault(episode.task, {}).setdefault(success, []).append(frames)
        if not found:
            raise RunError(
                f"value function: none of {len(episodes)} episodes has a step to learn from: "
                "aborted episodes and people's steps have no return; record episodes with an outcome"
            )
        self._tasks = [
            [_join(found[task][success]) for success in sorted(found[task], reverse=True)] for task in sorted(found)
        ]

    def __len__(self) -> int:
        return sum(len(group) for groups in self._tasks for group in groups)

    def draw(self, count: int, generator: np.random.Generator) -> Frames:
        """`count` steps with replacement; tasks differ by at most one in how often they are drawn."""
        task = generator.permutation(len(self._tasks))[np.arange(count) % len(self._tasks)]
        episode, step = np.empty(count, np.int64), np.empty(count, np.int64)
        target = np.empty(count, np.float32)
        for row in range(count):
            groups = self._tasks[task[row]]
            group = groups[generator.integers(len(groups))]
            pick = generator.integers(len(group))
            episode[row], step[row], target[row] = group.episode[pick], group.step[pick], group.target[pick]
        return Frames(episode, step, target)


def _join(parts: list[Frames]) -> Frames:
    return Frames(
        np.concatenate([part.episode for part in parts]),
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.target for part in parts]),
    )
