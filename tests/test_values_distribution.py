"""Bins and two-hot targets held to numbers worked out by hand."""

import numpy as np
import pytest
import torch

from sop.values import bin_centres, expectation, two_hot


def masses(value: float, num_bins: int) -> dict[int, float]:
    target = two_hot(torch.tensor([value], dtype=torch.float64), num_bins)[0]
    return {int(index): pytest.approx(float(target[index]), abs=1e-6) for index in target.nonzero().flatten()}


def test_201_bins_lie_a_two_hundredth_apart_from_minus_1_to_0() -> None:
    centres = bin_centres(201)
    assert centres.dtype == torch.float32
    assert (centres[0], centres[100], centres[200]) == (-1, -0.5, 0)
    np.testing.assert_allclose(centres, np.arange(-200, 1) / 200, atol=1e-7)


def test_a_value_on_a_centre_puts_all_mass_there() -> None:
    assert masses(-1.0, 201) == {0: 1.0}
    assert masses(0.0, 201) == {200: 1.0}
    assert masses(-0.5, 201) == {100: 1.0}
    assert masses(-0.25, 5) == {3: 1.0}


def test_a_value_between_two_centres_is_split_by_its_distance() -> None:
    assert masses(-0.992, 201) == {1: 0.4, 2: 0.6}
    assert masses(-0.0025, 201) == {199: 0.5, 200: 0.5}
    assert masses(-0.3, 3) == {1: 0.6, 2: 0.4}


def test_values_outside_fall_into_the_outermost_bins() -> None:
    assert masses(-1.7, 201) == {0: 1.0}
    assert masses(0.3, 201) == {200: 1.0}


def test_two_hot_keeps_the_shape_and_its_rows_sum_to_1() -> None:
    value = torch.linspace(-1, 0, 24).view(2, 3, 4)
    target = two_hot(value, 11)
    assert target.shape == (2, 3, 4, 11)
    torch.testing.assert_close(target.sum(dim=-1), torch.ones(2, 3, 4))


@pytest.mark.parametrize("num_bins", [2, 51, 201])
def test_the_expectation_of_a_two_hot_target_is_the_value(num_bins: int) -> None:
    value = torch.rand(500, generator=torch.Generator().manual_seed(0)) - 1
    target = two_hot(value, num_bins)
    torch.testing.assert_close(target @ bin_centres(num_bins), value, atol=1e-6, rtol=0)
    torch.testing.assert_close(expectation(target.log()), value, atol=1e-6, rtol=0)


def test_equal_logits_expect_the_middle() -> None:
    torch.testing.assert_close(expectation(torch.zeros(3, 201)), torch.full((3,), -0.5))


def test_what_cannot_be_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        two_hot(torch.tensor([float("nan")]), 201)
    with pytest.raises(ValueError, match="num_bins must be at least 2, got 1"):
        two_hot(torch.zeros(1), 1)
    with pytest.raises(ValueError, match="num_bins must be at least 2, got 1"):
        bin_centres(1)
