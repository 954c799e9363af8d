"""What happened between the base policy and the fleet: rollouts of the base, a value function, the indicator.

Only for runs whose algorithm asks for it; everything is read from base rollouts, timing and the learner's metrics.
"""

from typing import Any

from sop.core.episode import Outcome
from sop.core.evaluation import wilson_interval
from sop.report.record import EpisodeFacts, Line, RunRecord

PHASES = ("base rollouts", "warm-up")
"""Phases of a run that only such an algorithm has."""


def advantage_numbers(record: RunRecord) -> dict[str, Any] | None:
    """The block `recap` of a summary; None when the algorithm has neither base rollouts nor a value function.

    Also of other rules that learn from advantages: `metrics` has the last values of the learner's lines that begin
    with the algorithm's name, `value/` or `warmup/`.
    """
    algorithm = None if record.run is None else record.run.config.get("algorithm")
    metrics = last_values(record.learner, (f"{algorithm}/", "value/", "warmup/"))
    if not metrics and not record.base_rollouts:
        return None
    wall_s = record.timing.get("wall_s") or {}
    return {
        "base_rollouts": _rollouts(record),
        "wall_minutes": {phase: wall_s[phase] / 60 for phase in PHASES if phase in wall_s},
        "warmup": {name: metrics.get(f"warmup/{name}") for name in ("separation", "null_loss", "base_loss")},
        "per_task": {
            task: {
                name: metrics.get(f"{algorithm}/{name}/{task}")
                for name in ("threshold", "positive_share", "offline_threshold", "offline_positive_share")
            }
            for task in record.fleet_tasks
        },
        "metrics": metrics,
    }


def last_values(lines: list[Line], prefixes: tuple[str, ...]) -> dict[str, float]:
    """Name -> its last value that was finite, of the metrics that begin with one of these."""
    found: dict[str, float] = {}
    for line in lines:
        found |= {name: value for name, value in line.items() if name.startswith(prefixes) and value is not None}
    return dict(sorted(found.items()))


def _rollouts(record: RunRecord) -> dict[str, Any]:
    ended = [episode for episode in record.base_rollouts if not episode.aborted]
    steps = sum(episode.num_steps for episode in record.base_rollouts)
    hz = None if record.run is None else record.run.embodiment.control_hz
    reset_s = float(record.setting("fleet", "reset_s") or 0)
    return {
        **_success(ended),
        "per_task": {task: _success([one for one in ended if one.task == task]) for task in record.fleet_tasks},
        "robot_minutes": None if hz is None else (steps / hz + reset_s * len(record.base_rollouts)) / 60,
    }


def _success(episodes: list[EpisodeFacts]) -> dict[str, Any]:
    successes = sum(episode.outcome is Outcome.SUCCESS for episode in episodes)
    return {
        "episodes": len(episodes),
        "successes": successes,
        "success": successes / len(episodes) if episodes else None,
        "interval": list(wilson_interval(successes, len(episodes))) if episodes else None,
    }
