"""The whole thing once, short: real processes, real faults."""

import json
from pathlib import Path

import pytest

from sop.cli import main


@pytest.mark.slow
def test_twenty_robot_minutes_under_fire_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["soak", "--quick", "--runs", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, said
    summary = json.loads((tmp_path / "soak" / "summary.json").read_text())
    assert summary["robot_hours"] >= 1 / 3
    assert summary["broken"] == []
    assert summary["history"]["recorded"] == summary["history"]["readable"] > 0
    assert summary["strikes"]
    assert all(strike["recovered_s"] > 0 for strike in summary["strikes"]), "the fleet settles after the last one"
    assert f"recovered: {summary['strikes'][0]['nemesis']} " in said
    assert "Every promise was kept." in said


def test_a_folder_with_a_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept" / "store").mkdir(parents=True)
    assert main(["soak", "--quick", "--name", "kept", "--runs", str(tmp_path)]) == 2
    assert "kept exists: choose another name" in capsys.readouterr().err
    assert list((tmp_path / "kept").iterdir()) == [tmp_path / "kept" / "store"]
