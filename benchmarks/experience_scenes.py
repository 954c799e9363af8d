"""What both sides of the window benchmark store: episodes of a made-up tabletop, equal to the last bit.

Plain numpy and one seed, so that two environments draw the same pixels without a file between them:

    front  224 x 224   a textured table under a fixed camera; five textured blocks move on it
    wrist  224 x 224   the same table seen from a camera that travels over it
    state [32], action [14]: sums of slow sine waves

Every frame carries sensor noise (standard deviation 2 grey levels), as a real camera's does: without it a video
codec is flattered, with white noise alone every codec is hopeless. Used by `experience.py` and, in lerobot's own
environment, by `peer_lerobot_dataset.py`; imports nothing of `sop`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SIZE = 224
"""Height and width of both cameras, pixels."""
CAMERAS = ("front", "wrist")
NUM_STATES = 32
NUM_ACTIONS = 14
HORIZON = 16
"""Steps of the action chunk of a window."""
FPS = 20
TASK = "sort-blocks"
INSTRUCTION = "sort the blocks by colour"
_TABLE = 512
_NUM_BLOCKS = 5
_NOISE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One episode of T steps."""

    images: dict[str, npt.NDArray[np.uint8]]
    """Camera -> [T, SIZE, SIZE, 3]."""
    state: npt.NDArray[np.float32]
    """[T, NUM_STATES]"""
    action: npt.NDArray[np.float32]
    """[T, NUM_ACTIONS]"""


def scenes(episodes: int, steps: int) -> Iterator[Scene]:
    """Make `episodes` scenes of `steps` steps, one after the other; scene i depends on i and `steps` alone."""
    for number in range(episodes):
        yield make_scene(number, steps)


def make_scene(number: int, steps: int) -> Scene:
    """The scene with this number: about 1 ms per frame."""
    rng = np.random.default_rng([number, steps])
    table = _texture(rng, _TABLE, contrast=34.0) + rng.uniform(90, 150, 3)
    blocks = [_texture(rng, int(rng.integers(18, 44)), 26.0) + rng.uniform(40, 215, 3) for _ in range(_NUM_BLOCKS)]
    paths = 0.5 + 0.42 * _waves(rng, steps, 2 * _NUM_BLOCKS)
    camera = 0.5 + 0.5 * _waves(rng, steps, 2)
    noise = rng.normal(0.0, _NOISE, (8, SIZE, SIZE, 1))
    images = {name: np.empty((steps, SIZE, SIZE, 3), np.uint8) for name in CAMERAS}
    for step in range(steps):
        world = table.copy()
        for block, (row, column) in zip(blocks, paths[step].reshape(-1, 2), strict=True):
            top, left = int(row * (_TABLE - len(block))), int(column * (_TABLE - len(block)))
            world[top : top + len(block), left : left + len(block)] = block
        top, left = (camera[step] * (_TABLE - SIZE)).astype(int)
        views = {"front": world[::2, ::2][16:240, 16:240], "wrist": world[top : top + SIZE, left : left + SIZE]}
        for shift, (name, view) in enumerate(views.items()):
            grain = np.roll(noise[(step + 3 * shift) % 8], int(rng.integers(SIZE)), axis=0)
            images[name][step] = np.clip(view + grain, 0, 255)
    return Scene(images=images, state=_waves(rng, steps, NUM_STATES), action=_waves(rng, steps, NUM_ACTIONS))


def features(image_type: str) -> dict[str, dict[str, Any]]:
    """The same content as LeRobot features; `image_type` is `video` or `image`."""
    picture = {"dtype": image_type, "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    numbers = {"state": NUM_STATES, "action": NUM_ACTIONS}
    names = {"state": "observation.state", "action": "action"}
    return {
        **{f"observation.images.{camera}": dict(picture) for camera in CAMERAS},
        **{
            names[kind]: {"dtype": "float32", "shape": (count,), "names": [f"{kind}_{n}" for n in range(count)]}
            for kind, count in numbers.items()
        },
    }


def _texture(rng: np.random.Generator, size: int, contrast: float) -> npt.NDArray[np.float32]:
    """Smooth coloured noise over four octaves, [size, size, 3], mean about 0."""
    texture = np.zeros((size, size, 3), np.float32)
    for octave, strength in ((4, 1.0), (12, 0.6), (40, 0.35), (120, 0.2)):
        grid = rng.normal(0.0, strength, (octave + 2, octave + 2, 3)).astype(np.float32)
        place = np.linspace(0, octave, size, dtype=np.float32)
        low, part = place.astype(int), (place % 1)[:, None, None]
        rows = grid[low] * (1 - part) + grid[low + 1] * part
        part = part.reshape(1, -1, 1)
        texture += rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return np.asarray(texture * (contrast / 2), np.float32)


def _waves(rng: np.random.Generator, steps: int, count: int) -> npt.NDArray[np.float32]:
    """Slow movements in [-1, 1], [steps, count]: two sine waves of 3 to 15 s each."""
    time = np.arange(steps)[:, None] / FPS
    period, phase = rng.uniform(3, 15, (2, count)), rng.uniform(0, 2 * np.pi, (2, count))
    waves = np.sin(2 * np.pi * time / period[0] + phase[0]) + np.sin(2 * np.pi * time / period[1] + phase[1])
    return np.asarray(waves / 2, np.float32)
