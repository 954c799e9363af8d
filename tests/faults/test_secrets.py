"""A scanner for secrets, over everything that a run with identities writes and says."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from fleet_examples import make_fleet, secrets_of
from sop.presets import make_config
from sop.runs import create_run
from sop.system import ActorOptions, run_actor
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
def test_fault_40_no_secret_is_in_anything_that_a_run_writes(tmp_path: Path) -> None:
    """Learner and robot with identities, logs at their most talkative, from the first signed policy on."""
    fleet = make_fleet(tmp_path / "fleet", clock=time.time_ns)
    fleet.enroll("learner", "learner")
    fleet.enroll("robot-8", "robot")
    secrets = secrets_of(tmp_path / "fleet")
    run = create_run(tmp_path / "run", make_config("debug", ["pretrain.steps=3", "pretrain.demonstrations_per_task=4"]))
    run_actor(run, ActorOptions(actor_id="lab-0", demonstrate=True, speed=0, end_sequence=12), threading.Event())
    said = [
        _ends(_start("learner", tmp_path, "learner", "--pretrain")),
        _ends(_start("robot-8", tmp_path, "actor", "--id", "robot-8", "--end", "2", "--speed", "0")),
        _ends_when_it_has_reported(_start("learner", tmp_path, "learner"), run.folder),
    ]
    assert len(list(run.folder.glob("store/episodes/robot-8/*.arrow"))) == 2
    assert list(run.folder.glob("store/checkpoints/*/state.json"))
    assert all(text for text in said)
    assert leaks(run.folder, secrets, *said) == []


def _start(identity: str, folder: Path, command: str, *arguments: str) -> "tuple[subprocess.Popen[bytes], Path]":
    """A process of `folder`/run with an identity of `folder`/fleet, and where its log and its command line are."""
    output = folder / f"{identity}-{time.monotonic_ns()}.log"
    words = [sys.executable, "-m", "sop", "--log-level", "DEBUG", command, str(folder / "run"), *arguments]
    with output.open("wb") as file:
        file.write(repr(words).encode())
        process = subprocess.Popen(
            words,
            env={**os.environ, VARIABLE: str(folder / "fleet" / "identities" / identity), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    return process, output


def _ends(started: "tuple[subprocess.Popen[bytes], Path]") -> bytes:
    """What a process said; it ends by itself, and well."""
    process, output = started
    try:
        assert process.wait(150) == 0, output.read_text()
    finally:
        process.kill()
    return output.read_bytes()


def _ends_when_it_has_reported(started: "tuple[subprocess.Popen[bytes], Path]", folder: Path) -> bytes:
    """What the learner said; it is asked to end when it has reported a step, and saves then."""
    process, metrics, deadline = started[0], folder / "metrics" / "learner.jsonl", time.monotonic() + 150
    before = metrics.stat().st_size if metrics.exists() else 0
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.stat().st_size > before:
            process.terminate()
            break
        time.sleep(0.1)
    return _ends(started)
