"""The action safety gate: the last thing between a command and the robot.

It does not make a robot safe: limits and emergency stop of the machine lie below this software. It keeps
wrong numbers (not finite, out of bounds, jumps) from becoming motion, whoever commanded them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment


@dataclass(frozen=True, slots=True)
class GatedAction:
    """What the gate lets through, and what it did."""

    action: npt.NDArray[np.float32]
    """[A] finite, within bounds, within the slew limit."""
    reason: str
    """Why the action differs from the command; empty when it does not."""


class SafetyGate:
    """Checks one command after the other; keeps the last action for the slew limit.

    A command that is not finite becomes `hold_action` (motion stops; elements without a hold value keep
    their last value): the gate never repeats a moving command. Bounds are clipped, then the change from the
    last action is limited; stopping is never limited.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self._low = np.asarray(embodiment.action_low, np.float32)
        self._high = np.asarray(embodiment.action_high, np.float32)
        limits = [np.inf if limit is None else limit for limit in embodiment.max_action_change]
        self._max_change = np.asarray(limits, np.float32)
        self._holds = np.asarray([value is not None for value in embodiment.hold_action])
        values = [0.0 if value is None else value for value in embodiment.hold_action]
        self._hold_values = np.clip(np.asarray(values, np.float32), self._low, self._high)
        self._last = self._hold_values

    def reset(self) -> None:
        """Begin an episode: the robot stands still."""
        self._last = self._hold_values

    def check(self, command: npt.NDArray[np.float32]) -> GatedAction:
        """Turn a command [A] into an action that may be executed. Never raises for wrong numbers."""
        if command.shape != self._low.shape:
            return self._let_through(self.hold(), f"shape {command.shape} is not {self._low.shape}: holding")
        if not np.isfinite(command).all():
            return self._let_through(self.hold(), "not finite: holding")
        bounded = np.clip(command.astype(np.float32), self._low, self._high)
        slewed = np.clip(bounded, self._last - self._max_change, self._last + self._max_change)
        if not np.array_equal(slewed, bounded):
            return self._let_through(slewed, "change limited")
        return self._let_through(bounded, "" if np.array_equal(bounded, command) else "out of bounds: clipped")

    def hold(self) -> npt.NDArray[np.float32]:
        """The action that stops motion [A]."""
        return np.where(self._holds, self._hold_values, self._last).astype(np.float32)

    def _let_through(self, action: npt.NDArray[np.float32], reason: str) -> GatedAction:
        self._last = action
        return GatedAction(action, reason)
