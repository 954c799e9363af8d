"""How much one actor may deliver: many times what a robot can do, so that only a broken or hostile one meets it."""

from collections.abc import Callable

SPEEDUP = 20.0
"""Times real time: a robot that was cut off for a day is taken in within minutes, a flood is not."""
RESERVE_S = 3600.0
"""An actor that was silent may deliver this much at once, times `SPEEDUP`."""
MIN_EPISODE_S = 1.0
"""A shorter episode counts as this long: reading it has a cost, too."""


class ActorQuota:
    """A bucket of robot time per actor: it fills at `SPEEDUP` seconds per second, episodes take out their length.

    Args:
        control_hz: control steps per second of robot time.
        clock: monotonic seconds.
        speedup: seconds of robot time per second that an actor may deliver; `inf` for no limit.
    """

    def __init__(self, control_hz: float, clock: Callable[[], float], *, speedup: float = SPEEDUP) -> None:
        if speedup <= 0:
            raise ValueError(f"the quota of an actor must be positive, got {speedup}")
        self._hz = control_hz
        self._clock = clock
        self._speedup = speedup
        self._full = speedup * RESERVE_S
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, actor_id: str, num_steps: int) -> bool:
        """Count one episode of an actor; False, and nothing is counted, when it has delivered too much.

        An actor whose bucket is not empty may overdraw it once, so that every episode gets in some day.
        """
        now = self._clock()
        left, at = self._left.get(actor_id, (self._full, now))
        if left < self._full:
            left = min(self._full, left + (now - at) * self._speedup)
        if left <= 0:
            return False
        self._left[actor_id] = (left - max(MIN_EPISODE_S, num_steps / self._hz), now)
        return True
