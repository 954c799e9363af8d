"""A clock that moves only when it is told to, or when somebody sleeps."""


class FakeClock:
    """Implements `sop.core.clock.Clock`; sleeping is instant and remembered.

    Args:
        tick_ns: added at every reading, so that two readings differ.
    """

    def __init__(self, tick_ns: int = 0) -> None:
        self.now_ns = 1_000_000_000
        self.slept_ns: list[int] = []
        self._tick_ns = tick_ns

    def monotonic_ns(self) -> int:
        """See `Clock`."""
        self.now_ns += self._tick_ns
        return self.now_ns

    def utc_ns(self) -> int:
        """See `Clock`: 2023-11-14 plus the monotonic time."""
        return 1_700_000_000_000_000_000 + self.monotonic_ns()

    def sleep_until(self, monotonic_ns: int) -> None:
        """See `Clock`."""
        self.slept_ns.append(monotonic_ns - self.now_ns)
        self.now_ns = max(self.now_ns, monotonic_ns)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ns += int(seconds * 1e9)
