"""A robot without a physics engine: a hand in a unit square that has to touch the block of the right colour.

It has the character of the real thing (pixels decide, the instruction decides, lab and deployment differ, pushes
happen) at a thousandth of the cost, so that tests of the whole loop finish in seconds.

        1 +-----------------+      Each block lies within BOX of its home; the lab uses the central half of
          |  [r]       [g]  |      that box. The hand begins within BOX of the middle. `top` sees the whole
          |        +        |      square, `wrist` the part within WRIST_REACH of the hand, in more detail.
          |       [b]       |
        0 +-----------------+
          0                 1
"""

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment
from sop.robots.base import SimulatedRobot

STEP = 0.05
"""Distance per step and axis at full command, in widths of the square."""
TOUCH = 0.06
"""The block is touched when the hand is this close to its centre."""
BOX = 0.16
"""Half width of the box in which a block or the hand begins."""
WRIST_REACH = 0.25
_HALF_SIZE = np.array([[0.06], [0.06], [0.06], [0.035]])
"""Half width of the three blocks and of the hand."""
_COLOURS = np.array([[220, 50, 50], [60, 190, 70], [70, 100, 230], [250, 250, 250]], np.float64)
_GROUND = np.array([70.0, 62.0, 56.0])
_HOMES = np.array([[0.22, 0.78], [0.78, 0.78], [0.5, 0.2], [0.5, 0.55]])
"""Red, green and blue block, hand."""
_BLOCKS = {"touch-red": 0, "touch-green": 1, "touch-blue": 2}


def toy_embodiment(image_size: int = 24) -> Embodiment:
    """Two square cameras, the hand's position as state, displacement commands, no gripper."""
    return Embodiment(
        name="toy-hand",
        cameras={"top": (image_size, image_size), "wrist": (image_size, image_size)},
        state_names=("hand_x", "hand_y"),
        action_names=("dx", "dy"),
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        hold_action=(0.0, 0.0),
        max_action_change=(None, None),  # the bounds are the speed limit
        control_hz=20.0,
    )


class ToyRobot(SimulatedRobot):
    """Tasks `touch-red`, `touch-green` and `touch-blue`; the expert needs about 6 steps in the lab, 13 in deployment.

    Args:
        image_size: height and width of both cameras, pixels; 16 to 32 is plenty.
    """

    num_displacements: ClassVar[int] = 2
    idle_action: ClassVar[tuple[float, ...]] = (0.0, 0.0)
    push_window: ClassVar[tuple[int, int]] = (1, 6)

    def __init__(self, image_size: int = 24) -> None:
        if image_size < 4:
            raise ValueError(f"robot.image_size must be at least 4 for toy, got {image_size}")
        self.embodiment = toy_embodiment(image_size)
        self.instructions = {
            task: (f"go to the {colour} block", f"touch the {colour} one")
            for task, colour in (("touch-red", "red"), ("touch-green", "green"), ("touch-blue", "blue"))
        }
        super().__init__()
        edges = np.linspace(0.0, 1.0, image_size + 1)
        self._edges = {"top": edges, "wrist": (2 * edges - 1) * WRIST_REACH}
        self._offsets = np.zeros((4, 2))
        self._places = _HOMES.copy()
        self._target = 0

    def horizon(self, task: str) -> int:
        """25 steps for every task."""
        self._require_task(task)
        return 25

    def expert_action(self) -> npt.NDArray[np.float32]:
        """Straight to the block [2], clipped."""
        return np.asarray(np.clip(self._to_block() / STEP, -1.0, 1.0), np.float32)

    def progress(self) -> float:
        """10 at the block, less by 10 per width of distance, never below 0."""
        return max(0.0, 10.0 * (1.0 - float(np.linalg.norm(self._to_block()))))

    @property
    def start_in_box(self) -> npt.NDArray[np.float64]:
        """Offsets of the three blocks and the hand from home, [8], in [-1, 1]."""
        return self._offsets.reshape(-1).copy()

    def _begin(self, task: str, seed: int, box: float, max_steps: int) -> None:  # noqa: ARG002
        self._target = _BLOCKS[task]
        self._offsets = np.random.default_rng(seed).uniform(-box, box, (4, 2))
        self._places = _HOMES + BOX * self._offsets

    def _apply(self, action: npt.NDArray[np.float32]) -> bool:
        self._places[3] = np.clip(self._places[3] + STEP * action, 0.0, 1.0)
        return bool(np.linalg.norm(self._to_block()) <= TOUCH)

    def _render(self) -> dict[str, npt.NDArray[np.uint8]]:
        return {
            "top": _draw(self._places, self._edges["top"]),
            "wrist": _draw(self._places - self._places[3], self._edges["wrist"]),
        }

    def _state(self) -> npt.NDArray[np.float32]:
        return np.array(self._places[3], np.float32)

    def _to_block(self) -> npt.NDArray[np.float64]:
        self._require_world()
        return np.asarray(self._places[self._target] - self._places[3])


def _draw(places: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Squares with exact anti-aliasing: each pixel's colour is weighted by the covered share of its area."""
    pixel = edges[1] - edges[0]
    size = len(edges) - 1
    share = []
    for centres in (places[:, 0:1], places[:, 1:2]):
        right = np.minimum(edges[1:], centres + _HALF_SIZE)
        left = np.maximum(edges[:-1], centres - _HALF_SIZE)
        share.append(np.maximum(right - left, 0.0) / pixel)
    columns = (share[0][:, :, None] * (_COLOURS - _GROUND)[:, None, :]).reshape(len(places), -1)
    image = (share[1].T @ columns).reshape(size, size, 3) + _GROUND
    return np.ascontiguousarray(np.minimum(np.maximum(image, 0.0), 255.0)[::-1], np.uint8)
