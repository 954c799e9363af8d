"""Where windows may start, and which of their steps count: arithmetic on an algorithm's `StepLabels`.

Chunk rule `prefix` (spec B.4): a window starts on a step that may start one; it reaches to the end of that
step's segment, to the first step with weight 0, or over H steps, whichever comes first; what lies beyond is
padding. A window with fewer than `min_valid_steps(H)` steps that count is not drawn.
"""

import numpy as np
import numpy.typing as npt

from sop.core.experience import StepLabels


def min_valid_steps(horizon: int) -> int:
    """Steps that a window of `horizon` steps must hold to be drawn: max(5, H / 3), at most H (spec B.4)."""
    return min(horizon, max(5, -(-horizon // 3)))


def valid_lengths(labels: StepLabels, horizon: int) -> npt.NDArray[np.int32]:
    """[T] number of steps that count in a window starting at each step, 0 to `horizon`."""
    counts = labels.loss_weight > 0
    steps = len(counts)
    if steps == 0:
        return np.zeros(0, np.int32)
    breaks = np.ones(steps + 1, np.bool_)
    breaks[1:steps] = (labels.segment[1:] != labels.segment[:-1]) | (counts[1:] != counts[:-1])
    edges = np.flatnonzero(breaks)
    run_end = edges[np.searchsorted(edges, np.arange(steps), side="right")]
    lengths = np.where(counts, np.minimum(run_end - np.arange(steps), horizon), 0)
    return lengths.astype(np.int32)


def start_runs(labels: StepLabels, horizon: int) -> list[tuple[int, int]]:
    """The valid window starts as runs `(first, count)`, in order."""
    valid = labels.can_start & (valid_lengths(labels, horizon) >= min_valid_steps(horizon))
    padded = np.concatenate(([False], valid, [False]))
    edges = np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)
    return [(int(first), int(stop - first)) for first, stop in edges]
