"""Two processes learn what one does; they end together; what one left, any number goes on from."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rank_worker import Session, run_sessions, saved, write_sessions
from sop.broadcast import fetch_policy, published_versions
from sop.core import layout
from sop.learner import Checkpoint
from sop.runs import Run, open_run

pytestmark = pytest.mark.slow
ENDS_S = 240.0
"""The machine may be busy; nothing here waits for so long."""
NO_EFFECT = ("heatmaps.bias", "query_key_value.bias")
"""Biases before a softmax: their gradient is 0 but for rounding, which AdamW turns into steps; no output changes."""


@contextmanager
def two_ranks(arguments: Sequence[str]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Two processes, as torchrun would start them; what is left of them is killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    _, errors = process.communicate(timeout=ENDS_S)
    return process.returncode, errors.decode(errors="replace")


def train_on_two(run: Run, file: Path, sessions: list[Session]) -> None:
    write_sessions(file, sessions)
    with two_ranks([str(Path(__file__).with_name("rank_worker.py")), str(run.folder), str(file)]) as ranks:
        for process in ranks:
            code, errors = ended(process)
            assert code == 0, errors


@pytest.fixture(scope="module")
def trained(finished_base: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> folder of a checkpoint after 20 steps: on one rank, on two, and with a change after 10."""
    folder = tmp_path_factory.mktemp("ranks")
    at = {name: str(folder / name) for name in ("one", "one10", "two", "two10", "parts", "parts10")}
    at |= {name: str(folder / name) for name in ("two-one", "one-two", "parts-one", "two-parts")}
    for place in at.values():
        Path(place).mkdir()
    run_sessions(finished_base, [Session(steps=20, save=at["one"]), Session(steps=10, save=at["one10"])])
    sessions = [
        Session(steps=20, save=at["two"], publish=True),
        Session(steps=20, save=at["parts"], parallel="shard", publish=True),
        Session(steps=10, save=at["two10"]),
        Session(steps=10, save=at["parts10"], parallel="shard"),
        Session(steps=20, save=at["one-two"], resume=at["one10"]),
        Session(steps=20, save=at["two-parts"], resume=at["two10"], parallel="shard"),
    ]
    train_on_two(finished_base, folder / "sessions.json", sessions)
    later = [
        Session(steps=20, save=at["two-one"], resume=at["two10"]),
        Session(steps=20, save=at["parts-one"], resume=at["parts10"]),
    ]
    run_sessions(finished_base, later)
    return at


def assert_close(found: Checkpoint, expected: Checkpoint) -> None:
    """Equal but for the order in which floats are added: 1e-5 of each kind of tensor, in norm."""
    assert found.tensors.keys() == expected.tensors.keys()
    for kind in ("module/", "average/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/", "optimizer/step/"):
        names = [name for name in expected.tensors if name.startswith(kind) and not name.endswith(NO_EFFECT)]
        assert names
        ours, theirs = (
            np.concatenate([point.tensors[name].double().numpy().ravel() for name in names])
            for point in (found, expected)
        )
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), kind
    assert found.tensors["generator"].tolist() == expected.tensors["generator"].tolist()
    assert found.state["pending"] == expected.state["pending"]


@pytest.mark.parametrize("name", ["two", "parts", "two-one", "one-two", "parts-one", "two-parts"])
def test_any_number_of_ranks_learns_what_one_learns(trained: dict[str, str], name: str) -> None:
    assert_close(saved(trained[name]), saved(trained["one"]))


@pytest.mark.parametrize("name", ["two", "parts"])
def test_the_sampler_is_told_the_losses_in_the_order_of_the_draw(trained: dict[str, str], name: str) -> None:
    ours, expected = (json.loads(Session(steps=20, save=trained[place]).seen.read_text()) for place in (name, "one"))
    assert len(ours) == len(expected) == 20
    for step, wanted in zip(ours, expected, strict=True):
        assert (step["start"], step["task"]) == (wanted["start"], wanted["task"])
        np.testing.assert_allclose(step["losses"], wanted["losses"], rtol=1e-4, atol=1e-6)


def test_what_two_ranks_publish_is_what_their_checkpoint_averages(trained: dict[str, str], finished_base: Run) -> None:
    versions = sorted(published_versions(finished_base.store))[-2:]
    for version, name in zip(versions, ("two", "parts"), strict=True):
        manifest, weights = fetch_policy(finished_base.store, version)
        assert manifest.learner_step == 20
        tensors = saved(trained[name]).tensors
        for tensor, value in weights.items():
            np.testing.assert_array_equal(value, tensors[f"average/{tensor}"].numpy(), err_msg=tensor)


@pytest.fixture
def endless(recorded_run: Path, tmp_path: Path) -> Run:
    """A run whose learner saves often and never has enough."""
    folder = tmp_path / "run"
    shutil.copytree(recorded_run, folder)
    record = folder / "store" / layout.RUN
    manifest = msgspec.json.decode(record.read_bytes())
    manifest["config"]["learner"] |= {"checkpoint_every": 3, "decode_workers": 0, "batch_size": 8, "device": "cpu"}
    manifest["config"]["learner"]["max_draws_per_start"] = 0.0
    manifest["config"]["fleet"]["episodes"] = None
    record.unlink()
    record.write_bytes(msgspec.json.encode(manifest))
    return open_run(str(folder))


def newest_step(run: Run) -> int:
    keys = [key for key in run.store.keys(f"{layout.CHECKPOINTS}/") if key.endswith("state.json")]
    return max(map(layout.version_of, keys), default=0)


def wait_for_step(run: Run, step: int, ranks: list["subprocess.Popen[bytes]"]) -> None:
    for _ in range(int(ENDS_S / 0.05)):
        if newest_step(run) >= step:
            return
        for process in ranks:
            assert process.poll() is None, ended(process)[1]
        threading.Event().wait(0.05)
    raise AssertionError(f"no checkpoint of step {step}")


def test_ranks_end_together_and_go_on_from_the_checkpoint(endless: Run) -> None:
    """Each one is killed once; then SIGTERM, which rank 1 alone gets: rank 0 saves and all end well."""
    command = ["-m", "sop", "learner", str(endless.folder)]
    reached = 0
    for victim in (1, 0):
        with two_ranks(command) as ranks:
            wait_for_step(endless, reached + 3, ranks)
            ranks[victim].kill()
            code, errors = ended(ranks[1 - victim])
            assert (code, f"rank {1 - victim} could not" in errors) == (1, True), errors
        reached = newest_step(endless)
    with two_ranks(command) as ranks:
        wait_for_step(endless, reached + 3, ranks)
        ranks[1].send_signal(signal.SIGTERM)
        assert [ended(process)[0] for process in ranks] == [0, 0]
    assert newest_step(endless) > reached
    assert max(published_versions(endless.store)) > 0
