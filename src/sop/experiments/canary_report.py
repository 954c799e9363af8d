"""`summary.json`, `table.md` and `canary.png` of the canary experiment."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.figure import Figure

from sop.provenance import code_version
from sop.report.style import render

METHOD = (
    "One process, simulated time, no pacing. The five candidates really act: toy robots, the debug preset's kind of "
    "policy trained here, the actor's control loop, the safety gate with limits (1.8 times the expert's velocity), "
    "encoded episodes in a directory store, states signed and verified. Faults are code around the same good weights; "
    "the one that is not finite counts its planned steps, so the replay has to be longer than an episode. Robots in no "
    "arm are not simulated, an immediate order reaches a robot at the end of its episode, and a stopped robot is "
    "cleared after two minutes. For the promotions, robots' episodes are drawn with replacement from pools of really "
    "acted episodes of each policy, so a policy's true success is its pool's; controller, tests, stages and signed "
    "states are the real ones. The offline gate measures inference in processor time: this machine is shared. "
    "A good policy loses less than the margin on every task of its pool; others are left out before any trial."
)


def write_report(summary: dict[str, Any], out: Path) -> dict[str, Any]:
    """Judge and write the three files; returns the summary with `passed`, `requirements` and `folder`."""
    trials = summary["promotions"]["trials"]
    promoted = [trial for trial in trials if trial["promoted"]]
    episodes = [trial["episodes"] for trial in promoted]
    summary["promotions"]["episodes"] = _spread(episodes)
    summary["promotions"]["both_arms"] = _spread([one["episodes"] + one["control_episodes"] for one in promoted])
    summary["promotions"]["hours"] = _spread([trial["seconds"] / 3600 for trial in promoted])
    summary["promotions"]["promoted"] = len(promoted)
    summary["promotions"]["undecided"] = sum("undecided" in trial["why"] for trial in trials)
    summary["promotions"]["false_rollbacks"] = sum(trial["rolled_back"] for trial in trials)
    summary["requirements"] = _requirements(summary)
    summary["passed"] = all(summary["requirements"].values())
    summary["experiment"], summary["method"], summary["code"] = "canary", METHOD, code_version()
    (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    (out / "table.md").write_text(table(summary))
    (out / "canary.png").write_bytes(paint(summary))
    return summary | {"folder": out}


def table(summary: Mapping[str, Any]) -> str:
    """The table for the documentation, Markdown."""
    header = ["candidate", "caught by", "its episodes", "robots", "failures beyond control", "until the end", "back in"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, trial in summary["candidates"].items():
        caught = trial["offline_gate"] or ("promoted: " if trial["promoted"] else "") + trial["why"]
        back = "-" if trial["back_s"] is None else f"{trial['back_s']:.0f} s"
        beyond = f"{trial.get('failures_beyond_control', 0):g}"
        hours = f"{trial['seconds'] / 3600:.1f} h"
        cells = [name, caught, str(trial["episodes"]), str(trial["robots"]), beyond, hours, back]
        lines.append("| " + " | ".join(cells) + " |")
    told = summary["promotions"]
    found = told["episodes"]
    good = (
        f"{len(told['trials'])} good promotions: {told['promoted']} promoted, {told['undecided']} withdrawn undecided, "
        f"{told['false_rollbacks']} false rollbacks; episodes of the candidate per promotion: median "
        f"{found['median']:g}, {found['least']:g} to {found['most']:g}. Left out: {', '.join(told['left_out']) or '-'}."
    )
    stable = ", ".join(f"{task} {100 * rate:.1f} %" for task, rate in summary["stable"].items())
    required = ", ".join(f"{name}: {'yes' if met else 'NO'}" for name, met in summary["requirements"].items())
    lines += ["", good, f"Stable policy: {stable}.", f"Required: {required}.", "", summary["method"], ""]
    return "\n".join(lines)


def paint(summary: Mapping[str, Any]) -> bytes:
    """PNG bytes: episodes until caught, and the candidate's episodes per promotion."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        names = list(summary["candidates"])
        left.barh(names, [summary["candidates"][name]["episodes"] for name in names], color="#3b6fb6")
        left.set_xscale("symlog")
        left.invert_yaxis()
        left.set_xlabel("episodes of the candidate until the trial ended", fontsize=8)
        trials = summary["promotions"]["trials"]
        right.hist([trial["episodes"] for trial in trials if trial["promoted"]], bins=15, color="#3b6fb6")
        right.set_xlabel("episodes of the candidate per promotion", fontsize=8)
        for axes in (left, right):
            axes.tick_params(labelsize=7)

    return render(2.6, draw)


def _requirements(summary: Mapping[str, Any]) -> dict[str, bool]:
    candidates = summary["candidates"].values()
    broken = [trial for trial in candidates if trial["version"] == 4]
    bad = [trial for trial in candidates if trial["version"] not in (4, 5)]
    good = [trial for trial in candidates if trial["version"] == 5]
    return {
        "three caught on the robots": all(trial["rolled_back"] for trial in bad),
        "not a number caught before any robot moved": all(
            "not finite" in trial["offline_gate"] and not trial["robots"] for trial in broken
        ),
        "good one promoted": all(trial["promoted"] for trial in good),
        "no false rollback": summary["promotions"]["false_rollbacks"] == 0,
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"median": 0.0, "least": 0.0, "most": 0.0}
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
