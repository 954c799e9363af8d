"""Every trainable policy keeps the rules of `TrainablePolicy`."""

from collections.abc import Callable

import pytest

from sop.core.embodiment import Embodiment
from sop.policies import TrainablePolicy, make_policy, make_spec
from sop.testing.contracts.policy import (
    CONDITIONED_RULES,
    PER_WINDOW_RULES,
    POLICY_RULES,
    UNCONDITIONED_RULES,
    MakePolicy,
)

TINY = {
    "action_horizon": 4, "width": 16, "heads": 2, "channels": [4, 8, 8], "keypoints": 4, "grid": 2,
    "text_encoder": "hash", "random_shift": 1,
}  # fmt: skip


def tiny_policy(**settings: object) -> TrainablePolicy:
    embodiment = Embodiment(
        name="tiny",
        cameras={"front": (16, 24), "wrist.left": (17, 16)},
        state_names=("x", "y", "grip"),
        action_names=("dx", "grip"),
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        hold_action=(0.0, None),
        max_action_change=(None, None),
        control_hz=20.0,
    )
    normalization = {
        "state_mean": (0.1, 0.2, 0.3), "state_std": (1.0, 0.5, 2.0),
        "action_mean": (0.0, 0.1), "action_std": (0.5, 0.8),
    }  # fmt: skip
    return make_policy(make_spec("flow_vla", TINY | settings, embodiment, 3, normalization), seed=1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", [*POLICY_RULES, *PER_WINDOW_RULES], ids=lambda rule: rule.__name__)
def test_flow_vla_keeps(rule: Callable[[MakePolicy], None], precision: str) -> None:
    rule(lambda: tiny_policy(precision=precision))


@pytest.mark.parametrize(("indicator", "precision"), [("embed", "float32"), ("embed", "bfloat16"), ("text", "float32")])
@pytest.mark.parametrize("rule", [*POLICY_RULES, *PER_WINDOW_RULES, *CONDITIONED_RULES], ids=lambda rule: rule.__name__)
def test_flow_vla_with_an_indicator_keeps(rule: Callable[[MakePolicy], None], indicator: str, precision: str) -> None:
    rule(lambda: tiny_policy(indicator=indicator, precision=precision))


@pytest.mark.parametrize("rule", UNCONDITIONED_RULES, ids=lambda rule: rule.__name__)
def test_flow_vla_without_an_indicator_keeps(rule: Callable[[MakePolicy], None]) -> None:
    rule(tiny_policy)
