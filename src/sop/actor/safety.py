"""The action safety gate: the last thing between a command and the robot.

It does not make a robot safe: limits and emergency stop of the machine lie below this software. It keeps
wrong numbers (not finite, out of bounds, jumps) from becoming motion, whoever commanded them.

Every limit is an interval per element. They are applied in a fixed order, hardest first; where two contradict each
other the earlier one wins:

    measured pose -> bounds -> workspace -> change -> velocity (and room to brake) -> acceleration -> jerk

    not finite, wrong shape       decelerate within the limits and hold; a moving command is never repeated for it
    3 clamped commands in 1 s     controlled stop: decelerate, hold, and the latch closes until a person clears it
                                  (with a limits file only: without one nothing ever stops by clamping; and what
                                  the acceleration limits clamp does not count while the robot takes up speed again
                                  after the gate itself has held it, or an episode began, for at most 1 s)
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sop.actor.latch import SafetyLatch
from sop.actor.limits import RobotLimits
from sop.actor.motion import MotionLimits
from sop.core.clock import SystemClock
from sop.core.embodiment import Embodiment
from sop.core.episode import SafetyCounts

Vector = npt.NDArray[np.float64]
CLAMPS_TO_STOP = 3
"""Clamped commands within one second of robot time that begin a controlled stop."""
NOWHERE = "the measured pose is not known: nothing is written"
_TAKING_UP = frozenset({"acceleration limited", "jerk limited"})
_TOLERANCE = 1e-6
"""A change below this share of an element's range is rounding, not a clamp."""


class Verdict(StrEnum):
    """What the gate made of one command."""

    PASSED = "passed"
    CLAMPED = "clamped"
    NONFINITE = "nonfinite"
    """Not finite, of a wrong shape, or without a measured pose to begin from: the robot decelerates and holds."""
    STOPPED = "stopped"
    """A controlled stop began with this command."""
    CLOSED = "closed"
    """The latch was closed before this command came."""


@dataclass(frozen=True, slots=True)
class GatedAction:
    """What the gate lets through, and what it did."""

    action: npt.NDArray[np.float32]
    """[A] finite, within every limit."""
    reason: str
    """Why the action differs from the command; empty when it does not."""
    verdict: Verdict = Verdict.PASSED


@dataclass(slots=True)
class SafetyTally:
    """Counts what happened in one episode."""

    clamped: int = 0
    nonfinite: int = 0
    stops: int = 0
    late: int = 0

    def add(self, verdict: Verdict) -> None:
        """One more command; the one that begins a stop was clamped, too."""
        self.clamped += verdict in (Verdict.CLAMPED, Verdict.STOPPED)
        self.nonfinite += verdict is Verdict.NONFINITE
        self.stops += verdict is Verdict.STOPPED

    def merge(self, counts: SafetyCounts) -> None:
        """What another gate counted in the meantime."""
        self.clamped += counts.clamped
        self.nonfinite += counts.nonfinite
        self.stops += counts.stops
        self.late += counts.late

    def counts(self) -> SafetyCounts:
        """As an episode keeps it."""
        return SafetyCounts(clamped=self.clamped, nonfinite=self.nonfinite, stops=self.stops, late=self.late)


class Gate(Protocol):
    """What the control loop needs of a gate:

    gate.refresh(); gate.closed                          # between episodes: a closed gate moves nothing
    gate.reset(state); gate.located                      # an episode begins, if it is known where
    gated = gate.check(command, state)                   # every step that has a command
    gated = gate.brake(state=state); gate.at_rest        # every one that has none, until it stands
    """

    @property
    def closed(self) -> str:
        """Why the latch is closed; empty when it is open."""
        ...

    @property
    def at_rest(self) -> bool:
        """Whether the last action that was let through moves nothing."""
        ...

    @property
    def located(self) -> bool:
        """Whether it is known from where absolute targets begin: until then no action stands for standing still, and
        nothing that the gate says may be executed. Always, where nothing says what is a target."""
        ...

    def refresh(self) -> None:
        """Look whether a person has cleared the latch."""
        ...

    def reset(self, state: npt.NDArray[np.float32] | None = None) -> None:
        """An episode begins; the robot stands still, where it was measured [S]."""
        ...

    def check(self, command: npt.NDArray[np.float32], state: npt.NDArray[np.float32] | None = None) -> GatedAction:
        """The action [A] that is executed instead of the command [A]; `state` [S] is what was measured."""
        ...

    def brake(self, reason: str = "", state: npt.NDArray[np.float32] | None = None) -> GatedAction:
        """The action [A] for a step without a command: decelerate within the limits, and hold."""
        ...


class SafetyGate:
    """Checks one command after the other, one per control step; keeps what it needs of the last actions.

    Without limits: a command that is not finite becomes `hold_action` (motion stops; elements without a hold value
    keep their last value); bounds are clipped, then the change from the last action is limited; stopping is never
    limited by `max_action_change`.

    Args:
        embodiment: bounds, hold values and slew limits of the robot.
        limits: of this very robot; None checks what the embodiment says and never stops.
        latch: closes at a controlled stop; None makes one in memory.
    """

    def __init__(
        self, embodiment: Embodiment, limits: RobotLimits | None = None, latch: SafetyLatch | None = None
    ) -> None:
        self._low = np.asarray(embodiment.action_low, np.float32).astype(np.float64)
        self._high = np.asarray(embodiment.action_high, np.float32).astype(np.float64)
        slew = [np.inf if limit is None else limit for limit in embodiment.max_action_change]
        self._max_change = np.asarray(slew, np.float64)
        self._holds = np.asarray([value is not None for value in embodiment.hold_action])
        values = np.asarray([0.0 if value is None else value for value in embodiment.hold_action], np.float32)
        self._hold_values = np.clip(values.astype(np.float64), self._low, self._high)
        self._motion = None if limits is None else MotionLimits(limits.check(embodiment), embodiment)
        self._window = round(embodiment.control_hz)
        self._clamped_at: deque[int] = deque(maxlen=CLAMPS_TO_STOP)
        self._step = 0
        self.latch = SafetyLatch(SystemClock()) if latch is None else latch
        self.reset()

    @property
    def closed(self) -> str:
        """See `Gate`."""
        return self.latch.reason

    @property
    def at_rest(self) -> bool:
        """See `Gate`."""
        if self._motion is not None:
            return self._motion.at_rest
        return bool(np.array_equal(self._last[self._holds], self._hold_values[self._holds]))

    @property
    def located(self) -> bool:
        """See `Gate`. Limits ask for a measurement of every absolute target."""
        return self._motion is None or self._motion.located

    def refresh(self) -> None:
        """See `Gate`. Reads the latch's record."""
        self.latch.refresh()

    def reset(self, state: npt.NDArray[np.float32] | None = None) -> None:
        """Begin an episode: the robot stands still. A closed latch stays closed."""
        self._last = self._hold_values
        self._clamped_at.clear()
        self._take_up_until = self._step + self._window
        if self._motion is not None:
            self._motion.reset()
        self._see(state)

    def check(self, command: npt.NDArray[np.float32], state: npt.NDArray[np.float32] | None = None) -> GatedAction:
        """Turn a command [A] into an action that may be executed. Never raises for wrong numbers.

        Args:
            command: of a policy or a person.
            state: measured now [S]; limits that need it do not apply without it, but before the first one that
                says where absolute targets begin (`located`) the gate lets nothing through.
        """
        self._step += 1
        self._see(state)
        if not self.located:
            return self._nowhere()
        if self.latch.reason:
            return self._brake(state, self.latch.reason, Verdict.CLOSED)
        if nonsense := self._nonsense(command, state):
            return self._brake(state, f"{nonsense}: holding", Verdict.NONFINITE)
        action, changed = self._within(command.astype(np.float64), state, slew=True)
        if self._clamps_too_often(changed):
            self.latch.close(f"{CLAMPS_TO_STOP} commands clamped within 1 s, the last one: {', '.join(changed)}")
            return self._brake(state, self.latch.reason, Verdict.STOPPED)
        self._let_through(action)
        return GatedAction(action.astype(np.float32), ", ".join(changed), _verdict(bool(changed)))

    def brake(self, reason: str = "", state: npt.NDArray[np.float32] | None = None) -> GatedAction:
        """Instead of a command for this step: decelerate within the limits, and hold. Closes no latch."""
        self._step += 1
        self._see(state)
        return self._brake(state, reason, Verdict.PASSED) if self.located else self._nowhere()

    def hold(self) -> npt.NDArray[np.float32]:
        """The action that stops motion [A], at once when there are no limits, else as fast as they allow."""
        if self._motion is not None:
            return self._motion.braking(self._last).astype(np.float32)
        return np.where(self._holds, self._hold_values, self._last).astype(np.float32)

    def _see(self, state: npt.NDArray[np.float32] | None) -> None:
        """The first measurement says where an absolute target starts from."""
        if self._motion is not None and state is not None:
            self._last = self._motion.start_at(self._last, state)

    def _nonsense(self, command: npt.NDArray[np.float32], state: npt.NDArray[np.float32] | None) -> str:
        """Why nothing can be made of the numbers; empty when something can."""
        if command.shape != self._low.shape:
            return f"shape {command.shape} is not {self._low.shape}"
        if not np.isfinite(command).all():
            return "not finite"
        if self._motion is not None and state is not None and not np.isfinite(state).all():
            return "the measured state is not finite"
        return ""

    def _nowhere(self) -> GatedAction:
        """What is said before it is known where the robot is: nothing to execute, and nothing is taken for executed."""
        self._take_up_until = self._step + self._window
        return GatedAction(self._last.astype(np.float32), NOWHERE, Verdict.NONFINITE)

    def _brake(self, state: npt.NDArray[np.float32] | None, reason: str, verdict: Verdict) -> GatedAction:
        action, _ = self._within(self.hold().astype(np.float64), state, slew=False)
        self._let_through(action)
        self._take_up_until = self._step + self._window
        return GatedAction(action.astype(np.float32), reason, verdict)

    def _within(
        self, command: Vector, state: npt.NDArray[np.float32] | None, *, slew: bool
    ) -> tuple[Vector, list[str]]:
        """The nearest admissible action, and the names of the limits that changed the command."""
        low, high = np.full_like(command, -np.inf), np.full_like(command, np.inf)
        changed, value, tolerance = [], command, _TOLERANCE * (self._high - self._low)
        for name, least, most in self._intervals(state, slew=slew):
            low, high = np.clip(least, low, high), np.clip(most, low, high)  # what contradicts becomes a point
            clipped = np.clip(value, low, high)
            if (np.abs(clipped - value) > tolerance).any():
                changed.append(name)
            value = clipped
        return value, changed

    def _intervals(self, state: npt.NDArray[np.float32] | None, *, slew: bool) -> Iterator[tuple[str, Vector, Vector]]:
        motion = self._motion
        if motion is not None:
            yield "far from the measured pose", *motion.near_measured(state)
        yield "out of bounds: clipped", self._low, self._high
        if motion is not None:
            yield "out of bounds: clipped", *motion.bounds
            yield "out of the workspace", *motion.inside(state)
        if slew:
            yield "change limited", self._last - self._max_change, self._last + self._max_change
        if motion is not None:
            yield "velocity limited", *motion.velocity(self._last)
            yield "too fast to brake in time", *motion.room_to_brake(self._last, state)
            yield "acceleration limited", *motion.acceleration(self._last)
            yield "jerk limited", *motion.jerk(self._last)

    def _clamps_too_often(self, changed: list[str]) -> bool:
        if self._motion is None:
            return False
        if not changed:
            self._take_up_until = 0
            return False
        if self._step <= self._take_up_until and _TAKING_UP.issuperset(changed):
            return False
        self._clamped_at.append(self._step)
        full = len(self._clamped_at) == CLAMPS_TO_STOP
        return full and self._step - self._clamped_at[0] < self._window

    def _let_through(self, action: Vector) -> None:
        if self._motion is not None:
            self._motion.executed(self._last, action)
        self._last = action


def _verdict(changed: bool) -> Verdict:
    return Verdict.CLAMPED if changed else Verdict.PASSED
