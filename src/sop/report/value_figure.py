"""The picture of a value function: what it predicted against what came of it, and how its opinion forms.

on the way to success     on the way to failure     x: realised, y: predicted, both normalised returns
all steps                 over an episode
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sop.report.style import FAILURE, INK, MUTED, SUCCESS, render
from sop.report.value import ValuedSteps

VALUE_READING = (
    "Value is 0 when success is there, falls with every step that is still needed, and far more for a failure. Above: "
    "dots are means of equally many steps, bands the middle 80 %. Early on nobody can know how an episode ends, so "
    "good values begin too low in successes and too high in failures; towards the right end they have to come to the "
    "dashed line. Lower left, all steps by their prediction: here dots should lie on the line everywhere, their "
    "distance to it is the calibration error. Lower right: the sooner the lines part, the earlier failures are seen "
    "coming."
)
_BINS = 10
_LOW, _HIGH = 10, 90
_MOMENTS = np.linspace(0, 1, 41)
_Array = npt.NDArray[np.float64]


def value_picture(episodes: Sequence[ValuedSteps]) -> bytes | None:
    """The picture as PNG; None without valued episodes."""
    if not episodes:
        return None
    predicted = np.concatenate([episode.value[episode.counts] for episode in episodes])
    realised = np.concatenate([episode.realised[episode.counts] for episode in episodes])
    good = np.concatenate([episode.to_success()[episode.counts] for episode in episodes])
    corrected = any(episode.success is None for episode in episodes)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(2, 2)
        _paint_outcome(axes[0, 0], realised[good], predicted[good], SUCCESS, "on the way to success")
        title = "to failure or correction" if corrected else "on the way to failure"
        _paint_outcome(axes[0, 1], realised[~good], predicted[~good], FAILURE, title)
        _paint_all(axes[1, 0], realised, predicted)
        _paint_over_time(axes[1, 1], episodes)
        low = min(-1.0, float(predicted.min()))
        for number, panel in enumerate(axes.flat):
            panel.set_ylim(1.03 * low, 0.04)
            panel.set_yticks([-1, -0.75, -0.5, -0.25, 0])
            panel.yaxis.set_major_formatter("{x:g}")
            if number < 3:
                panel.set_xlim(-1.03, 0.04)
                panel.set_xticks([-1, -0.75, -0.5, -0.25, 0])
                panel.xaxis.set_major_formatter("{x:g}")
                panel.tick_params(axis="x", labelsize=10.5)
                panel.set_xlabel("realised return")
            if number != 1:
                panel.set_ylabel("predicted value")

    return render(6.6, paint)


def bins(by: _Array, num_bins: int = _BINS) -> list[npt.NDArray[np.int64]]:
    """Rows in the order of `by`, in parts of equal count (differing by at most 1); none is empty."""
    return [rows for rows in np.array_split(np.argsort(by, kind="stable"), num_bins) if len(rows)]


def _identity(axes: Any) -> None:
    axes.plot([-1, 0], [-1, 0], color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)


def _paint_outcome(axes: Any, realised: _Array, predicted: _Array, color: str, title: str) -> None:
    """Bins along what came: mean and the middle 80 % of the predictions."""
    _identity(axes)
    axes.set_title(title, color=color, fontweight="bold", fontsize=11)
    if not len(realised):
        axes.text(-0.5, -0.2, "no such steps", color=MUTED, ha="center")
        return
    parts = bins(realised)
    x = [realised[rows].mean() for rows in parts]
    spread = [np.percentile(predicted[rows], (_LOW, _HIGH)) for rows in parts]
    axes.fill_between(x, [low for low, _ in spread], [high for _, high in spread], color=color, alpha=0.18, lw=0)
    axes.plot(x, [predicted[rows].mean() for rows in parts], "o-", color=color, ms=4.5, mec="white", mew=0.7)


def _paint_all(axes: Any, realised: _Array, predicted: _Array) -> None:
    """Bins along the prediction: the mean of what came, which the calibration error compares with the prediction."""
    _identity(axes)
    axes.set_title("all steps, by prediction", fontweight="bold", fontsize=11)
    parts = bins(predicted)
    x, y = ([side[rows].mean() for rows in parts] for side in (realised, predicted))
    spread = [np.percentile(realised[rows], (_LOW, _HIGH)) for rows in parts]
    axes.hlines(y, [low for low, _ in spread], [high for _, high in spread], color=INK, alpha=0.25, lw=3)
    axes.plot(x, y, "o", color=INK, ms=5, mec="white", mew=0.7)


def _paint_over_time(axes: Any, episodes: Sequence[ValuedSteps]) -> None:
    axes.set_title("over an episode", fontweight="bold", fontsize=11)
    kinds = (
        (True, "success", SUCCESS, "-"),
        (False, "failure", FAILURE, "-"),
        (None, "corrected", MUTED, (0, (4, 2))),
    )
    for success, name, color, dashes in kinds:
        mine = [course for one in episodes if one.success is success and (course := _course(one)) is not None]
        if not mine:
            continue
        courses = np.stack(mine)
        if success is not None:
            axes.fill_between(_MOMENTS, *np.percentile(courses, (_LOW, _HIGH), axis=0), color=color, alpha=0.15, lw=0)
        axes.plot(_MOMENTS, courses.mean(axis=0), color=color, ls=dashes, lw=2.4 if success is not None else 1.6,
                  label=f"{name} ({len(mine)})")  # fmt: skip
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.set_xticks([0, 0.5, 1])
    axes.set_xlabel("of the episode")
    axes.legend(loc="best", fontsize=9.5, borderaxespad=0.1, handlelength=1.4, labelspacing=0.25)


def _course(episode: ValuedSteps) -> _Array | None:
    """[41] the value from the beginning of an episode to its end."""
    known = np.flatnonzero(np.isfinite(episode.value))
    if not len(known):
        return None
    return np.interp(_MOMENTS * (len(episode.value) - 1), known, episode.value[known])
