"""How good a value function is: does it rank, is it right on average, does it see failures coming?

Only numpy. Everything is computed on steps that have both a prediction and a realised return (see
`sop.values.returns.returns`), in units of the normalised return: 0.1 is a tenth of the task's scale. An answer that
the data cannot give (e.g. one episode, or no failure) is NaN.

Shapes: M numbers, T steps.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Numbers = npt.ArrayLike


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuedEpisode:
    """One episode with what was predicted and what came of it."""

    task: str
    success: bool | None
    """Whether the policy brought the episode to success; None keeps it out of the AUCs (e.g. people took over)."""
    values: npt.NDArray[np.float32]
    """[T] predictions."""
    realised: npt.NDArray[np.float32]
    """[T] normalised returns, NaN where a step has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPoint:
    """One bin of steps with similar predictions, all from successes or all from others."""

    success: bool | None
    """Of the episodes, see `ValuedEpisode`."""
    predicted: float
    """Mean prediction."""
    realised: float
    """Mean realised return."""
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The quality of one version of a value function on some episodes."""

    rank_correlation: float
    """Spearman's, per task, averaged with the tasks' numbers of steps as weights."""
    pooled_rank_correlation: float
    """Spearman's over all steps at once: also counts that the tasks are told apart."""
    calibration_error: float
    """`calibration_error` over all steps, ten bins."""
    bias: float
    """Mean of predicted minus realised: above 0 = too optimistic."""
    auc_start: float
    """Chance that a success is valued above a failure of the same task, at the first step; .5 = no idea."""
    auc_middle: float
    """The same at the middle step."""
    auc_end: float
    """The same at the last step."""
    points: tuple[CalibrationPoint, ...]
    """For the plot: ten equal-count bins of the prediction per kind of episode, in ascending order."""
    tasks: Mapping[str, float]
    """Task -> rank correlation."""
    num_episodes: int
    """With at least one step that counts."""
    num_steps: int
    value_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How a value function does on newer episodes against older ones; 0 = as before."""

    bias: float
    """Change of the mean of predicted minus realised: below 0 = the policy outgrew the values."""
    rank_correlation: float
    """Change of the rank correlation: below 0 = it ranks worse than it did."""


def rank_correlation(predicted: _Numbers, realised: _Numbers) -> float:
    """Spearman's correlation of M pairs, average ranks for ties; pairs with a value that is not finite do not count.

    NaN when fewer than 2 pairs are left or when either side is constant.
    """
    pairs = _finite_pairs(predicted, realised)
    ranks = [_ranks(side) - (len(side) + 1) / 2 for side in pairs]
    power = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / power if power > 0 else math.nan


def calibration_error(predicted: _Numbers, realised: _Numbers, num_bins: int = 10) -> float:
    """Mean of |mean predicted - mean realised| over bins of equal count along the prediction, weighted by count.

    The expected calibration error (Naeini et al. 2015) for a regression. With fewer pairs than bins each pair is a
    bin; NaN without any. Pairs with a value that is not finite do not count.

    Raises:
        ValueError: `num_bins` is below 1.
    """
    left, right = _finite_pairs(predicted, realised)
    if not len(left):
        return math.nan
    return sum(len(rows) * abs(float(left[rows].mean() - right[rows].mean())) for rows in _bins(left, num_bins)) / len(
        left
    )


def separation(success_scores: _Numbers, failure_scores: _Numbers) -> float:
    """AUC: the chance that a random success has a higher score than a random failure, ties count half.

    NaN when either side is empty.
    """
    above, pairs = _wins(np.asarray(success_scores, np.float64), np.asarray(failure_scores, np.float64))
    return above / pairs if pairs else math.nan


def calibrate(episodes: Sequence[ValuedEpisode], value_version: int) -> Calibration:
    """Measure the predictions of one version against what came of the episodes.

    AUCs compare within a task and are averaged with the number of pairs as weights; start, middle and end are those
    of the steps that count, in an episode that people corrected the policy's.

    Raises:
        ValueError: an episode's values and returns differ in length.
    """
    counted = [counted for episode in episodes if len((counted := _counting_steps(episode)).values)]
    predicted = np.concatenate([np.empty(0), *(episode.values for episode in counted)])
    realised = np.concatenate([np.empty(0), *(episode.realised for episode in counted)])
    tasks, weights = {}, {}
    for task in sorted({episode.task for episode in counted}):
        mine = [episode for episode in counted if episode.task == task]
        values = np.concatenate([episode.values for episode in mine])
        tasks[task] = rank_correlation(values, np.concatenate([episode.realised for episode in mine]))
        if math.isfinite(tasks[task]):
            weights[task] = len(values)
    ranked = sum(tasks[task] * count for task, count in weights.items()) / sum(weights.values()) if weights else None
    return Calibration(
        rank_correlation=math.nan if ranked is None else ranked,
        pooled_rank_correlation=rank_correlation(predicted, realised),
        calibration_error=calibration_error(predicted, realised),
        bias=float((predicted - realised).mean()) if len(predicted) else math.nan,
        auc_start=_separation_at(counted, 0.0),
        auc_middle=_separation_at(counted, 0.5),
        auc_end=_separation_at(counted, 1.0),
        points=_points(counted),
        tasks=tasks,
        num_episodes=len(counted),
        num_steps=len(predicted),
        value_version=value_version,
    )


def drift(reference: Calibration, newest: Calibration) -> Drift:
    """What changed from the reference (e.g. the episodes of the fit) to the newest episodes; NaN where unknown."""
    return Drift(
        bias=newest.bias - reference.bias,
        rank_correlation=newest.rank_correlation - reference.rank_correlation,
    )


def _counting_steps(episode: ValuedEpisode) -> ValuedEpisode:
    if episode.values.shape != episode.realised.shape:
        raise ValueError(f"{episode.task}: {episode.values.shape} values and {episode.realised.shape} returns")
    values, realised = _finite_pairs(episode.values, episode.realised)
    return ValuedEpisode(
        task=episode.task,
        success=episode.success,
        values=values.astype(np.float32),
        realised=realised.astype(np.float32),
    )


def _separation_at(episodes: Sequence[ValuedEpisode], share: float) -> float:
    scores: dict[str, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for episode in episodes:
        if episode.success is not None:
            at = round(share * (len(episode.values) - 1))
            scores[episode.task][episode.success].append(float(episode.values[at]))
    wins = [_wins(np.asarray(both[True]), np.asarray(both[False])) for both in scores.values()]
    pairs = sum(count for _, count in wins)
    return sum(above for above, _ in wins) / pairs if pairs else math.nan


def _points(episodes: Sequence[ValuedEpisode], num_bins: int = 10) -> tuple[CalibrationPoint, ...]:
    points = []
    for success in (True, False, None):
        mine = [episode for episode in episodes if episode.success is success]
        predicted = np.concatenate([np.empty(0), *(episode.values for episode in mine)])
        realised = np.concatenate([np.empty(0), *(episode.realised for episode in mine)])
        points += [
            CalibrationPoint(
                success=success,
                predicted=float(predicted[rows].mean()),
                realised=float(realised[rows].mean()),
                num_steps=len(rows),
            )
            for rows in _bins(predicted, num_bins)
        ]
    return tuple(points)


def _bins(values: npt.NDArray[np.float64], num_bins: int) -> list[npt.NDArray[np.int64]]:
    """Rows in ascending order of their value, in `num_bins` parts whose sizes differ by at most 1; none is empty."""
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    return [part for part in np.array_split(np.argsort(values, kind="stable"), num_bins) if len(part)]


def _finite_pairs(left: _Numbers, right: _Numbers) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(f"needs two lists of equal length, got {left.shape} and {right.shape}")
    both = np.isfinite(left) & np.isfinite(right)
    return left[both], right[both]


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1, 2, ... in ascending order; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return shared


def _wins(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> tuple[float, int]:
    """How many of all pairs (one of each) the first side wins, ties count half (Mann and Whitney); number of pairs."""
    ranks = _ranks(np.concatenate((above, below)))
    return float(ranks[: len(above)].sum()) - len(above) * (len(above) + 1) / 2, len(above) * len(below)
