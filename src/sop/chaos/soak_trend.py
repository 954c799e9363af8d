"""Does something grow? A slope that belongs to no restart, with an interval that knows that samples are related.

A process that starts anew begins anew: only two samples of the same lifetime say anything about growth. The slope is
the median of the slopes of all such pairs (Theil 1950, Sen 1968), so that a burst, or a page that was touched late,
moves it little. Neighbouring samples are nearly the same measurement: the interval is a bootstrap over blocks of
neighbours (Kuensch 1989), not over samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 300
MAX_SAMPLES = 240
"""Of all lifetimes together; more are thinned evenly: pairs grow with the square."""
MIN_SAMPLES = 12
"""Fewer say nothing."""
MIN_SPAN = 0.1
"""Share of the looked-at stretch that the longest lifetime has to cover, or restarts have hidden any growth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """How fast something grows."""

    slope: float
    """Per unit of `x`."""
    low: float
    high: float
    """Of 95 % of the resamples."""
    samples: int
    lifetimes: int
    level: float
    """Median of what was looked at."""

    def grows(self, allowance: float) -> bool:
        """Whether it certainly grows faster than is allowed: the whole interval lies above."""
        return self.low > allowance


def find_trend(lifetimes: Sequence[npt.NDArray[np.float64]], *, least: float = 0.0, seed: int = 0) -> Trend | None:
    """The common slope within lifetimes.

    Args:
        lifetimes: one array [n, 2] of (x, y) per process that lived, x ascending.
        least: of x, that the longest lifetime has to cover: a slope is not to be believed far beyond what was seen.
        seed: of the resamples.

    Returns:
        None when there are fewer than MIN_SAMPLES, or no lifetime covers `least` and MIN_SPAN of x.
    """
    kept = [life for life in lifetimes if len(life) > 1]
    if not kept:
        return None
    every = -(-sum(len(life) for life in kept) // MAX_SAMPLES)
    kept = [life[::every] for life in kept]
    x, y = np.concatenate(kept).T
    owner = np.repeat(np.arange(len(kept)), [len(life) for life in kept])
    longest = max(life[-1, 0] - life[0, 0] for life in kept)
    if len(x) < MIN_SAMPLES or longest < max(least, MIN_SPAN * (x.max() - x.min())) or longest <= 0:
        return None
    slopes, first, second = _pairs(x, y, owner)
    blocks = _blocks(owner)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        counts = np.zeros(len(x))
        for block in rng.integers(len(blocks), size=len(blocks)):
            counts[blocks[block]] += 1
        weights = counts[first] * counts[second]
        if weights.any():
            drawn.append(_weighted_median(slopes, weights))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Trend(
        slope=float(np.median(slopes)),
        low=float(low),
        high=float(high),
        samples=len(x),
        lifetimes=len(kept),
        level=float(np.median(y)),
    )


def _pairs(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], owner: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Slopes of all pairs of one lifetime, ascending, and the two samples of each."""
    first, second = np.triu_indices(len(x), 1)
    same = (owner[first] == owner[second]) & (x[second] > x[first])
    first, second = first[same], second[same]
    slopes = (y[second] - y[first]) / (x[second] - x[first])
    order = np.argsort(slopes)
    return slopes[order], first[order], second[order]


def _blocks(owner: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Neighbours of one lifetime: about the square root of all samples per block."""
    size = max(2, round(len(owner) ** 0.5))
    blocks = []
    for life in np.unique(owner):
        mine = np.flatnonzero(owner == life)
        blocks += np.array_split(mine, max(1, round(len(mine) / size)))
    return blocks


def _weighted_median(ordered: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> float:
    total = np.cumsum(weights)
    return float(ordered[np.searchsorted(total, total[-1] / 2)])
