"""The histogram of policy ages: what is in which bucket, and what is left out."""

import numpy as np
import pytest

from sop.learner.ages import NAMES, PolicyAges


def test_ages_are_counted_from_the_newest_version_and_demonstrations_have_none() -> None:
    ages = PolicyAges()
    ages.add(np.asarray([-1, 10, 9, 8, 7, -1, 2]), 10)  # 0, 1, 2, 3, 8
    found = ages.take()
    assert [found[f"batch/policy_age/{name}"] for name in NAMES] == pytest.approx([0.2, 0.2, 0.4, 0, 0.2, 0, 0])
    assert found["batch/policy_age_p50"] == 2
    assert found["batch/policy_age_p99"] == pytest.approx(7.8)


def test_each_report_starts_anew_and_says_nothing_without_robots() -> None:
    ages = PolicyAges()
    ages.add(np.asarray([3, 3]), 3)
    assert ages.take()["batch/policy_age/0"] == 1.0
    ages.add(np.asarray([-1, -1]), 3)
    ages.add(np.asarray([1]), None)
    assert ages.take() == {}


def test_the_oldest_fall_into_the_open_bucket_and_the_future_into_the_first() -> None:
    ages = PolicyAges()
    ages.add(np.asarray([0, 5]), 10**6)
    ages.add(np.asarray([7]), 5)
    found = ages.take()
    assert found["batch/policy_age/32+"] == pytest.approx(2 / 3)
    assert found["batch/policy_age/0"] == pytest.approx(1 / 3)
