"""The whole experiment on the toy robot, from the recorded stream to the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sop.experiments.plan import ARMS, QUICK


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_experiment_runs_every_arm_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "x-ind"
    command = [sys.executable, "-m", "sop", "experiment", "x-ind", "--quick", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"] is True
    assert set(summary["arms"]) == set(ARMS)
    embed, told = summary["arms"]["plain-embed-cold"], summary["arms"]["tuned-text-warm"]
    assert embed["curve"][0]["separation"]["mean"] == 0.0  # a table of zeros changes nothing
    assert embed["curve"][0]["told_apart"]["mean"] == 0.0
    assert embed["curve"][-1]["separation"]["mean"] > 0
    assert told["curve"][0]["separation"]["mean"] > 0
    assert (told["warmup_steps"], embed["warmup_steps"]) == ([4], [0])
    control = summary["arms"]["no-indicator"]
    assert embed["conditions"]["beta 0"]["episodes"] == control["success"]["episodes"] == 4
    assert embed["curve"][0]["success"] == control["curve"][0]["success"]  # both act like the base policy
    assert embed["signed_advantage"]["pairs"] >= 2
    assert {name: arm["curve"][-1]["online_episodes"] for name, arm in summary["arms"].items()} == dict.fromkeys(
        ARMS, 6
    )
    steps = {name: arm["steps"][0] - arm["warmup_steps"][0] for name, arm in summary["arms"].items()}
    assert steps == dict.fromkeys(ARMS, QUICK.learner_steps(6)), "every arm takes as many steps"
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("seed1/*/result.json")}
    assert len(stamps) == len(ARMS) + 2
    subprocess.run(command, capture_output=True, check=True, env=environment)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
