"""The adaptive sampler: the paper's equations to six digits, exact mixtures, repeatable draws."""

import math

import numpy as np
import pytest

from sop.buffer import AdaptiveSampler, EpisodeIndex, EpisodeRow
from sop.buffer.sampler import LossWindow, online_share
from sop.config import SamplerConfig
from sop.core.episode import Outcome
from sop.core.errors import RunError
from sop.core.experience import Source

TASKS = ("door", "drawer", "window")


def row(number: int, task: str, source: Source, runs: tuple[tuple[int, int], ...]) -> EpisodeRow:
    return EpisodeRow(
        episode_id=f"{number:032x}",
        actor_id="robot-0",
        sequence=number,
        task=task,
        source=source,
        num_steps=500,
        human_steps=0,
        num_interventions=0,
        policy_version=1,
        outcome=Outcome.SUCCESS,
        start_runs=runs,
        end_utc_ns=0,
        indexed_utc_ns=0,
    )


def full_index() -> EpisodeIndex:
    index = EpisodeIndex(TASKS)
    for number in range(30):
        index.add(row(number, TASKS[number % 3], Source(number % 2), ((0, 40), (100, 25))))
    return index


def fill(sampler: AdaptiveSampler, online: float, offline: float, steps: int = 20) -> None:
    for _ in range(steps):
        windows = sampler.draw(32)
        sampler.observe(windows, np.where(windows.source == Source.ONLINE, online, offline).astype(np.float32))


@pytest.mark.parametrize(
    ("online", "offline", "scale", "alpha", "expected"),
    [
        (1.0, 1.0, "ratio", 1.5, 1 / (1 + math.exp(-0.5))),
        (2.0, 1.0, "ratio", 1.5, 1 / (1 + math.exp(-(1.5 * 4 / 3 - 2 / 3)))),
        (0.5, 1.0, "ratio", 1.5, 1 / (1 + math.exp(-(1.5 * 2 / 3 - 4 / 3)))),
        (4.0, 1.0, "ratio", 1.5, 0.8),
        (0.01, 1.0, "ratio", 1.5, 0.2),
        (0.0, 0.0, "ratio", 1.5, 0.5),
        (0.06, 0.03, "raw", 2.0, 1 / (1 + math.exp(-0.09))),
        (0.10, 0.03, "raw", 2.0, 1 / (1 + math.exp(-0.17))),
        (9.0, 0.0, "raw", 2.0, 0.8),
        (0.0, 9.0, "raw", 2.0, 0.2),
    ],
)
def test_the_online_share_is_the_papers_formula(online, offline, scale, alpha, expected) -> None:
    config = SamplerConfig(alpha=alpha, scale=scale)
    assert online_share(online, offline, config) == pytest.approx(expected, abs=1e-6)


def test_tasks_are_uniform_and_shares_hold_in_every_batch() -> None:
    sampler = AdaptiveSampler(full_index(), SamplerConfig(), seed=0)
    for _ in range(50):
        windows = sampler.draw(64)
        assert len(windows) == 64
        for task in range(3):
            for source in Source:
                count = int(((windows.task == task) & (windows.source == source)).sum())
                assert abs(count - 64 / 6) < 1


def test_counts_have_exactly_the_expected_mean() -> None:
    sampler = AdaptiveSampler(full_index(), SamplerConfig(), seed=1)
    counts = sum(np.bincount(sampler.draw(7).task, minlength=3) for _ in range(3000))
    np.testing.assert_allclose(counts / 3000, 7 / 3, atol=0.03)


def test_until_both_sides_have_twenty_entries_the_share_is_one_half() -> None:
    sampler = AdaptiveSampler(full_index(), SamplerConfig(), seed=0)
    fill(sampler, online=4.0, offline=1.0, steps=19)
    assert sampler.share(0) == 0.5
    fill(sampler, online=4.0, offline=1.0, steps=1)
    assert sampler.share(0) == 0.8


def test_losses_older_than_the_window_are_forgotten() -> None:
    sampler = AdaptiveSampler(full_index(), SamplerConfig(window=20), seed=0)
    fill(sampler, online=9.0, offline=1.0, steps=20)
    assert sampler.share(1) == 0.8
    fill(sampler, online=1.0, offline=1.0, steps=20)
    assert sampler.share(1) == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_a_task_with_few_online_starts_is_drawn_offline_only() -> None:
    index = EpisodeIndex(("door",))
    index.add(row(0, "door", Source.OFFLINE, ((0, 50),)))
    index.add(row(1, "door", Source.ONLINE, ((0, 99),)))
    sampler = AdaptiveSampler(index, SamplerConfig(), seed=0)
    assert set(sampler.draw(32).source) == {Source.OFFLINE}
    index.add(row(2, "door", Source.ONLINE, ((0, 1),)))
    assert sampler.share(0) == 0.5


def test_a_task_without_demonstrations_is_drawn_online_only_and_an_empty_one_not_at_all() -> None:
    index = EpisodeIndex(TASKS)
    index.add(row(0, "drawer", Source.ONLINE, ((0, 3),)))
    sampler = AdaptiveSampler(index, SamplerConfig(), seed=0)
    windows = sampler.draw(8)
    assert set(windows.task) == {1}
    assert set(windows.source) == {Source.ONLINE}
    assert set(windows.start) <= {0, 1, 2}


def test_without_any_window_the_sampler_says_so() -> None:
    with pytest.raises(RunError, match="nothing to learn from"):
        AdaptiveSampler(EpisodeIndex(TASKS), SamplerConfig(), seed=0).draw(4)


def test_draws_are_uniform_over_window_starts() -> None:
    index = EpisodeIndex(("door",))
    index.add(row(0, "door", Source.OFFLINE, ((5, 1), (20, 2))))
    index.add(row(1, "door", Source.OFFLINE, ((7, 1),)))
    sampler = AdaptiveSampler(index, SamplerConfig(), seed=0)
    windows = sampler.draw(40_000)
    pairs, counts = np.unique(np.stack([windows.episode, windows.start], axis=1), axis=0, return_counts=True)
    assert pairs.tolist() == [[0, 5], [0, 20], [0, 21], [1, 7]]
    np.testing.assert_allclose(counts / 40_000, 0.25, atol=0.01)


def test_a_restored_sampler_draws_exactly_what_the_first_one_would_have() -> None:
    first = AdaptiveSampler(full_index(), SamplerConfig(), seed=5)
    fill(first, online=2.0, offline=1.0, steps=25)
    second = AdaptiveSampler(full_index(), SamplerConfig(), seed=99)
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        mine, theirs = first.draw(16), second.draw(16)
        np.testing.assert_array_equal(mine.episode, theirs.episode)
        np.testing.assert_array_equal(mine.start, theirs.start)
        losses = np.linspace(0, 1, 16, dtype=np.float32)
        first.observe(mine, losses)
        second.observe(theirs, losses)
    assert first.metrics() == second.metrics()


def test_a_loss_that_is_not_finite_does_not_poison_the_shares() -> None:
    sampler = AdaptiveSampler(full_index(), SamplerConfig(), seed=0)
    fill(sampler, online=1.0, offline=1.0, steps=20)
    windows = sampler.draw(32)
    sampler.observe(windows, np.full(32, np.nan, np.float32))
    assert sampler.share(0) == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_a_draw_is_systematic_counts_and_then_one_uniform_rank_per_window() -> None:
    """The order in which the generator is asked is part of what a seed means."""
    index = full_index()
    sampler, rng = AdaptiveSampler(index, SamplerConfig(), seed=11), np.random.default_rng(11)
    for _ in range(20):
        order = rng.permutation(6)
        marks = np.floor(np.concatenate(([0.0], np.cumsum(np.full(6, 48 / 6)))) + rng.random())
        marks[0], marks[-1] = 0, 48
        counts = np.empty(6, np.int64)
        counts[order] = np.diff(marks).astype(np.int64)
        expected = []
        for (task, source), count in zip([(t, s) for t in range(3) for s in reversed(Source)], counts, strict=True):
            rows = [number for number in range(30) if (number % 3, number % 2) == (task, source)]
            for rank in rng.integers(0, 65 * len(rows), size=count):
                step = int(rank) % 65
                expected.append((rows[int(rank) // 65], step if step < 40 else 60 + step, task, int(source)))
        windows = sampler.draw(48)
        columns = (windows.episode, windows.start, windows.task, windows.source)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


def test_a_loss_window_forgets_to_the_last_bit() -> None:
    """Whatever passed through it, the mean is that of its entries: a restored window has the same."""
    rng = np.random.default_rng(0)
    window = LossWindow(10)
    for step in range(1, 200):
        window.append(step, float(10.0 ** rng.uniform(-9, 30)) if step % 7 else 3.4e38)
        window.forget(step)
        losses = [loss for _, loss in window.entries()]
        restored = LossWindow(10)
        restored.load(window.entries())
        assert len(window) == min(step, 10)
        assert window.mean == restored.mean == pytest.approx(math.fsum(losses) / len(losses), rel=1e-15)
    for step in range(200, 211):
        window.append(step, 0.25)
        window.forget(step)
    assert window.mean == 0.25
