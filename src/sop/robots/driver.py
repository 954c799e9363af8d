"""What a real robot offers: read, write, stop. The gate's process owns it; nothing else touches the machine.

while True:                                          # in the gate's process, control_hz times a second
    reading = driver.read()
    driver.write(action, deadline_ns)                # the last promise: another write before the deadline,
driver.stop()                                        # or the machine stops by itself
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was measured last; stamps are CLOCK_MONOTONIC of this machine, nanoseconds, of the measurement itself."""

    state: npt.NDArray[np.float32]
    """Proprioception [S]."""
    state_ns: int
    images: Mapping[str, npt.NDArray[np.uint8]]
    """Camera -> RGB [h, w, 3]."""
    images_ns: Mapping[str, int]
    """Camera -> when its picture was taken."""


class RobotDriver(Protocol):
    """The machine. Used by one thread. To add one: write a class like this and a function `(settings) -> driver`,
    and name it to the gate's process as `module:function`.
    """

    @property
    def embodiment(self) -> Embodiment:
        """What it can do; `control_hz` is the rate of the loop."""
        ...

    def read(self) -> Reading:
        """The newest measurements; waits for none of them (a camera that stands still repeats picture and stamp).

        Raises:
            OSError: the machine does not answer.
        """
        ...

    def write(self, action: npt.NDArray[np.float32], deadline_ns: int) -> None:
        """Execute an action [A] until the next one; does not block.

        Args:
            action: finite, within the limits.
            deadline_ns: monotonic time. Without another write until then the machine itself (its controller, not
                this program, which may be dead) must decelerate and hold.

        Raises:
            OSError: the machine does not answer.
        """
        ...

    def stop(self) -> None:
        """Decelerate and hold by the machine's own means, now. Idempotent."""
        ...

    def close(self) -> None:
        """Stop and let go of the connection. Idempotent."""
        ...
