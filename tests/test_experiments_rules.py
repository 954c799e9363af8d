"""The arms of an experiment are what their names say: labels, policy settings, and what gives a gradient."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sop.algorithms.base import Origin
from sop.algorithms.recap import Recap
from sop.config import LearnerConfig
from sop.core.episode import Outcome
from sop.core.experience import Batch, Collection, Source, Windows
from sop.core.policy import Conditioning
from sop.experiments.arm import conditions_of
from sop.experiments.plan import ARMS, BASES, FULL, Arm, evaluated
from sop.experiments.rules import KeptValues, make_base_rule, make_rule
from sop.experiments.training import cooled_down
from sop.experiments.x_ind import chosen_plan
from sop.testing.episodes import TOY_BODY, make_episode
from sop.testing.library import MemoryLibrary, tiny_policy

RECORDED = {"handover_s": 0.0, "lookahead_s": 0.2, "threshold_least": 4, "pre_takeover_s": 0.2, "policy_stride": 1}
EIGHT = {
    f"{base}-{kind}-{start}" for base in ("plain", "tuned") for kind in ("embed", "text") for start in ("cold", "warm")
}


class Ramp:
    """A value function that knows one task and takes its values from the states of the episode."""

    version: int = 1
    task_steps: ClassVar[Mapping[str, int]] = {"push": 10}

    def __init__(self) -> None:
        self.asked = 0

    def predict(self, episode: Any) -> np.ndarray:
        """-0.5 + 0.01 * step^2."""
        self.asked += 1
        return (-0.5 + 0.01 * np.arange(episode.num_steps) ** 2).astype(np.float32)

    def advantages(self, episode: Any, values: np.ndarray, lookahead: int) -> np.ndarray:
        """The step's own value: later is better."""
        found = values.astype(np.float32).copy()
        if episode.policy_version is not None:
            found[episode.controller == 1] = np.nan
        return found

    def returns(self, episode: Any) -> np.ndarray:
        """Unknown."""
        return np.full(episode.num_steps, np.nan, np.float32)

    def fit(self, episodes: Any, steps: int | None = None) -> Any:
        """Not asked for."""
        raise AssertionError

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def ready(arm: Arm) -> Recap:
    rule = make_rule(arm, FULL, RECORDED, control_hz=10.0)
    rule.critic.function = Ramp()
    return rule


def fleet() -> Any:
    return make_episode("pppppppphhpppppp", actor_id="robot-0", outcome=Outcome.SUCCESS)


def labels_of(rule: Recap, episode: Any, source: Source = Source.ONLINE) -> Any:
    rule.prepare(MemoryLibrary(), tiny_policy(TOY_BODY))
    rule.indexed(episode, source)
    assert rule.refresh(0, MemoryLibrary())
    return rule.annotate(episode)


def test_there_are_eight_combinations_and_five_controls() -> None:
    assert set(ARMS) == EIGHT | {"positive-only", "no-indicator", "filtered", "weighted", "demonstrations"}
    assert ARMS["plain-embed-warm"] == Arm(kind="embed", warm=True)
    assert ARMS["tuned-text-cold"] == Arm(tuned=True, kind="text")
    assert ARMS["positive-only"] == Arm(kind="embed", warm=True, negatives=False)
    assert (ARMS["no-indicator"], ARMS["filtered"]) == (Arm(), Arm(lessons="positive"))
    assert {name: arm.base for name, arm in ARMS.items() if arm.base} == {
        name: f"base-{ARMS[name].kind}" for name in EIGHT if name.startswith("tuned")
    }
    assert set(BASES) == {"base-embed", "base-text"}


def test_an_arm_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="without an indicator"):
        Arm(warm=True)
    with pytest.raises(ValueError, match="without an indicator"):
        Arm(tuned=True)
    with pytest.raises(ValueError, match="leaves nothing out"):
        Arm(kind="text", lessons="positive")
    with pytest.raises(ValueError, match="leaves nothing out"):
        Arm(kind="embed", lessons="demonstrations")


def test_a_plan_has_arms_that_exist_and_episodes() -> None:
    assert replace(FULL, arms=("filtered",)).arms == ("filtered",)
    for arms in ((), ("filtered", "filtered"), ("filtered", "best")):
        with pytest.raises(ValueError, match="each once"):
            replace(FULL, arms=arms)
    with pytest.raises(ValueError, match="at least 1"):
        replace(FULL, episodes=0)


def test_a_plan_takes_other_numbers_by_name_and_says_what_it_does_not_take() -> None:
    plan = chosen_plan(FULL, ["filtered"], ["episodes=9", "betas=[0, 2]", "rollouts=value_only"])
    assert list(conditions_of(ARMS["plain-embed-cold"], plan)) == ["beta 0", "beta 1", "beta 2", "negative"]
    assert conditions_of(ARMS["plain-embed-cold"], plan)["beta 0"] == Conditioning(), "the null branch, in one pass"
    assert list(conditions_of(ARMS["filtered"], plan)) == ["beta 0"]
    assert plan == replace(FULL, arms=("filtered",), episodes=9, betas=(0.0, 2.0), rollouts="value_only")
    assert chosen_plan(FULL, None, []) == FULL
    for change, words in (
        ("episode=9", "Did you mean 'episodes'"),
        ("episodes=many", "int"),
        ("episodes", "name=value"),
        ("rollouts=none", "none"),
    ):
        with pytest.raises(ValueError, match=words):
            chosen_plan(FULL, None, [change])


@pytest.mark.parametrize("name", sorted(ARMS))
def test_policy_settings_install_and_conditioning_are_those_of_the_arm(name: str) -> None:
    arm, rule = ARMS[name], make_rule(ARMS[name], FULL, RECORDED, control_hz=10.0)
    expected = {} if arm.kind is None else {"indicator": arm.kind, "indicator_dropout": 0.3}
    assert dict(rule.policy_settings) == expected
    assert rule.settings.install == ("warmup" if name.endswith("warm") or name == "positive-only" else "cold")
    assert rule.conditioning().advantage_indicator is (None if arm.kind is None else True)
    assert (rule.settings.warmup_max_steps, rule.settings.value_refresh) == (100, 0)
    assert (rule.settings.rollouts, rule.settings.demonstrations) == ("value_and_policy", "positive")
    collection = Collection.NOTHING if name == "demonstrations" else Collection.ON_POLICY
    assert (rule.settings.lookahead_s, rule.collection) == (0.2, collection)


@pytest.mark.parametrize("name", sorted(set(ARMS) - {"demonstrations", "weighted"}))
def test_all_arms_learn_from_the_same_windows_and_only_positive_only_hides_bad_ones(name: str) -> None:
    labels = labels_of(ready(ARMS[name]), fleet())
    # 14 policy steps, the best 40 % (6) are the last six; two steps before the takeover are bad, people are good
    bad = 0 if name == "positive-only" else -1
    assert labels.advantage_indicator.tolist() == [bad] * 8 + [1] * 2 + [1] * 6
    assert labels.loss_weight.tolist() == [1.0] * 16
    assert labels.can_start.all()
    assert labels.segment.tolist() == [0] * 6 + [1] * 2 + [2] * 2 + [3] * 6


def test_the_control_of_demonstrations_alone_starts_no_window_where_a_policy_acted() -> None:
    rule = ready(ARMS["demonstrations"])
    labels = labels_of(rule, fleet())
    assert not labels.can_start.any()  # people's steps in it are no demonstration either
    rollout = make_episode("p" * 10, actor_id="base-0")
    assert not rule.annotate(rollout).can_start.any()
    shown = make_episode("h" * 10, policy_version=None, actor_id="lab-0")
    assert rule.annotate(shown).can_start.all()
    assert rule.collection is Collection.NOTHING  # nor does it wait for such windows


def test_a_control_that_waits_for_nothing_cools_down_in_the_last_steps_as_the_others_do() -> None:
    assert FULL.learner_steps(72) == 71 * 5 + 1 + 120
    factor = cooled_down(LearnerConfig(warmup_steps=20, cooldown_steps=120, cooldown_lr_factor=0.1), 476)
    assert [factor(step) for step in (9, 19, 20, 356)] == pytest.approx([0.5, 1, 1, 1])
    assert [factor(step) for step in (357, 416, 476)] == pytest.approx([1 - 0.9 / 120, 0.55, 0.1])


def test_the_weighted_control_weighs_policy_steps_by_advantage_and_hides_none() -> None:
    rule = ready(ARMS["weighted"])
    labels = labels_of(rule, fleet())
    advantage = (-0.5 + 0.01 * np.arange(16) ** 2)[[*range(8), *range(10, 16)]]
    assert (labels.advantage_indicator, labels.can_start.all()) == (None, True)
    assert labels.loss_weight[8:10].tolist() == [1, 1]  # people's
    assert labels.loss_weight[6:8].tolist() == pytest.approx([0.01, 0.01])  # before the takeover
    threshold = rule.threshold(fleet(), Origin.FLEET)
    assert threshold is not None
    expected = np.exp((advantage - threshold.value) / (threshold.spread * 0.5)).clip(0.01, 3)
    assert labels.loss_weight[:6] == pytest.approx(expected[:6], rel=1e-5)
    assert labels.loss_weight[10:] == pytest.approx(expected[8:], rel=1e-5)
    assert labels.loss_weight[5] < 1 < labels.loss_weight[10]


def test_a_tuned_base_learns_which_three_tenths_of_the_demonstrations_are_best() -> None:
    rule = make_base_rule("text", FULL, RECORDED, control_hz=10.0)
    rule.critic.function = Ramp()
    shown = make_episode("h" * 10, policy_version=None, actor_id="lab-0")
    labels = labels_of(rule, shown, Source.OFFLINE)
    assert labels.advantage_indicator.tolist() == [-1] * 7 + [1] * 3
    assert (rule.collection, dict(rule.policy_settings)["indicator"]) == (Collection.NOTHING, "text")
    rollout = make_episode("p" * 10, actor_id="base-0")
    assert not rule.annotate(rollout).loss_weight.any()


class Echo:
    """Loss i of window i, through a parameter."""

    def __init__(self) -> None:
        self.parameter = torch.tensor(1.0, requires_grad=True)
        self.told: list[object] = []

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """[B]"""
        self.told.append(batch.advantage_indicator)
        return self.parameter * torch.arange(1.0, len(batch) + 1)


def batch_of(indicator: list[int]) -> Batch:
    size = len(indicator)
    zero = np.zeros(size, np.int64)
    return Batch(
        windows=Windows(zero, zero.astype(np.int32), zero.astype(np.int32), zero.astype(np.uint8)),
        images={},
        state=np.zeros((size, 2), np.float32),
        action=np.zeros((size, 4, 2), np.float32),
        loss_weight=np.ones((size, 4), np.float32),
        instruction=("push",) * size,
        policy_version=zero,
        advantage_indicator=np.asarray(indicator, np.int8),
    )


@pytest.mark.parametrize(("name", "gradient"), [("no-indicator", 1 + 2 + 3 + 4), ("filtered", 2 + 4)])
def test_controls_tell_the_policy_nothing_and_filtering_takes_the_gradient_of_what_is_not_positive(
    name: str, gradient: int
) -> None:
    policy, rule = Echo(), make_rule(ARMS[name], FULL, RECORDED, control_hz=10.0)
    losses = rule.loss(policy, batch_of([-1, 1, 0, 1]), torch.Generator())
    assert losses.tolist() == [1, 2, 3, 4]  # the sampler sees the same in both
    torch.autograd.backward(losses.sum())
    assert policy.parameter.grad is not None
    assert (policy.parameter.grad.item(), policy.told) == (gradient, [None])


def test_values_are_predicted_once_for_all_arms(tmp_path: Path) -> None:
    function, episode = Ramp(), fleet()
    first, second = KeptValues(function, tmp_path), KeptValues(function, tmp_path)
    expected = function.predict(episode)
    assert first.predict(episode).tolist() == expected.tolist() == second.predict(episode).tolist()
    assert function.asked == 2
    longer = replace(fleet(), sequence=1)
    second.predict(longer)
    assert function.asked == 3
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".npy", ".npy"]
    next(iter(tmp_path.iterdir())).write_bytes(b"broken")
    assert [KeptValues(function, tmp_path).predict(one).tolist() for one in (episode, longer)] == [
        expected.tolist()
    ] * 2


def test_publishes_are_measured_at_powers_of_two_and_at_the_end() -> None:
    assert [evaluated(number) for number in (0, 1, 2, 3, 6)] == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 4, 5]]
    assert evaluated(27) == [0, 1, 2, 4, 8, 16, 26]
