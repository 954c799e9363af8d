"""Jobs on a real Ray of this machine: what they print and how they end is known here; a lost machine is a death."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sop.cluster import LOST, RayProcess, on_cluster
from sop.core.errors import RunError
from sop.presets import make_config
from sop.processes import Children, Job, Spawn
from sop.runs import create_run

pytestmark = pytest.mark.slow
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def spawn() -> Iterator[Spawn]:
    with on_cluster("ray") as started:
        yield started


def job(folder: Path, name: str, *arguments: str) -> Job:
    return Job(name=name, arguments=arguments, output=folder / f"{name}.out", errors=folder / f"{name}.err")


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline


def listens(pid: int) -> bool:
    """Whether a process has said what it does when it is asked to finish."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_jobs_end_with_their_codes_and_what_they_say_arrives(spawn: Spawn, tmp_path: Path) -> None:
    good, bad = job(tmp_path, "good", "--help"), job(tmp_path, "bad", "actor", "nowhere", "--id", "x")
    processes = [spawn(good), spawn(bad)]
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 1]
    assert good.output.read_text().startswith("usage: sop")
    assert "nowhere is not the folder of a run" in (tmp_path / "bad.err").read_text()
    assert not (tmp_path / "good.err").exists()


def test_a_robot_whose_machine_is_lost_starts_again_and_then_finishes_when_asked(spawn: Spawn, tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", make_config("debug"))
    notes: list[str] = []
    children = Children(tmp_path, on_restart=notes.append, spawn=spawn)
    children.start("robot-0", ["actor", *run.address, "--id", "robot-0"], restart=True)  # waits for a policy
    first = children._children["robot-0"].process
    assert isinstance(first, RayProcess)
    wait_until(lambda: first.poll() is not None or first.pid)
    host = int(Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(host, signal.SIGKILL)
    wait_until(lambda: first.poll() is not None)
    assert first.poll() == LOST
    wait_until(lambda: not Path(f"/proc/{first.pid}").exists())  # a job ends with its machine, and lets its spool go
    children.watch()
    assert notes == [f"robot-0 died (code {LOST}) and was started again"]
    second = children._children["robot-0"].process
    wait_until(lambda: second.poll() is not None or second.pid)
    assert second.pid != first.pid
    wait_until(lambda: listens(second.pid))
    second.terminate()
    assert second.wait(PATIENCE_S) == 0


def test_a_cluster_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(RunError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"), on_cluster("127.0.0.1:1"):
        pass
