"""One robot of ten that sends a hundred times as much, or lies: its part is bounded, and it is named."""

import numpy as np

from faults.test_links import RUN
from sop.buffer import AdaptiveSampler, EpisodeIndex, EpisodeRow, Ingest
from sop.buffer.influence import Influence
from sop.buffer.quota import RESERVE_S, SPEEDUP
from sop.config import SamplerConfig
from sop.core.codec import content_hash, encode
from sop.core.episode import Outcome
from sop.core.experience import Source
from sop.core.layout import EpisodeKey
from sop.testing.episodes import make_episode
from sop.testing.memory import MemoryBus, MemoryStore

ROBOTS = 10
BAD = "robot-3"


def fleet_index(*, episodes_of_bad: int, success_of_bad: float) -> EpisodeIndex:
    """Ten robots with 20 episodes each that succeed in three of four, one of them otherwise; and demonstrations."""
    index, number = EpisodeIndex(("push",)), 0
    rng = np.random.default_rng(0)
    for robot in range(-1, ROBOTS):
        name = "lab-0" if robot < 0 else f"robot-{robot}"
        for sequence in range(episodes_of_bad if name == BAD else 20):
            good = rng.random() < (success_of_bad if name == BAD else 0.75)
            index.add(
                EpisodeRow(
                    episode_id=f"{number:032x}",
                    actor_id=name,
                    sequence=sequence,
                    task="push",
                    source=Source.OFFLINE if robot < 0 else Source.ONLINE,
                    num_steps=50,
                    human_steps=0,
                    num_interventions=0,
                    policy_version=1,
                    outcome=Outcome.SUCCESS if good else Outcome.FAILURE,
                    start_runs=((0, 30),),
                    end_utc_ns=0,
                    indexed_utc_ns=0,
                )
            )
            number += 1
    return index


def test_fault_41_a_robot_that_sends_a_hundred_times_as_much_gets_its_share_of_a_batch_and_no_more() -> None:
    index = fleet_index(episodes_of_bad=2000, success_of_bad=0.75)
    sampler = AdaptiveSampler(index, SamplerConfig(), seed=0)
    for _ in range(50):
        windows = sampler.draw(128)
        online = windows.episode[windows.source == Source.ONLINE]
        mine = sum(index.row(int(row)).actor_id == BAD for row in online)
        assert mine <= 2 / ROBOTS * len(online) + 1


def test_fault_41_a_flood_waits_in_the_store_and_the_others_get_in() -> None:
    """Each counts a second at least: its reserve is used up, the rest waits, nothing is lost."""
    store, now = MemoryStore(), 0.0
    limit = int(RESERVE_S * 0.001)  # as many episodes as a slowed-down quota lets in at once, a second each at least
    for actor, count in ((BAD, 3 * limit + 3), ("robot-9", 2)):
        for number in range(count):
            data = encode(make_episode(actor_id=actor, sequence=number))
            store.put(str(EpisodeKey("episodes", actor, number, 4, content_hash(data))), data)
    ingest = Ingest(store, MemoryBus(), RUN, clock=lambda: now, speedup=0.001)
    ingest.reconcile()
    taken = [str(episode.key) for episode in ingest.drain()]
    assert sum(key.startswith("episodes/robot-9/") for key in taken) == 2
    assert limit <= sum(key.startswith(f"episodes/{BAD}/") for key in taken) <= limit + 1
    assert list(ingest.over_quota) == [f"episodes/{BAD}"]
    for _ in range(5):
        now += RESERVE_S / 0.001 / 1000 * 1001
        ingest.reconcile()
        taken += [str(episode.key) for episode in ingest.drain()]
    assert sorted(taken) == sorted(store.keys("episodes/")), "it was late, and it was not lost"
    assert SPEEDUP > 1


def test_fault_42_a_robot_that_flips_its_labels_is_named() -> None:
    report = Influence(fleet_index(episodes_of_bad=40, success_of_bad=0.05)).report()
    assert (report[0].actor_id, report[0].named) == (BAD, True)
    assert not any(robot.named for robot in report[1:])


def test_fault_42_a_robot_that_sends_noise_is_named_by_what_its_windows_cost_and_its_part_is_bounded() -> None:
    """Noise cannot be learned: its windows stay expensive while those of the others become cheap."""
    index = fleet_index(episodes_of_bad=60, success_of_bad=0.75)
    sampler, influence, rng = (
        AdaptiveSampler(index, SamplerConfig(), seed=1),
        Influence(index),
        np.random.default_rng(2),
    )
    for _ in range(150):
        windows = sampler.draw(64)
        bad = np.array([index.row(int(row)).actor_id == BAD for row in windows.episode])
        losses = np.where(bad, 1.0, 0.2) * rng.uniform(0.8, 1.2, len(bad))
        sampler.observe(windows, losses.astype(np.float32))
        influence.observe(windows, losses.astype(np.float32))
    first = influence.report()[0]
    assert (first.actor_id, first.named) == (BAD, True)
    assert first.loss_ratio is not None
    assert first.loss_ratio > 2
    assert first.draw_share <= 2 / ROBOTS + 0.01
