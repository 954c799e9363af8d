"""Settings of the rules that learn by advantage: of their value function, and of their thresholds and masks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sop.core.settings import build_settings
from sop.values import ReturnSettings, ValueSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSettings:
    """Settings of `Critic`; times in seconds of robot time.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    value: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `sop.values.ValueSettings` that differ from its defaults, e.g. {"steps": 800}."""
    failure_cost: float = 1.0
    """C_fail: what a failure costs, as a multiple of the task's longest episode."""
    takeover: Literal["charge", "cut"] = "charge"
    """What a takeover means for the policy's steps before it: `charge` = a failure; `cut` = unknown."""
    lookahead_s: float = 1.0
    """Robot time that an action has to show what it was good for: N of the N-step advantage."""
    value_refresh: int = 0
    """Learner steps between two fits of the value function; 0 keeps the first (the paper's)."""
    refresh_steps: int = 100
    """Optimizer steps of such a fit."""
    refresh_episodes: int = 128
    """The fleet's newest episodes that such a fit sees, beside demonstrations and base rollouts."""

    def __post_init__(self) -> None:
        self.value_settings()
        self.return_settings()
        if not 0 < self.lookahead_s < float("inf"):
            raise ValueError(f"lookahead_s must be positive and finite, got {self.lookahead_s}")
        for name, least in (("value_refresh", 0), ("refresh_steps", 1), ("refresh_episodes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")

    def value_settings(self) -> ValueSettings:
        """Those of network and fit."""
        return build_settings(ValueSettings, self.value, "value")

    def return_settings(self) -> ReturnSettings:
        """What outcomes are worth."""
        return ReturnSettings(failure_cost=self.failure_cost, takeover=self.takeover)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageSettings(CriticSettings):
    """Settings of `AdvantageRule` beside those of its value function; times in seconds of robot time.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    offline_positive: float = 0.30
    """Part of the offline buffer's judged steps, per task, whose advantage is to be positive."""
    online_positive: float = 0.40
    """Part of the fleet's policy steps, per task, whose advantage is to be positive."""
    threshold_window: int = 10_000
    """Newest steps per task and buffer that a threshold is made from."""
    threshold_least: int = 100
    """Steps of a task before it has a threshold; until then nothing is known of its policy steps."""
    rollouts: Literal["value_only", "value_and_policy"] = "value_and_policy"
    """Whether the policy learns from base rollouts too."""
    handover_s: float = 0.3
    """Beginning of every human run that is not learned from."""
    pre_takeover_s: float = 0.8
    """Policy steps this long before a takeover are bad, whatever their advantage."""
    policy_weight: float = 1.0
    """Weight of the policy's own steps."""
    policy_stride: int = 4
    """Every k-th step of a policy run may start a window: autonomous windows overlap, and are many."""
    rollout_stride: int = 8
    """The same for base rollouts: enough of them to install an indicator, few enough to clone little of them."""

    def __post_init__(self) -> None:
        CriticSettings.__post_init__(self)
        for name in ("offline_positive", "online_positive"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("handover_s", "pre_takeover_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        for name in ("threshold_window", "threshold_least", "policy_stride", "rollout_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.threshold_least > self.threshold_window:
            raise ValueError(
                f"threshold_least is {self.threshold_least}, threshold_window keeps {self.threshold_window} steps only"
            )
        if not 0 < self.policy_weight <= 1:
            raise ValueError(f"policy_weight must be in (0, 1], got {self.policy_weight}")
