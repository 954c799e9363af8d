"""A scanner for secrets, over everything that a run with identities writes and says."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from fleet_examples import make_fleet, secrets_of
from sop.runs import Run
from sop.transport.identity import VARIABLE


def leaks(folder: Path, secrets: Iterable[str], *texts: bytes) -> list[tuple[str, str]]:
    """(where, the first digits of what) of every secret in any file below a folder, or in a text."""
    places = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    places |= {f"text {number}": text for number, text in enumerate(texts)}
    return [(name, secret[:6]) for name, data in places.items() for secret in secrets if secret.encode() in data]


def test_fault_40_the_scanner_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\xff\xfe user=x secret=a-long-secret-nobody-may-read \x00")
    assert leaks(tmp_path, {"a-long-secret-nobody-may-read"}) == [(str(tmp_path / "log"), "a-long")]
    assert leaks(tmp_path, {"another"}, b"says another") == [("text 0", "anothe")]


@pytest.mark.slow
def test_fault_40_no_secret_is_in_anything_that_a_run_writes(finished_base: Run, tmp_path: Path) -> None:
    """Learner and robot with identities, logs at their most talkative. No policy is signed here: a person drives."""
    fleet = make_fleet(tmp_path / "fleet", clock=time.time_ns)
    fleet.enroll("learner", "learner")
    fleet.enroll("robot-8", "robot")
    identities, folder = tmp_path / "fleet" / "identities", finished_base.folder
    secrets = secrets_of(tmp_path / "fleet")
    commands = {
        "robot-8": ["actor", str(folder), "--id", "robot-8", "--demonstrate", "--end", "2"],
        "learner": ["learner", str(folder)],
    }
    said = []
    for name, command in commands.items():
        output = tmp_path / f"{name}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "sop", "--log-level", "DEBUG", *command],
                env={**os.environ, VARIABLE: str(identities / name), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        said.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        _end_when_it_has_written(process, folder)
        said.append(output.read_bytes())
    assert len(list(folder.glob("store/demonstrations/robot-8/*.arrow"))) == 2
    assert list(folder.glob("store/checkpoints/*/state.json"))
    assert leaks(folder, secrets, *said) == []


def _end_when_it_has_written(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """The robot ends by itself; the learner is asked to when it has reported, and saves then."""
    metrics, deadline = folder / "metrics" / "learner.jsonl", time.monotonic() + 150
    before = metrics.stat().st_size
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return
        if metrics.stat().st_size > before:
            process.terminate()
    process.kill()
    process.wait()
    raise AssertionError("it did not end")
