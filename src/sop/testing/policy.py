"""A policy that plans countable chunks and checks how it is used."""

import numpy as np

from sop.core.embodiment import Embodiment, Observation
from sop.core.errors import PolicyRefused
from sop.core.policy import ActionChunk, Conditioning, PolicySpec, Weights


class FakePolicy:
    """Implements `sop.core.policy.Policy`: chunk i holds the values i + h / 100 in every action element.

    Args:
        embodiment: decides the number of action elements.
        action_horizon: predicted steps.
        execution_horizon: executed steps.
        bad_chunk: number of a chunk that is all NaN; None for none.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        *,
        action_horizon: int = 8,
        execution_horizon: int = 8,
        bad_chunk: int | None = None,
    ) -> None:
        self._spec = PolicySpec(
            kind="fake",
            config={},
            embodiment=embodiment,
            action_horizon=action_horizon,
            execution_horizon=execution_horizon,
        )
        self._bad_chunk = bad_chunk
        self.version = 0
        self.chunks: list[ActionChunk] = []
        """Chunks planned since the last reset."""
        self.loaded: list[int] = []
        self.acting = False
        """Set by the test between the first step and the end of an episode: `load` must not be called then."""

    @property
    def spec(self) -> PolicySpec:
        """See `Policy`."""
        return self._spec

    def infer(self, observation: Observation, instruction: str, conditioning: Conditioning) -> ActionChunk:
        """See `Policy`; refuses what no actor should pass."""
        if not instruction or observation.state.shape != (self._spec.embodiment.num_states,):
            raise ValueError(f"not an instruction and an observation: {instruction!r}, {observation.state.shape}")
        if conditioning.advantage_indicator is not None:
            raise ValueError("this policy knows no indicator")
        number = len(self.chunks)
        steps = np.arange(self._spec.action_horizon, dtype=np.float32)[:, None] / 100
        chunk = np.tile(number + steps, (1, self._spec.embodiment.num_actions)).astype(np.float32)
        self.chunks.append(np.full_like(chunk, np.nan) if number == self._bad_chunk else chunk)
        return self.chunks[-1]

    def load(self, weights: Weights, version: int) -> None:
        """See `Policy`; refuses to be swapped while it acts, and half a policy."""
        if self.acting or not weights:
            raise PolicyRefused("a whole policy is swapped between episodes only")
        self.version = version
        self.loaded.append(version)

    def reset(self, seed: int, coherence: float = 0.0) -> None:  # noqa: ARG002 - it does not sample
        """See `Policy`; counts chunks from 0 again."""
        if seed < 0:
            raise ValueError(f"a seed is 0 or more, got {seed}")
        self.chunks.clear()
