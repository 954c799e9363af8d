"""The result of an evaluation, as it is stored, and the interval that belongs to a success rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from sop.core.errors import InvalidRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What happened in the evaluation episodes of one task."""

    episodes: int
    successes: int
    robot_s: float
    """Robot time spent, resets included, in seconds."""

    @property
    def success(self) -> float:
        """Share of episodes that succeeded."""
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `success`."""
        return wilson_interval(self.successes, self.episodes)

    @property
    def throughput(self) -> float:
        """Successes per robot-hour, resets included."""
        return 3600 * self.successes / self.robot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """One evaluation of one policy version: no operators, fixed seeds that no training episode uses."""

    version: int | None
    """None for the expert (the ceiling)."""
    name: str
    """`base`, `progress`, `final` or `expert`."""
    first_seed: int
    """Episode i of each task was reset with seed `first_seed + i`."""
    tasks: Mapping[str, TaskResult]
    online_episodes: int
    """Episodes in the online buffer when the version was published."""
    utc_ns: int
    """When the evaluation ended."""
    published_utc_ns: int | None
    """When the version was published."""

    def pooled(self, tasks: tuple[str, ...]) -> TaskResult:
        """The given tasks counted as one."""
        chosen = [self.tasks[task] for task in tasks]
        return TaskResult(
            episodes=sum(result.episodes for result in chosen),
            successes=sum(result.successes for result in chosen),
            robot_s=sum(result.robot_s for result in chosen),
        )

    def to_json(self) -> bytes:
        """JSON bytes as stored."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> "EvaluationResult":
        """Read a stored result.

        Raises:
            InvalidRecord: names the field that is wrong.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRecord("evaluation", str(error)) from error


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); z = 1.96 covers 95 %. (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
