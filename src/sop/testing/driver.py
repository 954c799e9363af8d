"""A simulated arm behind a driver, with a machine that outlives every process: its state is a file and a formula.

    record = (written_ns, position [2], speed [2], deadline_ns, kind)      one per write, appended in one piece

Until the deadline the arm moves at the written speed; then the machine itself decelerates at HARDWARE_DECELERATION
and holds. So anybody can say from the file alone, at any time and after any death, where the arm is and how fast.
"""

import json
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment
from sop.robots.driver import Reading

HARDWARE_DECELERATION = 5.0
"""Of the machine's own stop, m/s^2."""
_RECORD = struct.Struct("<q2d2dqq")
_WRITE, _STOP = 0, 1

ARM = Embodiment(
    name="simulated-arm",
    cameras={"front": (16, 16)},
    state_names=("x", "y"),
    action_names=("dx", "dy"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    hold_action=(0.0, 0.0),
    max_action_change=(None, None),
    control_hz=50.0,
)
"""An action unit is `SCALE` m per step."""
SCALE = 0.01
ARM_LIMITS: dict[str, Any] = {
    "robot": "simulated-arm",
    "elements": {
        name: {
            "kind": "displacement",
            "state": state,
            "scale": SCALE,
            "workspace": [-2.0, 2.0],
            "velocity": 0.6,
            "acceleration": 4.0,
        }
        for name, state in (("dx", "x"), ("dy", "y"))
    },
}
"""A limits file for it: from full speed to rest in 0.15 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One write and what the machine made of it."""

    written_ns: int
    position: npt.NDArray[np.float64]
    """[2] m, at `written_ns`."""
    speed: npt.NDArray[np.float64]
    """[2] m/s, from `written_ns` on."""
    deadline_ns: int
    stopped: bool
    """`stop` was called."""

    def at(self, now_ns: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Position and speed at a later time, when nothing more was written."""
        driven_s = max(min(now_ns, self.deadline_ns) - self.written_ns, 0) / 1e9
        braked_s = max(now_ns - max(self.deadline_ns, self.written_ns), 0) / 1e9
        size = float(np.linalg.norm(self.speed))
        if size == 0.0:
            return self.position, self.speed
        braked_s = min(braked_s, size / HARDWARE_DECELERATION)
        left = size - HARDWARE_DECELERATION * braked_s
        way = size * driven_s + (size + left) / 2 * braked_s
        return self.position + self.speed / size * way, self.speed / size * left


def moments(path: Path) -> list[Moment]:
    """Everything that was written to the machine, in order."""
    data = path.read_bytes()
    whole = len(data) - len(data) % _RECORD.size
    return [
        Moment(
            written_ns=written_ns,
            position=np.asarray([x, y]),
            speed=np.asarray([vx, vy]),
            deadline_ns=deadline_ns,
            stopped=kind == _STOP,
        )
        for written_ns, x, y, vx, vy, deadline_ns, kind in _RECORD.iter_unpack(data[:whole])
    ]


class SimulatedDriver:
    """Implements `sop.robots.driver.RobotDriver` over the file.

    Args:
        path: the machine; made when missing.
        camera_stops_after_s: after this time pictures and their stamps repeat; None for never.
        fails_after: `read` raises OSError at this call; None for never.
    """

    def __init__(
        self, path: Path, *, camera_stops_after_s: float | None = None, fails_after: int | None = None
    ) -> None:
        self.embodiment = ARM
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        self._camera_stops_after_s = camera_stops_after_s
        self._fails_after = fails_after
        self._reads = 0
        self._began_ns = time.monotonic_ns()
        past = moments(path)
        self._last = (
            past[-1]
            if past
            else Moment(
                written_ns=self._began_ns,
                position=np.zeros(2),
                speed=np.zeros(2),
                deadline_ns=self._began_ns,
                stopped=True,
            )
        )

    def read(self) -> Reading:
        """See `RobotDriver`."""
        self._reads += 1
        if self._reads == self._fails_after:
            raise OSError("the arm does not answer")
        now_ns = time.monotonic_ns()
        position, _ = self._last.at(now_ns)
        picture_ns = now_ns
        if self._camera_stops_after_s is not None:
            picture_ns = min(now_ns, self._began_ns + int(self._camera_stops_after_s * 1e9))
        grey = int(np.clip(128 + 50 * position[0], 0, 255))
        return Reading(
            state=position.astype(np.float32),
            state_ns=now_ns,
            images={"front": np.full((16, 16, 3), grey, np.uint8)},
            images_ns={"front": picture_ns},
        )

    def write(self, action: npt.NDArray[np.float32], deadline_ns: int) -> None:
        """See `RobotDriver`."""
        self._append(np.asarray(action, np.float64) * SCALE * ARM.control_hz, deadline_ns, _WRITE)

    def stop(self) -> None:
        """See `RobotDriver`: the deadline is now."""
        _, speed = self._last.at(time.monotonic_ns())
        self._append(speed, 0, _STOP)

    def close(self) -> None:
        """See `RobotDriver`."""
        if self._file >= 0:
            self.stop()
            os.close(self._file)
            self._file = -1

    def _append(self, speed: npt.NDArray[np.float64], deadline_ns: int, kind: int) -> None:
        now_ns = time.monotonic_ns()
        position, _ = self._last.at(now_ns)
        self._last = Moment(
            written_ns=now_ns, position=position, speed=speed, deadline_ns=deadline_ns, stopped=kind == _STOP
        )
        os.write(self._file, _RECORD.pack(now_ns, *position, *speed, deadline_ns, kind))


def make(settings: dict[str, Any]) -> SimulatedDriver:
    """For `--driver sop.testing.driver:make`: settings `path` and the arguments of `SimulatedDriver`."""
    return SimulatedDriver(Path(settings.pop("path")), **settings)


def write_limits(path: Path) -> Path:
    """`ARM_LIMITS` as a file."""
    path.write_text(json.dumps(ARM_LIMITS))
    return path
