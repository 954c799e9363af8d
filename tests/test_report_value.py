"""What a report says of a value function and of what came before the fleet, against numbers worked out by hand."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from run_directory import START_UTC_S, RunDirectory, make_episode
from sop.core.episode import Outcome
from sop.report import describe, summarise, write_report
from sop.report.curve import FleetTime
from sop.report.record import read_run
from sop.report.value import ValuedSteps, steps_of_one, valued_episodes
from sop.report.value_figure import bins, value_picture

NAN = math.nan
PNG = b"\x89PNG\r\n"


def make_run(folder: Path, **config: object) -> RunDirectory:
    run = RunDirectory(folder)
    run.write_run(**({"algorithm": "recap", "operator": {"kind": "stand_in"}} | config))
    return run


def record(run: RunDirectory, number: int, controllers: str, task: str = "open", **facts: object) -> str:
    return run.record(make_episode(controllers, sequence=number, task=task, start_s=10.0 * number, **facts))  # type: ignore[arg-type]


@pytest.fixture
def valued(tmp_path: Path) -> RunDirectory:
    """Returns in tenths: a success of open, a failure of open, a corrected episode of close, a success of close."""
    run = make_run(tmp_path / "valued")
    won = record(run, 0, "PPPP")
    run.sidecar(won, {"value": [-0.5, -0.4, -0.1, 0.0], "realised": [-0.3, -0.2, -0.1, 0.0]})
    failed = record(run, 1, "PPPP", outcome=Outcome.FAILURE)
    run.sidecar(failed, {"value": [-0.4, -0.6, -0.7, -0.6], "realised": [-0.8, -0.7, -0.6, -0.5]})
    helped = record(run, 2, "PPHHP", "close")
    run.sidecar(helped, {"value": [-0.6, -0.5, -0.9, -0.9, -0.1], "realised": [-0.6, -0.5, NAN, NAN, 0.0]})
    quick = record(run, 3, "PP", "close")
    run.sidecar(quick, {"value": [-0.2, -0.1], "realised": [-0.1, 0.0]})
    return run


def test_rank_correlation_and_calibration_error_are_those_worked_out_by_hand(valued: RunDirectory) -> None:
    value = summarise(valued.folder)["value"]
    # open: ranks of values 4 5.5 7 8 5.5 2.5 1 2.5, of returns 5 6 7 8 1 2 3 4: products of deviations from
    # 4.5 sum up to 27.5, squares to 41 and 42; close: 1 2 4.5 3 4.5 and 1 2 4.5 3 4.5, in full agreement
    assert value["per_task"]["open"]["rank_correlation"] == pytest.approx(27.5 / math.sqrt(41 * 42))
    assert value["per_task"]["close"]["rank_correlation"] == pytest.approx(1.0)
    assert value["rank_correlation"] == pytest.approx((8 * 27.5 / math.sqrt(41 * 42) + 5 * 1.0) / 13)
    # open, a bin per step: .2 .2 0 0 and .4 .1 .1 .1; close: 0 0 .1 .1 .1
    assert value["per_task"]["open"]["calibration_error"] == pytest.approx(1.1 / 8)
    assert value["per_task"]["close"]["calibration_error"] == pytest.approx(0.3 / 5)
    assert value["bias"] == pytest.approx((-0.4 + 0.4 + 0.1 - 0.1 - 0.1 - 0.3) / 13)
    assert (value["num_episodes"], value["num_steps"], value["value_versions"]) == (4, 13, [1])
    assert (value["num_successes"], value["num_failures"]) == (2, 1)


def test_the_error_in_steps_comes_from_the_rise_of_the_returns(valued: RunDirectory) -> None:
    value = summarise(valued.folder)["value"]
    assert value["per_task"]["open"]["scale_steps"] == 10.0
    assert value["per_task"]["open"]["mean_absolute_error_steps"] == pytest.approx(10 * 1.1 / 8, rel=1e-5)
    assert value["mean_absolute_error_steps"] == pytest.approx(10 * 1.4 / 13, rel=1e-5)


def _steps(realised: list[float]) -> ValuedSteps:
    record = make_episode("P" * len(realised))
    array = np.array(realised)
    return ValuedSteps(record, 1, array, array)  # type: ignore[arg-type]


def test_returns_that_are_cut_off_or_alone_do_not_tell_what_a_step_is_worth() -> None:
    assert steps_of_one([_steps([-1.0, -1.0, -0.98, -0.93]), _steps([NAN, -0.5, NAN])]) == pytest.approx(20)
    assert steps_of_one([_steps([-0.5, NAN, 0.0])]) is None


def test_success_is_told_from_failure_within_a_task_and_without_corrected_episodes(valued: RunDirectory) -> None:
    value = summarise(valued.folder)["value"]
    assert [value[f"auc_{moment}"] for moment in ("start", "middle", "end")] == [0.0, 1.0, 1.0]
    assert value["per_task"]["close"]["auc_end"] is None


def test_drift_compares_the_last_with_the_first_quarter_of_the_episodes(valued: RunDirectory) -> None:
    drift = summarise(valued.folder)["value"]["drift"]
    assert drift["first_quarter"] == {"rank_correlation": 1.0, "bias": pytest.approx(-0.1), "num_episodes": 1}
    assert drift["last_quarter"] == {"rank_correlation": 1.0, "bias": pytest.approx(-0.1), "num_episodes": 1}
    assert (drift["rank_correlation"], drift["bias"]) == (0.0, pytest.approx(0.0, abs=1e-6))


def test_three_episodes_have_no_quarters(tmp_path: Path) -> None:
    run = make_run(tmp_path / "few")
    for number in range(3):
        run.sidecar(record(run, number, "PP"), {"value": [-0.2, -0.1], "realised": [-0.1, 0.0]})
    drift = summarise(run.folder)["value"]["drift"]
    assert drift["first_quarter"] == {"rank_correlation": None, "bias": None, "num_episodes": 0}
    assert (drift["rank_correlation"], drift["bias"]) == (None, None)


def test_the_oldest_opinion_counts_for_newer_models_may_have_learned_from_the_episode(tmp_path: Path) -> None:
    run = make_run(tmp_path / "versions")
    old, new = (record(run, number, "PP") for number in range(2))
    run.sidecar(old, {"value": [-0.2, -0.1], "realised": [-0.1, 0.0]}, version=1)
    run.sidecar(old, {"value": [-0.9, -0.9], "realised": [-0.1, 0.0]}, version=2)
    run.sidecar(new, {"value": [-0.3, -0.2], "realised": [-0.1, 0.0]}, version=2)
    value = summarise(run.folder)["value"]
    assert value["value_versions"] == [1, 2]
    assert value["bias"] == pytest.approx(-0.15)


def test_only_what_the_fleet_did_with_a_policy_to_its_end_is_valued(tmp_path: Path) -> None:
    run = make_run(tmp_path / "others")
    numbers = {"value": [-0.2, -0.1], "realised": [-0.1, 0.0]}
    run.sidecar(run.record(make_episode("PP", actor_id="base-0")), numbers)
    run.sidecar(record(run, 1, "HH", version=None), numbers)
    run.sidecar(record(run, 2, "PP", outcome=Outcome.ABORTED), numbers)
    run.sidecar(record(run, 3, "PP"), {"other": [1.0, 1.0]})
    run.sidecar(record(run, 4, "PP"), {"value": [-0.1, -0.1], "realised": [NAN, NAN]})
    refused = record(run, 5, "PP")
    run.sidecar(refused, numbers)
    run.quarantine(refused)
    assert summarise(run.folder)["value"] is None
    kept = record(run, 6, "PP")
    run.sidecar(kept, numbers)
    assert [one.facts.key for one in valued_episodes(read_run(run.folder))] == [kept]


def test_a_damaged_sidecar_is_left_out_and_named(valued: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    key = record(valued, 4, "PPP")
    place = valued.sidecar(key, {"value": [-0.2] * 3, "realised": [0.0] * 3})
    (valued.folder / "store" / place).write_bytes(b"no arrow at all")
    foreign = record(valued, 5, "PPP")
    other = valued.sidecar(foreign, {"value": [-0.2] * 3, "realised": [0.0] * 3}, version=2)
    (valued.folder / "store" / other).write_bytes(
        (valued.folder / "store" / next(valued.store.keys("labels/recap/0001/"))).read_bytes()
    )
    with caplog.at_level(logging.WARNING):
        value = summarise(valued.folder)["value"]
    assert value["num_episodes"] == 4
    named = [message for message in caplog.messages if message.startswith((place, other))]
    assert len(named) == 2
    assert all("is left out of the report" in message for message in named)


def test_without_sidecars_there_is_neither_block_nor_picture_nor_section(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "plain")
    run.write_run()
    record(run, 0, "PPPP")
    page = write_report(run.folder).read_text()
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["value"], summary["recap"]) == (None, None)
    assert "Value function" not in page
    assert "Before the fleet" not in page
    assert not (run.folder / "value.png").exists()
    assert value_picture([]) is None


def test_the_page_shows_the_picture_and_the_numbers_of_the_value_function(valued: RunDirectory) -> None:
    page = write_report(valued.folder).read_text()
    assert (valued.folder / "value.png").read_bytes().startswith(PNG)
    assert "<h2>Value function</h2>" in page
    assert "<td>open</td><td>0.66</td><td>0.14</td><td>1</td><td>0 %, 100 %, 100 %</td><td>2</td>" in page
    assert "First quarter of the episodes: rank correlation 1.00, predicted minus realised -0.10" in page


def test_steps_count_as_successful_from_the_last_correction_on(valued: RunDirectory) -> None:
    episodes = valued_episodes(read_run(valued.folder))
    assert [one.to_success().tolist() for one in episodes] == [
        [True] * 4,
        [False] * 4,
        [False, False, False, False, True],
        [True] * 2,
    ]
    assert [one.success for one in episodes] == [True, False, None, True]


def test_a_picture_of_nothing_but_failures_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "failures")
    key = record(run, 0, "P", outcome=Outcome.FAILURE)
    run.sidecar(key, {"value": [-0.4], "realised": [-0.5]})
    picture = value_picture(valued_episodes(read_run(run.folder)))
    assert picture is not None
    assert picture.startswith(PNG)


def test_bins_hold_equally_many_rows_in_order() -> None:
    assert [rows.tolist() for rows in bins(np.array([0.3, 0.1, 0.2, 0.5, 0.4]), 2)] == [[1, 2, 0], [4, 3]]
    assert [rows.tolist() for rows in bins(np.array([0.3, 0.1]), 10)] == [[1], [0]]


@pytest.fixture
def warmed(tmp_path: Path) -> RunDirectory:
    """Three base rollouts a long time before the fleet's only episode, a warm-up, and two demonstrations."""
    run = make_run(tmp_path / "warmed", operator={"kind": "none"}, exploration={"kind": "offset"})
    for number in range(2):
        run.record(make_episode("HHHH", actor_id="lab-0", sequence=number, version=None, start_s=-900))
    outcomes = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.FAILURE, Outcome.ABORTED)
    for number, outcome in enumerate(outcomes):
        episode = make_episode("P" * 20, actor_id="base-0", sequence=number, outcome=outcome, start_s=-500)
        run.record(episode)
    run.record(make_episode("P" * 40, start_s=0.0, version=1))
    warm = {"warmup/separation": 0.02, "warmup/null_loss": 0.3, "warmup/base_loss": 0.2}
    run.log("learner", -300, 25, warm | {"warmup/separation": 0.001})
    run.log("learner", -200, 50, warm)
    run.log("learner", -200, 50, {"learner/busy": 1.0, "learner/worked_s": 9.0, "learner/version": 0.0})
    share = {"recap/positive_share/open": 0.4, "recap/positive_share/close": NAN, "recap/offline_threshold/open": 0.1}
    run.log("learner", 5, 60, {"learner/busy": 0.5, "learner/worked_s": 1.0, "learner/version": 1.0, **share})
    run.log("learner", 6, 70, {"recap/positive_share/open": NAN, "value/drift": 0.05})
    for version, swap_s in ((1, 90.0), (2, 1.5)):
        run.log("fleet", 1.0, version, {"fleet/publish_to_swap_s": swap_s, "fleet/publish_to_staged_s": 0.5})
    run.write_timing({"base rollouts": 30.0, "warm-up": 120.0, "fleet": 60.0})
    return run


def test_base_rollouts_are_counted_apart_from_episodes_demonstrations_and_time(warmed: RunDirectory) -> None:
    summary = summarise(warmed.folder)
    counts = {"indexed_episodes": None, "waiting_episodes": 0, "lost_episodes": 0, "duplicate_episodes": None}
    assert summary["demonstrations"] == counts | {"recorded_episodes": 2, "waiting_episodes": 2}
    assert summary["base_rollouts"] == counts | {"recorded_episodes": 4, "waiting_episodes": 4}
    assert (summary["recorded_episodes"], summary["episodes"], summary["aborted_episodes"]) == (1, 1, 0)
    assert (summary["steps"], summary["human_steps"], summary["operator_minutes"]) == (40, 0, 0.0)
    assert summary["per_task"]["open"]["episodes"] == 1
    assert summary["robot_minutes"] == pytest.approx((40 / 20 + 1.0) / 60)


def test_what_came_before_the_fleet_has_its_own_block(warmed: RunDirectory) -> None:
    recap = summarise(warmed.folder)["recap"]
    rollouts = recap["base_rollouts"]
    assert (rollouts["episodes"], rollouts["successes"], rollouts["success"]) == (3, 1, pytest.approx(1 / 3))
    assert rollouts["per_task"]["open"]["interval"] == pytest.approx([0.0615, 0.7923], abs=1e-4)
    assert rollouts["per_task"]["close"] == {"episodes": 0, "successes": 0, "success": None, "interval": None}
    assert rollouts["robot_minutes"] == pytest.approx(4 * (20 / 20 + 1.0) / 60)
    assert recap["wall_minutes"] == {"base rollouts": 0.5, "warm-up": 2.0}
    assert recap["warmup"] == {"separation": 0.02, "null_loss": 0.3, "base_loss": 0.2}
    assert recap["per_task"]["open"] == {
        "threshold": None,
        "positive_share": 0.4,  # the last that is known
        "offline_threshold": 0.1,
        "offline_positive_share": None,
    }
    assert recap["per_task"]["close"]["positive_share"] is None
    assert recap["metrics"]["value/drift"] == 0.05


def test_time_and_freshness_begin_with_the_fleet(warmed: RunDirectory) -> None:
    read = read_run(warmed.folder)
    assert FleetTime(read).at(START_UTC_S - 100) == 0.0
    assert FleetTime(read).at(START_UTC_S + 2) == pytest.approx(2.0)
    assert FleetTime(read).episode_ends() == pytest.approx([2.0])
    summary = summarise(warmed.folder)
    assert summary["freshness"]["publish_to_swap_s"] == {"p50": 1.5, "p99": 1.5}  # version 1 waited for the fleet
    assert summary["learner_busy"] == 0.5  # the warm-up's laps are not the fleet's


def test_the_page_tells_of_base_rollouts(warmed: RunDirectory) -> None:
    page = write_report(warmed.folder).read_text()
    assert "<td>open</td><td>3</td><td>33 % <small>6-79 %</small></td><td>-</td><td>40 %</td>" in page
    assert "Base rollouts took 30 s; warm-up took 2.0 min; after the warm-up the two branches" in page


def test_the_paragraph_names_the_algorithm_and_says_that_nobody_helped(warmed: RunDirectory) -> None:
    text = describe(summarise(warmed.folder))
    assert text.startswith(
        "The fleet collected 1 episode in 3 s of robot time. The algorithm was recap; nobody helped, with exploration "
        "on. No policy was evaluated."
    )
    assert "value function" not in text


def test_the_paragraph_says_how_well_the_value_function_ranks(valued: RunDirectory) -> None:
    text = describe(summarise(valued.folder))
    assert "The algorithm was recap; operators helped." in text
    assert "asked about 4 episodes of the fleet that it had not seen" in text
    assert "at a rank correlation of 0.79 (calibration error" in text
