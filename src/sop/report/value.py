"""How good the value function of a run was, measured on episodes that it had not seen.

    the fleet's episodes -> their oldest sidecars (value and realised return per step)
                         -> over all, per task, and the first quarter against the last

A step counts that has both numbers: the policy's own steps, as far as it is known what came of them. Values and
returns are normalised, 0 = success now, -1 = the worst; what one step is worth is read off the returns, which rise by
it from step to step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.core.episode import Outcome
from sop.report.record import EpisodeFacts, RunRecord

VALUE = (
    "value: on the fleet's episodes alone, each valued when it came in; success and failure episodes are those that "
    "nobody corrected; drift: last minus first quarter of the episodes, bias: mean of predicted minus realised; an "
    "error in steps counts a failure as the steps that it costs"
)
_NUMBERS = ("value", "realised")
_AUC = ("auc_start", "auc_middle", "auc_end")


@dataclass(frozen=True, slots=True)
class ValuedSteps:
    """An episode of the fleet with what was predicted and what came of it."""

    facts: EpisodeFacts
    version: int
    """Of the value function."""
    value: npt.NDArray[np.float64]
    """[T] prediction at every step."""
    realised: npt.NDArray[np.float64]
    """[T] normalised return; NaN on a person's steps and where it is not known what came of them."""

    @property
    def success(self) -> bool | None:
        """How the policy ended the episode on its own; None when people took over."""
        return None if self.facts.interventions else self.facts.outcome is Outcome.SUCCESS

    @property
    def counts(self) -> npt.NDArray[np.bool_]:
        """[T] steps with both numbers."""
        return np.asarray(np.isfinite(self.value) & np.isfinite(self.realised))

    def to_success(self) -> npt.NDArray[np.bool_]:
        """[T] whether the policy went on from the step to success without help."""
        good = np.zeros(len(self.realised), np.bool_)
        if self.facts.outcome is Outcome.SUCCESS:
            helped = max((mark.stop for mark in self.facts.interventions), default=0)
            good[helped:] = True
        return good


def valued_episodes(record: RunRecord) -> list[ValuedSteps]:
    """The episodes that have sidecars of a value function, in the order in which they ended."""
    found = []
    for episode in record.collected:
        sidecar = record.sidecars.get(episode.key)
        if sidecar is None or episode.policy_version is None or not set(_NUMBERS) <= sidecar.columns.keys():
            continue
        value, realised = (sidecar.columns[name].astype(np.float64) for name in _NUMBERS)
        valued = ValuedSteps(episode, sidecar.version, value, realised)
        if valued.counts.any():
            found.append(valued)
    return found


def value_numbers(episodes: Sequence[ValuedSteps]) -> dict[str, Any] | None:
    """The block `value` of a summary: JSON values, null where the data cannot tell; None without episodes."""
    if not episodes:
        return None
    tasks = sorted({episode.facts.task for episode in episodes})
    quarter = len(episodes) // 4
    first, last = (_numbers(part) for part in (episodes[:quarter], episodes[len(episodes) - quarter :]))
    return {
        **_numbers(episodes),
        "value_versions": sorted({episode.version for episode in episodes}),
        "per_task": {task: _task_numbers([one for one in episodes if one.facts.task == task]) for task in tasks},
        "drift": {
            "first_quarter": {name: first[name] for name in _DRIFT},
            "last_quarter": {name: last[name] for name in _DRIFT},
            **{name: _difference(last[name], first[name]) for name in ("rank_correlation", "bias")},
        },
    }


_DRIFT = ("rank_correlation", "bias", "num_episodes")


def _numbers(episodes: Sequence[ValuedSteps]) -> dict[str, Any]:
    from sop.values.calibration import ValuedEpisode, calibrate

    valued = [
        ValuedEpisode(
            task=episode.facts.task,
            success=episode.success,
            values=episode.value.astype(np.float32),
            realised=episode.realised.astype(np.float32),
        )
        for episode in episodes
    ]
    found = calibrate(valued, 0)
    names = ("rank_correlation", "pooled_rank_correlation", "calibration_error", "bias", *_AUC)
    return {
        **{name: _known(getattr(found, name)) for name in names},
        "mean_absolute_error_steps": _error_in_steps(episodes),
        "num_episodes": found.num_episodes,
        "num_steps": found.num_steps,
        "num_successes": sum(episode.success is True for episode in episodes),
        "num_failures": sum(episode.success is False for episode in episodes),
    }


def _task_numbers(episodes: Sequence[ValuedSteps]) -> dict[str, Any]:
    found = _numbers(episodes)
    del found["pooled_rank_correlation"]
    steps = steps_of_one(episodes)
    return {**found, "scale_steps": None if steps is None else round(steps, 1)}


def steps_of_one(episodes: Sequence[ValuedSteps]) -> float | None:
    """Steps that a return of 1 stands for in episodes of one task: 1 / its rise from a step to the next.

    None when no two steps in a row have a return; steps at -1, where returns are cut off, do not count.
    """
    rises = []
    for episode in episodes:
        rise = np.diff(episode.realised)
        rises.append(rise[np.isfinite(rise) & (episode.realised[:-1] > -1) & (rise > 0)])
    together = np.concatenate([np.empty(0), *rises])
    return float(1 / np.median(together)) if len(together) else None


def _error_in_steps(episodes: Sequence[ValuedSteps]) -> float | None:
    """Mean of |predicted - realised| in steps, over the episodes whose steps are known."""
    groups: dict[tuple[str, int], list[ValuedSteps]] = {}
    for episode in episodes:
        groups.setdefault((episode.facts.task, episode.version), []).append(episode)
    errors = []
    for group in groups.values():
        steps = steps_of_one(group)
        if steps is not None:
            errors += [np.abs(one.value - one.realised)[one.counts] * steps for one in group]
    return float(np.concatenate(errors).mean()) if errors else None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _difference(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new - old
