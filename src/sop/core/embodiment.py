"""What a robot can see, sense and do: the contract between robot, episode and policy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sop.core.errors import InvalidRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Embodiment:
    """One kind of robot. Two robots with equal embodiments can run the same policy and share episodes."""

    name: str
    """Kind of robot, e.g. `metaworld-sawyer`."""
    cameras: Mapping[str, tuple[int, int]]
    """Camera name -> (height, width) in pixels; images are uint8 RGB [h, w, 3]."""
    state_names: tuple[str, ...]
    """One name per element of the proprioceptive state [S]."""
    action_names: tuple[str, ...]
    """One name per element of an action [A]."""
    action_low: tuple[float, ...]
    """Smallest admissible value per action element, in action units."""
    action_high: tuple[float, ...]
    """Largest admissible value per action element, in action units."""
    hold_action: tuple[float | None, ...]
    """The action that stops motion: a value per element, None where holding means keeping the last value
    (e.g. a gripper that must not open because a plan was refused)."""
    max_action_change: tuple[float | None, ...]
    """Slew limit: largest change per element from one step to the next, None for unlimited."""
    control_hz: float
    """Control steps per second of robot time."""

    def __post_init__(self) -> None:
        count = len(self.action_names)
        for field in ("action_low", "action_high", "hold_action", "max_action_change"):
            if len(getattr(self, field)) != count:
                raise InvalidRecord(field, f"needs {count} values, one per action name, got {getattr(self, field)}")
        if not self.cameras:
            raise InvalidRecord("cameras", "an embodiment needs at least one camera")
        if not self.control_hz > 0:
            raise InvalidRecord("control_hz", f"must be positive, got {self.control_hz}")
        for name, low, high in zip(self.action_names, self.action_low, self.action_high, strict=True):
            if not low < high:
                raise InvalidRecord("action_low", f"must be below action_high for {name!r}, got {low} and {high}")

    @property
    def num_actions(self) -> int:
        """A, the length of an action."""
        return len(self.action_names)

    @property
    def num_states(self) -> int:
        """S, the length of the proprioceptive state."""
        return len(self.state_names)

    def difference(self, other: "Embodiment") -> str | None:
        """Say in words where two embodiments differ, None when a policy for one runs on the other."""
        for field in ("name", "cameras", "state_names", "action_names", "action_low", "action_high", "control_hz"):
            mine, theirs = getattr(self, field), getattr(other, field)
            same = dict(mine) == dict(theirs) if field == "cameras" else mine == theirs
            if not same:
                return f"{field} is {theirs}, this robot has {mine}"
        return None


@dataclass(frozen=True, slots=True)
class Observation:
    """What the robot sees and senses before it acts."""

    images: Mapping[str, npt.NDArray[np.uint8]]
    """Camera name -> RGB [h, w, 3]."""
    state: npt.NDArray[np.float32]
    """Proprioception [S]."""
