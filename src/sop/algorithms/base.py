"""What a learning rule is to the learner, and the labels that several rules share.

Shapes: T steps, B windows, S state elements, A action elements.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sop.core.episode import Episode, Intervention, Outcome
from sop.core.experience import Batch, Collection, StepLabels
from sop.core.policy import Conditioning


class EpisodeFacts(Protocol):
    """What a rule may read of a stored episode: columns, no images. `Episode` is one."""

    @property
    def num_steps(self) -> int:
        """T."""
        ...

    @property
    def policy_version(self) -> int | None:
        """The version that drove or proposed; None for a demonstration."""
        ...

    @property
    def outcome(self) -> Outcome:
        """How the episode ended."""
        ...

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """One entry per maximal run of HUMAN steps, in order."""
        ...

    @property
    def controller(self) -> npt.NDArray[np.uint8]:
        """[T] `Controller` values."""
        ...

    @property
    def state(self) -> npt.NDArray[np.float32]:
        """[T, S] proprioception before the action."""
        ...

    @property
    def action(self) -> npt.NDArray[np.float32]:
        """[T, A] executed actions."""
        ...


class LossPolicy(Protocol):
    """What a rule needs of a policy: see `sop.policies.base.TrainablePolicy.loss`."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """One differentiable loss per window, [B]."""
        ...


class Algorithm(Protocol):
    """A learning rule. The learner's use of it:

    algorithm.prepare(offline_episodes)                       # once, before the first step
    labels = algorithm.annotate(episode)                      # when indexed, and before its first window is loaded
    loss = algorithm.loss(policy, batch, generator)           # every step; [B], seen by the sampler
    manifest(conditioning=algorithm.conditioning())           # with every published policy
    """

    @property
    def collection(self) -> Collection:
        """What the fleet does meanwhile."""
        ...

    def prepare(self, offline: Iterable[Episode]) -> None:
        """Learn from the demonstrations before the first step, e.g. a value function. May take minutes."""
        ...

    def annotate(self, episode: EpisodeFacts) -> StepLabels:
        """Say which steps are learned from. Deterministic and cheap; reads the episode, changes nothing.

        Called from the learner's thread and from the batch loader's, perhaps at once. The loader keeps the labels:
        when the opinion changes, `BatchLoader.relabel` has to be called.
        """
        ...

    def loss(self, policy: LossPolicy, batch: Batch, generator: torch.Generator) -> Tensor:
        """One differentiable loss per window, [B]; the sampler gets it per task and source."""
        ...

    def conditioning(self) -> Conditioning:
        """What actors feed the policy beside observation and instruction."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the rule itself has learned: JSON values and numpy arrays; empty when it learns nothing."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state belongs to another rule.
        """
        ...


class Imitation:
    """The parts that all imitation rules share: the policy's own loss, no conditioning, nothing learned beside it."""

    def prepare(self, offline: Iterable[Episode]) -> None:
        """Nothing to prepare; `offline` is not read."""

    def loss(self, policy: LossPolicy, batch: Batch, generator: torch.Generator) -> Tensor:
        """The policy's loss on the actions that carry weight, [B]."""
        return policy.loss(batch, generator)

    def conditioning(self) -> Conditioning:
        """None: the policy is asked for what it has seen."""
        return Conditioning()

    def state_dict(self) -> dict[str, Any]:
        """Empty: labels are computed from the episodes again."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept an empty state.

        Raises:
            ValueError: the state holds something, so another rule made it.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, the checkpoint holds {sorted(state)}")


def demonstration_labels(num_steps: int) -> StepLabels:
    """Every step counts, and a window may start at every step."""
    return StepLabels(
        loss_weight=np.ones(num_steps, np.float32),
        segment=np.zeros(num_steps, np.int32),
        can_start=np.ones(num_steps, np.bool_),
    )


def ignored_labels(num_steps: int) -> StepLabels:
    """Nothing is learned from the episode."""
    return StepLabels(
        loss_weight=np.zeros(num_steps, np.float32),
        segment=np.zeros(num_steps, np.int32),
        can_start=np.zeros(num_steps, np.bool_),
    )


def is_usable_demonstration(episode: EpisodeFacts) -> bool:
    """Whether people controlled every step and brought it to an end, good or bad."""
    return episode.policy_version is None and episode.outcome is not Outcome.ABORTED
