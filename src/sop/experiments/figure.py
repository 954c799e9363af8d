"""The experiment in one picture: every row one arm.

success over publishes | D over publishes (log) | success against beta | asked for good, null, asked for bad
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from sop.report.style import INK, MUTED, percent_axis, render, task_color

_GROUPS = ("embed", "text", "control")
_NULL, _BAD = "#9aa5b1", "#c2476d"


def paint_experiment(summary: Mapping[str, Any]) -> bytes:
    """PNG bytes."""
    arms: Mapping[str, Any] = summary["arms"]

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(arms), 4, squeeze=False, sharex="col", sharey="col")
        for row, (name, arm) in enumerate(arms.items()):
            color = task_color(_GROUPS, _group(arm["settings"]))
            _success(axes[row][0], arm, color, summary["base"]["rate"])
            _separation(axes[row][1], arm, color)
            _guidance(axes[row][2], arm, color)
            _branches(axes[row][3], arm, color)
            axes[row][0].set_ylabel(name.replace("-", "\n"), fontsize=8, rotation=0, ha="right", va="center")
            for one in axes[row]:
                one.tick_params(labelsize=7)
        titles = ("success", "D, good (bad dashed)", "success by beta", "good, null, bad")
        for one, title in zip(axes[0], titles, strict=True):
            one.set_title(title, fontsize=8)
        for one, label in zip(axes[-1], ("publish", "publish", "beta", ""), strict=True):
            one.set_xlabel(label, fontsize=8)

    return render(0.95 * len(arms) + 0.7, paint)


def _group(settings: Mapping[str, Any]) -> str:
    return settings["kind"] if settings["kind"] and settings["negatives"] else "control"


def _success(axes: Any, arm: Mapping[str, Any], color: str, base: float) -> None:
    x = [point["publish"] for point in arm["curve"]]
    rates = [point["success"] for point in arm["curve"]]
    axes.fill_between(x, [one["low"] for one in rates], [one["high"] for one in rates], color=color, alpha=0.18, lw=0)
    axes.plot(x, [one["rate"] for one in rates], "o-", color=color, ms=3)
    axes.axhline(base, color=MUTED, lw=0.8, ls=":")
    _publishes(axes)
    _rates(axes)


def _separation(axes: Any, arm: Mapping[str, Any], color: str) -> None:
    known = [point for point in arm["curve"] if point.get("separation", {}).get("mean")]
    if known:
        for measure, style, shade in (("separation", "o-", color), ("separation_negative", "--", _BAD)):
            values = [point[measure]["mean"] or float("nan") for point in known]
            axes.plot([point["publish"] for point in known], values, style, color=shade, ms=3)
    axes.axhline(0.01, color=MUTED, lw=0.8, ls=":")
    axes.set_yscale("log")
    axes.set_ylim(1e-6, 10)
    axes.set_yticks([1e-6, 1e-4, 1e-2, 1], ["1e-6", "1e-4", "0.01", "1"])
    _publishes(axes)


def _guidance(axes: Any, arm: Mapping[str, Any], color: str) -> None:
    found = {float(name.removeprefix("beta ")): one for name, one in arm["conditions"].items() if "beta" in name}
    x = sorted(found)
    _bars(axes, x, [found[beta] for beta in x], color)
    _rates(axes)


def _branches(axes: Any, arm: Mapping[str, Any], color: str) -> None:
    conditions = arm["conditions"]
    shown = [("beta 1", color), ("beta 0", _NULL), ("negative", _BAD)]
    for place, (name, shade) in enumerate(shown):
        if name in conditions:
            _bars(axes, [place], [conditions[name]], shade)
    axes.set_xticks(range(len(shown)), ["+", "null", "-"])
    axes.set_xlim(-0.5, len(shown) - 0.5)
    _rates(axes)


def _bars(axes: Any, x: list[float] | list[int], found: list[Any], color: str) -> None:
    rates = [one["rate"] for one in found]
    low = [max(0.0, one["rate"] - one["low"]) for one in found]
    high = [max(0.0, one["high"] - one["rate"]) for one in found]
    axes.errorbar(x, rates, yerr=[low, high], fmt="o-", color=color, ecolor=INK, elinewidth=0.8, ms=4)


def _publishes(axes: Any) -> None:
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, 1, 4, 16], ["0", "1", "4", "16"])
    axes.minorticks_off()


def _rates(axes: Any) -> None:
    percent_axis(axes)
    axes.set_yticks([0, 0.5, 1.0])
