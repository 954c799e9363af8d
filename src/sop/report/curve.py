"""The learning curve: success in evaluation over the time of the fleet."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sop.core.evaluation import EvaluationResult, TaskResult, wilson_interval
from sop.report.record import RunRecord, laps
from sop.report.style import INK, MUTED, percent_axis, render, task_color
from sop.report.words import percent

PAUSE_S = 120.0
"""Longer silence means that the run was stopped and resumed; it is cut out of the time axis."""
_CURVE = ("base", "progress", "final")
_NOTED = ("base", "final")
_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))


class FleetTime:
    """Wall-clock time since the fleet's first episode began, without the time in which the run was stopped.

    Without a fleet it counts from the learner's first lap.

    Args:
        record: moments at which something happened are taken from its episodes, metrics and evaluations.
    """

    def __init__(self, record: RunRecord) -> None:
        trained_s = [line["utc_s"] for line in laps(record.learner)]
        begin_s = min([episode.start_utc_ns / 1e9 for episode in record.episodes] or trained_s, default=None)
        self._ends_s = np.sort([episode.end_utc_ns / 1e9 for episode in record.collected])
        moments = {0.0} if begin_s is None else {begin_s, *(s for s in _moments(record) if s > begin_s)}
        self._utc_s = np.array(sorted(moments))
        gaps = np.diff(self._utc_s)
        gaps[gaps > PAUSE_S] = 0.0
        self._fleet_s = np.concatenate(([0.0], np.cumsum(gaps)))

    def at(self, utc_s: float) -> float:
        """Seconds of the fleet at a moment; 0 before it started."""
        return float(np.interp(utc_s, self._utc_s, self._fleet_s))

    def episode_ends(self) -> list[float]:
        """When the first, second, ... episode ended, seconds of the fleet."""
        return [self.at(end_s) for end_s in self._ends_s]


def _moments(record: RunRecord) -> Iterable[float]:
    for episode in record.episodes:
        yield episode.start_utc_ns / 1e9
        yield episode.end_utc_ns / 1e9
    yield from (line["utc_s"] for line in laps(record.learner))
    yield from (_published_s(result) for result in record.evaluations if result.published_utc_ns is not None)


def _published_s(result: EvaluationResult) -> float:
    return (result.utc_ns if result.published_utc_ns is None else result.published_utc_ns) / 1e9


@dataclass(frozen=True, slots=True)
class _Point:
    at: float
    """Fleet time of publication: seconds, then the unit of the picture."""
    name: str
    tasks: Mapping[str, TaskResult]
    pooled: TaskResult | None


def curve(record: RunRecord) -> bytes | None:
    """The picture as PNG; None when no policy was evaluated."""
    tasks = record.fleet_tasks
    points = _points(record)
    if not points:
        return None
    expert = record.evaluation("expert")
    ceiling = {} if expert is None else dict(expert.tasks)
    rows = (len(tasks) + 1) // 2
    limit_s = max(point.at for point in points)
    unit, unit_s = next((pair for pair in _UNITS if limit_s >= 2 * pair[1]), ("s", 1.0))
    points = [replace(point, at=point.at / unit_s) for point in points]
    top_in = 3.9

    def paint(figure: Figure) -> None:
        grid = figure.add_gridspec(rows + 1, 2, height_ratios=[top_in, *[1.75] * rows])
        axes = figure.add_subplot(grid[0, :])
        _paint_pooled(axes, points, tasks, None if expert is None else _pooled(expert, tasks))
        _episodes_axis(axes, [end_s / unit_s for end_s in FleetTime(record).episode_ends()])
        for number, task in enumerate(tasks):
            panel = figure.add_subplot(grid[1 + number // 2, number % 2], sharex=axes)
            _paint_task(panel, points, task, task_color(tasks, task), ceiling.get(task))
            if number >= len(tasks) - 2:
                panel.set_xlabel(f"fleet time / {unit}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"fleet time / {unit}          thick: all tasks, thin: the tasks below")
        limit = max(limit_s, 1.0) / unit_s
        axes.set_xlim(-0.03 * limit, 1.06 * limit)

    return render(top_in + 1.75 * rows, paint)


def _points(record: RunRecord) -> list[_Point]:
    """One point per evaluated version and set of scenes, the largest evaluation of it, in the order of versions."""
    time = FleetTime(record)
    best: dict[tuple[int, bool], _Point] = {}
    for result in record.evaluations:
        if result.version is None or result.name not in _CURVE:
            continue
        point = _Point(
            0.0 if result.version == 0 else time.at(_published_s(result)),
            result.name,
            {task: outcome for task, outcome in result.tasks.items() if outcome.episodes},
            _pooled(result, record.fleet_tasks),
        )
        key = (result.version, result.name in _NOTED)
        before = best.get(key)
        if before is None or _trials(point.tasks) >= _trials(before.tasks):
            best[key] = point
    return [best[key] for key in sorted(best)]


def _joined(points: Sequence[_Point]) -> list[_Point]:
    """The points that a line joins: progress evaluations share their scenes; base and final have others."""
    progress = [point for point in points if point.name not in _NOTED]
    return progress if len(progress) > 1 else list(points)


def _trials(tasks: Mapping[str, TaskResult]) -> int:
    return sum(outcome.episodes for outcome in tasks.values())


def _pooled(result: EvaluationResult, tasks: tuple[str, ...]) -> TaskResult | None:
    if not tasks or not all(task in result.tasks for task in tasks):
        return None
    pooled = result.pooled(tasks)
    return pooled if pooled.episodes else None


def _paint_pooled(axes: Any, points: Sequence[_Point], tasks: Sequence[str], ceiling: TaskResult | None) -> None:
    for task in tasks:
        mine = [point for point in _joined(points) if task in point.tasks]
        axes.plot(
            [point.at for point in mine],
            [point.tasks[task].success for point in mine],
            color=task_color(tasks, task), lw=1.1, alpha=0.55, marker="o", ms=2,
        )  # fmt: skip
    joined = [(point.at, point.pooled) for point in _joined(points) if point.pooled is not None]
    x = [at for at, _ in joined]
    bounds = [result.interval for _, result in joined]
    axes.fill_between(x, [low for low, _ in bounds], [high for _, high in bounds], color=INK, alpha=0.1, lw=0)
    axes.plot(x, [result.success for _, result in joined], color=INK, lw=3)
    pooled = [(point, point.pooled) for point in points if point.pooled is not None]
    for point, result in pooled:
        large = point.name in _NOTED
        axes.plot(point.at, result.success, "o", color=INK, ms=7 if large else 4, mec="white", mew=0.8)
        if large:
            base = point.name == "base"
            axes.annotate(
                f"{point.name} {percent(result.success)}",
                (point.at, result.success),
                xytext=(8, 9) if base else (6, -30),
                textcoords="offset points",
                ha="left" if base else "right",
                fontweight="bold",
                bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5},
                zorder=4,
            )
    if ceiling is not None:
        _ceiling(axes, ceiling.success)
        axes.text(0.01, ceiling.success + 0.012, f"expert {percent(ceiling.success)}", color=MUTED, fontsize=10.5,
                  ha="left", va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
    percent_axis(axes)
    axes.set_ylim(-0.02, 1.09)
    axes.set_ylabel("success in evaluation")


def _ceiling(axes: Any, success: float) -> None:
    axes.axhline(success, color=MUTED, lw=1, ls=(0, (4, 3)))


def _paint_task(axes: Any, points: Sequence[_Point], task: str, color: str, ceiling: TaskResult | None) -> None:
    mine = [(point, point.tasks[task]) for point in points if task in point.tasks]
    if ceiling is not None and ceiling.episodes:
        _ceiling(axes, ceiling.success)
    line = [(point.at, point.tasks[task].success) for point in _joined(points) if task in point.tasks]
    axes.plot([at for at, _ in line], [success for _, success in line], color=color, lw=1.8)
    for point, result in mine:
        low, high = wilson_interval(result.successes, result.episodes)
        large = point.name in _NOTED
        axes.errorbar(
            point.at, result.success, yerr=[[result.success - low], [high - result.success]], fmt="o",
            ms=5.5 if large else 3.2, color=color, ecolor=color, elinewidth=1.6 if large else 0.8, capsize=0,
        )  # fmt: skip
    axes.set_title(task, color=color, fontweight="bold")
    percent_axis(axes)
    axes.set_yticks([0, 0.5, 1.0])


def _episodes_axis(axes: Any, ended: Sequence[float]) -> None:
    """A second axis on top: how many episodes the fleet had collected by then."""
    if len(ended) < 2:
        return
    counts = [int(count) for count in MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]).tick_values(0, len(ended))]
    counts = [count for count in counts if 0 < count <= len(ended)]
    top = axes.secondary_xaxis("top")
    top.set_xticks([ended[count - 1] for count in counts], [str(count) for count in counts])
    top.tick_params(length=3, labelsize=10.5)
    top.set_xlabel("episodes collected", fontsize=10.5, color=MUTED)
