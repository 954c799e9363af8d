"""Filtered and weighted cloning by hand. 10 Hz; the longest episode has 10 steps: returns in 1/20."""

from typing import Any

import numpy as np
import pytest

from sop.algorithms import make_algorithm
from sop.algorithms.weighted_bc import WeightedCloning
from sop.core.episode import Outcome
from sop.core.experience import Collection, Source
from sop.core.policy import Conditioning
from sop.testing.episodes import make_episode
from sop.testing.library import MemoryLibrary
from sop.testing.values import WrittenValues

CORRECTED = "p" * 6 + "h" * 5 + "p" * 4


def filtered(**settings: Any) -> Any:
    return make_algorithm("filtered_bc", {"pre_takeover_s": 0.2, "policy_stride": 1} | settings, 10.0)


def weighted(**settings: Any) -> WeightedCloning:
    common = {"lookahead_s": 0.2, "threshold_least": 1, "pre_takeover_s": 0.2, "policy_stride": 1}
    made = make_algorithm("weighted_bc", common | settings, 10.0)
    assert isinstance(made, WeightedCloning)
    made.critic.function = WrittenValues({"push": 10}, lambda _: -0.2)
    return made


def test_an_unaided_success_is_cloned_and_a_failure_is_not() -> None:
    labels = filtered(policy_weight=0.25).annotate(make_episode("pppp"))
    assert labels.loss_weight.tolist() == [0.25] * 4
    assert labels.can_start.all()
    for outcome in (Outcome.FAILURE, Outcome.ABORTED):
        labels = filtered().annotate(make_episode(CORRECTED, outcome=outcome))
        assert not labels.loss_weight.any()
        assert not labels.can_start.any()


def test_of_a_rescued_success_all_is_cloned_but_what_led_to_the_rescue_and_the_handover() -> None:
    labels = filtered(policy_weight=0.5).annotate(make_episode(CORRECTED))
    assert labels.loss_weight.tolist() == [0.5] * 4 + [0] * 2 + [0] * 3 + [1] * 2 + [0.5] * 4
    assert labels.segment.tolist() == [0] * 4 + [1] * 2 + [2] * 3 + [3] * 2 + [4] * 4
    assert np.array_equal(labels.can_start, labels.loss_weight > 0)


def test_the_stride_thins_the_policys_starts_alone() -> None:
    labels = filtered(policy_stride=3, handover_s=0.0).annotate(make_episode(CORRECTED))
    assert np.flatnonzero(labels.can_start).tolist() == [0, 3, 6, 7, 8, 9, 10, 11, 14]


def test_demonstrations_are_cloned_whole_even_failed_ones() -> None:
    """People decide what they demonstrate; the rule of `bc` and `hg_dagger`."""
    demonstration = make_episode("hhhh", policy_version=None, actor_id="lab-0", outcome=Outcome.FAILURE)
    assert filtered().annotate(demonstration).loss_weight.tolist() == [1] * 4
    aborted = make_episode("hhhh", policy_version=None, actor_id="lab-0", outcome=Outcome.ABORTED)
    assert not filtered().annotate(aborted).can_start.any()


def test_filtered_cloning_needs_nothing_before_it_starts() -> None:
    rule = filtered()
    assert (rule.collection, rule.needs_rollouts, rule.warm_up) == (Collection.ON_POLICY, False, None)
    assert (rule.conditioning(), rule.policy_settings, rule.state_dict()) == (Conditioning(), {}, {})


def test_weights_by_hand() -> None:
    """A = -.1 four times, .15, .2; two of six are to be positive, so the threshold is -.1."""
    rule, episode = weighted(temperature=2.0, max_weight=9.0), make_episode("pppppp")
    rule.indexed(episode, Source.ONLINE)
    assert rule.annotate(episode).loss_weight.tolist() == [1] * 6  # nothing is known before the refresh
    assert rule.refresh(1, MemoryLibrary())
    spread = np.std([-0.1] * 4 + [0.15, 0.2])
    expected = np.exp(np.array([0, 0, 0, 0, 0.25, 0.3]) / (2.0 * spread))
    labels = rule.annotate(episode)
    assert labels.loss_weight == pytest.approx(expected, rel=1e-5)
    assert labels.advantage_indicator is None
    assert rule.refresh(2, MemoryLibrary()) is False


def test_weights_are_clipped_and_stay_positive() -> None:
    """The failure's end is 3 spreads below: it gets the floor, and windows start there as before."""
    rule, episode = weighted(temperature=0.01, min_weight=0.125, max_weight=2.0), make_episode("pppppp")
    failure = make_episode("pppppp", outcome=Outcome.FAILURE, sequence=1)
    before = rule.annotate(failure)
    for one in (episode, failure):
        rule.indexed(one, Source.ONLINE)
    rule.refresh(1, MemoryLibrary())
    assert rule.annotate(episode).loss_weight == pytest.approx([1, 1, 1, 1, 2, 2], rel=1e-4)
    after = rule.annotate(failure)
    assert after.loss_weight == pytest.approx([1, 1, 1, 1, 0.125, 0.125], rel=1e-4)
    assert np.array_equal(before.can_start, after.can_start)


def test_people_count_fully_and_what_led_to_them_least() -> None:
    rule, episode = weighted(policy_weight=0.5), make_episode("p" * 6 + "h" * 5)
    labels = rule.annotate(episode)
    assert labels.loss_weight == pytest.approx([0.5] * 4 + [0.005] * 2 + [0] * 3 + [1] * 2)
    demonstration = make_episode("hhhh", policy_version=None, actor_id="lab-0")
    assert rule.annotate(demonstration).loss_weight.tolist() == [1] * 4


def test_weighted_cloning_needs_rollouts_and_no_indicator() -> None:
    rule = weighted()
    assert (rule.needs_rollouts, rule.warm_up, rule.policy_settings) == (True, None, {})
    assert rule.conditioning() == Conditioning()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("filtered_bc", {"policy_weight": 1.5}, r"policy_weight must be in \[0, 1\]"),
        ("filtered_bc", {"policy_stride": 0}, "policy_stride must be 1 or more"),
        ("filtered_bc", {"handover_s": -1.0}, "handover_s must be 0 or more"),
        ("weighted_bc", {"temperature": 0.0}, "temperature must be positive"),
        ("weighted_bc", {"min_weight": 0.0}, "0 < min_weight <= 1 <= max_weight"),
        ("weighted_bc", {"refresh_steps": 0}, "refresh_steps must be 1 or more"),
    ],
)
def test_a_wrong_setting_is_named(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_algorithm(name, settings, 10.0)
