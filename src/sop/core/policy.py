"""What an actor needs of a policy, and what a policy needs to be run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment, Observation
from sop.core.errors import InvalidRecord

ActionChunk = npt.NDArray[np.float32]
"""[H, A] actions for the next H = `action_horizon` control steps, in action units."""

Weights = Mapping[str, npt.NDArray[Any]]
"""Tensor name -> array. Weights cross process borders as named numpy arrays, never as objects of a framework."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What the actor feeds the policy besides observation and instruction; travels in the manifest."""

    advantage_indicator: bool | None = None
    """Ask for actions that are better than expected (RECAP); None asks for the unconditional policy."""
    guidance: float = 1.0
    """beta of classifier-free guidance: v(None) + beta * (v(indicator) - v(None)); 1 needs one pass only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """All that is needed, beside the weights, to rebuild a policy and run it on a robot."""

    kind: str
    """Name of the policy class in `sop.policies.POLICIES`."""
    config: Mapping[str, Any]
    """Constructor settings of that class (JSON values)."""
    embodiment: Embodiment
    """The robot it was trained for."""
    action_horizon: int
    """H, the number of predicted steps per inference."""
    execution_horizon: int
    """Steps executed before the next inference."""
    normalization: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Statistics that the policy applies to its inputs and outputs; frozen with the base policy."""
    processors: Mapping[str, Any] = field(default_factory=dict)
    """Pre- and post-processing that belongs to a foreign policy (JSON values); its arrays travel as weights."""

    def __post_init__(self) -> None:
        if not 1 <= self.execution_horizon <= self.action_horizon:
            raise InvalidRecord(
                "execution_horizon", f"must be in [1, {self.action_horizon}], got {self.execution_horizon}"
            )


class Policy(Protocol):
    """Maps what the robot sees to what it does. The actor's use of it:

    chunk = policy.infer(observation, instruction, conditioning)    # every execution_horizon steps
    policy.load(staged.weights, staged.version)                     # between two episodes only
    """

    version: int
    """`policy_version` of the loaded weights."""

    @property
    def spec(self) -> PolicySpec:
        """What this policy needs to run."""
        ...

    def infer(self, observation: Observation, instruction: str, conditioning: Conditioning) -> ActionChunk:
        """Plan the next steps: [H, A], finite or not (the safety gate decides). Blocks for one inference."""
        ...

    def load(self, weights: Weights, version: int) -> None:
        """Replace the weights. All or nothing.

        Raises:
            PolicyRefused: names, shapes or dtypes are not those of this policy; the old weights stay.
        """
        ...

    def reset(self, seed: int, coherence: float = 0.0) -> None:
        """Begin an episode: forget history and seed the sampling noise, so that an episode can be repeated.

        Args:
            seed: of the noise.
            coherence: correlation in [0, 1] of the noise of any two inferences until the next reset (exploration); a
                policy that does not sample has none.
        """
        ...
