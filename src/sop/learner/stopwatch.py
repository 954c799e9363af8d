"""Where the learner's time goes: working, waiting for a batch, pausing because there is nothing new to learn."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Lap(NamedTuple):
    """A stretch of the learner's time."""

    steps_per_s: float
    """Steps per second, pauses included."""
    busy: float
    """1 - waiting / (total - paused): how little the optimizer waits for batches. 1 when all was pause."""
    worked_s: float
    """Length of the lap without its pauses, seconds: the weight of `busy` in a mean over laps."""


class Stopwatch:
    """Adds up waiting and pausing; a lap is what lies between two reports.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._start_step = 0
        self._waited = 0.0
        self._paused = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside was spent waiting for a batch."""
        begin = self._clock()
        yield
        self._waited += self._clock() - begin

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """The time inside was a pause: there was nothing new to learn."""
        begin = self._clock()
        yield
        self._paused += self._clock() - begin

    def lap(self, step: int, every_s: float, *, force: bool = False) -> Lap | None:
        """Close the lap if it lasted `every_s`; None if it goes on."""
        now = self._clock()
        total = now - self._start
        if total < every_s and not force:
            return None
        worked = total - self._paused
        busy = 1.0 if worked < 1e-3 else 1 - self._waited / worked
        lap = Lap((step - self._start_step) / max(total, 1e-9), busy, worked)
        self._start, self._start_step, self._waited, self._paused = now, step, 0.0, 0.0
        return lap
