"""Chunk playback: one inference gives the actions of the next `execution_horizon` steps."""

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Observation
from sop.core.policy import ActionChunk, Conditioning, Policy


class ChunkPlayback:
    """Plays a policy's chunks action by action.

    Args:
        policy: plans the chunks.
        conditioning: what it is conditioned on, from the manifest.
    """

    def __init__(self, policy: Policy, conditioning: Conditioning) -> None:
        self._policy = policy
        self._conditioning = conditioning
        self._chunk: ActionChunk | None = None
        self._position = 0

    @property
    def plans_next(self) -> bool:
        """Whether the next step needs an inference, so that only then somebody has to look."""
        return self._chunk is None or self._position >= self._policy.spec.execution_horizon

    def next(self, observation: Observation, instruction: str) -> npt.NDArray[np.float32]:
        """The policy's proposal [A] for this step; blocks for an inference when the chunk is played out."""
        if self._chunk is None or self.plans_next:
            self._chunk = self._policy.infer(observation, instruction, self._conditioning)
            self._position = 0
        action: npt.NDArray[np.float32] = self._chunk[self._position]
        self._position += 1
        return action

    def drop(self) -> None:
        """Forget the rest of the chunk, e.g. when control changes hands: the next step plans anew."""
        self._chunk = None
