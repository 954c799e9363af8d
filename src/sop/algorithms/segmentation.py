"""What the steps of an episode are to the rules that learn from takeovers, and the segments that follow from it.

    step      0                                                  T
              P P P P P P P P P b b b b | h h h H H H H H H H | P P P
              POLICY            PRE_TAKEOVER HANDOVER  HUMAN    POLICY

Every maximal run of one kind is a segment, so a window never mixes controllers: between a policy and a human run
lies always a change of kind.
"""

import math
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from sop.core.episode import Controller, human_runs


class StepKind(IntEnum):
    """What a step of a robot's episode is."""

    POLICY = 0
    PRE_TAKEOVER = 1
    """The policy, shortly before a person took over: it led to the mistake."""
    HANDOVER = 2
    """The first steps of a human run: reflex, and the hands find the robot's pose."""
    HUMAN = 3
    IDLE = 4
    """A person who waits; set by rules that look for it."""


def steps_in(seconds: float, control_hz: float) -> int:
    """Control steps that a time covers, rounded up (a millionth of a step is rounding error)."""
    return math.ceil(seconds * control_hz - 1e-6)


def step_kinds(controller: npt.NDArray[np.uint8], *, handover: int, before: int) -> npt.NDArray[np.int64]:
    """[T] `StepKind` of every step of a robot's episode.

    Args:
        controller: [T] `Controller` values.
        handover: steps at the beginning of a human run that are HANDOVER.
        before: policy steps before a human run that are PRE_TAKEOVER; never reaches into an earlier human run.
    """
    kind = np.full(len(controller), StepKind.POLICY, np.int64)
    for start, stop in human_runs(controller):
        takeover = slice(max(0, start - before), start)
        kind[takeover] = np.where(controller[takeover] == Controller.POLICY, StepKind.PRE_TAKEOVER, kind[takeover])
        kind[start:stop] = StepKind.HUMAN
        kind[start : min(start + handover, stop)] = StepKind.HANDOVER
    return kind


def segments(kind: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """[T] number of the maximal run of one kind that a step lies in: 0, 1, 2, ..."""
    return np.cumsum(np.diff(kind, prepend=kind[:1]) != 0, dtype=np.int32)


def spread(can_start: npt.NDArray[np.bool_], most: int) -> None:
    """Keep `most` of the starts in place, evenly spread, when there are more."""
    starts = np.flatnonzero(can_start)
    if len(starts) > most:
        can_start[:] = False
        can_start[starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]] = True


def every(segment: npt.NDArray[np.int32], stride: int) -> npt.NDArray[np.bool_]:
    """[T] whether a step is the first, the (1 + stride)-th, the (1 + 2 stride)-th, ... of its segment."""
    steps = np.arange(len(segment))
    first = np.searchsorted(segment, segment)  # segments are numbered in order
    return np.asarray((steps - first) % stride == 0)
