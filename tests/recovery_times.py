"""How long a system takes to be whole again after a fault: measured by its test, kept by `sop chaos --check`.

recovery.fault_is_over()                    or recovery.fault_is_over(clock): the clock that the system goes by
recovery.whole("what is right again")
"""

import time
from collections.abc import Callable

from sop.buffer import Ingest
from sop.core.events import TOPIC_EPISODES
from sop.testing.clock import FakeClock
from sop.transport import Cursor

Clock = Callable[[], float]
"""Seconds."""


class Recovery:
    """Measures, and gives what it measured to the report of the tests.

    Args:
        record: pytest's `record_property`.
    """

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record
        self._clock: Clock = time.monotonic
        self._began_s: float | None = None

    def fault_is_over(self, clock: Clock | None = None) -> None:
        """The link is healed, the process starts again, there is room: from here it counts; again: from here instead.

        Args:
            clock: that the system under test goes by; None: the wall's.
        """
        self._clock = clock or time.monotonic
        self._began_s = self._clock()

    def whole(self, until: str) -> None:
        """Everything is right again; `until` says what was waited for, behind "until"."""
        assert self._began_s is not None, "the fault is not over"
        self.took(self._clock() - self._began_s, until, clock="wall" if self._clock is time.monotonic else "injected")
        self._began_s = None

    def took(self, seconds: float, until: str, *, clock: str = "wall") -> None:
        """For what was measured elsewhere."""
        for name, value in (("recovery_s", seconds), ("recovery_clock", clock), ("recovery_until", until)):
            self._record(name, value)


def seconds_of(clock: FakeClock) -> Clock:
    """Its seconds."""
    return lambda: clock.monotonic_ns() / 1e9


def ingest_until(ingest: Ingest, clock: FakeClock, done: Callable[[], bool]) -> None:
    """Run the background loop of `ingest` here until `done`; what it would wait for events passes on `clock`."""
    bus = ingest._bus

    class NobodyWaits:
        """The same bus, polled without waiting."""

        def poll(self, topic: str, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
            assert topic == TOPIC_EPISODES
            if done():
                ingest._stop.set()
                return []
            found = bus.poll(topic, after, 0)
            clock.advance(0 if found else timeout_s)
            return found

    ingest._bus = NobodyWaits()  # type: ignore[assignment]
    ingest._loop()
    ingest._bus = bus
    ingest._stop.clear()
