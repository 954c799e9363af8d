"""The limits of one robot, from a file of its own: what the safety gate lets through at most.

    {"robot": "bench-arm",                                   Embodiment.name: limits of another robot are refused
     "elements": {
       "joint_1": {"kind": "position", "state": "q_1",       an absolute target; the state element that measures it
                   "low": -2.8, "high": 2.8,                 bounds of the command
                   "velocity": 2.0, "acceleration": 10, "jerk": 500},
       "dx":      {"kind": "displacement", "state": "hand_x", "scale": 0.01,   m per action unit and step
                   "workspace": [-0.4, 0.4], "velocity": 0.25},
       "gripper": {"kind": "force", "high": 20, "low": -20}}}

Every element of the action is named once. Units: state units (rad, m) and seconds; `scale` is what one action unit
is in state units (per step for a displacement), 1 when it is left out. A limit that is left out does not limit,
but for `from_measured`: an absolute target may be at most 0.1 rad per 33 ms away from the measured pose unless the
file says otherwise (in units per second; 0.1 / 0.033 is about 3 rad/s).
"""

from pathlib import Path
from typing import Literal

import msgspec

from sop.core.embodiment import Embodiment
from sop.core.errors import InvalidRecord, RunError

FROM_MEASURED = 0.1 / 0.033
"""Default largest distance between an absolute target and the measured pose, per second of control period."""
_POSITIVE = ("scale", "velocity", "acceleration", "jerk", "from_measured")


class ElementLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one element of the action; None does not limit."""

    kind: Literal["position", "displacement", "force"]
    """`position`: an absolute target. `displacement`: a change of position per step. `force`: neither moves nor
    is measured (a gripper's force); only bounds apply."""
    state: str | None = None
    """Name of the state element that measures this one; needed by `workspace` and `from_measured`."""
    scale: float = 1.0
    """State units per action unit (of a displacement: per step)."""
    low: float | None = None
    """Smallest command, action units."""
    high: float | None = None
    """Largest command, action units."""
    workspace: tuple[float, float] | None = None
    """Where the measured position has to stay, state units; displacements only (a target has `low` and `high`)."""
    velocity: float | None = None
    """Largest speed, state units per second."""
    acceleration: float | None = None
    """Largest change of the speed, state units per second^2."""
    jerk: float | None = None
    """Largest change of the acceleration, state units per second^3."""
    from_measured: float | None = None
    """Largest distance of a target from the measured pose per control period, state units per second; positions
    with a `state` only. None takes `FROM_MEASURED`."""


class RobotLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of one robot, checked against its embodiment by `load_limits` or `check`."""

    robot: str
    """`Embodiment.name`."""
    elements: dict[str, ElementLimits]
    """Action element -> its limits; every element of the action is there."""

    def check(self, embodiment: Embodiment) -> "RobotLimits":
        """The same limits, when they are complete and make sense for this robot.

        Raises:
            InvalidRecord: names the element and what is wrong with it.
        """
        if self.robot != embodiment.name:
            raise InvalidRecord(
                "limits.robot", f"these are limits of {self.robot!r}, this robot is {embodiment.name!r}"
            )
        if set(self.elements) != set(embodiment.action_names):
            wrong = sorted(set(self.elements) ^ set(embodiment.action_names))
            raise InvalidRecord("limits.elements", f"name every action element once, wrong or missing: {wrong}")
        for name, element in self.elements.items():
            _check_element(f"limits.{name}", element, embodiment)
        return self


def _check_element(field: str, element: ElementLimits, embodiment: Embodiment) -> None:
    for name in _POSITIVE:
        value = getattr(element, name)
        if value is not None and not 0 < value < float("inf"):
            raise InvalidRecord(f"{field}.{name}", f"must be positive, got {value}")
    _check_bounds(field, element)
    if element.state is not None and element.state not in embodiment.state_names:
        raise InvalidRecord(
            f"{field}.state", f"no state element {element.state!r}: {', '.join(embodiment.state_names)}"
        )
    allowed = {
        "position": {"state", "velocity", "acceleration", "jerk", "from_measured"},
        "displacement": {"state", "workspace", "velocity", "acceleration", "jerk"},
        "force": set(),
    }[element.kind]
    for name in ("state", "workspace", "velocity", "acceleration", "jerk", "from_measured"):
        if getattr(element, name) is not None and name not in allowed:
            raise InvalidRecord(f"{field}.{name}", f"means nothing for a {element.kind}")
    if (element.workspace or element.from_measured) and element.state is None:
        raise InvalidRecord(f"{field}.state", "name the state element that measures this one")
    if element.kind == "position" and element.state is None:
        raise InvalidRecord(f"{field}.state", "an absolute target needs the state element that measures it")


def _check_bounds(field: str, element: ElementLimits) -> None:
    for name, pair in (("low", (element.low, element.high)), ("workspace", element.workspace)):
        if pair is not None and None not in pair and not pair[0] < pair[1]:  # type: ignore[operator]
            raise InvalidRecord(f"{field}.{name}", f"the lower bound must be below the upper one, got {pair}")
    if element.kind == "displacement" and not (element.low or 0.0) <= 0.0 <= (element.high or 0.0):
        raise InvalidRecord(f"{field}.low", "0 must be allowed: it is how a displacement stands still")


def load_limits(path: Path, embodiment: Embodiment) -> RobotLimits:
    """Read a robot's limits.

    Raises:
        RunError: there is no such file.
        InvalidRecord: it is not JSON as in the module's picture, or `RobotLimits.check` refuses it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"no limits in {path}: write them or leave the option out ({error.strerror})") from error
    try:
        limits = msgspec.json.decode(data, type=RobotLimits)
    except msgspec.DecodeError as error:
        raise InvalidRecord("limits", f"{path}: {error}") from error
    return limits.check(embodiment)
