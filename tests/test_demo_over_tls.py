"""The whole loop behind TLS and identities, on a real store and a real bus: who is revoked is out, who joins is in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("pretrain.steps=20", "pretrain.demonstrations_per_task=4", "evaluation.episodes_per_task=4")


@pytest.mark.slow
def test_two_robots_are_revoked_and_two_join_in_the_middle_and_nothing_is_lost(tmp_path: Path) -> None:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = [
        "benchmarks/demo_over_tls.py",
        "--preset",
        "debug",
        "--out",
        str(tmp_path),
        "--patience-s",
        "120",
        *settings,
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "demo_over_tls.json").read_text())
    assert result["violations"] == []
    assert result["lost"] == result["duplicated"] == result["strangers"] == result["quarantined"] == 0
    assert result["acknowledged"] == result["indexed"] >= result["episodes_wanted"]
    assert set(result["revoked"]) == {"robot-2", "robot-3"}
    for facts in result["revoked"].values():
        assert facts["to_refused_s"] < 60
        assert facts["to_bus_dropped_s"] < 60
        assert facts["to_last_write_s"] < 60
        assert facts["alive"], "it keeps its policy and goes on recording for its spool"
        assert facts["waiting"] > 0
        assert facts["waiting"] + facts["acknowledged"] == facts["recorded"], "nothing that it recorded is gone"
    assert result["restarts_of_revoked"] == 0
    for facts in result["joined"].values():
        assert facts["indexed"] > 0
    base, final = result["success"]["over TLS"]
    assert base is not None
    assert final is not None
    assert list(tmp_path.glob("tls-*")) == [], "what it made is cleaned up"
