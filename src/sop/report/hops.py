"""The report's picture of freshness: one episode's way to the fleet, with the measured times on its arrows."""

from collections.abc import Mapping
from html import escape
from typing import Any

from sop.core.freshness import HOPS, LEARNED, SAMPLEABLE, STAMPS
from sop.report.words import seconds

Hops = Mapping[str, Mapping[str, float]]
"""Hop -> {p50, p99, count}: seconds."""
PLACES: Mapping[str, str] = {
    "recorded": "episode ends",
    "spooled": "on the robot's disk",
    "uploaded": "in the store",
    "indexed": "may be drawn",
    "sampled": "drawn",
    "published": "in the weights",
    "staged": "verified on a robot",
    "swapped": "a robot acts",
}
"""Stamp -> what it means, in a few words."""
_BOX, _GAP = 92, 52
"""Width of a box and of the room between two, in units of the picture."""
_READING = (
    "Median on each arrow, 99 % below it. The totals: from an episode's end until the learner may draw it, and until "
    "the first robot acts with weights that learned from it. Staging and swapping are counted per robot and policy; a "
    "robot swaps when its running episode ends. Across machines a hop is as good as their clocks."
)


def freshness_section(freshness: Mapping[str, Any]) -> str:
    """HTML: picture, totals, and the hops per task and per robot; empty when nothing was measured."""
    hops: Hops = freshness["hops"]
    if not hops:
        return ""
    totals = [(label, hops[name]) for name, label in _TOTALS.items() if name in hops]
    lines = "".join(f"<tr><td>{label}</td><td>{_times(hop)}</td></tr>" for label, hop in totals)
    return (
        f'<h2>Freshness</h2>\n<p class="quiet">{escape(_READING)}</p>\n{journey(hops)}\n'
        f'<table class="facts">{lines}</table>\n'
        f"{_groups('task', freshness['by_task'])}{_groups('robot', freshness['by_actor'])}"
    )


_TOTALS = {
    SAMPLEABLE: "from an episode's end to the learner's index",
    LEARNED: "from an episode's end to the first robot that has learned from it",
}


def journey(hops: Hops) -> str:
    """The way as an inline SVG: a box per stamp, an arrow per hop with its median and 99 % point."""
    parts = []
    for number, stamp in enumerate(STAMPS):
        x = number * (_BOX + _GAP)
        words = PLACES[stamp].split(" ")
        middle = (len(words) + 1) // 2
        rows = [" ".join(words[:middle]), " ".join(words[middle:])]
        parts.append(f'<rect x="{x}" y="30" width="{_BOX}" height="40" rx="6" class="box"/>')
        for row, text in enumerate(rows):
            parts.append(f'<text x="{x + _BOX / 2}" y="{47 + 14 * row}">{escape(text)}</text>')
        if number < len(HOPS):
            parts.append(_arrow(x + _BOX, hops.get(HOPS[number])))
    return (
        f'<svg viewBox="0 0 {len(STAMPS) * (_BOX + _GAP) - _GAP} 100" role="img" aria-label="hops of an episode" '
        'style="width:100%;height:auto;font:11px sans-serif;text-anchor:middle">'
        "<style>.box{fill:none;stroke:#888}.way{stroke:#888;stroke-width:1.5}.tip{fill:#888}text{fill:currentColor}"
        f"</style>{''.join(parts)}</svg>"
    )


def _arrow(x: float, hop: Mapping[str, float] | None) -> str:
    middle, end = x + _GAP / 2, x + _GAP
    times = ("-", "") if hop is None else (seconds(hop["p50"]), seconds(hop["p99"]))
    return (
        f'<line x1="{x + 2}" y1="50" x2="{end - 6}" y2="50" class="way"/>'
        f'<path d="M{end - 8} 46 L{end - 1} 50 L{end - 8} 54 z" class="tip"/>'
        f'<text x="{middle}" y="42"><tspan font-weight="bold">{times[0]}</tspan></text>'
        f'<text x="{middle}" y="66" opacity="0.7">{times[1]}</text>'
    )


def _groups(title: str, groups: Mapping[str, Hops]) -> str:
    if not groups:
        return ""
    names = [hop for hop in (*HOPS, SAMPLEABLE, LEARNED) if any(hop in hops for hops in groups.values())]
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in (title, *names))
    rows = "".join(
        f"<tr><td>{escape(group)}</td>{''.join(f'<td>{_times(hops.get(name))}</td>' for name in names)}</tr>"
        for group, hops in groups.items()
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _times(hop: Mapping[str, float] | None) -> str:
    return "-" if hop is None else f"{seconds(hop['p50'])} <small>{seconds(hop['p99'])}</small>"
