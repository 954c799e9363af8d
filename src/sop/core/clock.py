"""Time, injected: the system's clock here, a clock for tests in `sop.testing`."""

import time
from typing import Protocol


class Clock(Protocol):
    """Reads and spends time."""

    def monotonic_ns(self) -> int:
        """Nanoseconds that only run forwards; differences are durations."""
        ...

    def utc_ns(self) -> int:
        """Nanoseconds since the epoch, UTC; may jump when the machine's clock is set."""
        ...

    def sleep_until(self, monotonic_ns: int) -> None:
        """Block until `monotonic_ns()` reaches the given value; returns at once when it is past."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_ns(self) -> int:
        """See `Clock`."""
        return time.monotonic_ns()

    def utc_ns(self) -> int:
        """See `Clock`."""
        return time.time_ns()

    def sleep_until(self, monotonic_ns: int) -> None:
        """See `Clock`."""
        remaining_ns = monotonic_ns - time.monotonic_ns()
        if remaining_ns > 0:
            time.sleep(remaining_ns / 1e9)
