"""A soak tells growth from noise, reads its curve from the records, and keeps no broken promise to itself."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from run_directory import START_UTC_S, RunDirectory, make_episode, utc_ns
from sop.buffer import EpisodeRow, IndexSegments, RowBlock
from sop.buffer.segments import IndexRows
from sop.chaos import soak_judge, soak_watch
from sop.chaos.history import Acted
from sop.chaos.recovery import Strike
from sop.chaos.soak import Soak, SoakPlan, describe_look, soak_config
from sop.chaos.soak_curve import Episodes, backlog, compare_quarters, hours, read_episodes, swap_delays
from sop.chaos.soak_judge import judge, lifetimes
from sop.chaos.soak_trend import find_trend
from sop.chaos.soak_watch import Look, ProcessLook, Watch
from sop.chaos.target import Target, Victim
from sop.core import layout
from sop.core.episode import Outcome
from sop.core.experience import Source
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.runs import Run
from sop.transport import DirectoryStore


def life(begin: float, end: float, level: float, slope: float, *, noise: float = 0.5, seed: int = 0) -> np.ndarray:
    x = np.linspace(begin, end, 60)
    return np.stack([x, level + slope * (x - begin) + np.random.default_rng(seed).normal(0, noise, len(x))], axis=1)


def test_a_leak_is_found_though_restarts_reset_it() -> None:
    lives = [life(0, 4, 300, 2.0, seed=1), life(4, 6, 300, 2.0, seed=2), life(6, 12, 300, 2.0, seed=3)]
    found = find_trend(lives)
    assert found is not None
    assert found.low < 2.0 < found.high
    assert found.high - found.low < 0.6
    assert found.grows(1.0)
    assert not found.grows(2.5)
    assert found.lifetimes == 3


def test_noise_and_different_levels_are_no_growth() -> None:
    lives = [life(3 * n, 3 * n + 3, 300 + 50 * n, 0.0, seed=n) for n in range(4)]
    found = find_trend(lives)
    assert found is not None
    assert not found.grows(0.0)
    assert found.low < 0 < found.high


def test_a_single_burst_moves_the_slope_little() -> None:
    burst = life(0, 10, 300, 0.0)
    burst[30:33, 1] += 400
    found = find_trend([burst])
    assert found is not None
    assert abs(found.slope) < 0.1
    assert not found.grows(0.1)


def test_too_little_says_nothing() -> None:
    assert find_trend([]) is None
    assert find_trend([life(0, 10, 300, 0.0)[:11]]) is None
    assert find_trend([life(0, 10, 300, 0.0)], least=11) is None
    assert find_trend([life(0, 10, 300, 0.0)], least=10) is not None
    assert find_trend([life(n, n + 1, 300, 0.0) for n in range(12)]) is None  # restarts would hide any growth


def test_the_same_samples_give_the_same_interval() -> None:
    lives = [life(0, 4, 300, 1.0)]
    assert find_trend(lives, seed=5) == find_trend(lives, seed=5)


def episodes_of(success: str, *, each_s: float = 900.0, helped: str = "") -> Episodes:
    """One character per episode: `s`uccess, `f`ailure, `a`borted; `helped` has an `h` where somebody helped."""
    count = len(success)
    ended = np.arange(1, count + 1, dtype=np.float64)
    return Episodes(
        robot_s=each_s * ended,
        success=np.array([letter == "s" for letter in success], np.bool_),
        aborted=np.array([letter == "a" for letter in success], np.bool_),
        interventions=np.array([letter == "h" for letter in helped.ljust(count)], np.int32),
        indexed_s=np.full(count, 2.5),
        ended_utc_s=ended,
        staleness=np.arange(count, dtype=np.int64),
        acting_hours=1.0,
    )


def test_an_hour_counts_what_ended_in_it_and_no_aborted_episode() -> None:
    first, second = hours(episodes_of("sfasssss", helped="h   hh"), [(2.0, 0.25), (7.0, 4.0)])
    assert (first.begin_h, first.end_h, first.episodes, first.aborted, first.successes) == (0.0, 1.0, 3, 1, 2)
    assert (first.alone, first.interventions) == (1, 1)
    assert first.success_interval == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert (first.swapped_p50_s, second.swapped_p50_s) == (0.25, 4.0)
    assert (second.episodes, second.successes, second.alone, second.interventions) == (4, 4, 2, 2)
    assert (second.staleness_p50, second.staleness_max) == (5.5, 7)


def test_a_short_rest_joins_the_last_hour_and_nothing_is_no_hour() -> None:
    assert [hour.episodes for hour in hours(episodes_of("s" * 9), [])] == [4, 5]
    assert [hour.episodes for hour in hours(episodes_of("s"), [])] == [1]
    assert hours(episodes_of(""), []) == []


def test_the_last_quarter_is_compared_with_the_first_and_the_second() -> None:
    found = list(compare_quarters(episodes_of("s" * 100 + "s" * 100 + "f" * 100 + "sf" * 50, helped="h" * 100)))
    told = {comparison.what: comparison for comparison in found}
    fell = told["success, last minus first quarter"]
    assert (fell.earlier, fell.later, fell.difference) == ((100, 100), (50, 100), -0.5)
    assert fell.interval[1] < -0.35
    rose = told["success without help, last minus first quarter"]
    assert (rose.earlier, rose.later) == ((0, 100), (50, 100))
    assert told["success without help, last minus second quarter"].difference == -0.5
    assert len(told) == 4
    assert list(compare_quarters(episodes_of(""))) == []


def test_what_waits_for_the_index_is_counted_at_every_moment() -> None:
    moments = np.array([0.5, 1.0, 3.0, 3.6, 9.0])
    assert backlog(episodes_of("ssss"), moments).tolist() == [0, 1, 3, 2, 0]


def test_a_swap_counts_once_per_robot_and_version_and_the_base_not_at_all() -> None:
    def acted(version: int, swapped_s: float) -> Acted:
        return Acted(version=version, started_utc_ns=0, swapped_utc_ns=int(swapped_s * 1e9))

    def key(actor: int, sequence: int) -> str:
        return str(EpisodeKey("episodes", f"robot-{actor}", sequence, 10, f"{actor:016x}{sequence:016x}"))

    readable = {key(0, 0): acted(0, 5), key(0, 1): acted(1, 11), key(0, 2): acted(1, 11), key(1, 0): acted(1, 12.5)}
    assert swap_delays(readable, {0: 1.0, 1: 10.0}) == [(11.0, 1.0), (12.5, 2.5)]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.write_run()
    return directory


def soak_of(directory: RunDirectory) -> Soak:
    folder = directory.folder
    store = DirectoryStore(folder / "store")
    manifest = RunManifest.from_json(store.get(layout.RUN))
    bus = f"sqlite://{folder / 'bus.sqlite'}"
    run = Run(str(folder), folder, store, bus, manifest, soak_config("debug", 0))
    return Soak(run=run, plan=SoakPlan(hours=1.0), watch=Watch(Target(run)), storm_s=60.0, settled_s=3.0)


def index(directory: RunDirectory, keys: list[str], outcomes: list[Outcome]) -> None:
    """A checkpoint that has these episodes, one second after each other, indexed half a second after their end."""
    rows = []
    for number, (key, outcome) in enumerate(zip(keys, outcomes, strict=True)):
        facts = EpisodeKey.parse(key)
        row = EpisodeRow(
            episode_id=facts.episode_id, actor_id=facts.actor_id, sequence=facts.sequence, task="open",
            source=Source.ONLINE, num_steps=facts.num_steps, human_steps=0, num_interventions=number % 2,
            policy_version=0, outcome=outcome, start_runs=(), end_utc_ns=utc_ns(number),
            indexed_utc_ns=utc_ns(number + 0.5),
        )  # fmt: skip
        rows.append(row)
    segments = IndexSegments(directory.store, "0" * 32).save(IndexRows((), (RowBlock.from_rows(rows),)))
    state = {"learner_step": 1, "tensors_hash": "", "segments": segments, "state": {}}
    directory.store.put(f"{layout.checkpoint_folder(1)}/state.json", json.dumps(state).encode())


def test_robot_time_is_read_from_the_index_and_from_the_journals_alike(directory: RunDirectory) -> None:
    keys = [directory.record(make_episode("PP" * 10, sequence=number)) for number in range(4)]
    directory.record(make_episode("P" * 20, actor_id="lab-0"))
    index(directory, keys, [Outcome.SUCCESS, Outcome.FAILURE, Outcome.ABORTED, Outcome.SUCCESS])
    soak = soak_of(directory)
    found = read_episodes(soak.run, {0: START_UTC_S - 1.0, 1: START_UTC_S + 1.5, 2: START_UTC_S + 2.5})
    assert found.robot_s.tolist() == [2.0, 4.0, 6.0, 8.0]
    assert found.acting_hours == pytest.approx(4 / 3600)
    assert (found.success.tolist(), found.aborted.tolist()) == ([1, 0, 0, 1], [0, 0, 1, 0])
    assert found.staleness.tolist() == [0, 0, 1, 2]
    assert found.indexed_s == pytest.approx([0.5] * 4)
    look = soak.watch.look()
    assert (look.robot_s, look.episodes, look.spooled) == (8.0, 4, 0)


def test_journals_are_read_on_and_a_torn_line_waits_for_its_rest(directory: RunDirectory) -> None:
    directory.log("learner", 5.0, 40, {"learner/version": 3.0})
    directory.log("learner", 6.0, 41, {"episode/steps": 7.0})
    watch = soak_of(directory).watch
    directory.record(make_episode("P" * 20), spool=True)
    assert (watch.look().robot_s, watch.recorded("robot-0") > 0, watch.recorded("robot-1")) == (2.0, True, 0)
    journal = directory.folder / "actors" / "robot-0" / "spool" / "journal"
    line = journal.read_text()
    journal.write_text(line + line[:30])
    assert watch.look().episodes == 1
    journal.write_text(line + line)
    found = watch.look()
    assert (found.episodes, found.spooled, found.robot_s) == (2, 1, 4.0)
    assert (found.learner_step, found.version, found.learner_utc_s) == (40, 3, START_UTC_S + 5.0)
    lines = (directory.folder / "metrics" / "soak.jsonl").read_text().splitlines()
    assert [json.loads(line)["episodes"] for line in lines] == [1, 1, 2]


def test_a_burst_of_episodes_does_not_hide_where_the_learner_is(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_watch, "_TAIL_BYTES", 200)
    watch = soak_of(directory).watch
    assert (watch.look().learner_step, watch.look().version) == (0, -1)
    directory.log("learner", 5.0, 40, {"learner/version": 3.0})
    assert watch.look().learner_step == 40
    for _ in range(20):
        directory.log("learner", 6.0, 41, {"episode/steps": 7.0})
    found = watch.look()
    assert (found.learner_step, found.version, found.learner_utc_s) == (40, 3, START_UTC_S + 5.0)


def test_a_process_is_measured_and_one_that_is_gone_is_not(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    alive, gone = Victim("actor", "robot-0", os.getpid(), 9.0), Victim("actor", "robot-1", 2**22 + 1, 9.0)
    monkeypatch.setattr(Target, "processes", lambda self: [alive, gone, Victim("", "lab-0", os.getpid(), 9.0)])
    (found,) = soak_of(directory).watch.look().processes
    assert (found.role, found.name, found.pid) == ("actor", "robot-0", os.getpid())
    assert 10 < found.own_mb < found.rss_mb < 100_000
    assert found.files > 2
    assert found.threads >= 1


def test_while_the_store_is_away_no_process_is_seen_and_nothing_fails(directory: RunDirectory) -> None:
    soak = soak_of(directory)
    (directory.folder / "store").rename(directory.folder / "store.away")
    assert soak.watch.look().processes == ()


def looks(rss_mb: list[float], *, per_look_s: float = 600.0, pid: int = 7) -> list[Look]:
    return [
        Look(
            utc_s=START_UTC_S + 10.0 * number, robot_s=per_look_s * (number + 1), episodes=number, spooled=number % 3,
            learner_step=number, version=0, learner_utc_s=0.0,
            processes=(
                ProcessLook(role="actor", name="robot-0", pid=pid, rss_mb=memory, own_mb=memory, files=9, threads=3),
            ),
        )
        for number, memory in enumerate(rss_mb)
    ]  # fmt: skip


def test_lifetimes_begin_after_the_start_and_in_the_second_half(directory: RunDirectory) -> None:
    soak = soak_of(directory)
    soak.watch.looks += looks([1.0] * 12)
    soak.watch.looks += [
        dataclasses.replace(look, robot_s=look.robot_s + 7200, utc_s=look.utc_s + 120)
        for look in looks([2.0] * 12, pid=8)
    ]
    first, second = lifetimes(soak, "actor", "rss_mb")
    assert first.tolist() == [[2.0, 1.0]]
    assert second[0].tolist() == pytest.approx([8 / 3, 2.0])  # half a robot hour after it was first seen
    assert len(second) == 9
    assert lifetimes(soak, "learner", "rss_mb") == []


def judged(directory: RunDirectory, memory: list[float], monkeypatch: pytest.MonkeyPatch) -> soak_judge.Verdict:
    monkeypatch.setattr(soak_judge, "read_published", lambda store: {0: START_UTC_S - 1.0})
    soak = soak_of(directory)
    soak.watch.looks += looks(memory)
    return judge(soak)


def test_a_clean_soak_keeps_every_promise(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [directory.record(make_episode("PPP", sequence=number)) for number in range(8)]
    index(directory, keys, [Outcome.SUCCESS] * 8)
    directory.publish(0)
    verdict = judged(directory, [300.0] * 80, monkeypatch)
    assert verdict.broken == ()
    assert "8 episodes" in verdict.paragraph
    assert "Lost 0, doubled 0, unsent 0" in verdict.paragraph
    assert verdict.paragraph.endswith("Every promise was kept.")
    summary = json.loads((directory.folder / "summary.json").read_text())
    assert summary["trends"]["memory of actor"]["slope"] == 0.0
    assert summary["highest"]["spooled"] == 2
    assert (directory.folder / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_what_followed_each_strike_is_in_summary_and_paragraph(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes of the example begin at the start and end 0.15 s later; the learner reports 2 s after it."""
    monkeypatch.setattr(soak_judge, "read_published", lambda store: {0: START_UTC_S - 1.0})
    episode = make_episode("PPP", sequence=0)
    index(directory, [directory.record(episode)], [Outcome.SUCCESS])
    directory.publish(0)
    began_s = episode.start_utc_ns / 1e9
    directory.log("learner", began_s + 2.0 - START_UTC_S, 1, {"learner/version": 0.0})
    soak = soak_of(directory)
    soak.watch.looks += looks([300.0] * 3)
    soak.strikes += [Strike(1.0, "kill", "x", began_s - 1.5), Strike(9.0, "flip", "y", began_s + 1.0)]
    soak.struck_at_h += [0.1, 0.2]
    verdict = judge(soak)
    found = json.loads((directory.folder / "summary.json").read_text())["strikes"]
    assert [(one["nemesis"], one["recovered_s"], one["at_h"]) for one in found] == [
        ("kill", 3.5, 0.1), ("flip", None, 0.2),
    ]  # fmt: skip
    assert "recovered: kill 3.5 s median, 3.5 s longest of 1\n" in verdict.paragraph
    assert "recovered: flip 1 not before the run ended\n" in verdict.paragraph


def test_a_leak_and_a_lost_episode_are_broken_promises(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [directory.record(make_episode("PPP", sequence=number)) for number in range(8)]
    index(directory, keys, [Outcome.SUCCESS] * 8)
    directory.publish(0)
    directory.store.delete(keys[3])
    verdict = judged(directory, [300.0 + number for number in range(80)], monkeypatch)
    assert any(keys[3] in words for words in verdict.broken)
    assert any(words.startswith("memory of actor grows by 6 per robot hour") for words in verdict.broken)


def test_a_soak_too_short_for_trends_says_so(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [directory.record(make_episode("PPP", sequence=0))]
    index(directory, keys, [Outcome.SUCCESS])
    directory.publish(0)
    verdict = judged(directory, [300.0] * 3, monkeypatch)
    assert "Too short to say whether memory grows." in verdict.paragraph
    assert verdict.broken == ()


@pytest.mark.parametrize(("each_s", "judged_too"), [(36.0, True), (35.9, False)])
def test_a_fall_of_success_breaks_a_promise_once_quarters_are_an_hour_long(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, each_s: float, judged_too: bool
) -> None:
    index(directory, [directory.record(make_episode("PPP", sequence=0))], [Outcome.SUCCESS])
    directory.publish(0)
    fell = episodes_of("s" * 300 + "f" * 100, each_s=each_s)
    monkeypatch.setattr(soak_judge, "read_episodes", lambda *given: fell)
    verdict = judged(directory, [300.0] * 3, monkeypatch)
    said = [words for words in verdict.broken if words.startswith("success, last minus first quarter fell: -100.0")]
    assert len(said) == judged_too
    assert ("Too short to say whether success falls." in verdict.paragraph) is not judged_too


def test_a_plan_needs_some_time() -> None:
    with pytest.raises(ValueError, match="needs some time, got 0 hours"):
        SoakPlan(hours=0)
    assert SoakPlan.quick(3).hours == pytest.approx(1 / 3)


def test_a_line_for_whoever_waits_names_processes_and_numbers() -> None:
    assert describe_look(looks([300.0])[0], 2, 1).endswith(
        "0.17 robot hours, 0 episodes, 2 strikes, 1 restarts, learner step 0, version 0  robot-0 300 MB"
    )
