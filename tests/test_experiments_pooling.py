"""Pooling over seeds by hand, the report's files, and an experiment that goes on where it stopped."""

import argparse
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sop.core.errors import RunError
from sop.core.evaluation import wilson_interval
from sop.experiments import x_ind
from sop.experiments.arm import RESULT, Setup, run_job, write
from sop.experiments.plan import ARMS, BASES, QUICK
from sop.experiments.pooling import compare, mean_and_error, pool_arm, pooled, time_to_target
from sop.experiments.report import describe, write_report
from sop.experiments.x_ind import Job, jobs, name_streams, run_experiment, run_jobs


def result(
    seed: str, arm: str, curve: list[int], final: dict[str, int], signed: list[float] | None = None
) -> dict[str, Any]:
    """An arm of ten episodes per evaluation: `curve` and `final` are the successes."""
    told = signed is not None
    measures = {"separation": 0.5, "separation_negative": 0.25, "told_apart": 0.4, "noise": 0.2} if told else {}
    found: dict[str, Any] = {
        "own": "beta 1" if told else "beta 0",
        "conditions": {name: {"push": [count, 8], "pull": [0, 2]} for name, count in final.items()},
        "held_out": {"slide": [1, 2]},
    }
    if told:
        scenes = {"task": ["push"] * len(signed), "seed": list(range(len(signed)))}
        found["signed"] = {"lookahead_steps": 20, "difference": signed, **scenes}
    if arm == "no-indicator":
        found["base"] = {"conditions": {"beta 0": {"push": [3, 10]}}, "held_out": {"slide": [0, 2]}}
    last = len(curve) - 1
    return {
        "seed": seed,
        "arm": arm,
        "settings": msgspec.to_builtins(ARMS[arm]),
        "curve": [
            {"publish": number, "last": number == last, "learner_step": 25 * number, "online_episodes": 5 * number,
             "success": {"push": [count, 10]}, **measures}
            for number, count in enumerate(curve)
        ],
        "final": found,
        "warmup_steps": 0,
        "steps": 100,
        "wall_s": 1.0,
    }  # fmt: skip


def arms() -> dict[str, dict[str, Any]]:
    control = [result(seed, "no-indicator", [3, 3, 4, 4], {"beta 0": 4}) for seed in ("seed1", "seed2")]
    told = [
        result("seed1", "plain-embed-cold", [4, 2, 6, 7], {"beta 0": 3, "beta 1": 7, "negative": 1}, [0.1, 0.3]),
        result("seed2", "plain-embed-cold", [4, 3, 5, 8], {"beta 0": 4, "beta 1": 5, "negative": 0}, [-0.1, 0.1]),
    ]
    return {"plain-embed-cold": pool_arm(told), "no-indicator": pool_arm(control)}


def test_success_is_pooled_over_seeds_and_its_spread_over_seeds_is_kept() -> None:
    found = pooled({"seed1": (3, 10), "seed2": (5, 10)})
    assert (found["successes"], found["episodes"], found["rate"]) == (8, 20, 0.4)
    assert (found["low"], found["high"]) == wilson_interval(8, 20)
    assert (found["per_seed"], found["mean"], found["se"]) == ([0.3, 0.5], 0.4, pytest.approx(0.1))
    assert found["counts"] == {"seed1": [3, 10], "seed2": [5, 10]}
    assert pooled({"seed1": (0, 0)})["rate"] is None


def test_a_mean_of_one_seed_has_no_error_and_one_of_none_is_unknown() -> None:
    assert mean_and_error([2.0]) == {"mean": 2.0, "se": None}
    assert mean_and_error([]) == {"mean": None, "se": None}
    assert mean_and_error([1.0, 2.0, 3.0]) == {"mean": 2.0, "se": pytest.approx(1 / math.sqrt(3))}


def test_an_arm_pooled_by_hand() -> None:
    arm = arms()["plain-embed-cold"]
    assert (arm["success"]["successes"], arm["success"]["episodes"], arm["success"]["per_seed"]) == (12, 20, [0.7, 0.5])
    assert {name: found["successes"] for name, found in arm["conditions"].items()} == {
        "beta 0": 7, "beta 1": 12, "negative": 1,
    }  # fmt: skip
    assert arm["success_per_task"]["push"]["rate"] == 12 / 16
    assert arm["negative_minus_own"]["difference"] == pytest.approx(-11 / 20)
    assert arm["negative_minus_own"]["high"] < 0
    assert [point["success"]["successes"] for point in arm["curve"]] == [8, 5, 11, 15]
    assert arm["curve"][0]["separation"] == {"mean": 0.5, "se": 0.0, "per_seed": [0.5, 0.5]}
    assert (arm["dip"]["publish"], arm["dip"]["difference"]) == (1, pytest.approx(-0.15))
    signed = arm["signed_advantage"]
    assert (signed["pairs"], signed["mean"], signed["share_positive"]) == (4, pytest.approx(0.1), 0.75)
    assert signed["scenes"] == 2
    assert signed["per_seed"] == [pytest.approx(0.2), pytest.approx(0.0)]


def test_pairs_of_the_same_scene_count_once() -> None:
    """Two policies that say the same in each of eight scenes know as much as one, and two more moments add nothing."""
    values = [0.1, -0.2, 0.3, 0.0, 0.2, 0.1, -0.1, 0.4]
    one = {"beta 0": 1, "beta 1": 2, "negative": 1}
    found = pool_arm([result(seed, "plain-embed-cold", [1, 2], one, values) for seed in ("seed1", "seed2")])
    signed = found["signed_advantage"]
    error = mean_and_error(values)["se"]
    assert error is not None
    assert (signed["pairs"], signed["scenes"], signed["mean"]) == (16, 8, pytest.approx(0.1))
    assert signed["high"] - signed["mean"] == pytest.approx(2.3646 * error, rel=5e-3), "Student, 7 degrees of freedom"
    assert signed["mean"] - signed["low"] == pytest.approx(signed["high"] - signed["mean"])


def test_gains_count_from_the_base_policy_and_the_target_is_half_of_the_best() -> None:
    found = arms()
    shared = compare(found)
    assert (shared["base"]["successes"], shared["base"]["episodes"], shared["best_arm"]) == (6, 20, "plain-embed-cold")
    assert shared["target"] == pytest.approx(0.3 + (0.6 - 0.3) / 2)
    assert found["no-indicator"]["gain"]["difference"] == pytest.approx(0.1)
    assert found["plain-embed-cold"]["time_to_target"] == {"publish": 2, "learner_step": 50, "online_episodes": 10}
    assert found["no-indicator"]["time_to_target"] is None


def test_arms_are_compared_over_the_seeds_that_both_have() -> None:
    """Bases differ between seeds: seed 2 of one arm is never subtracted from seed 1 of another."""
    control = pool_arm([result(seed, "no-indicator", [3, 4], {"beta 0": 4}) for seed in ("seed1", "seed2")])
    late = pool_arm([result("seed2", "plain-embed-cold", [4, 7], {"beta 0": 3, "beta 1": 7, "negative": 1}, [0.1])])
    alone = pool_arm([result("seed9", "filtered", [4, 7], {"beta 0": 8})])
    found = {"no-indicator": control, "plain-embed-cold": late, "filtered": alone}
    shared = compare(found)
    assert late["gain"]["seeds"] == ["seed2"]
    assert late["gain"]["per_seed"] == [pytest.approx(0.7 - 0.3)]
    assert late["gain"]["difference"] == pytest.approx(0.7 - 0.3)
    assert (alone["gain"]["seeds"], alone["gain"]["difference"]) == ([], None)
    assert shared["best_arm"] == "plain-embed-cold"


def test_a_target_is_reached_when_success_stays_there() -> None:
    curve = [{"publish": number, "learner_step": number, "online_episodes": 0, "success": {"rate": rate}}
             for number, rate in enumerate([0.6, 0.2, 0.5, 0.5])]  # fmt: skip
    assert time_to_target(curve, 0.5) == {"publish": 2, "learner_step": 2, "online_episodes": 0}
    assert time_to_target(curve, 0.2) == {"publish": 0, "learner_step": 0, "online_episodes": 0}
    assert time_to_target(curve, 0.51) is None


@pytest.fixture
def out(tmp_path: Path) -> Path:
    Setup(plan=QUICK, streams={"seed1": "nowhere"}).save(tmp_path)
    one = result(
        "seed1", "plain-embed-cold", [4, 2, 6, 7], {"beta 0": 3, "beta 1": 7, "beta 2": 6, "negative": 1}, [0.1]
    )
    for found in (one, result("seed1", "no-indicator", [3, 3, 4, 4], {"beta 0": 4})):
        write(tmp_path / "seed1" / found["arm"] / RESULT, json.dumps(found).encode())
    return tmp_path


def test_the_report_is_summary_table_and_picture_of_what_is_there(out: Path) -> None:
    summary = write_report(out)
    stored = json.loads((out / "summary.json").read_text())
    assert (stored["complete"], list(stored["arms"]), stored["seeds"]) == (
        False,
        ["plain-embed-cold", "no-indicator"],
        ["seed1"],
    )
    assert stored["arms"]["plain-embed-cold"]["success"]["rate"] == 0.7
    assert stored["plan"]["episodes"] == QUICK.episodes
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].startswith(
        "| arm | D, start | D, end | told apart / noise | null branch | asked for good | beta 2 |"
    )
    assert lines[2].startswith(
        "| plain-embed-cold | 0.5 | 0.5 | 2.00 | 30 [11, 60] | 70 [40, 89] | 60 [31, 83] | 10 [2, 40] |"
    )
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert (out / "x-ind.png").read_bytes().startswith(b"\x89PNG")
    assert "plain-embed-cold       70 [40, 89]" in describe(summary)


def test_tuned_bases_come_before_the_arms_that_need_them() -> None:
    found = jobs(["seed1", "seed2"], tuple(ARMS))
    assert len(found) == 2 * (len(ARMS) + len(BASES))
    assert found[:2] == [Job("seed1/base-embed"), Job("seed1/base-text")]
    assert {job.after for job in found if job.name.startswith("seed2/tuned-text")} == {"seed2/base-text"}
    assert {job.after for job in found if "plain" in job.name} == {None}


def test_some_arms_need_their_own_tuned_base_alone() -> None:
    found = jobs(["seed1"], ("tuned-text-warm", "demonstrations"))
    assert found == [
        Job("seed1/base-text"),
        Job("seed1/demonstrations"),
        Job("seed1/tuned-text-warm", "seed1/base-text"),
    ]
    assert jobs(["seed1"], ("no-indicator",)) == [Job("seed1/no-indicator")]


class Processes:
    """Children that end at once: with a result, unless their job is to fail."""

    started: list[str] = []  # noqa: RUF012 - shared by the children of a test, emptied by it

    def __init__(self, _logs: Path) -> None:
        self.failed = False

    def start(self, _name: str, arguments: list[str]) -> None:
        """Note the job and do it."""
        out, job = Path(arguments[3]), arguments[5]
        self.started.append(job)
        self.failed = job.endswith("base-text")
        if not self.failed:
            write(out / job / RESULT, b"{}")

    def watch(self) -> None:
        """Raise for a dead child."""
        if self.failed:
            raise RunError("it ended with code 1; its log ends so:\nno memory")

    def finished(self, _name: str) -> bool:
        """At once."""
        return True

    def stop(self) -> None:
        """Nothing runs."""


def test_finished_arms_are_skipped_and_a_failure_stops_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(x_ind, "Children", Processes)
    monkeypatch.setattr(x_ind, "POLL_S", 0)
    Processes.started.clear()
    write(tmp_path / "seed1" / "filtered" / RESULT, b"{}")
    failed = run_jobs(jobs(["seed1"], tuple(ARMS)), tmp_path, 2, threading.Event())
    names = [job.name for job in jobs(["seed1"], tuple(ARMS))]
    assert sorted(Processes.started) == sorted(
        name for name in names if "filtered" not in name and "tuned-text" not in name
    )
    assert set(failed) == {"seed1/base-text", "seed1/tuned-text-cold", "seed1/tuned-text-warm"}
    assert "no memory" in failed["seed1/base-text"]
    assert failed["seed1/tuned-text-cold"] == "seed1/base-text failed"
    assert "base-text  FAILED" in capsys.readouterr().out
    Processes.started.clear()
    run_jobs(jobs(["seed1"], tuple(ARMS)), tmp_path, 2, threading.Event())
    assert Processes.started == ["seed1/base-text"]


def test_a_finished_arm_is_not_done_again_and_an_unknown_one_is_refused(out: Path) -> None:
    before = (out / "seed1" / "no-indicator" / RESULT).read_bytes()
    run_job(out, "seed1/no-indicator")  # its stream is nowhere
    assert (out / "seed1" / "no-indicator" / RESULT).read_bytes() == before
    with pytest.raises(RunError, match=r"no job is called 'seed2/filtered': seeds \['seed1'\]"):
        run_job(out, "seed2/filtered")


def test_another_plan_needs_another_folder(out: Path) -> None:
    with pytest.raises(RunError, match="holds an experiment with another plan"):
        run_experiment(out, QUICK, {"seed1": "elsewhere"}, workers=1, stop=threading.Event())


def test_more_seeds_and_other_arms_go_on_with_what_is_there() -> None:
    before = Setup(plan=QUICK, streams={"seed1": "a"})
    later = Setup(plan=replace(QUICK, arms=("filtered",)), streams={"seed2": "b"})
    assert later.continues(before)
    joined = later.joined(before)
    assert joined.plan == QUICK, "one more arm of these never takes the others out of the report"
    assert joined.streams == {"seed1": "a", "seed2": "b"}
    assert not Setup(plan=QUICK, streams={"seed1": "b"}).continues(before)
    assert not Setup(plan=replace(QUICK, cooldown_steps=9), streams={"seed1": "a"}).continues(before)


def test_every_stream_needs_a_seed_of_its_own(tmp_path: Path) -> None:
    assert name_streams([str(tmp_path)], [4]) == {"seed4": str(tmp_path)}
    with pytest.raises(ValueError, match="each of another seed: got 2 runs"):
        name_streams(["a", "b"], [1, 1])


def test_the_report_alone_needs_no_stream(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(x_ind, "stop_on_signals", threading.Event)
    options = argparse.Namespace(out=out, arm=None, report_only=True)
    assert x_ind.run_command(options) == 0
    assert f"Numbers: {out / 'summary.json'}" in capsys.readouterr().out
