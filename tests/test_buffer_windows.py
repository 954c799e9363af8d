"""Windows start where the labels say, and never cross a segment."""

import numpy as np
import pytest

from sop.algorithms import make_algorithm
from sop.buffer.windows import min_valid_steps, start_runs, valid_lengths
from sop.core.experience import StepLabels
from sop.testing.episodes import make_episode


def labels(weight: list[float], segment: list[int], start: list[int] | None = None) -> StepLabels:
    return StepLabels(
        loss_weight=np.asarray(weight, np.float32),
        segment=np.asarray(segment, np.int32),
        can_start=np.asarray(start if start is not None else [1] * len(weight), np.bool_),
    )


def test_a_window_ends_with_its_segment_its_weight_or_the_episode() -> None:
    weight = [1, 1, 1, 1, 1, 0, 1, 1, 1]
    segment = [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert valid_lengths(labels(weight, segment), 4).tolist() == [3, 2, 1, 2, 1, 0, 3, 2, 1]


def test_windows_shorter_than_the_minimum_are_not_drawn() -> None:
    opinion = labels([1] * 20, [0] * 20)
    assert min_valid_steps(8) == 5
    assert min_valid_steps(30) == 10
    assert min_valid_steps(3) == 3
    assert start_runs(opinion, 8) == [(0, 16)]


def test_starts_are_only_where_they_are_allowed() -> None:
    opinion = labels([1] * 12, [0] * 12, [1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    assert start_runs(opinion, 5) == [(0, 2), (4, 3)]


def test_an_empty_episode_has_no_windows() -> None:
    assert start_runs(labels([], []), 8) == []


def test_hg_dagger_on_a_corrected_episode_gives_exactly_the_listed_starts() -> None:
    """10 Hz, handover 0.3 s = 3 steps, H = 5: a run of 12 human steps at 8 learns from 11..19, starts 11..15."""
    episode = make_episode("p" * 8 + "h" * 12 + "p" * 10 + "h" * 7)
    algorithm = make_algorithm("hg_dagger", {}, 10.0)
    opinion = algorithm.annotate(episode)
    assert np.flatnonzero(opinion.loss_weight).tolist() == [*range(11, 20), *range(33, 37)]
    assert start_runs(opinion, 5) == [(11, 5)]


@pytest.mark.parametrize("horizon", [1, 5, 8, 30])
def test_no_window_holds_a_step_of_another_controller(horizon: int) -> None:
    rng = np.random.default_rng(horizon)
    algorithm = make_algorithm("hg_dagger", {"handover_s": 0.0}, 10.0)
    for _ in range(50):
        letters = "".join(rng.choice(["p", "h"]) * int(rng.integers(1, 20)) for _ in range(8))
        opinion = algorithm.annotate(make_episode(letters))
        lengths = valid_lengths(opinion, horizon)
        for first, count in start_runs(opinion, horizon):
            for start in range(first, first + count):
                assert set(letters[start : start + lengths[start]]) == {"h"}
                assert lengths[start] >= min_valid_steps(horizon)
