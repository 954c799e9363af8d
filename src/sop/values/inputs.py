"""Stored steps as the tensors that a value network reads.

Shapes: N steps, S state elements.
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from sop.core.embodiment import Embodiment
from sop.core.errors import InvalidRecord
from sop.core.experience import StoredEpisode
from sop.policies.normalization import LARGEST_STATE, compute_normalization
from sop.policies.sentences import TextEncoder
from sop.policies.vision import random_shift
from sop.values.network import ValueInputs

Statistics = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Mean and standard deviation of the state, [S] each."""


def known_statistics(normalization: Mapping[str, tuple[float, ...]], count: int) -> Statistics | None:
    """Those of the policy for S = `count`; None when it keeps none of its own, so that the first fit computes them.

    Raises:
        ValueError: only one of them is there, or one has a wrong length or values that cannot be.
    """
    if "state_mean" not in normalization and "state_std" not in normalization:
        return None
    mean, std = (np.asarray(normalization.get(key, ()), np.float32) for key in ("state_mean", "state_std"))
    if mean.shape != (count,) or std.shape != (count,) or not np.isfinite(mean).all() or not (std > 0).all():
        raise ValueError(f"normalization: state_mean and state_std (positive) need {count} finite values each")
    return mean, std


def fitted_statistics(episodes: Sequence[StoredEpisode]) -> Statistics:
    """Those of all steps of these episodes.

    Raises:
        ValueError: there is no step.
    """
    found = compute_normalization([one.state for one in episodes], [one.action for one in episodes])
    return np.asarray(found["state_mean"], np.float32), np.asarray(found["state_std"], np.float32)


class FrameReader:
    """Decodes, checks and normalises. Thread-safe.

    Args:
        embodiment: names and sizes of the cameras, length of the state.
        encoder: of the instructions; used by one thread at a time.
        device: of the tensors.
    """

    def __init__(self, embodiment: Embodiment, encoder: TextEncoder, device: torch.device) -> None:
        self._body = embodiment
        self._encoder = encoder
        self._device = device
        self._lock = threading.Lock()

    def read(
        self,
        rows: Sequence[tuple[StoredEpisode, int]],
        statistics: Statistics,
        largest_shift: int = 0,
        generator: torch.Generator | None = None,
    ) -> ValueInputs:
        """N pairs of episode and step; with a generator every image is shifted at random by up to `largest_shift`.

        Raises:
            InvalidRecord: a frame is missing, damaged or of another size, or a state has another length.
        """
        images = []
        for camera, size in self._body.cameras.items():
            pixels = np.stack([_frame(episode, camera, step, size) for episode, step in rows])
            if generator is not None and largest_shift > 0:
                pixels = random_shift(pixels, largest_shift, generator)
            images.append(torch.from_numpy(pixels).to(self._device))
        state = np.stack([_state(episode, step, self._body.num_states) for episode, step in rows])
        normalised = np.clip((state - statistics[0]) / statistics[1], -LARGEST_STATE, LARGEST_STATE)
        return ValueInputs(tuple(images), torch.from_numpy(normalised).to(self._device), self._text(rows))

    def _text(self, rows: Sequence[tuple[StoredEpisode, int]]) -> torch.Tensor:
        instructions = [episode.instruction for episode, _ in rows]
        distinct = list(dict.fromkeys(instructions))
        with self._lock:
            vectors = self._encoder.encode(distinct)
        return torch.from_numpy(vectors[[distinct.index(text) for text in instructions]]).to(self._device)


def _frame(episode: StoredEpisode, camera: str, step: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    frame = episode.frame(camera, step)
    if frame.shape != (*size, 3) or frame.dtype != np.uint8:
        found = f"{frame.dtype.name} {frame.shape}"
        raise InvalidRecord(f"images.{camera}", f"must be uint8 {(*size, 3)}, got {found}", step=step)
    return frame


def _state(episode: StoredEpisode, step: int, count: int) -> npt.NDArray[np.float32]:
    state: npt.NDArray[np.float32] = episode.state[step]
    if state.shape != (count,):
        raise InvalidRecord("state", f"needs {count} elements for this embodiment, got {state.shape}", step=step)
    return state
