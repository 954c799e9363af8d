"""Hops from the end of an episode to the first robot that learned from it, to the second."""

from types import SimpleNamespace
from typing import Any

import pytest

from sop.core.episode import PolicyTimes
from sop.core.freshness import ALL_HOPS, HOPS, arrival_hops, as_json, by_actor, by_task, summary
from sop.core.lineage import LearnedEpisode, Lineage
from sop.freshness import Swap, first_swaps, hop_samples
from sop.report.hops import freshness_section


def s(seconds: float) -> int:
    return int(seconds * 1e9)


def learned(
    number: int, *, at: float, actor: str = "robot-1", task: str = "door", event: bool = True
) -> LearnedEpisode:
    """Recorded at `at`, spooled +0.1, uploaded +0.3, indexed +0.6, drawn +1.0 seconds."""
    return LearnedEpisode(
        key=f"episodes/{actor}/{number:08d}-00120-{number:032x}.arrow",
        task=task,
        policy_version=0,
        human_steps=0,
        operators=(),
        learner_step=1,
        recorded_utc_ns=s(at),
        spooled_utc_ns=s(at + 0.1) if event else None,
        uploaded_utc_ns=s(at + 0.3) if event else None,
        indexed_utc_ns=s(at + 0.6),
        sampled_utc_ns=s(at + 1.0),
    )


def version(number: int, *episodes: LearnedEpisode, created: float) -> tuple[Any, Lineage]:
    return SimpleNamespace(version=number, created_utc_ns=s(created)), Lineage(draws=(), learned=episodes)


def swap(actor: str, number: int, published: float, staged: float, swapped: float) -> Swap:
    return Swap(
        actor, number, PolicyTimes(published_utc_ns=s(published), staged_utc_ns=s(staged), swapped_utc_ns=s(swapped))
    )


def values(samples: list[Any], hop: str) -> list[float]:
    return [round(sample.seconds, 6) for sample in samples if sample.hop == hop]


def test_the_hops_are_the_ways_between_neighbouring_stamps() -> None:
    assert HOPS[0] == "recorded_to_spooled"
    assert HOPS[-1] == "staged_to_swapped"
    assert len(HOPS) == 7


def test_an_episode_measures_every_hop_up_to_its_first_draw() -> None:
    hops = {sample.hop: round(sample.seconds, 6) for sample in arrival_hops(learned(1, at=10))}
    assert hops == {
        "recorded_to_spooled": 0.1,
        "spooled_to_uploaded": 0.2,
        "uploaded_to_indexed": 0.3,
        "indexed_to_sampled": 0.4,
        "recorded_to_indexed": 0.6,
    }


def test_a_lost_event_leaves_out_the_hops_that_need_it() -> None:
    hops = {sample.hop for sample in arrival_hops(learned(1, at=10, event=False))}
    assert hops == {"indexed_to_sampled", "recorded_to_indexed"}


def test_the_way_ends_at_the_first_robot_with_that_version_or_a_later_one() -> None:
    history = [version(2, learned(1, at=10), created=12), version(1, learned(0, at=4), created=6)]
    swaps = [swap("robot-2", 3, 20, 20.5, 21), swap("robot-1", 1, 6.5, 7, 9), swap("robot-3", 2, 12.5, 13, 30)]
    samples = hop_samples(history, swaps)
    assert sorted(values(samples, "sampled_to_published")) == [1.0, 1.0]
    assert values(samples, "recorded_to_swapped") == [5.0, 11.0]  # robot-2 swapped to 3 before robot-3 to 2
    assert sorted(values(samples, "published_to_staged")) == [0.5, 0.5, 0.5]
    assert sorted(values(samples, "staged_to_swapped")) == [0.5, 2.0, 17.0]


def test_what_no_robot_acts_with_yet_has_no_total() -> None:
    samples = hop_samples([version(2, learned(1, at=10), created=12)], [swap("robot-1", 1, 1, 2, 3)])
    assert values(samples, "recorded_to_swapped") == []
    assert values(samples, "sampled_to_published") == [1.0]


def test_the_base_policy_and_the_lab_are_left_out() -> None:
    lab = learned(5, at=1, actor="lab-0")
    samples = hop_samples([version(0, lab, created=3), version(1, lab, created=9)], [swap("robot-1", 0, 3, 4, 50)])
    assert samples == []


def test_a_robot_that_reports_a_swap_with_every_episode_counts_once() -> None:
    one, restarted = swap("robot-1", 1, 1, 2, 3), swap("robot-1", 1, 1, 7000, 7003)
    samples = hop_samples([], [one, restarted, one])
    assert values(samples, "published_to_staged") == [1.0], "the first time counts, not the one after a restart"
    assert values(samples, "staged_to_swapped") == [1.0]


def test_an_episode_that_is_new_again_after_the_index_was_rebuilt_counts_once() -> None:
    again = learned(1, at=10)
    samples = hop_samples([version(2, again, created=99), version(1, again, created=12)], [])
    assert values(samples, "sampled_to_published") == [1.0]


def test_the_earliest_swap_wins_over_all_later_versions() -> None:
    swaps = [swap("a", 1, 0, 0, 9), swap("b", 2, 0, 0, 5), swap("a", 3, 0, 0, 7)]
    assert first_swaps(swaps) == {1: s(5), 2: s(5), 3: s(7)}


def test_percentiles_are_given_for_all_per_task_and_per_robot() -> None:
    episodes = [learned(n, at=n, actor=f"robot-{n % 2}", task="door" if n < 3 else "drawer") for n in range(4)]
    samples = hop_samples([version(1, *episodes, created=20)], [swap("robot-9", 1, 20, 21, 22)])
    overall = summary(samples)
    assert list(overall) == [hop for hop in ALL_HOPS if hop in overall]
    assert overall["recorded_to_swapped"].count == 4
    assert overall["recorded_to_swapped"].p50 == pytest.approx(20.5)
    assert list(by_actor(samples)) == ["robot-0", "robot-1", "robot-9"]
    assert by_actor(samples)["robot-9"].keys() == {"published_to_staged", "staged_to_swapped"}
    assert by_task(samples)["door"]["recorded_to_swapped"].count == 3
    assert "published_to_staged" not in by_task(samples)["door"]


def test_the_picture_names_the_measured_times() -> None:
    samples = hop_samples([version(1, learned(1, at=10, task="<b>"), created=12)], [swap("robot-1", 1, 12, 12.25, 15)])
    page = freshness_section(
        {
            "hops": as_json(summary(samples)),
            "by_task": {task: as_json(hops) for task, hops in by_task(samples).items()},
            "by_actor": {actor: as_json(hops) for actor, hops in by_actor(samples).items()},
        }
    )
    assert "<svg" in page
    assert page.count("0.25 s") >= 2
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert freshness_section({"hops": {}, "by_task": {}, "by_actor": {}}) == ""
