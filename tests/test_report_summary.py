"""The numbers of a report against numbers worked out by hand."""

import json
import math
from pathlib import Path

import pytest

from run_directory import RunDirectory, make_episode
from sop.core import layout
from sop.core.episode import Outcome
from sop.core.errors import RunError
from sop.report import describe, summarise
from sop.report.record import laps
from sop.report.summary import newcombe_interval


@pytest.fixture
def small_run(tmp_path: Path) -> RunDirectory:
    """Eight recorded episodes of two robots: four indexed, one of them twice, one refused, two waiting, one lost."""
    run = RunDirectory(tmp_path / "small")
    run.write_run()
    lab = [
        run.record(make_episode("HHHH", actor_id="lab-0", sequence=number, version=None, start_s=-100))
        for number in range(2)
    ]
    first = run.record(make_episode("PPHHPP", sequence=0, task="open"))
    second = run.record(make_episode("PPPP", sequence=1, task="close", outcome=Outcome.FAILURE, start_s=10))
    aborted = run.record(make_episode("PP", sequence=2, task="open", outcome=Outcome.ABORTED, start_s=20))
    other = run.record(make_episode("PHHHPPHP", actor_id="robot-1", sequence=0, task="close", version=1))
    run.record(make_episode("PPPP", actor_id="robot-1", sequence=1, start_s=10), upload=False)
    run.record(make_episode("PPPP", actor_id="robot-1", sequence=2, start_s=20), upload=False, spool=True)
    run.record(make_episode("PPPP", actor_id="robot-1", sequence=3, task="open", start_s=30))
    bad = run.record(make_episode("HHPP", actor_id="robot-1", sequence=4, task="open", start_s=40))
    run.quarantine(bad)
    run.checkpoint(5, [*lab, first])
    run.checkpoint(15, [*lab, first, second, aborted, other, other])
    run.publish(0, 1, 2, 3)
    run.evaluate("base", 0, {"open": (5, 10), "close": (2, 10), "slide": (8, 10)})
    run.evaluate("expert", None, {"open": (10, 10), "close": (9, 10), "slide": (10, 10)})
    run.evaluate("progress", 1, {"open": (1, 2), "close": (2, 2)})
    run.evaluate("final", 3, {"open": (9, 10), "close": (7, 10), "slide": (7, 10)}, at_s=60)
    for sampleable_s, staleness in ((1.0, 0.0), (2.0, math.nan), (3.0, 2.0)):
        run.log("learner", 1.0, 0, {"episode/sampleable_s": sampleable_s, "episode/staleness": staleness})
    for swap_s in (1.0, 3.0):
        run.log("fleet", 2.0, 1, {"fleet/publish_to_swap_s": swap_s, "fleet/publish_to_staged_s": 0.5})
    run.log("fleet", 2.0, 0, {"fleet/publish_to_swap_s": 500.0, "fleet/publish_to_staged_s": 500.0})  # the base
    _log_lap(run, step=100, busy=0.1, worked_s=50.0, version=-1)  # pretraining
    _log_lap(run, step=10, busy=1.0, worked_s=1.0)
    _log_lap(run, step=20, busy=0.5, worked_s=3.0)
    _log_lap(run, step=20, busy=1.0, worked_s=0.0)  # nothing but pause
    run.write_timing({"setup": 6.0, "fleet": 90.0, "base evaluation": 24.0})
    return run


def _log_lap(run: RunDirectory, *, step: int, busy: float, worked_s: float, version: int = 0) -> None:
    values = {"learner/busy": busy, "learner/worked_s": worked_s, "learner/version": version, "learner/loss": 0.1}
    run.log("learner", step / 10, step, values)


def test_success_is_pooled_over_the_tasks_of_the_fleet_only(small_run: RunDirectory) -> None:
    summary = summarise(small_run.folder)
    assert summary["base"]["success"] == 7 / 20
    assert summary["final"]["success"] == 16 / 20
    assert summary["expert"]["success"] == 19 / 20
    assert summary["base"]["interval"] == pytest.approx([0.1812, 0.5671], abs=1e-4)
    assert summary["final"]["interval"] == pytest.approx([0.5840, 0.9193], abs=1e-4)


def test_the_gain_has_newcombes_interval_and_names_it(small_run: RunDirectory) -> None:
    gain = summarise(small_run.folder)["gain"]
    assert gain["difference"] == pytest.approx(0.45)
    assert gain["interval"] == pytest.approx([0.1438, 0.6567], abs=2e-4)
    assert "Newcombe" in gain["method"]


def test_newcombes_interval_agrees_with_the_examples_that_he_published() -> None:
    """Newcombe 1998, table II, method 10: 56/70 - 48/80 and 9/10 - 3/10."""
    assert newcombe_interval((48, 80), (56, 70)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert newcombe_interval((3, 10), (9, 10)) == pytest.approx((0.1705, 0.8090), abs=1e-4)


def test_every_task_has_its_own_numbers(small_run: RunDirectory) -> None:
    summary = summarise(small_run.folder)
    task = summary["per_task"]["close"]
    assert (task["base"], task["final"], task["expert"]) == (0.2, 0.7, 0.9)
    assert (task["episodes"], task["interventions"]) == (2, 2)
    assert task["interval"] == pytest.approx([0.3968, 0.8922], abs=1e-4)
    assert task["base_interval"] == pytest.approx([0.0567, 0.5098], abs=1e-4)
    assert (summary["per_task"]["open"]["episodes"], summary["per_task"]["open"]["interventions"]) == (2, 1)
    assert list(summary["per_task"]) == ["open", "close"]


def test_held_out_tasks_are_reported_apart(small_run: RunDirectory) -> None:
    held_out = summarise(small_run.folder)["held_out"]
    assert (held_out["base"], held_out["final"]) == (0.8, 0.7)
    task = held_out["per_task"]["slide"]
    assert (task["base"], task["final"]) == (0.8, 0.7)
    assert task["base_interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert task["final_interval"] == pytest.approx([0.3968, 0.8922], abs=1e-4)


def test_throughput_is_successes_per_robot_hour(small_run: RunDirectory) -> None:
    throughput = summarise(small_run.folder)["throughput"]  # 20 attempts of 10 s each
    assert throughput == {"base": pytest.approx(126.0), "final": pytest.approx(288.0)}


def test_every_recorded_episode_is_accounted_for(small_run: RunDirectory) -> None:
    summary = summarise(small_run.folder)
    assert summary["recorded_episodes"] == 8
    assert summary["indexed_episodes"] == 5
    assert summary["duplicate_episodes"] == 1
    assert summary["quarantined"] == 1
    assert summary["waiting_episodes"] == 2
    assert summary["lost_episodes"] == 1
    assert summary["demonstrations"] == {
        "recorded_episodes": 2,
        "indexed_episodes": 2,
        "waiting_episodes": 0,
        "lost_episodes": 0,
        "duplicate_episodes": 0,
    }


def test_an_episode_that_was_uploaded_later_is_not_lost(small_run: RunDirectory) -> None:
    journal = small_run.folder / "actors" / "robot-1" / "spool" / "journal"
    small_run.record(make_episode("PPPP", actor_id="robot-1", sequence=1, start_s=10), journal=False)
    assert len(journal.read_text().splitlines()) == 5
    assert summarise(small_run.folder)["lost_episodes"] == 0


def test_work_counts_aborted_episodes_as_time_but_not_as_episodes(small_run: RunDirectory) -> None:
    summary = summarise(small_run.folder)
    assert (summary["episodes"], summary["aborted_episodes"]) == (4, 1)
    assert summary["interventions"] == 3
    assert (summary["steps"], summary["human_steps"]) == (24, 6)
    assert summary["operator_minutes"] == pytest.approx(6 / 20 / 60)
    assert summary["robot_minutes"] == pytest.approx((24 / 20 + 5 * 1.0) / 60)


def test_latencies_are_percentiles_of_what_was_logged(small_run: RunDirectory) -> None:
    summary = summarise(small_run.folder)
    freshness = summary["freshness"]
    assert freshness["episode_to_sampleable_s"] == {"p50": 2.0, "p99": pytest.approx(2.98)}
    assert freshness["publish_to_swap_s"] == {"p50": 2.0, "p99": pytest.approx(2.98)}
    assert freshness["publish_to_staged_s"] == {"p50": 0.5, "p99": 0.5}
    assert summary["staleness"] == {"p50": 1.0, "p99": pytest.approx(1.98)}


def test_the_learner_is_judged_by_the_time_it_worked_without_pretraining(small_run: RunDirectory) -> None:
    summary = summarise(small_run.folder)
    assert summary["learner_busy"] == pytest.approx((1.0 * 1.0 + 0.5 * 3.0) / 4.0)
    assert summary["learner_steps"] == 20
    assert summary["publishes"] == 3


def test_identity_and_time_of_the_run_are_kept(small_run: RunDirectory) -> None:
    summary = summarise(small_run.folder)
    assert (summary["preset"], summary["algorithm"], summary["seed"]) == ("demo", "hg_dagger", 7)
    assert summary["wall_minutes"] == pytest.approx(2.0)
    assert summary["wall"] == {"setup": 0.1, "fleet": 1.5, "base evaluation": 0.4}
    assert summary["interrupted"] is False
    assert summary["versions"].keys() >= {"python", "sop", "numpy"}
    assert summary["hardware"]["cores"] >= 1


def test_the_summary_is_written_and_says_what_lost_means(small_run: RunDirectory) -> None:
    summary = summarise(small_run.folder)
    written = json.loads((small_run.folder / "summary.json").read_text())
    assert written == summary
    assert "neither" in written["definitions"]["lost_episodes"]
    assert not list(small_run.folder.glob("*.part"))


def test_steps_that_a_resumed_learner_did_again_count_once() -> None:
    lines = [{"step": step, "learner/busy": 1.0, "utc_s": n} for n, step in enumerate((10, 20, 30, 25, 35))]
    assert [(line["step"], line["utc_s"]) for line in laps(lines)] == [(10, 0), (20, 1), (25, 3), (35, 4)]


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run at"):
        summarise(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_an_empty_folder_gives_nulls(tmp_path: Path) -> None:
    summary = summarise(tmp_path)
    assert summary["base"]["success"] is None
    assert summary["gain"]["difference"] is None
    assert summary["per_task"] == {}
    assert summary["episodes"] == 0
    assert summary["lost_episodes"] is None
    assert summary["recorded_episodes"] is None
    assert summary["learner_steps"] is None
    assert summary["wall_minutes"] is None
    assert summary["freshness"]["publish_to_swap_s"] == {"p50": None, "p99": None}
    assert not (tmp_path / "store").exists()


def test_a_run_stopped_after_the_base_evaluation_has_what_there_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_run()
    run.evaluate("base", 0, {"open": (5, 10), "close": (2, 10), "slide": (8, 10)})
    run.write_timing({"setup": 6.0}, interrupted=True)
    summary = summarise(run.folder)
    assert summary["base"]["success"] == 0.35
    assert summary["final"]["success"] is None
    assert summary["gain"]["interval"] is None
    assert summary["per_task"]["open"]["final"] is None
    assert summary["robot_minutes"] == 0.0
    assert summary["interrupted"] is True


def test_an_evaluation_that_lacks_a_task_is_not_pooled(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_run()
    run.evaluate("base", 0, {"open": (5, 10)})
    summary = summarise(run.folder)
    assert summary["base"]["success"] is None
    assert summary["per_task"]["open"]["base"] == 0.5


def test_damaged_parts_are_left_out(small_run: RunDirectory) -> None:
    (small_run.folder / "store" / "evaluations" / "00000003" / "final.json").write_text("{")
    (small_run.folder / "store" / "checkpoints" / "00000015" / "state.json").write_text("{}")
    (small_run.folder / "timing.json").write_text("{")
    with (small_run.folder / "actors" / "robot-0" / "spool" / "journal").open("a") as journal:
        journal.write("epis")
    damaged = next(small_run.store.keys(f"{layout.EPISODES}/robot-0/"))
    (small_run.folder / "store" / damaged).write_bytes(b"not an episode")
    summary = summarise(small_run.folder)
    assert summary["final"]["success"] is None
    assert summary["indexed_episodes"] == 1
    assert summary["recorded_episodes"] == 8
    assert summary["wall_minutes"] is None
    assert summary["episodes"] == 3


def test_the_paragraph_says_what_happened_with_numbers(small_run: RunDirectory) -> None:
    text = describe(summarise(small_run.folder))
    assert "4 episodes" in text
    assert "3 interventions" in text
    assert "from 35 % of 20 attempts (18-57 %) to 80 % of 20 attempts (58-92 %)" in text
    assert "+45 points (95 % interval +14 to +66)" in text
    assert "does not show a difference" not in text
    assert "Of 8 recorded episodes 1 was lost, 1 indexed twice and 1 refused." in text
    assert "99 % within" in text


def test_the_paragraph_does_not_boast_when_nothing_was_gained(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_run()
    run.evaluate("base", 0, {"open": (5, 10), "close": (5, 10)})
    run.evaluate("final", 3, {"open": (4, 10), "close": (7, 10)})
    text = describe(summarise(run.folder))
    assert "does not show a difference" in text
    assert "Worse than the base on: open." in text


def test_the_paragraph_says_that_the_policy_got_worse(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_run()
    run.evaluate("base", 0, {"open": (50, 50), "close": (50, 50)})
    run.evaluate("final", 3, {"open": (10, 50), "close": (40, 50)})
    text = describe(summarise(run.folder))
    assert "The policy got worse." in text
    assert "-50 points" in text


def test_the_paragraph_of_an_empty_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "timing.json").write_text('{"wall_s": {"setup": 30}, "interrupted": true}')
    assert describe(summarise(tmp_path)) == (
        "The run was interrupted. The fleet collected no episodes. No policy was evaluated. Everything took 30 s."
    )


def test_the_paragraph_tells_demonstrations_from_a_fleet_that_acted(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_run()
    for number in range(2):
        run.record(make_episode("H" * 20, sequence=number, version=None))
    summary = summarise(run.folder)
    assert summary["demonstrated_episodes"] == 2
    assert describe(summary).startswith("Operators recorded 2 demonstrations in 4 s of robot time.")
