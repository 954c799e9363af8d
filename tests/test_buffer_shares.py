"""One robot's share of a batch is capped, exactly and in every batch; its flood waits in the store."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from hostile_examples import RUN, long_episode, put
from sop.buffer import AdaptiveSampler, EpisodeIndex, EpisodeRow, Ingest, RowBlock
from sop.buffer.quota import ActorQuota
from sop.buffer.shares import capped_shares
from sop.config import SamplerConfig
from sop.core.episode import Outcome
from sop.core.experience import Source
from sop.testing.memory import MemoryBus, MemoryStore

TASKS = ("door", "drawer")


def row(number: int, actor: str, runs: Any, *, task: str = "door", source: Source = Source.ONLINE) -> EpisodeRow:
    return EpisodeRow(
        episode_id=f"{number:032x}",
        actor_id=actor,
        sequence=number,
        task=task,
        source=source,
        num_steps=500,
        human_steps=0,
        num_interventions=0,
        policy_version=1,
        outcome=Outcome.SUCCESS,
        start_runs=tuple(runs),
        end_utc_ns=0,
        indexed_utc_ns=0,
    )


def flooded(actors: int, flood: int) -> list[EpisodeRow]:
    """robot-0 has `flood` episodes for every one of the others; all are mixed."""
    names = [name for number in range(4) for name in [*["robot-0"] * flood, *(f"robot-{n}" for n in range(1, actors))]]
    return [row(number, name, [(0, 20), (40, 5)]) for number, name in enumerate(names)]


def index_of(rows: list[EpisodeRow], *, at_once: bool = False) -> EpisodeIndex:
    index = EpisodeIndex(TASKS)
    if at_once:
        index.extend(RowBlock.from_rows(rows[: len(rows) // 2]), RowBlock.from_rows(rows[len(rows) // 2 :]))
    else:
        for one in rows:
            index.add(one)
    return index


def counts(index: EpisodeIndex, episode: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    return np.bincount(index.actors_of(episode), minlength=len(index.actors))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_flood_from_one_robot_of_ten_gets_a_fifth_of_every_batch(at_once: bool) -> None:
    """Fault 41: one actor sends 100x data: its share of any batch is capped, 2 / N by default."""
    index = index_of(flooded(10, 100), at_once=at_once)
    sampler, drawn = AdaptiveSampler(index, SamplerConfig(), seed=0), np.zeros(10)
    for _ in range(200):
        found = counts(index, sampler.draw(64).episode)
        assert 12 <= found[0] <= 13
        assert (found[1:] >= 5).all()
        drawn += found
    np.testing.assert_allclose(drawn / drawn.sum(), [0.2, *[0.8 / 9] * 9], atol=1e-3)


def test_within_a_capped_robot_and_within_the_others_every_start_counts_the_same() -> None:
    rows = [row(n, "robot-0", [(n, 2)]) for n in range(20)] + [
        row(50, "robot-1", [(3, 1), (9, 2)]),
        row(51, "robot-2", [(5, 1)]),
    ]
    index = index_of(rows)
    windows = AdaptiveSampler(index, SamplerConfig(max_actor_share=0.5), seed=0).draw(80_000)
    pairs, found = np.unique(np.stack([windows.episode, windows.start]), axis=1, return_counts=True)
    assert pairs.T.tolist() == [[n, n + k] for n in range(20) for k in (0, 1)] + [[20, 3], [20, 9], [20, 10], [21, 5]]
    np.testing.assert_allclose(found[:40] / 80_000, 0.5 / 40, rtol=0.1)
    np.testing.assert_allclose(found[40:] / 80_000, 0.5 / 4, rtol=0.03)


def test_while_nobody_is_above_the_cap_the_draws_are_those_without_one() -> None:
    index = index_of(flooded(10, 1))
    capped, free = (AdaptiveSampler(index, SamplerConfig(max_actor_share=cap), seed=3) for cap in (None, 1.0))
    for _ in range(20):
        mine, theirs = capped.draw(32), free.draw(32)
        np.testing.assert_array_equal(mine.episode, theirs.episode)
        np.testing.assert_array_equal(mine.start, theirs.start)


def test_with_two_robots_the_default_cuts_nothing_and_demonstrations_are_never_cut() -> None:
    rows = [
        *flooded(2, 9),
        *(row(n, "lab-0", [(0, 50)], task="drawer", source=Source.OFFLINE) for n in range(900, 950)),
    ]
    rows += [row(n, f"lab-{n}", [(0, 1)], task="drawer", source=Source.OFFLINE) for n in range(990, 995)]
    index = index_of(rows)
    found = counts(index, AdaptiveSampler(index, SamplerConfig(), seed=0).draw(4000).episode)
    names = dict(zip(index.actors, found.tolist(), strict=True))
    assert names["robot-0"] / 2000 == pytest.approx(0.9, abs=0.03)
    assert names["lab-0"] / 2000 > 0.98


def test_the_cap_holds_per_task_and_for_robots_that_come_later() -> None:
    index = index_of(flooded(5, 40))
    sampler = AdaptiveSampler(index, SamplerConfig(min_online_starts=0), seed=0)
    sampler.draw(8)
    for number in range(700, 705):
        index.add(row(number, f"robot-{number}", [(0, 25)]))
        index.add(row(number + 100, "robot-1", [(0, 99)], task="drawer"))
    windows = sampler.draw(400)
    door = counts(index, windows.episode[windows.task == 0])
    assert door[0] == 40
    assert set(counts(index, windows.episode[windows.task == 1]).nonzero()[0]) == {1}


@pytest.mark.parametrize(
    ("starts", "cap", "expected"),
    [
        ([10, 10, 10], 0.5, [1 / 3, 1 / 3, 1 / 3]),
        ([80, 10, 10], 0.5, [0.5, 0.25, 0.25]),
        ([70, 20, 5, 5], 0.4, [0.4, 0.4, 0.1, 0.1]),
        ([97, 1, 1, 1], 0.1, [0.25, 0.25, 0.25, 0.25]),
        ([5], 0.2, [1.0]),
        ([1, 1000, 1], 0.5, [0.25, 0.5, 0.25]),
        ([60, 40], 0.5, [0.5, 0.5]),
    ],
)
def test_what_is_cut_off_goes_to_the_others_in_proportion(starts: list[int], cap: float, expected: list[float]) -> None:
    np.testing.assert_allclose(capped_shares(np.asarray(starts), cap), expected)


def test_shares_add_up_stay_below_the_cap_and_keep_their_order_whatever_comes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        starts = np.ceil(10 ** rng.uniform(0, 6, rng.integers(1, 30))).astype(np.int64)
        cap = float(rng.uniform(0.02, 1))
        shares = capped_shares(starts, cap)
        assert shares.sum() == pytest.approx(1)
        assert shares.max() <= max(cap, 1 / len(starts)) * (1 + 1e-9)
        order = np.argsort(starts, kind="stable")
        assert (np.diff(shares[order]) >= -1e-12).all()


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"sampler\.max_actor_share must be in"):
        SamplerConfig(max_actor_share=wrong)


def test_a_robot_may_deliver_twenty_times_real_time_after_an_hour_in_reserve() -> None:
    now = [0.0]
    quota = ActorQuota(10.0, lambda: now[0], speedup=20.0)
    hours = 0
    while quota.take("a", 36_000):
        hours += 1
    assert hours == 20
    assert quota.take("b", 36_000)
    now[0] = 180.0
    assert quota.take("a", 36_000)
    assert not quota.take("a", 1)
    assert sum(quota.take("c", 1) for _ in range(100_000)) == 72_000


def test_a_flood_waits_in_the_store_while_the_others_get_in() -> None:
    """Fault 41: one actor sends 100x data: quota; told, nothing lost, in later."""
    now, store = [0.0], MemoryStore()
    keys = {
        actor: [put(store, long_episode(actor_id=actor, sequence=n), sequence=n, actor=actor) for n in range(count)]
        for actor, count in (("robot-0", 30), ("robot-1", 3))
    }
    ingest = Ingest(store, MemoryBus(), RUN, clock=lambda: now[0], speedup=0.01)  # 36 s in reserve: 9 episodes
    ingest.reconcile()
    found = [str(episode.key) for episode in ingest.drain()]
    assert found == keys["robot-0"][:9] + keys["robot-1"]
    assert ingest.over_quota == {"episodes/robot-0": 1}
    assert ingest.missing() == {}
    fetched: list[str] = []
    store.before = lambda operation, key: fetched.append(key) if operation == "get" else None
    ingest.reconcile()
    assert fetched == []
    now[0] = 1e6
    while ingest.over_quota:
        ingest.reconcile()
        now[0] += 1e6
    assert [str(episode.key) for episode in ingest.drain()] == keys["robot-0"][9:]
    rebuilt = Ingest(store, MemoryBus(), RUN, speedup=0.01)
    assert len(list(rebuilt.everything())) == 33


def test_what_is_kept_of_an_episode_is_small_when_they_come_one_by_one_and_no_cap_binds() -> None:
    """A learner that runs for weeks: millions of episodes, none of which is asked for by its actor."""
    rows = [row(number, f"robot-{number % 2}", [(0, 20)]) for number in range(12_000)]
    index = index_of(rows[:4_000])
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for one in rows[4_000:]:
            index.add(one)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 8_000 < 250, "bytes per episode"
    assert len(index) == 12_000
