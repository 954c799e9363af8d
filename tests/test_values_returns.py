"""Returns and advantages held to numbers worked out by hand; nothing leaks across a takeover."""

from typing import Any

import numpy as np
import pytest

from sop.core.episode import Episode, Outcome
from sop.testing.episodes import make_episode
from sop.values import (
    ReturnSettings,
    advantages,
    ends_in_success,
    longest_episodes,
    policy_runs,
    returns,
    value_runs,
)

NAN = float("nan")
CHARGE = ReturnSettings()
CUT = ReturnSettings(takeover="cut")
"""With task_steps 5 and failure_cost 1 a failure costs 5 steps and the scale is 10."""


def failure(controllers: str = "pppp", **changes: Any) -> Episode:
    return make_episode(controllers, outcome=Outcome.FAILURE, **changes)


def values_of(*numbers: float) -> np.ndarray:
    return np.asarray(numbers, np.float32)


def same(found: np.ndarray, *expected: float) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_runs_are_the_policys_steps_and_a_demonstration_is_one_run() -> None:
    episode = make_episode("pphhphpp")
    assert policy_runs(episode.controller) == [(0, 2), (4, 5), (6, 8)]
    assert value_runs(episode) == [(0, 2), (4, 5), (6, 8)]
    assert value_runs(make_episode("hhh", policy_version=None)) == [(0, 3)]
    assert value_runs(make_episode("hhh")) == []


def test_a_success_counts_the_steps_to_go() -> None:
    same(returns(make_episode("pppp"), 5, CHARGE), -0.3, -0.2, -0.1, 0.0)


def test_a_failure_also_pays_its_cost() -> None:
    same(returns(failure(), 5, CHARGE), -0.8, -0.7, -0.6, -0.5)


@pytest.mark.parametrize(("cost", "scale"), [(0.0, 5), (2.0, 15), (9.0, 50)])
def test_the_cost_of_a_failure_is_a_multiple_of_the_longest_episode(cost: float, scale: float) -> None:
    settings = ReturnSettings(failure_cost=cost)
    same(returns(failure("pp"), 5, settings), (-1 - 5 * cost) / scale, -5 * cost / scale)
    same(returns(make_episode("pp"), 5, settings), -1 / scale, 0)


def test_an_episode_of_one_step_is_all_or_nothing() -> None:
    same(returns(make_episode("p"), 5, CHARGE), 0.0)
    same(returns(failure("p"), 5, CHARGE), -0.5)


def test_longer_episodes_than_the_longest_known_are_clipped() -> None:
    same(returns(failure("pppp"), 2, CHARGE), -1.0, -1.0, -0.75, -0.5)
    same(returns(make_episode("p" * 6), 2, CHARGE), -1.0, -1.0, -0.75, -0.5, -0.25, 0.0)


def test_an_aborted_episode_has_no_returns_and_no_advantages() -> None:
    episode = make_episode("pphp", outcome=Outcome.ABORTED)
    assert np.isnan(returns(episode, 5, CHARGE)).all()
    assert np.isnan(advantages(episode, np.zeros(4, np.float32), 5, CHARGE, 2)).all()


def test_a_takeover_is_charged_as_a_failure_at_the_step_before_it() -> None:
    same(returns(make_episode("ppphhp"), 5, CHARGE), -0.7, -0.6, -0.5, NAN, NAN, 0.0)


def test_a_takeover_cuts_what_is_known() -> None:
    same(returns(make_episode("ppphhpp"), 5, CUT), NAN, NAN, NAN, NAN, NAN, -0.1, 0.0)


def test_after_a_hand_back_the_policy_answers_for_the_end() -> None:
    same(returns(failure("phpp"), 5, CHARGE), -0.5, NAN, -0.6, -0.5)
    same(returns(failure("phpp"), 5, CUT), NAN, NAN, -0.6, -0.5)


def test_an_episode_that_a_person_finishes_charges_the_policy_or_says_nothing() -> None:
    same(returns(make_episode("pph"), 5, CHARGE), -0.6, -0.5, NAN)
    assert np.isnan(returns(make_episode("pph"), 5, CUT)).all()


@pytest.mark.parametrize("settings", [CHARGE, CUT])
def test_a_demonstration_has_returns_and_advantages_like_an_episode_of_the_policy(settings: ReturnSettings) -> None:
    demonstration = make_episode("hhh", policy_version=None)
    values = values_of(-0.4, -0.1, -0.2)
    same(returns(demonstration, 5, settings), -0.2, -0.1, 0.0)
    same(advantages(demonstration, values, 5, settings, 1), 0.2, -0.2, 0.2)


def test_advantages_bootstrap_inside_and_stop_at_the_end_of_a_success() -> None:
    """A_0 = -.2 + V_2 - V_0; step 2 looks at the end: 3 - 2 = 1 step to go, no bootstrap."""
    values = values_of(-0.5, -0.4, -0.1, -0.3)
    same(
        advantages(make_episode("pppp"), values, 5, CHARGE, 2),
        -0.2 - 0.1 + 0.5, -0.2 - 0.3 + 0.4, -0.1 + 0.1, 0.0 + 0.3,
    )  # fmt: skip


def test_advantages_pay_for_the_failure_at_its_end() -> None:
    values = values_of(-0.5, -0.4, -0.1, -0.3)
    same(
        advantages(failure("pppp"), values, 5, CHARGE, 2),
        -0.2 - 0.1 + 0.5, -0.2 - 0.3 + 0.4, -0.1 - 0.5 + 0.1, -0.5 + 0.3,
    )  # fmt: skip


def test_a_lookahead_that_ends_at_the_last_step_bootstraps_and_one_further_does_not() -> None:
    values = values_of(-0.5, -0.4, -0.2)
    same(advantages(make_episode("ppp"), values, 5, CHARGE, 2)[:1], -0.2 - 0.2 + 0.5)
    same(advantages(make_episode("ppp"), values, 5, CHARGE, 3)[:1], -0.2 + 0.5)


@pytest.mark.parametrize("end", [Outcome.SUCCESS, Outcome.FAILURE])
@pytest.mark.parametrize("lookahead", [4, 100])
def test_a_lookahead_beyond_the_episode_gives_return_minus_value(end: Outcome, lookahead: int) -> None:
    episode, values = make_episode("pppp", outcome=end), values_of(-0.5, -0.4, -0.1, -0.3)
    same(advantages(episode, values, 5, CHARGE, lookahead), *(returns(episode, 5, CHARGE) - values))


def test_an_episode_of_one_step_has_an_advantage() -> None:
    same(advantages(make_episode("p"), values_of(-0.4), 5, CHARGE, 3), 0.4)
    same(advantages(failure("p"), values_of(-0.4), 5, CHARGE, 3), -0.1)


def test_advantages_before_a_takeover_are_charged() -> None:
    """Takeover at 3: step 0 still bootstraps from step 2, steps 1 and 2 run into it."""
    values = values_of(-0.5, -0.4, -0.3, -9, -9, -0.2)
    same(
        advantages(make_episode("ppphhp"), values, 5, CHARGE, 2),
        -0.2 - 0.3 + 0.5, -0.1 - 0.5 + 0.4, -0.5 + 0.3, NAN, NAN, 0.2,
    )  # fmt: skip


def test_advantages_before_a_takeover_are_cut_at_the_last_step_of_the_policy() -> None:
    values = values_of(-0.5, -0.4, -0.3, -9, -9, -0.2)
    same(
        advantages(make_episode("ppphhp"), values, 5, CUT, 2),
        -0.2 - 0.3 + 0.5, -0.1 - 0.3 + 0.4, 0.0, NAN, NAN, 0.2,
    )  # fmt: skip


def test_advantages_after_a_hand_back_start_anew() -> None:
    values = values_of(-0.6, -9, -0.5, -0.2, -0.1)
    same(
        advantages(failure("phppp"), values, 5, CHARGE, 1),
        -0.5 + 0.6, NAN, -0.1 - 0.2 + 0.5, -0.1 - 0.1 + 0.2, -0.5 + 0.1,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [CHARGE, CUT])
@pytest.mark.parametrize("lookahead", [1, 3, 50])
def test_nothing_from_a_takeover_on_reaches_the_steps_before_it(settings: ReturnSettings, lookahead: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        before, after = int(rng.integers(1, 8)), int(rng.integers(0, 8))
        rest = "".join(rng.choice(["p", "h"], after))
        values = rng.uniform(-1, 0, before + 1 + after).astype(np.float32)
        other = values.copy()
        other[before:] = rng.uniform(-1, 0, 1 + after)
        rescued = make_episode("p" * before + "h" + rest)
        lost = failure("p" * before + "h" + rest[::-1])
        for episode, seen in (
            (rescued, other),
            (lost, values),
            (make_episode("p" * before + "h"), values[: before + 1]),
        ):
            np.testing.assert_array_equal(
                returns(episode, 20, settings)[:before], returns(rescued, 20, settings)[:before]
            )
            np.testing.assert_array_equal(
                advantages(episode, seen, 20, settings, lookahead)[:before],
                advantages(rescued, values, 20, settings, lookahead)[:before],
            )


def test_a_charged_takeover_looks_like_a_failure_at_the_same_place() -> None:
    values = np.linspace(-0.9, -0.2, 6).astype(np.float32)
    taken, failed = make_episode("pppphh"), failure("pppp")
    same(returns(taken, 7, CHARGE)[:4], *returns(failed, 7, CHARGE))
    same(advantages(taken, values, 7, CHARGE, 2)[:4], *advantages(failed, values[:4], 7, CHARGE, 2))


def test_exact_values_of_a_success_have_no_advantage_anywhere() -> None:
    """The value of what happens anyway: no action was better than expected."""
    episode = make_episode("p" * 9)
    exact = returns(episode, 12, CHARGE)
    for lookahead in (1, 4, 9):
        same(advantages(episode, exact, 12, CHARGE, lookahead), *np.zeros(9))


def test_only_runs_that_reach_a_successful_end_end_in_success() -> None:
    assert ends_in_success(make_episode("pphpp")).tolist() == [False, False, False, True, True]
    assert not ends_in_success(failure("pphpp")).any()
    assert not ends_in_success(make_episode("pph")).any()
    assert ends_in_success(make_episode("hh", policy_version=None)).all()


def test_the_longest_episode_is_found_per_task_and_aborted_ones_do_not_count() -> None:
    episodes = [
        make_episode("ppp"), make_episode("pp", task="pull"), failure("ppppp", task="pull"),
        make_episode("p" * 9, outcome=Outcome.ABORTED), make_episode("p", task="lost", outcome=Outcome.ABORTED),
    ]  # fmt: skip
    assert longest_episodes(episodes) == {"push": 3, "pull": 5}


def test_wrong_arguments_are_named() -> None:
    episode = make_episode("ppp")
    with pytest.raises(ValueError, match="task_steps must be at least 1, got 0"):
        returns(episode, 0, CHARGE)
    with pytest.raises(ValueError, match="lookahead must be at least 1 step, got 0"):
        advantages(episode, np.zeros(3, np.float32), 5, CHARGE, 0)
    with pytest.raises(ValueError, match=r"values must be \[3\].*got \(2,\)"):
        advantages(episode, np.zeros(2, np.float32), 5, CHARGE, 1)
    with pytest.raises(ValueError, match="failure_cost must be 0 or more and finite, got -1"):
        ReturnSettings(failure_cost=-1.0)
    with pytest.raises(ValueError, match="takeover must be 'charge' or 'cut', got 'ignore'"):
        ReturnSettings(takeover="ignore")
