"""The report's other pictures: each makes PNG bytes of the run's record, or None when there is nothing to show."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sop.metrics import percentile
from sop.report.record import RunRecord, finite, laps, swaps
from sop.report.style import HUMAN, INK, MUTED, POLICY, percent_axis, render, task_color
from sop.report.words import seconds

Picture = Callable[[RunRecord], bytes | None]
_SHARE = "sampler/online_share/"
_SECOND = "#9aa5b1"


def rolling(values: Sequence[float], weights: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """sum(values) / sum(weights) over the last `window` entries (fewer at the beginning) at every entry."""
    sums = []
    for row in (values, weights):
        total = np.concatenate(([0.0], np.cumsum(np.asarray(row, np.float64))))
        end = np.arange(1, len(row) + 1)
        sums.append(total[end] - total[np.maximum(end - window, 0)])
    return np.asarray(sums[0] / sums[1])


def corrections(record: RunRecord) -> bytes | None:
    """Interventions per episode and the human's share of steps, over the fleet's episodes."""
    episodes = record.collected
    if len(episodes) < 2 or record.autonomous:
        return None
    number = np.arange(1, len(episodes) + 1)
    window = min(16, max(4, len(episodes) // 6))
    first = min(window // 2, len(episodes) - 2)
    interventions = [float(len(episode.interventions)) for episode in episodes]
    human, steps = ([float(getattr(e, name)) for e in episodes] for name in ("human_steps", "num_steps"))

    def paint(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.plot(number, interventions, "o", color=HUMAN, ms=3, alpha=0.3, mew=0)
        mean = rolling(interventions, np.ones(len(episodes)).tolist(), window)
        upper.plot(number[first:], mean[first:], color=HUMAN, lw=2.6)
        upper.set_title(f"interventions per episode, mean of the last {window}")
        upper.set_ylim(bottom=0)
        upper.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        share = rolling(human, steps, window)
        lower.fill_between(number[first:], share[first:], color=HUMAN, alpha=0.85, lw=0, label="operator")
        lower.fill_between(number[first:], share[first:], 1, color=POLICY, alpha=0.25, lw=0, label="policy")
        lower.legend(loc="upper right", ncols=2)
        lower.set_title(f"who controlled the robots, share of steps in the last {window} episodes")
        percent_axis(lower)
        lower.set_ylim(0, 1)
        lower.set_xlim(1, len(episodes))
        _episodes(lower)

    return render(4.8, paint)


def shares(record: RunRecord) -> bytes | None:
    """The sampler's online share per task, over learner steps."""
    lines = [line for line in laps(record.learner) if any(name.startswith(_SHARE) for name in line)]
    tasks = [task for task in record.fleet_tasks if finite(lines, _SHARE + task)]
    if len(lines) < 2 or not tasks:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for task in tasks:
            mine = [line for line in lines if line.get(_SHARE + task) is not None]
            axes.step(
                [line["step"] for line in mine], [line[_SHARE + task] for line in mine], where="post",
                color=task_color(record.fleet_tasks, task), lw=2, label=task,
            )  # fmt: skip
        axes.axhline(0.5, color=MUTED, lw=0.8, ls=":")
        percent_axis(axes)
        axes.set_ylabel("share of online data")
        axes.set_xlabel("learner step")
        figure.legend(loc="outside lower center", ncols=2)

    return render(3.4 + 0.22 * ((len(tasks) + 1) // 2), paint)


def staleness(record: RunRecord) -> bytes | None:
    """Versions between the learner and the policy that recorded an episode, and how fast policies reach robots."""
    stale = finite(record.learner, "episode/staleness")
    swapped = finite(swaps(record), "fleet/publish_to_swap_s")
    staged = finite(swaps(record), "fleet/publish_to_staged_s")
    panels: list[Callable[[Any], None]] = []
    if stale:
        panels.append(lambda axes: _paint_staleness(axes, stale))
    if swapped:
        series = [
            ("ready on the robot (staged)", staged, _SECOND),
            ("acting (swapped, between episodes)", swapped, INK),
        ]
        panels.append(lambda axes: _paint_waiting(axes, series, "policies by the time since they were published"))
    return _stacked(panels)


def freshness(record: RunRecord) -> bytes | None:
    """Time from an episode's end on the robot until the learner can draw it."""
    waited = finite(record.learner, "episode/sampleable_s")
    if not waited:
        return None
    title = "episodes by the time from their end to the learner's index"
    return _stacked([lambda axes: _paint_waiting(axes, [("sampleable", waited, INK)], title)])


def training(record: RunRecord) -> bytes | None:
    """The learner's loss and how busy it is, over learner steps."""
    lines = [line for line in laps(record.learner) if line.get("learner/loss") is not None]
    if len(lines) < 2:
        return None
    step = [line["step"] for line in lines]
    loss = finite(lines, "learner/loss")

    def paint(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        upper.plot(step, loss, color=_SECOND, lw=0.9)
        upper.plot(step, rolling(loss, np.ones(len(loss)).tolist(), 10), color=INK, lw=2.4)
        upper.set_title("loss, and its mean over ten laps of about a second")
        upper.set_ylim(bottom=0)
        busy = [line for line in lines if line.get("learner/busy") is not None]
        lower.fill_between(
            [line["step"] for line in busy], [line["learner/busy"] for line in busy], color="#4c9f70", alpha=0.75, lw=0,
            step="pre",
        )  # fmt: skip
        lower.set_title("share of time in which the learner did not wait for a batch")
        percent_axis(lower)
        lower.set_ylim(0, 1.02)
        lower.set_xlabel("learner step")

    return render(4.6, paint)


def _stacked(panels: Sequence[Callable[[Any], None]]) -> bytes | None:
    if not panels:
        return None

    def paint(figure: Figure) -> None:
        for axes, panel in zip(np.ravel(figure.subplots(len(panels), 1)), panels, strict=True):
            panel(axes)

    return render(3.0 * len(panels), paint)


def _paint_staleness(axes: Any, stale: Sequence[float]) -> None:
    number = range(1, len(stale) + 1)
    axes.vlines(number, 0, stale, color=_SECOND, lw=max(0.8, min(3.0, 250 / len(stale))))
    axes.plot(number, stale, "o", color=INK, ms=2.5, mew=0)
    median, high = (percentile(stale, percent) for percent in (50, 99))
    axes.axhline(median, color=POLICY, lw=1.4)
    axes.set_title(f"staleness of every episode, versions (median {median:.0f}, 99 %: {high:.0f})")
    axes.set_xlim(0, len(stale) + 1)
    axes.set_ylim(0, max(stale) + 1)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _episodes(axes)


def _paint_waiting(axes: Any, series: Sequence[tuple[str, Sequence[float], str]], title: str) -> None:
    """Cumulative shares over seconds; the axis ends a little after the 99th percentile."""
    limit = 0.0
    for label, values, color in series:
        if not values:
            continue
        ordered = np.sort(values)
        median, high = percentile(values, 50), percentile(values, 99)
        limit = max(limit, 1.15 * high)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(np.r_[0, ordered, 1e9], np.r_[0, share, 1], where="post", color=color, lw=2.2,
                  label=f"{label}: median {seconds(median)}, 99 % {seconds(high)}")  # fmt: skip
        axes.plot([median, high], [0.5, 0.99], "o", color=color, ms=5, mec="white", mew=0.8)
    axes.set_xlim(0, limit or 1.0)
    percent_axis(axes)
    axes.set_title(title)
    axes.set_xlabel("seconds")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.26), borderaxespad=0, borderpad=0)


def _episodes(axes: Any) -> None:
    axes.set_xlabel("episodes of the fleet")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
