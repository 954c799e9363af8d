"""Tests that may be looked at all the time: hand-computed wealth, boundaries, error rates under optional stopping."""

import math

import numpy as np
import pytest

from sop.rollout.sequential import STAKES, Claim, SuccessTest, Verdict, Wager, log_mean_exp


def wealth(claim: Claim, pairs: list[tuple[float, float]]) -> float:
    """The definition, in numbers instead of logarithms."""
    parts = []
    for share in STAKES:
        product = 1.0
        for candidate, control in pairs:
            product *= 1 + share / (claim.factor + claim.margin) * (candidate - claim.factor * control - claim.margin)
        parts.append(product)
    return sum(parts) / len(parts)


def test_one_pair_by_hand() -> None:
    wager = Wager(Claim(1.0, 0.25))  # largest stake 1 / 1.25 = 0.8
    wager.add(1, 0)  # z = 0.75, so each stake gains its share * 0.8 * 0.75 = 0.6
    assert math.exp(wager.log_e) == pytest.approx(1 + 0.6 * sum(STAKES) / 8)
    wager = Wager(Claim(1.0, 0.25))
    wager.add(0, 1)  # z = -1.25: a stake loses exactly its share
    assert math.exp(wager.log_e) == pytest.approx(1 - sum(STAKES) / 8)


@pytest.mark.parametrize("claim", [Claim(1, 0.03), Claim(1, -0.03), Claim(1.5, 0.01), Claim(3, 0.01), Claim(0, 0.01)])
def test_wealth_is_the_mean_over_stakes_of_the_products(claim: Claim) -> None:
    pairs = [(1.0, 0.0), (0.0, 0.0), (0.25, 0.5), (1.0, 1.0), (0.0, 1.0 if claim.factor else 0.0), (0.7, 0.1)]
    wager = Wager(claim)
    for pair in pairs:
        wager.add(*pair)
    assert math.exp(wager.log_e) == pytest.approx(wealth(claim, pairs))


@pytest.mark.parametrize("claim", [Claim(1, 0.03), Claim(1, -0.03), Claim(3, 0.01)])
def test_the_expected_gain_is_nothing_at_the_edge_of_the_claim(claim: Claim) -> None:
    rng = np.random.default_rng(0)
    for control in rng.uniform(0.05, 0.3, 5):
        candidate = claim.factor * control + claim.margin
        expected = 0.0
        for first in (0, 1):
            for second in (0, 1):
                chance = (candidate if first else 1 - candidate) * (control if second else 1 - control)
                expected += chance * wealth(claim, [(float(first), float(second))])
        assert expected <= 1 + 1e-12


def test_wealth_never_reaches_zero() -> None:
    wager = Wager(Claim(3.0, 0.01))
    for _ in range(2000):
        wager.add(0, 1)
    assert math.isfinite(wager.log_e)
    assert wager.log_e < -50


def test_a_claim_once_rejected_stays_rejected() -> None:
    wager = Wager(Claim(1.0, 0.03))
    while not wager.rejects(0.05):
        wager.add(1, 0)
    for _ in range(100):
        wager.add(0, 1)
    assert wager.log_e < 0
    assert wager.rejects(0.05)
    assert not wager.rejects(0.0005)


def test_rejection_begins_exactly_at_one_over_alpha() -> None:
    wager = Wager(Claim(1.0, 0.03), [math.log(20)] * len(STAKES), math.log(20))
    assert wager.rejects(0.05)
    assert not wager.rejects(0.0499)


@pytest.mark.parametrize("pair", [(1.01, 0), (0, -0.01), (math.nan, 0)])
def test_numbers_outside_of_zero_and_one_are_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="numbers in"):
        Wager(Claim(1.0, 0.03)).add(*pair)


@pytest.mark.parametrize(("factor", "margin"), [(-1, 0), (0, 0), (0.01, -0.03), (1, 1)])
def test_claims_that_cannot_be_bet_against_are_refused(factor: float, margin: float) -> None:
    with pytest.raises(ValueError, match="doubted"):
        Claim(factor, margin)


def test_the_mean_of_logarithms_survives_large_numbers() -> None:
    assert log_mean_exp([1000.0, 1000.0]) == 1000.0
    assert log_mean_exp([-2000.0, 0.0]) == pytest.approx(math.log(0.5))


def run(test: SuccessTest, rates: dict[str, tuple[float, float]], pairs: int, seed: int, alpha: float) -> Verdict:
    """Look after every pair, stop at the first verdict."""
    rng = np.random.default_rng(seed)
    for _ in range(pairs):
        for task, (candidate, control) in rates.items():
            test.add(task, candidate=rng.random() < candidate, control=rng.random() < control)
            verdict = test.verdict(alpha, 0.05)
            if verdict is not Verdict.UNDECIDED:
                return verdict
    return Verdict.UNDECIDED


def test_looking_after_every_pair_raises_no_more_false_alarms_than_alpha() -> None:
    """At the edge, where it is hardest: 300 trials of 150 pairs with a candidate exactly 3 points worse on both tasks
    (10 % alarms would be allowed; a z-test at the same level that looks as often raises three times as many)."""
    alarms = 0
    for seed in range(300):
        verdict = run(SuccessTest(["a", "b"], 0.03), {"a": (0.77, 0.8), "b": (0.62, 0.65)}, 150, seed, 0.1)
        alarms += verdict is Verdict.WORSE
    assert alarms / 300 <= 0.1


def test_a_candidate_that_loses_the_margin_is_not_called_equal() -> None:
    found = [
        run(SuccessTest(["a"], 0.1), {"a": (0.8, 0.9)}, 400, seed, 0.01) is Verdict.BETTER_OR_EQUAL
        for seed in range(200)
    ]
    assert sum(found) / 200 <= 0.05


def test_equal_policies_are_never_rolled_back_and_found_equal_soon() -> None:
    verdicts = [run(SuccessTest(["a"], 0.1), {"a": (0.9, 0.9)}, 1000, seed, 0.01) for seed in range(30)]
    assert verdicts == [Verdict.BETTER_OR_EQUAL] * 30


def test_one_bad_task_of_three_is_worse() -> None:
    rates = {"a": (0.9, 0.9), "b": (0.5, 0.9), "c": (0.9, 0.9)}
    assert all(run(SuccessTest(list(rates), 0.03), rates, 300, seed, 0.01) is Verdict.WORSE for seed in range(10))


def test_evidence_of_several_tasks_adds_up() -> None:
    one, three = SuccessTest(["a"], 0.03), SuccessTest(["a", "b", "c"], 0.03)
    for _ in range(10):
        one.add("a", candidate=False, control=True)
        for task in ("a", "b", "c"):
            three.add(task, candidate=False, control=True)
    assert three.log_e_worse > 2 * one.log_e_worse


def test_a_task_without_pairs_leaves_it_undecided_and_an_unknown_one_is_passed_over() -> None:
    test = SuccessTest(["a", "b"], 0.5)
    for _ in range(100):
        test.add("a", candidate=True, control=True)
        test.add("x", candidate=True, control=True)
    assert test.verdict(0.01, 0.05) is Verdict.UNDECIDED
    assert test.pairs == {"a": 100, "b": 0}
    for _ in range(100):
        test.add("b", candidate=True, control=True)
    assert test.verdict(0.01, 0.05) is Verdict.BETTER_OR_EQUAL


def test_a_saved_test_goes_on_as_if_it_had_not_stopped() -> None:
    rng = np.random.default_rng(3)
    whole, first = SuccessTest(["a", "b"], 0.03), SuccessTest(["a", "b"], 0.03)
    outcomes = [(str(rng.choice(["a", "b"])), bool(rng.random() < 0.5), bool(rng.random() < 0.9)) for _ in range(60)]
    for number, (task, candidate, control) in enumerate(outcomes):
        whole.add(task, candidate=candidate, control=control)
        if number == 30:
            first = SuccessTest(["a", "b"], 0.03, first.state_dict())
        first.add(task, candidate=candidate, control=control)
    assert first.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match="tasks"):
        SuccessTest(["a"], 0.03, first.state_dict())


def test_no_tasks_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        SuccessTest([], 0.03)
