"""The whole loop in seconds: it learns, is killed, resumes, and loses nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recovery_times import Recovery
from sop.broadcast import published_versions
from sop.chaos.history import check_history
from sop.chaos.strikes import attack_new
from sop.chaos.target import Target
from sop.cli import main
from sop.report.record import read_run
from sop.runs import open_run
from sop.transport import open_store

pytestmark = pytest.mark.slow


def sop(*arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "sop", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: "subprocess.Popen[bytes]", code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    text = output.decode()
    assert process.returncode == code, text
    return text


def test_the_debug_run_ends_with_a_report_and_every_number(tmp_path: Path) -> None:
    text = finish(sop("run", "debug", "--runs", str(tmp_path), "--name", "whole", "--seed", "1"))
    folder = tmp_path / "whole"
    summary = json.loads((folder / "summary.json").read_text())
    assert 24 <= summary["episodes"] <= 27  # a robot may finish one more before it hears that it is enough
    assert summary["lost_episodes"] == summary["duplicate_episodes"] == summary["quarantined"] == 0
    assert summary["publishes"] >= 2
    assert summary["learner_steps"] >= 20
    assert summary["seed"] == 1
    assert 0 <= summary["base"]["success"] <= 1
    assert summary["expert"]["success"] >= 0.9
    assert summary["freshness"]["publish_to_staged_s"]["p50"] >= 0
    assert set(summary["per_task"]) == {"touch-red", "touch-green"}
    assert summary["held_out"]["final"] is not None
    page = (folder / "report.html").read_text()
    assert "<img" in page
    assert "http://" not in page
    assert (folder / "curve.png").stat().st_size > 1000
    assert f"{summary['episodes']} episodes" in text
    newest = list(published_versions(open_store(str(folder / "store"))))[-1]
    assert finish(sop("inspect", str(folder))).count(f" {newest} ") >= 1
    assert check_history(open_run(str(folder))).words() == []
    record = read_run(folder)
    assert sorted(record.indexed or ()) == sorted(record.stored), "the learner ends last"
    again = finish(sop("run", "debug", "--runs", str(tmp_path), "--name", "whole"), code=2)
    assert "--resume goes on with it" in again


def test_ctrl_c_ends_a_run_with_a_report_and_resume_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    run = sop("run", "debug", "--runs", str(tmp_path), "--name", "broken", "--episodes", "30")
    while run.poll() is None and not list((folder / "store" / "episodes").glob("*/*.arrow")):
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert "--name broken --resume" in finish(run, code=130)
    partial = json.loads((folder / "summary.json").read_text())
    assert partial["final"]["success"] is None
    assert partial["lost_episodes"] == 0
    assert 0 < partial["episodes"] < 30
    assert (folder / "report.html").exists()
    assert Target(open_run(str(folder))).processes() == []
    finish(sop("run", "debug", "--runs", str(tmp_path), "--resume"))
    summary = json.loads((folder / "summary.json").read_text())
    assert 30 <= summary["episodes"] <= 33
    assert summary["learner_steps"] > partial["learner_steps"]
    assert summary["final"]["success"] is not None
    history = check_history(open_run(str(folder)))
    assert history.words() == []
    assert history.last_step > 0
    assert main(["replay-batch", str(folder), "--step", str(history.last_step)]) == 0


def test_struck_processes_lose_nothing(tmp_path: Path, recovery: Recovery) -> None:
    names, said = ("bus-wiped", "flip", "kill", "power-cut", "store-away"), list[str]()
    attack = attack_new("debug", tmp_path, strikes=4, seed=3, names=names, every_s=2.5, say=said.append)
    log = "\n".join([*said, (tmp_path / "debug-seed3" / "run.log").read_text()])
    assert attack.exit_code == 0, log
    assert attack.history.words() == [], log
    assert len(attack.strikes) >= 3, log
    assert attack.history.counts()["indexed"] >= 40
    assert attack.survived
    for strike in attack.strikes:
        if strike.recovered_s is not None:
            recovery.took(strike.recovered_s, "every robot and the learner were at work again")
    kept = json.loads((tmp_path / "debug-seed3" / "chaos.json").read_text())
    assert kept["violations"] == []
    assert [strike["recovered_s"] for strike in kept["strikes"]] == [one.recovered_s for one in attack.strikes]
    assert main(["replay-batch", str(tmp_path / "debug-seed3"), "--step", str(attack.history.last_step)]) == 0


def test_the_loop_runs_on_deltas_in_bfloat16(tmp_path: Path) -> None:
    settings = ("--set", "learner.publish_encoding=packed", "--set", "learner.publish_dtype=bfloat16")
    finish(sop("run", "debug", "--runs", str(tmp_path), "--name", "packed", *settings))
    summary = json.loads((tmp_path / "packed" / "summary.json").read_text())
    assert summary["lost_episodes"] == summary["quarantined"] == 0
    store = open_store(str(tmp_path / "packed" / "store"))
    forms = [key.split("/")[2] for key in store.keys("policies/") if key.endswith((".packed", ".safetensors"))]
    assert "weights.safetensors" not in forms
    assert sum(form.startswith("delta-") for form in forms) >= summary["publishes"] - 2
    assert summary["freshness"]["hops"]["published_to_staged"]["count"] >= 2, "robots acted with what came as deltas"


def test_extra_demonstrations_go_to_the_offline_buffer_and_the_base_is_shared(tmp_path: Path) -> None:
    finish(sop("run", "debug", "--runs", str(tmp_path), "--name", "a", "--minutes", "0", "--episodes", "4"))
    arguments = ("--name", "b", "--algorithm", "offline_extra", "--base-from", str(tmp_path / "a"), "--episodes", "12")
    finish(sop("run", "debug", "--runs", str(tmp_path), *arguments))
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert second["base"] == first["base"]
    assert 12 <= second["episodes"] == second["demonstrated_episodes"] <= 15
    assert second["final"]["success"] is not None
    store = open_store(str(tmp_path / "b" / "store"))
    assert list(store.keys("episodes/")) == []
    assert len(list(store.keys("demonstrations/robot-"))) == second["recorded_episodes"]
    weights = [open_store(str(tmp_path / name / "store")).get("policies/00000000/weights.safetensors") for name in "ab"]
    assert weights[0] == weights[1]
    refused = sop(
        "run", "debug", "--runs", str(tmp_path), "--name", "c", "--seed", "9", "--base-from", str(tmp_path / "a")
    )
    assert "its seed is 0, this run has 9" in finish(refused, code=1)
