"""Behaviour cloning with continuous advantage weights: RECAP's value function without an indicator (spec D.4).

    weight of a policy step = clip(exp((A - threshold) / (spread * temperature)), min_weight, max_weight)

with threshold and spread (standard deviation) of the task's advantages: a step at the threshold has weight 1. People's
steps have weight 1, steps before a takeover `min_weight`, steps of which nothing is known 1. `min_weight` is positive,
so that where windows start never changes. (Compare "Dissecting advantage-guided post-training", arXiv 2609.28161.)
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sop.algorithms.advantage import AdvantageRule, Plan
from sop.algorithms.critic_settings import AdvantageSettings
from sop.algorithms.segmentation import StepKind
from sop.core.experience import StoredEpisode


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedCloningSettings(AdvantageSettings):
    """Settings of `WeightedCloning`; `policy_weight` multiplies the weights of policy steps.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    temperature: float = 0.5
    """Spreads above the threshold at which the weight is e."""
    min_weight: float = 0.01
    """Least weight."""
    max_weight: float = 3.0
    """Greatest weight."""

    def __post_init__(self) -> None:
        AdvantageSettings.__post_init__(self)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 < self.min_weight <= 1 <= self.max_weight < float("inf"):
            raise ValueError(
                f"0 < min_weight <= 1 <= max_weight is needed, got min_weight {self.min_weight} and "
                f"max_weight {self.max_weight}"
            )


class WeightedCloning(AdvantageRule):
    """Clones people, and the policy by how good it was; see the module and `AdvantageRule`."""

    name: ClassVar[str] = "weighted_bc"

    def __init__(self, settings: WeightedCloningSettings, control_hz: float) -> None:
        super().__init__(settings, control_hz)
        self.settings = settings

    def weights_and_indicator(
        self, episode: StoredEpisode, plan: Plan
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8] | None]:
        """The formula at the top; no indicator."""
        return advantage_weights(self, episode, plan, self.settings), None


def advantage_weights(
    rule: AdvantageRule, episode: StoredEpisode, plan: Plan, settings: WeightedCloningSettings
) -> npt.NDArray[np.float32]:
    """Weights [T] of an episode's steps by the formula at the top, with the values and thresholds of `rule`."""
    weight = np.ones(episode.num_steps)
    threshold = rule.threshold(episode, plan.origin)
    if threshold is not None and (plan.learned & plan.by_policy).any():
        advantage = rule.critic.scores(episode).advantage.astype(np.float64)
        exponent = (advantage - threshold.value) / (threshold.spread * settings.temperature)
        judged = plan.by_policy & np.isfinite(exponent)
        low, high = np.log([settings.min_weight, settings.max_weight])
        weight[judged] = np.exp(exponent[judged].clip(low, high))
    weight[plan.kind == StepKind.PRE_TAKEOVER] = settings.min_weight
    weight[plan.by_policy] *= settings.policy_weight
    return weight.astype(np.float32)
