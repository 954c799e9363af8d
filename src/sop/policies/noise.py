"""The noise that a policy samples from when it acts."""

from typing import Protocol

import numpy as np
import numpy.typing as npt


class NoiseSource(Protocol):
    """Where `infer_many` gets its noise from: a `numpy.random.Generator`, or `EpisodeNoise`."""

    def standard_normal(self, size: tuple[int, ...], dtype: type[np.float32]) -> npt.NDArray[np.float32]:
        """Normal noise of this shape, each call anew."""
        ...


class EpisodeNoise:
    """Noise of one episode: sqrt(1 - c) times what is drawn anew plus sqrt(c) times what the episode has in common.

    Every draw is standard normal whatever the coherence c is, so a policy is never given noise that it was not
    trained on. With coherence 0 it is `numpy.random.default_rng(seed)`.

    Args:
        seed: of all draws.
        coherence: c in [0, 1], the correlation of any two draws of the same shape.

    Raises:
        ValueError: a coherence outside of [0, 1].
    """

    def __init__(self, seed: int, coherence: float = 0.0) -> None:
        if not 0 <= coherence <= 1:
            raise ValueError(f"coherence must be in [0, 1], got {coherence}")
        self._rng = np.random.default_rng(seed)
        self._new = np.float32(np.sqrt(1 - coherence))
        self._kept = np.float32(np.sqrt(coherence))
        self._common: dict[tuple[int, ...], npt.NDArray[np.float32]] = {}

    def standard_normal(self, size: tuple[int, ...], dtype: type[np.float32]) -> npt.NDArray[np.float32]:
        """See `NoiseSource`."""
        drawn = self._rng.standard_normal(size, dtype)
        if not self._kept:
            return drawn
        if size not in self._common:
            self._common[size] = self._rng.standard_normal(size, dtype)
        return self._new * drawn + self._kept * self._common[size]
