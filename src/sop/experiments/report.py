"""`summary.json`, `table.md` and `x-ind.png` of an experiment, from the results that are there."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from sop.core.errors import RunError
from sop.experiments.arm import RESULT, Setup, write
from sop.experiments.figure import paint_experiment
from sop.experiments.plan import Plan
from sop.experiments.pooling import compare, pool_arm
from sop.provenance import code_version, cpu_model

SUMMARY, TABLE, FIGURE = "summary.json", "table.md", "x-ind.png"
PACKAGES = ("numpy", "torch", "metaworld", "mujoco")
"""Distributions whose versions are part of a result."""


def write_report(out: Path) -> dict[str, Any]:
    """Pool what is there and write the three files (blocking, may be repeated); returns the summary.

    Raises:
        RunError: no arm has a result.
    """
    setup = Setup.read(out)
    results = {arm: _results(out, setup, arm) for arm in setup.plan.arms}
    arms = {arm: pool_arm(found) for arm, found in results.items() if found}
    if not arms:
        raise RunError(f"{out} has no result of an arm yet")
    jobs = len(setup.plan.arms) * len(setup.streams)
    summary = {
        "experiment": "x-ind",
        "complete": sum(len(found) for found in results.values()) == jobs,
        "plan": msgspec.to_builtins(setup.plan),
        "seeds": sorted(setup.streams),
        "streams": dict(setup.streams),
        **compare(arms),
        "arms": arms,
        "code": code_version(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }
    write(out / SUMMARY, msgspec.json.format(msgspec.json.encode(_plain(summary)), indent=2))
    write(out / TABLE, table(summary, setup.plan).encode())
    write(out / FIGURE, paint_experiment(summary))
    return summary


def table(summary: Mapping[str, Any], plan: Plan) -> str:
    """The table for the documentation, Markdown."""
    betas = [f"beta {beta:g}" for beta in plan.betas if beta not in (0.0, 1.0)]
    header = [
        "arm", "D, start", "D, end", "told apart / noise", "null branch", "asked for good", *betas, "asked for bad",
        "good minus bad, signed advantage", "dip", "publishes to target", "held out",
    ]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, arm in summary["arms"].items():
        first, last, conditions = arm["curve"][0], arm["curve"][-1], arm["conditions"]
        lines.append(
            "| "
            + " | ".join(
                [
                    name,
                    _number(_mean(first, "separation")),
                    _number(_mean(last, "separation")),
                    _ratio(_mean(last, "told_apart"), _mean(last, "noise")),
                    _rate(conditions.get("beta 0")),
                    _rate(conditions.get("beta 1")),
                    *(_rate(conditions.get(beta)) for beta in betas),
                    _rate(conditions.get("negative")),
                    _signed(arm.get("signed_advantage")),
                    _points(arm["dip"]),
                    "-" if arm["time_to_target"] is None else f"{arm['time_to_target']['publish']:g}",
                    _rate(arm["held_out"]),
                ]
            )
            + " |"
        )
    base, count = summary["base"], len(summary["seeds"])
    note = (
        f"Success in per cent with its 95 % interval (Wilson), {count} seed{'s' * (count != 1)} pooled. "
        f"Base policy: {_rate(base)}. Dip: lowest of the publishes 1 to 4 minus publish 0, in points. "
        "Told apart / noise: mean |a(+) - a(-)| of sampled chunks over mean |a(+) - a(+)| under another noise."
    )
    lines += ["", note, ""]
    return "\n".join(lines)


def describe(summary: Mapping[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"base policy            {_rate(summary['base'])}"]
    for name, arm in summary["arms"].items():
        separation = _number(_mean(arm["curve"][-1], "separation"))
        lines.append(f"{name:22s} {_rate(arm['success']):16s} gain {_points(arm['gain']):18s} D {separation}")
    return "\n".join(lines)


def _results(out: Path, setup: Setup, arm: str) -> list[dict[str, Any]]:
    paths = [out / seed / arm / RESULT for seed in sorted(setup.streams)]
    return [msgspec.json.decode(path.read_bytes()) for path in paths if path.exists()]


def _mean(point: Mapping[str, Any], measure: str) -> float | None:
    found: float | None = point.get(measure, {}).get("mean")
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _ratio(first: float | None, second: float | None) -> str:
    return "-" if first is None or not second else f"{first / second:.2f}"


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None or found["rate"] is None:
        return "-"
    return f"{100 * found['rate']:.0f} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _points(found: Mapping[str, Any] | None) -> str:
    if found is None or found["difference"] is None:
        return "-"
    return f"{100 * found['difference']:+.0f} [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"


def _signed(found: Mapping[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "-"
    interval = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['mean']:+.3f}{interval}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """JSON values; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
