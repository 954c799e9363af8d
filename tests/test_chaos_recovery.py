"""When a run was whole again after a strike: from episodes and reports with known times."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from run_directory import START_UTC_S, RunDirectory, make_episode
from sop.chaos.history import Acted
from sop.chaos.recovery import Strike, Work, read_work, recovery_s, recovery_words, with_recovery
from sop.core import layout
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.presets import make_config
from sop.runs import Run

Spans = list[tuple[float, float]]


def strike(ended_utc_s: float, nemesis: str = "kill", recovered_s: float | None = None) -> Strike:
    return Strike(0.0, nemesis, "hit", ended_utc_s, recovered_s)


def test_the_slowest_of_robots_and_learner_says_when_all_were_at_work() -> None:
    work = {
        "robot-0": Work([(0, 4), (9, 13), (14, 18)]),  # the strike cut (5, 9)
        "robot-1": Work([(1, 12), (12, 16)]),  # untouched: the one that began before does not count
        "learner": Work([(8, 8), (11.5, 11.5), (12.5, 12.5)]),
    }
    assert recovery_s(10.0, work) == 8.0
    assert recovery_s(8.5, work) == 7.5, "robot-1"
    assert recovery_s(0.0, {"learner": work["learner"]}) == 8.0


def test_what_begins_at_the_very_end_of_a_strike_counts_and_a_moment_before_does_not() -> None:
    assert recovery_s(10.0, {"robot-0": Work([(10.0, 12.0)])}) == 2.0
    assert recovery_s(10.0, {"robot-0": Work([(9.999, 12.0), (13.0, 14.0)])}) == 4.0


def test_a_strike_after_which_one_does_nothing_more_has_no_figure() -> None:
    work = {"robot-0": Work([(11, 12)]), "learner": Work([(9, 9)])}
    assert recovery_s(10.0, work) is None
    assert recovery_s(8.0, work) == 4.0
    assert recovery_s(8.0, {**work, "robot-1": Work([])}) is None
    assert recovery_s(8.0, {}) is None


def test_of_two_that_overlap_each_has_the_outage_of_both() -> None:
    """The second strike comes while the fleet still starts after the first: it is whole once, at 30."""
    work = {"robot-0": Work([(0, 9), (26, 30)]), "learner": Work([(9, 9), (25, 25)])}
    first, second = with_recovery([strike(10.0), strike(20.0)], work)
    assert (first.recovered_s, second.recovered_s) == (20.0, 10.0)
    assert (first.ended_utc_s, first.nemesis, first.what) == (10.0, "kill", "hit")


def naive(ended: float, work: dict[str, Spans]) -> float | None:
    firsts = [[done for began, done in spans if began >= ended] for spans in work.values()]
    return max(min(first) for first in firsts) - ended if firsts and all(firsts) else None


moments = st.integers(0, 50)
spans_of = st.lists(st.tuples(moments, moments).map(lambda pair: (float(min(pair)), float(max(pair)))), max_size=12)


@given(st.dictionaries(st.sampled_from(["robot-0", "robot-1", "learner"]), spans_of), st.lists(moments), st.integers())
def test_the_order_of_episodes_workers_and_strikes_does_not_matter(
    work: dict[str, Spans], ends: list[int], seed: int
) -> None:
    rng = random.Random(seed)
    strikes = [strike(float(end)) for end in ends]
    straight = with_recovery(strikes, {name: Work(spans) for name, spans in work.items()})
    assert [one.recovered_s for one in straight] == [naive(float(end), work) for end in ends]
    names = rng.sample(sorted(work), len(work))
    mixed = {name: Work(rng.sample(work[name], len(work[name]))) for name in names}
    order = rng.sample(range(len(strikes)), len(strikes))
    assert list(with_recovery([strikes[at] for at in order], mixed)) == [straight[at] for at in order]


def test_work_is_read_from_the_episodes_and_from_the_learners_reports(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.write_run()
    directory.log("learner", 5.0, 40, {"learner/version": 3.0})
    directory.log("learner", 5.5, 40, {"episode/steps": 7.0})  # no report
    directory.log("learner", 6.0, 40, {"learner/version": 3.0})  # it waits
    directory.log("learner", 6.5, 30, {"learner/version": 3.0})  # it goes on from a checkpoint
    directory.log("learner", 7.0, 31, {"learner/version": 3.0})
    manifest = RunManifest.from_json(directory.store.get(layout.RUN))
    bus = f"sqlite://{directory.folder / 'bus.sqlite'}"
    run = Run(str(directory.folder), directory.folder, directory.store, bus, manifest, make_config("debug"))

    def key(actor_id: str) -> str:
        return str(EpisodeKey("episodes", actor_id, 0, 10, f"{1:032x}"))

    acted = Acted(version=0, started_utc_ns=(START_UTC_S + 5) * 10**9, ended_utc_ns=(START_UTC_S + 6) * 10**9)
    work = read_work(run, {key("robot-0"): acted, key("lab-0"): acted})
    assert sorted(work) == ["learner", "robot-0"]
    assert recovery_s(START_UTC_S + 4.0, work) == 2.0
    assert recovery_s(START_UTC_S + 5.0, {"learner": work["learner"]}) == 0.0
    assert recovery_s(START_UTC_S + 5.2, {"learner": work["learner"]}) == pytest.approx(1.8)
    assert recovery_s(START_UTC_S + 5.2, work) is None


def test_the_checker_reads_when_an_episode_ended(tmp_path: Path) -> None:
    from sop.chaos.history import _read_store

    directory = RunDirectory(tmp_path / "run")
    episode = make_episode("PPPP")
    key = directory.record(episode)
    readable, _ = _read_store(directory.store)
    assert (readable[key].started_utc_ns, readable[key].ended_utc_ns) == (episode.start_utc_ns, episode.end_utc_ns)


def test_the_closing_lines_name_median_longest_and_what_has_no_figure() -> None:
    hits = [strike(0, "kill", seconds) for seconds in (4.1, 6.04, 1.0)] + [strike(0, "flip", 2.0), strike(0, "flip")]
    assert recovery_words([*hits, strike(0, "pause")]) == [
        "recovered: flip 2.0 s median, 2.0 s longest of 1, 1 not before the run ended",
        "recovered: kill 4.1 s median, 6.0 s longest of 3",
        "recovered: pause 1 not before the run ended",
    ]
    assert recovery_words([]) == []
