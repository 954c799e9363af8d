"""The canary experiment with a handful of everything: it runs, and what it writes fits together."""

from pathlib import Path

import msgspec
import pytest

from sop.experiments.canary import NAMES, QUICK, run_experiment


@pytest.mark.slow
def test_the_quick_experiment_catches_what_it_must(tmp_path: Path) -> None:
    summary = run_experiment(QUICK, tmp_path)
    written = msgspec.json.decode((tmp_path / "summary.json").read_bytes())
    assert list(written["candidates"]) == list(NAMES.values())
    broken = written["candidates"]["not a number"]
    assert (broken["robots"], broken["episodes"]) == (0, 0)
    assert "not finite at step 200" in broken["offline_gate"]
    assert written["candidates"]["good"]["promoted"]
    assert summary["requirements"]["three caught on the robots"], written["candidates"]
    assert len(written["promotions"]["trials"]) == QUICK.promotions
    assert "| not a number |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "canary.png").read_bytes().startswith(b"\x89PNG")
