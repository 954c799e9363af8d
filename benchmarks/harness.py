"""What every benchmark shares: the header of its result, its table, the clock, and the processes that it starts.

A benchmark is a command (`.venv/bin/python benchmarks/<name>.py [--quick]`). It measures our code and its floor or peer
in the same run, repeats, reports medians and ratios, prints a table and writes `runs/bench/<name>.json`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sop.provenance import cpu_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "runs" / "bench"
PACKAGES = ("sop", "numpy", "torch", "pyarrow", "safetensors", "simplejpeg", "blake3", "numba", "zstandard", "grpcio")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has: `--quick`, `--repeats`, `--out`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, under 50 s, the same keys")
    parser.add_argument("--repeats", type=int, help="repeats of each measurement (default: 5, quick: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the result (default: {RESULTS})")
    return parser


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def medians(work: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of each measurement. They take turns (a, b, a, b, ...), so that a noisy neighbour hits all alike.

    Args:
        work: name -> measurement; returns seconds (or whatever is measured). The first round warms up and is dropped.
        repeats: rounds that count.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, measure in work.items():
            value = measure()
            if turn:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def write_result(name: str, values: Mapping[str, Any], options: argparse.Namespace) -> Path:
    """Write `<out>/<name>.json`, whole: the values, and under `about` hardware, versions, commit and load."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = Path(options.out) / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**values, "about": about(options)}, indent=2, allow_nan=False) + "\n")
    part.replace(path)
    return path


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "quick": options.quick,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
    }


def commit() -> str:
    """Commit of this checkout, with `+` when files differ from it; empty outside of a checkout."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers are rounded to three significant digits."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(width=140).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
