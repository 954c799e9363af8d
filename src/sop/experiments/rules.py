"""The learning rules of the arms: RECAP's labels from a value function that is given; controls ignore the indicator.

arm              the policy learns from            told
most             all windows                       +1, -1 or nothing
positive-only    all windows                       +1 or nothing
no-indicator     all windows                       nothing
filtered         windows that are +1               nothing
weighted         all windows, by advantage         nothing
demonstrations   people's, before the fleet        nothing
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sop.algorithms import LossPolicy
from sop.algorithms.advantage import Plan as EpisodePlan
from sop.algorithms.base import TrainedPolicy
from sop.algorithms.critic import Critic, ValueModel
from sop.algorithms.recap import Recap, RecapSettings
from sop.algorithms.weighted_bc import WeightedCloningSettings, advantage_weights
from sop.core.errors import RunError
from sop.core.experience import Batch, Collection, Library, StepLabels, StoredEpisode
from sop.core.policy import Conditioning
from sop.core.settings import build_settings
from sop.experiments.plan import Arm, Kind, Lessons, Plan
from sop.values import FitReport


def arm_settings(arm: Arm, plan: Plan, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """RECAP's settings in an arm: those of the stream's run, but for what the arm is about."""
    return {
        **recorded,
        "value_refresh": 0,
        "indicator": arm.kind or "embed",
        "install": "warmup" if arm.warm else "cold",
        "condition_negatives": arm.negatives,
        "rollouts": plan.rollouts,
        "demonstrations": plan.demonstrations,
        "offline_positive": plan.offline_positive,
        "warmup_max_steps": plan.warmup_max_steps,
        "guidance": 1.0,
        **({} if arm.kind else {"negative_weight": 1.0}),  # who is told nothing knows nothing of bad steps
    }


def make_rule(arm: Arm, plan: Plan, recorded: Mapping[str, Any], control_hz: float) -> "GivenValues":
    """The rule of an arm; it needs `use_values` before anything else."""
    settings = build_settings(RecapSettings, arm_settings(arm, plan, recorded), "algorithm recap")
    if arm.kind is not None:
        return GivenValues(settings, control_hz)
    return CONTROLS[arm.lessons](settings, control_hz)


def make_base_rule(kind: Kind, plan: Plan, recorded: Mapping[str, Any], control_hz: float) -> "GivenValues":
    """The rule that makes a tuned base policy: demonstrations alone, labelled by advantage."""
    values = arm_settings(Arm(kind=kind), plan, recorded)
    values |= {"demonstrations": "advantage", "rollouts": "value_only"}
    return FromDemonstrations(build_settings(RecapSettings, values, "algorithm recap"), control_hz)


class GivenValues(Recap):
    """RECAP with a value function that somebody else has fitted."""

    def __init__(self, settings: RecapSettings, control_hz: float) -> None:
        super().__init__(settings, control_hz)
        self.critic = FittedCritic(settings, control_hz)
        self.values: ValueModel | None = None
        """The value function itself, which keeps nothing; None before `use_values`."""

    def use_values(self, state: Mapping[str, Any], folder: Path) -> None:
        """Take the value function of a saved rule; thresholds begin anew.

        Args:
            state: of the rule that fitted it.
            folder: keeps the values of episodes that were asked for, for all arms.

        Raises:
            RunError: there is none in it.
        """
        self.critic.load_state_dict(state)
        self.values = self.critic.function
        if self.values is None:
            raise RunError("the stream's checkpoint holds no value function")
        self.critic.function = KeptValues(self.values, folder)


class FromDemonstrations(GivenValues):
    """Trains on what is there, for `offline_steps`."""

    collection = Collection.NOTHING


class WithoutIndicator(GivenValues):
    """The same windows and labels; the policy is told nothing."""

    @property
    def policy_settings(self) -> Mapping[str, Any]:
        """The base policy's own."""
        return {}

    def conditioning(self) -> Conditioning:
        """None."""
        return Conditioning()

    def loss(self, policy: LossPolicy, batch: Batch, generator: torch.Generator) -> Tensor:
        """The policy's loss [B]."""
        return policy.loss(replace(batch, advantage_indicator=None), generator)


class PositiveAlone(WithoutIndicator):
    """Windows that are not positive give no gradient (the sampler sees their losses all the same)."""

    def loss(self, policy: LossPolicy, batch: Batch, generator: torch.Generator) -> Tensor:
        """The policy's loss [B]; of windows that are left out without a graph."""
        losses = super().loss(policy, batch, generator)
        if batch.advantage_indicator is None:
            return losses
        positive = torch.from_numpy(batch.advantage_indicator > 0).to(losses.device)
        return torch.where(positive, losses, losses.detach())


class Weighted(WithoutIndicator):
    """Weights of `weighted_bc` with its defaults, from this rule's values and thresholds."""

    def weights_and_indicator(
        self, episode: StoredEpisode, plan: EpisodePlan
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8] | None]:
        """See `AdvantageRule`; no indicator."""
        return advantage_weights(self, episode, plan, WeightedCloningSettings()), None


class DemonstrationsAlone(WithoutIndicator):
    """As many steps, on what was recorded without a policy; it waits for no episode."""

    collection = Collection.NOTHING

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        """See `Algorithm`; no window starts in an episode in which a policy acted."""
        labels = super().annotate(episode)
        if episode.policy_version is None:
            return labels
        return replace(labels, can_start=np.zeros_like(labels.can_start))


CONTROLS: Mapping[Lessons, type[WithoutIndicator]] = {
    "all": WithoutIndicator,
    "positive": PositiveAlone,
    "weighted": Weighted,
    "demonstrations": DemonstrationsAlone,
}
"""Rules of the arms that are told nothing."""


class FittedCritic(Critic):
    """A critic that is ready before `prepare`."""

    def prepare(self, library: Library, policy: TrainedPolicy) -> None:
        """Nothing is fitted."""


class KeptValues:
    """A frozen `ValueModel` whose predictions are kept as files, so that every arm of a seed gets the same, once.

    Args:
        function: predicts what is not kept.
        folder: one file per stored episode (actor and number name it); processes may share it.
    """

    def __init__(self, function: ValueModel, folder: Path) -> None:
        self._function = function
        self._folder = folder
        self.version = function.version

    @property
    def task_steps(self) -> Mapping[str, int]:
        """See `ValueModel`."""
        return self._function.task_steps

    def fit(self, episodes: Sequence[StoredEpisode], steps: int | None = None) -> FitReport:
        """Refused: the value function of an experiment is the same for all.

        Raises:
            RunError: always.
        """
        raise RunError(f"a value function that is kept cannot be fitted to {len(episodes)} episodes in {steps} steps")

    def predict(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """[T]; blocks for a prediction when it is not kept."""
        path = self._folder / f"{episode.actor_id}-{episode.sequence:08d}.npy"
        if path.exists():
            with contextlib.suppress(ValueError, OSError):
                kept: npt.NDArray[np.float32] = np.load(path)
                if kept.shape == (episode.num_steps,):
                    return kept
        values = self._function.predict(episode)
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        with draft.open("wb") as file:
            np.save(file, values)
        draft.replace(path)
        return values

    def returns(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """See `ValueModel`."""
        return self._function.returns(episode)

    def advantages(
        self, episode: StoredEpisode, values: npt.NDArray[np.float32], lookahead: int
    ) -> npt.NDArray[np.float32]:
        """See `ValueModel`."""
        return self._function.advantages(episode, values, lookahead)

    def state_dict(self) -> dict[str, Any]:
        """See `ValueModel`."""
        return self._function.state_dict()
