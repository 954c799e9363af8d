"""Limits of motion as intervals of commands: what a robot's position, speed, acceleration and jerk allow next.

    position       v = (a - last) * scale * hz          a = last + v / (scale * hz)
    displacement   v = a * scale * hz                   a = v / (scale * hz)
    force          does not move: never limited here

With v the speed that the actions of the last steps commanded (state units per second), dt = 1 / hz:

    velocity       |v| <= V
    acceleration   |v' - v| <= A dt
    jerk           |(v' - v) / dt - (v - v_before) / dt| <= J dt
    room to brake  v dt + v^2 / 2A <= d, so v <= A (sqrt(dt^2 + 2 d / A) - dt); d is the way to the bound
    braking        with a jerk limit the deceleration itself has to end in time: the same formula one order higher
"""

import numpy as np
import numpy.typing as npt

from sop.actor.limits import FROM_MEASURED, ElementLimits, RobotLimits
from sop.core.embodiment import Embodiment

Vector = npt.NDArray[np.float64]
State = npt.NDArray[np.float32] | None
Interval = tuple[Vector, Vector]
_REST = 1e-6
"""Speeds below this, in state units per second, are standstill."""


class MotionLimits:
    """The intervals of one robot, and how it has moved until now. Every method takes and gives vectors [A].

    Args:
        limits: checked against the embodiment.
        embodiment: order of elements and control rate.
    """

    def __init__(self, limits: RobotLimits, embodiment: Embodiment) -> None:
        elements = [limits.elements[name] for name in embodiment.action_names]
        self._dt = 1.0 / embodiment.control_hz
        self._is_target = np.asarray([element.kind == "position" for element in elements])
        self._moves = np.asarray([element.kind != "force" for element in elements])
        self._scale = np.asarray([element.scale for element in elements])
        self._per_speed = self._dt / self._scale
        self._speed, self._accel, self._jerk = (
            np.asarray([_or(getattr(element, name), np.inf) for element in elements])
            for name in ("velocity", "acceleration", "jerk")
        )
        self.bounds: Interval = (
            np.asarray([_or(element.low, -np.inf) for element in elements]),
            np.asarray([_or(element.high, np.inf) for element in elements]),
        )
        """Smallest and largest commands."""
        workspaces = [element.workspace or (-np.inf, np.inf) for element in elements]
        self._workspace: Interval = (np.asarray([w[0] for w in workspaces]), np.asarray([w[1] for w in workspaces]))
        names = embodiment.state_names
        self._num_states = len(names)
        self._state_at = np.asarray([-1 if e.state is None else names.index(e.state) for e in elements])
        self._reach = np.asarray([_reach(element) for element in elements]) * self._dt / self._scale
        self.reset()

    @property
    def at_rest(self) -> bool:
        """Whether the last action moves nothing."""
        return bool((np.abs(self._v) < _REST).all())

    @property
    def located(self) -> bool:
        """Whether every absolute target has begun from a measured pose since `reset`."""
        return self._located

    def reset(self) -> None:
        """The robot stands still, nobody knows where."""
        self._v = np.zeros(len(self._scale))
        self._a = np.zeros(len(self._scale))
        self._located = False

    def start_at(self, last: Vector, state: npt.NDArray[np.float32]) -> Vector:
        """The last action, absolute targets replaced by the measured pose when nothing was executed since `reset`."""
        if self._located:
            return last
        measured = self._measured(state)
        self._located = bool(np.isfinite(measured[self._is_target]).all())
        return np.where(self._is_target & np.isfinite(measured), measured / self._scale, last)

    def executed(self, last: Vector, action: Vector) -> None:
        """An action was let through: remember how it moves the robot."""
        v = np.where(self._moves, (action - self._base(last)) / self._per_speed, 0.0)
        self._a = (v - self._v) / self._dt
        self._v = v

    def near_measured(self, state: State) -> Interval:
        """Absolute targets stay within reach of the measured pose."""
        measured = self._measured(state) / self._scale
        known = self._is_target & np.isfinite(measured)
        return np.where(known, measured - self._reach, -np.inf), np.where(known, measured + self._reach, np.inf)

    def inside(self, state: State) -> Interval:
        """Displacements do not lead out of the workspace. Outside of it only inward motion is left."""
        down, up = self._room(None, state)
        return -down / self._scale, up / self._scale

    def velocity(self, last: Vector) -> Interval:
        """Speeds up to the limit."""
        return self._commands(last, -self._speed, self._speed)

    def room_to_brake(self, last: Vector, state: State) -> Interval:
        """Speeds from which the robot still comes to rest before a bound or the edge of the workspace."""
        down, up = self._room(last, state)
        return self._commands(last, -self._braked(down), self._braked(up))

    def acceleration(self, last: Vector) -> Interval:
        """Speeds that the acceleration limit reaches within one step."""
        return self._commands(last, self._v - self._accel * self._dt, self._v + self._accel * self._dt)

    def jerk(self, last: Vector) -> Interval:
        """Speeds that the jerk limit reaches within one step."""
        change = self._jerk * self._dt
        return self._commands(last, self._v + (self._a - change) * self._dt, self._v + (self._a + change) * self._dt)

    def braking(self, last: Vector) -> Vector:
        """The command that brings the robot to rest as fast as the limits allow; at rest, the one that holds."""
        speed = np.abs(self._v)
        with np.errstate(invalid="ignore"):
            ends = self._jerk * (np.sqrt(self._dt**2 + 2 * speed / self._jerk) - self._dt)
        rate = np.minimum(self._accel, np.where(np.isfinite(self._jerk), ends, np.inf))
        with np.errstate(invalid="ignore"):
            loss = np.minimum(speed, np.where(np.isfinite(rate), rate * self._dt, speed))
        v = np.sign(self._v) * (speed - loss)
        return np.where(self._moves, self._base(last) + v * self._per_speed, last)

    def _base(self, last: Vector) -> Vector:
        return np.where(self._is_target, last, 0.0)

    def _commands(self, last: Vector, slowest: Vector, fastest: Vector) -> Interval:
        base = self._base(last)
        low, high = base + slowest * self._per_speed, base + fastest * self._per_speed
        return np.where(self._moves, low, -np.inf), np.where(self._moves, high, np.inf)

    def _measured(self, state: State) -> Vector:
        """The measured position of every element, state units; NaN where it is not known."""
        if state is None or state.shape != (self._num_states,):
            return np.full(len(self._scale), np.nan)
        return np.where(self._state_at >= 0, np.asarray(state, np.float64)[self._state_at], np.nan)

    def _room(self, last: Vector | None, state: State) -> Interval:
        """State units down and up to the edge of the workspace and, with `last`, of a target to its bounds."""
        measured = self._measured(state)
        position = np.where(np.isfinite(measured) & ~self._is_target, measured, np.nan)
        low, high = self._workspace
        if last is not None:
            position = np.where(self._is_target, last * self._scale, position)
            low = np.where(self._is_target, self.bounds[0] * self._scale, low)
            high = np.where(self._is_target, self.bounds[1] * self._scale, high)
        down, up = np.maximum(position - low, 0.0), np.maximum(high - position, 0.0)
        return np.where(np.isfinite(down), down, np.inf), np.where(np.isfinite(up), up, np.inf)

    def _braked(self, way: Vector) -> Vector:
        with np.errstate(invalid="ignore"):
            v = self._accel * (np.sqrt(self._dt**2 + 2 * way / self._accel) - self._dt)
        return np.where(np.isfinite(self._accel) & np.isfinite(way), v, way / self._dt)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _reach(element: ElementLimits) -> float:
    return _or(element.from_measured, FROM_MEASURED) if element.kind == "position" else np.inf
