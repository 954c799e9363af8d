"""Measures of a value function held to numbers worked out by hand; what the data cannot say is NaN."""

import math

import numpy as np
import pytest

from sop.core.episode import Episode, Outcome
from sop.core.errors import RunError
from sop.testing.episodes import make_episode
from sop.values import (
    ValuedEpisode,
    calibrate,
    calibration_error,
    drift,
    missing_outcomes,
    rank_correlation,
    require_outcomes,
    separation,
)

NAN = float("nan")


def valued(
    values: list[float], realised: list[float], task: str = "push", success: bool | None = True
) -> ValuedEpisode:
    return ValuedEpisode(
        task=task, success=success, values=np.asarray(values, np.float32), realised=np.asarray(realised, np.float32)
    )


def test_rank_correlation_reads_order_only() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 8, 27, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 5, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)


def test_ties_share_the_mean_of_their_ranks() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    assert rank_correlation([10, 20, 20, 30], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_rank_correlation_leaves_out_what_is_not_finite_and_does_not_guess() -> None:
    assert rank_correlation([1, NAN, 2, 3], [1, 0, NAN, 3]) == pytest.approx(1)
    assert math.isnan(rank_correlation([1], [1]))
    assert math.isnan(rank_correlation([], []))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="equal length"):
        rank_correlation([1, 2], [1, 2, 3])


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    """Two bins of the sorted predictions: (.1, .2) realise (.3, .2), (.6, .8) realise (.6, .4)."""
    predicted, realised = [0.8, 0.1, 0.6, 0.2], [0.4, 0.3, 0.6, 0.2]
    assert calibration_error(predicted, realised, 2) == pytest.approx((2 * 0.1 + 2 * 0.2) / 4)
    assert calibration_error(predicted, realised, 1) == pytest.approx(0.05)
    assert calibration_error([0.0, 0.1, 0.9], [0.0, 0.3, 0.0], 2) == pytest.approx((2 * 0.1 + 1 * 0.9) / 3)
    assert calibration_error([0.3], [0.1], 10) == pytest.approx(0.2)
    assert math.isnan(calibration_error([NAN], [0.1]))
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        calibration_error([0.3], [0.1], 0)


def test_separation_counts_pairs_and_halves_ties() -> None:
    assert separation([3, 4], [1, 2]) == 1
    assert separation([1, 2], [3, 4]) == 0
    assert separation([1, 3], [2, 3]) == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    assert math.isnan(separation([], [1]))
    assert math.isnan(separation([1], []))


def test_correlation_per_task_does_not_count_that_tasks_are_told_apart() -> None:
    """Within each task the order is wrong, between the tasks it is right."""
    episodes = [valued([-0.8, -0.9], [-0.9, -0.8], "hard"), valued([-0.1, -0.3, -0.2], [-0.3, -0.1, -0.2], "easy")]
    found = calibrate(episodes, 7)
    assert found.tasks == {"easy": pytest.approx(-1), "hard": pytest.approx(-1)}
    assert found.rank_correlation == pytest.approx(-1)
    assert found.pooled_rank_correlation == pytest.approx(1 - 6 * (1 + 1 + 4 + 4) / (5 * 24))
    assert (found.num_episodes, found.num_steps, found.value_version) == (2, 5, 7)


def test_tasks_count_by_their_steps_and_one_that_cannot_be_ranked_not_at_all() -> None:
    episodes = [
        valued([-0.3, -0.2, -0.1], [-0.3, -0.2, -0.1], "right"), valued([-0.3, -0.2], [-0.2, -0.3], "wrong"),
        valued([-0.5, -0.5, -0.5, -0.5], [-0.4, -0.3, -0.2, -0.1], "flat"),
    ]  # fmt: skip
    found = calibrate(episodes, 1)
    assert found.rank_correlation == pytest.approx((3 * 1 + 2 * -1) / 5)
    assert math.isnan(found.tasks["flat"])


def test_failures_are_told_from_successes_at_three_moments_within_a_task() -> None:
    flat = [-0.5] * 3
    episodes = [
        valued([-0.9, -0.5, -0.1], flat), valued([-0.1, -0.5, -0.9], flat, success=False),
        valued([-0.3, -0.2, -0.1], flat, "pull"), valued([-0.4, -0.2, -0.6], flat, "pull", success=False),
        valued([-0.5, -0.5, -0.5], flat, success=None), valued([-0.1, -0.1, -0.1], flat, "only good"),
    ]  # fmt: skip
    found = calibrate(episodes, 1)
    assert found.auc_start == pytest.approx((0 + 1) / 2)
    assert found.auc_middle == pytest.approx((0.5 + 0.5) / 2)
    assert found.auc_end == pytest.approx(1)


def test_only_steps_with_a_return_count() -> None:
    episode = valued([-0.1, -0.2, -0.3, -0.4], [NAN, -0.1, -0.1, NAN])
    found = calibrate([episode, valued([-0.5], [NAN])], 1)
    assert (found.num_episodes, found.num_steps) == (1, 2)
    assert found.bias == pytest.approx(-0.15)
    assert found.calibration_error == pytest.approx((0.1 + 0.2) / 2)
    with pytest.raises(ValueError, match=r"push: \(2,\) values and \(1,\) returns"):
        calibrate([valued([-0.1, -0.2], [-0.1])], 1)


def test_points_are_equal_bins_in_ascending_order_per_kind_of_episode() -> None:
    values = np.linspace(-0.9, -0.1, 20).tolist()
    found = calibrate([valued(values[::-1], values[::-1]), valued([-0.7], [-0.9], success=False)], 1).points
    good = [point for point in found if point.success]
    assert [point.num_steps for point in good] == [2] * 10
    np.testing.assert_allclose([point.predicted for point in good], np.reshape(values, (10, 2)).mean(1), atol=1e-6)
    assert [point.predicted for point in good] == [point.realised for point in good]
    assert [(point.success, point.num_steps) for point in found[10:]] == [(False, 1)]
    assert (found[10].predicted, found[10].realised) == (pytest.approx(-0.7), pytest.approx(-0.9))


def test_nothing_to_measure_is_not_a_number() -> None:
    found = calibrate([], 0)
    assert (found.num_episodes, found.num_steps, found.points, found.tasks) == (0, 0, (), {})
    numbers = (found.rank_correlation, found.pooled_rank_correlation, found.calibration_error, found.bias)
    assert all(math.isnan(number) for number in (*numbers, found.auc_start, found.auc_middle, found.auc_end))


def test_drift_is_what_changed() -> None:
    before = calibrate([valued([-0.3, -0.2, -0.1], [-0.3, -0.2, -0.1])], 1)
    after = calibrate([valued([-0.3, -0.2, -0.1], [-0.1, -0.1, -0.2])], 1)
    found = drift(before, after)
    assert found.bias == pytest.approx(-0.2 - -0.4 / 3)
    assert found.rank_correlation == pytest.approx(-math.sqrt(0.75) - 1)


def ended(*outcomes: Outcome) -> list[Episode]:
    return [make_episode("p", outcome=outcome) for outcome in outcomes]


GOOD, BAD, GONE = Outcome.SUCCESS, Outcome.FAILURE, Outcome.ABORTED


def test_every_task_needs_a_success_and_a_failure_and_the_message_says_what_it_has() -> None:
    episodes = {
        "fine": ended(GOOD, BAD), "easy": ended(GOOD, GOOD, GONE), "hard": ended(BAD), "unknown": ended(GONE),
        "absent": [],
    }  # fmt: skip
    sentences = missing_outcomes(episodes).split(". ")
    assert sentences[0].startswith("task 'easy' has no failed episode (2 successful, 0 failed, 1 aborted): record more")
    assert sentences[1].startswith(
        "task 'hard' has no successful episode (0 successful, 1 failed, 0 aborted): add demo"
    )
    assert sentences[2].startswith("task 'unknown' has no labelled episode (0 successful, 0 failed, 1 aborted): record")
    assert sentences[3].startswith("task 'absent' has no labelled episode (0 successful, 0 failed, 0 aborted): record")
    assert len(sentences) == 4


def test_a_run_without_the_outcomes_is_refused_and_one_with_them_is_not() -> None:
    assert missing_outcomes({"fine": ended(GOOD, BAD)}) == ""
    require_outcomes({"fine": ended(BAD, GONE, GOOD)})
    with pytest.raises(RunError, match=r"cannot be learned. task 'easy' has no failed episode.*hg_dagger"):
        require_outcomes({"fine": ended(BAD, GOOD), "easy": ended(GOOD)})
    with pytest.raises(RunError, match="names none"):
        require_outcomes({})
