"""The watchdog: says when the robot must stop because nobody commands or sees it any more.

    no fresh action for 3 control periods (100 ms at 30 Hz)    -> decelerate and hold
    state or a camera older than 200 ms, or never seen         -> decelerate and hold
    one stamped more than that ahead of the clock              -> decelerate and hold

It closes no latch: the robot goes on when what was missing is back. It does nothing itself; the loop that owns the
robot asks it once per step.
"""

from collections.abc import Collection

from sop.core.clock import Clock

ACTION_PERIODS = 3
"""Control periods without a fresh action until the robot stops."""
MAX_AGE_S = 0.2
"""Oldest state or picture by which a robot may move."""


class Watchdog:
    """Keeps the time of the last action and of what was seen.

    Args:
        clock: monotonic time; stamps are compared with it.
        control_hz: control steps per second.
        sources: what has to be seen, e.g. `state` and the cameras.
    """

    def __init__(self, clock: Clock, control_hz: float, sources: Collection[str]) -> None:
        self._clock = clock
        self._patience_ns = int(ACTION_PERIODS / control_hz * 1e9)
        self._seen_ns: dict[str, int | None] = dict.fromkeys(sources)
        self._acted_ns: int | None = None

    def acted(self, monotonic_ns: int) -> None:
        """A fresh action came, decided at this time."""
        self._acted_ns = max(monotonic_ns, self._acted_ns or monotonic_ns)

    def saw(self, source: str, monotonic_ns: int) -> None:
        """A source was measured at this time; a repeated old stamp does not make it fresh."""
        self._seen_ns[source] = monotonic_ns

    def problem(self) -> str:
        """Why the robot must hold now; empty when it may move."""
        now_ns = self._clock.monotonic_ns()
        for source, seen_ns in self._seen_ns.items():
            if seen_ns is None:
                return f"{source} was never seen"
            if now_ns - seen_ns > MAX_AGE_S * 1e9:
                return f"{source} is {(now_ns - seen_ns) / 1e6:.0f} ms old"
            if seen_ns - now_ns > MAX_AGE_S * 1e9:  # would never grow old
                return f"{source} is stamped {(seen_ns - now_ns) / 1e9:.3g} s ahead: by another clock"
        if self._acted_ns is None:
            return "no action yet"
        if now_ns - self._acted_ns > self._patience_ns:
            return f"no fresh action for {(now_ns - self._acted_ns) / 1e6:.0f} ms"
        return ""
