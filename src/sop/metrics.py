"""Metrics: numbers named `area/name`, written as JSON lines. Standard library only; usable from everywhere.

{"utc_s": 1735689600.0, "step": 25, "learner/loss": 0.031, "sampler/online_share/door-open": 0.62}
"""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol


class MetricSink(Protocol):
    """Where numbers go. Another backend (TensorBoard, W&B, trackio) is another class with this method."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take a group of values that belong to one step. Must not block for long and must not raise."""
        ...

    def close(self) -> None:
        """Let go of files and connections; idempotent."""
        ...


class JsonlSink:
    """Appends one line per call to a file; a line is written whole. Values that are not finite become null.

    Args:
        path: the file; its folder is made when missing. A resumed run appends.
        utc_s: seconds since the epoch.
    """

    def __init__(self, path: Path, utc_s: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)
        self._utc_s = utc_s

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `MetricSink`."""
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"utc_s": round(self._utc_s(), 3), "step": step, **clean}) + "\n")

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Lines of a metrics file in order; nothing when it does not exist; a line cut by a crash is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def percentile(values: Collection[float], percent: float) -> float:
    """Percentile by linear interpolation between closest ranks; nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
