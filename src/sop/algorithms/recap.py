"""RECAP, streaming: learn from everything, and tell the policy which actions were better than expected.

pi*0.6 (arXiv 2511.14759): pi(a | o, text, I) with the indicator I = [A(o, a) > threshold of the task]; the policy is
asked for I = positive when it acts. There all of it happens between two collections; here a new episode is labelled
when it arrives, thresholds move as data streams in, and the loop goes on. `sop.algorithms.advantage` has the table of
what is learned from; this is the indicator's:

    step                                      indicator
    demonstration                             +1, or by advantage (`demonstrations`)
    human, after the handover                 +1, forced
    policy                                    +1 where A > threshold, else -1; 0 while the task has no threshold
    policy, before a takeover                 -1, forced
    everything without an advantage           0: the policy's null branch

`condition_negatives=False` makes every -1 a 0: positive-only conditioning, as RLinf ships it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from sop.algorithms.advantage import AdvantageRule, Plan
from sop.algorithms.base import Origin
from sop.algorithms.critic_settings import AdvantageSettings
from sop.algorithms.segmentation import StepKind
from sop.core.episode import Outcome
from sop.core.experience import StoredEpisode
from sop.core.policy import Conditioning


@dataclass(frozen=True, slots=True, kw_only=True)
class RecapSettings(AdvantageSettings):
    """Settings of `Recap`.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    indicator: Literal["embed", "text"] = "embed"
    """How the policy is told: a zero-initialised embedding in the action expert, or words in the instruction."""
    indicator_dropout: float = 0.3
    """Part of the labelled windows that are trained without the indicator, for the null branch."""
    install: Literal["warmup", "cold"] = "warmup"
    """Whether the indicator is trained on the offline buffer before the fleet starts."""
    warmup_max_steps: int = 200
    """Learner steps after which the warm-up ends in any case."""
    warmup_separation: float = 0.0003
    """The warm-up ends when E||v(+) - v(null)||^2 / E||v(null)||^2 is at least this, v being the flow's velocity: half
    of what whole runs end with, since most of the velocity is noise to be removed and most data is positive ..."""
    warmup_null_tolerance: float = 0.05
    """... and the null branch's loss on held-out windows exceeds the base policy's by at most this part of it."""
    demonstrations: Literal["positive", "advantage"] = "positive"
    """Whether all steps of demonstrations are positive, or those with the task's best advantages."""
    condition_negatives: bool = True
    """Whether the policy is told of bad actions as well; otherwise these train the null branch."""
    negative_weight: float = 1.0
    """Weight of the policy's own bad steps, beside `policy_weight`: they share all weights but the tables' with the
    good ones. 0: they are drawn, and not learned from."""
    guidance: float = 1.0
    """beta with which the fleet acts: v(null) + beta (v(+) - v(null)); 1 costs one pass, others two."""

    def __post_init__(self) -> None:
        AdvantageSettings.__post_init__(self)
        if not 0 <= self.indicator_dropout < 1:
            raise ValueError(f"indicator_dropout must be in [0, 1), got {self.indicator_dropout}")
        if not 0 <= self.negative_weight <= 1:
            raise ValueError(f"negative_weight must be in [0, 1], got {self.negative_weight}")
        for name in ("warmup_max_steps", "warmup_separation", "warmup_null_tolerance", "guidance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")


class Recap(AdvantageRule):
    """Labels every step with the indicator; see the module and `AdvantageRule`."""

    name: ClassVar[str] = "recap"

    def __init__(self, settings: RecapSettings, control_hz: float) -> None:
        super().__init__(settings, control_hz)
        self.settings = settings

    @property
    def policy_settings(self) -> Mapping[str, Any]:
        """The policy has to have the indicator."""
        return {"indicator": self.settings.indicator, "indicator_dropout": self.settings.indicator_dropout}

    @property
    def warm_up(self) -> RecapSettings:
        """The settings say how the indicator is installed."""
        return self.settings

    def conditioning(self) -> Conditioning:
        """The fleet asks for good actions."""
        return Conditioning(advantage_indicator=True, guidance=self.settings.guidance)

    def weights_and_indicator(
        self, episode: StoredEpisode, plan: Plan
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8] | None]:
        """Weight 1 for people and `policy_weight` for the policy, times `negative_weight` where it was bad; the
        indicator of the table at the top."""
        weight = np.where(plan.by_policy, self.settings.policy_weight, 1.0).astype(np.float32)
        indicator = np.zeros(episode.num_steps, np.int8)
        if not plan.learned.any() or episode.outcome is Outcome.ABORTED:
            return weight, indicator
        judged = plan.by_policy
        if plan.origin is Origin.DEMONSTRATION and self._judges(plan.origin):
            judged = np.ones_like(judged)
        threshold = self.threshold(episode, plan.origin)
        if threshold is not None and judged.any():
            advantage = self.critic.scores(episode).advantage
            sign = np.where(advantage > np.float32(threshold.value), 1, -1)
            indicator[:] = np.where(judged & np.isfinite(advantage), sign, 0)
        indicator[(plan.kind == StepKind.HUMAN) & ~judged] = 1
        indicator[plan.kind == StepKind.PRE_TAKEOVER] = -1
        weight[plan.by_policy & (indicator < 0)] *= np.float32(self.settings.negative_weight)
        if not self.settings.condition_negatives:
            indicator[indicator < 0] = 0
        return weight, indicator

    def _judges(self, origin: Origin) -> bool:
        if origin is Origin.DEMONSTRATION:
            return self.settings.demonstrations == "advantage"
        return super()._judges(origin)
