"""What a learning rule is to the learner, and the labels that several rules share.

Shapes: T steps, B windows, S state elements, A action elements.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sop.core.episode import Outcome
from sop.core.experience import Batch, Collection, Library, Sidecar, Source, StepLabels, StoredEpisode
from sop.core.layout import before_fleet
from sop.core.policy import Conditioning, PolicySpec


class LossPolicy(Protocol):
    """What a rule needs of a policy: see `sop.policies.base.TrainablePolicy.loss`."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """One differentiable loss per window, [B]."""
        ...


class TrainedPolicy(Protocol):
    """What a rule may know of the policy before the first step, e.g. to start a value function from it."""

    @property
    def spec(self) -> PolicySpec:
        """What the policy is."""
        ...

    @property
    def module(self) -> nn.Module:
        """All weights; read only."""
        ...


class WarmUpSettings(Protocol):
    """How long the learner trains on the offline buffer before the fleet starts, to install an indicator.

    It ends when the branches are separate and the null branch is sound, or after `warmup_max_steps`.
    """

    @property
    def install(self) -> str:
        """`warmup`, or `cold`: no such steps, the indicator is learned while the fleet runs."""
        ...

    @property
    def warmup_max_steps(self) -> int:
        """Learner steps."""
        ...

    @property
    def warmup_separation(self) -> float:
        """E||v(+) - v(null)||^2 / E||v(null)||^2 that is to be reached, v being the policy's velocity."""
        ...

    @property
    def warmup_null_tolerance(self) -> float:
        """The null branch's loss on held-out windows may exceed the base policy's by this part of it."""
        ...


class Algorithm(Protocol):
    """A learning rule. The learner's use of it:

        policy = make_policy(base | algorithm.policy_settings)    # once
        algorithm.prepare(library, policy)                        # once, before the first step; not after a resume
        algorithm.indexed(episode, source)                        # every new episode, in the order of the index
        sidecar = algorithm.sidecar(episode)                      # after that; stored, never read back by the learner
        if algorithm.refresh(learner_step, library):              # before every step
            loader.relabel()                                      # its opinion has changed: ask again
        labels = algorithm.annotate(episode)                      # when indexed, and before its first window is loaded
        loss = algorithm.loss(policy, batch, generator)           # every step; [B], seen by the sampler
        manifest(conditioning=algorithm.conditioning())           # with every published policy

    `Imitation` has all of it but `annotate`.
    """

    @property
    def collection(self) -> Collection:
        """What the fleet does meanwhile."""
        ...

    @property
    def needs_rollouts(self) -> bool:
        """Whether rollouts of the base policy and a warm-up of the learner come before the fleet."""
        ...

    @property
    def warm_up(self) -> WarmUpSettings | None:
        """Offline steps that install what the base policy lacks; None when there is nothing to install."""
        ...

    @property
    def policy_settings(self) -> Mapping[str, Any]:
        """Settings of the policy that the rule needs beside those of the base policy, e.g. an indicator."""
        ...

    def prepare(self, library: Library, policy: TrainedPolicy) -> None:
        """Learn from the offline buffer before the first step, e.g. a value function. May take minutes.

        Raises:
            RunError: the rule cannot work with what there is; says what is missing.
        """
        ...

    def indexed(self, episode: StoredEpisode, source: Source) -> None:
        """Take note of a new episode. In the learner's thread, in the order of the index; not repeated by a resume."""
        ...

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        """Say which steps are learned from. Reads the episode, changes nothing; equal until `refresh` says True.

        `segment` and `can_start` of an episode never change, nor which weights are positive: the index keeps where
        windows may start. Called in the learner's thread.
        """
        ...

    def sidecar(self, episode: StoredEpisode) -> Sidecar | None:
        """The numbers behind the labels, to be stored beside the episode; None when there are none."""
        ...

    def refresh(self, learner_step: int, library: Library) -> bool:
        """Whether the labels have changed since the last call; may learn (and block) before it answers."""
        ...

    def loss(self, policy: LossPolicy, batch: Batch, generator: torch.Generator) -> Tensor:
        """One differentiable loss per window, [B]; the sampler gets it per task and source.

        Depends on nothing but its arguments and the settings: with several ranks each calls it for its part of the
        batch, and only the first one calls anything else.
        """
        ...

    def conditioning(self) -> Conditioning:
        """What actors feed the policy beside observation and instruction."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """What the rule knows about itself, logged once a second."""
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

    needs_rollouts = False

    @property
    def warm_up(self) -> WarmUpSettings | None:
        """None: there is nothing to install."""
        return None

    @property
    def policy_settings(self) -> Mapping[str, Any]:
        """None: any policy will do."""
        return {}

    def prepare(self, library: Library, policy: TrainedPolicy) -> None:
        """Nothing to prepare; nothing is read."""

    def indexed(self, episode: StoredEpisode, source: Source) -> None:
        """Nothing is kept of an episode."""

    def sidecar(self, episode: StoredEpisode) -> Sidecar | None:  # noqa: ARG002
        """None: the labels say everything."""
        return None

    def refresh(self, learner_step: int, library: Library) -> bool:  # noqa: ARG002
        """Labels never change."""
        return False

    def loss(self, policy: LossPolicy, batch: Batch, generator: torch.Generator) -> Tensor:
        """The policy's loss on the actions that carry weight, [B]."""
        return policy.loss(batch, generator)

    def conditioning(self) -> Conditioning:
        """None: the policy is asked for what it has seen."""
        return Conditioning()

    def metrics(self) -> Mapping[str, float]:
        """Nothing beside the loop's own."""
        return {}

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


class Origin(Enum):
    """Where an episode comes from."""

    DEMONSTRATION = "demonstration"
    ROLLOUT = "rollout"
    """Of the base policy, before the fleet started."""
    FLEET = "fleet"


def origin_of(episode: StoredEpisode) -> Origin:
    """Told by who acted; a fleet that acts with version 0 is still a fleet."""
    if episode.policy_version is None:
        return Origin.DEMONSTRATION
    return Origin.ROLLOUT if before_fleet(episode.actor_id) else Origin.FLEET


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


def is_usable_demonstration(episode: StoredEpisode) -> bool:
    """Whether people controlled every step and brought it to an end, good or bad."""
    return episode.policy_version is None and episode.outcome is not Outcome.ABORTED
