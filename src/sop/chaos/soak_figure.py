"""The picture of a soak: success, memory, delays and queues over robot time; grey ticks are strikes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sop.chaos.soak_curve import Hour
from sop.chaos.soak_watch import Look
from sop.report.style import FAILURE, HUMAN, MUTED, POLICY, SUCCESS, TASKS, percent_axis, render

_ROLES = {"learner": TASKS[0], "decode worker": TASKS[1], "actor": TASKS[2], "evaluator": TASKS[3]}
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
"""Labels of logarithmic axes: the common style reads no mathematics."""


def draw(
    looks: Sequence[Look], hours: Sequence[Hour], strikes: Sequence[float], waiting: npt.NDArray[np.int64]
) -> bytes:
    """PNG bytes.

    Args:
        looks: in order.
        hours: in order.
        strikes: robot hours at which something was struck.
        waiting: [len(looks)] episodes that had ended and were not indexed.
    """

    def paint(figure: Figure) -> None:
        success, memory, delay, queues = np.ravel(figure.subplots(4, 1, sharex=True))
        _paint_success(success, hours)
        _paint_memory(memory, looks)
        _paint_delay(delay, hours)
        _paint_queues(queues, looks, waiting)
        for axes in (success, memory, delay, queues) if strikes else ():
            axes.plot(strikes, [0.0] * len(strikes), "|", color=MUTED, ms=7, transform=axes.get_xaxis_transform(),
                      clip_on=False)  # fmt: skip
        queues.set_xlabel("robot time of the fleet, hours")

    return render(10.5, paint)


def _steps(hours: Sequence[Hour]) -> list[float]:
    return [(hour.begin_h + hour.end_h) / 2 for hour in hours]


def _paint_success(axes: Any, hours: Sequence[Hour]) -> None:
    middle = _steps(hours)
    for label, color, interval, good in (
        ("episodes", SUCCESS, [hour.success_interval for hour in hours], [hour.successes for hour in hours]),
        ("without help", POLICY, [hour.alone_interval for hour in hours], [hour.alone for hour in hours]),
    ):
        rate = [number / max(1, hour.episodes) for number, hour in zip(good, hours, strict=True)]
        axes.fill_between(middle, *np.array(interval).reshape(-1, 2).T, color=color, alpha=0.2, lw=0)
        axes.plot(middle, rate, "o-", color=color, ms=3, label=label)
    percent_axis(axes)
    axes.set_title("success per robot hour, 95 % Wilson")
    axes.legend(loc="lower right", ncols=2)


def _paint_memory(axes: Any, looks: Sequence[Look]) -> None:
    lives: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for look in looks:
        for process in look.processes:
            lives.setdefault((process.role, process.pid), []).append((look.robot_s / 3600, process.rss_mb))
    seen = set[str]()
    for (role, _), life in lives.items():
        label = None if role in seen else role
        seen.add(role)
        axes.plot(*np.array(life).T, color=_ROLES[role], lw=1.2, label=label)
    axes.set_ylim(bottom=0)
    axes.set_title("memory (RSS) of every process, MB")
    axes.legend(loc="lower right", ncols=3, fontsize=9)


def _paint_delay(axes: Any, hours: Sequence[Hour]) -> None:
    middle = _steps(hours)
    axes.plot(middle, [hour.indexed_p50_s for hour in hours], color=HUMAN, marker=".", label="end to indexed, median")
    axes.plot(middle, [hour.indexed_p99_s for hour in hours], color=HUMAN, marker=".", ls=":", label="99 %")
    swapped = [(at, hour) for at, hour in zip(middle, hours, strict=True) if hour.swapped_p50_s is not None]
    when = [at for at, _ in swapped]
    median, high = ([getattr(hour, name) for _, hour in swapped] for name in ("swapped_p50_s", "swapped_p99_s"))
    axes.plot(when, median, color=POLICY, marker=".", label="published to swapped, median")
    axes.plot(when, high, color=POLICY, marker=".", ls=":", label="99 %")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.set_title("delays per robot hour, seconds of wall clock")
    axes.legend(loc="best", ncols=2, fontsize=9)


def _paint_queues(axes: Any, looks: Sequence[Look], waiting: npt.NDArray[np.int64]) -> None:
    at = [look.robot_s / 3600 for look in looks]
    axes.plot(at, waiting, color=FAILURE, label="ended, not indexed")
    axes.plot(at, [look.spooled for look in looks], color=MUTED, label="on robots' disks")
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.set_ylim(bottom=0)
    axes.set_title("episodes that wait")
    axes.legend(loc="best", ncols=2, fontsize=9)
