"""How the pictures look: one width (a phone's page), one palette, PNG bytes out. Global settings stay as they are."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

WIDTH_IN = 6.4
"""Text of 12 points stays readable when this is shrunk to the width of a phone."""
DPI = 170
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e6e9ee"
POLICY, HUMAN = "#3f7cac", "#e07a2f"
"""Colours of the controllers; used for nothing else."""
SUCCESS, FAILURE = "#1b8a6b", "#a4243b"
"""Colours of outcomes."""
TASKS = ("#4c9f70", "#8e5ea8", "#c9a227", "#c2476d", "#2a9d9d", "#7d5a3c", "#5b6fd6", "#8a8d91")
"""Colours of tasks, in the order of the run; repeated after the last."""
_STYLE: dict[str, Any] = {
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,  # a task may be called anything, also a$b$
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.6,
}


def render(height_in: float, paint: Callable[[Figure], None]) -> bytes:
    """A picture as PNG: `paint` draws on an empty figure of the common width, in the common style."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained", facecolor="white")
        paint(figure)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=DPI)
    return sink.getvalue()


def task_color(tasks: Sequence[str], task: str) -> str:
    """The colour of a task in every picture of a run."""
    return TASKS[list(tasks).index(task) % len(TASKS)]


def percent_axis(axes: Any) -> None:
    """Let the vertical axis show fractions from 0 to 1 as percentages."""
    axes.set_ylim(-0.02, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
