"""What several test files need: a run of the debug preset, made once per session and copied for each file."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recovery_times import Recovery
from sop.presets import make_config
from sop.runs import Run, create_run, open_run
from sop.system import ActorOptions, run_actor, run_pretraining
from sop.testing.servers.s3 import S3Server

SETTINGS = ["pretrain.steps=3", "pretrain.demonstrations_per_task=4", "learner.publish_every=4", "fleet.speed=0"]


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a debug run with demonstrations, a base policy, and six episodes of a fleet; read only."""
    run = create_run(tmp_path_factory.mktemp("recorded") / "base", make_config("debug", SETTINGS))
    run_actor(run, ActorOptions(actor_id="lab-0", demonstrate=True, speed=0, end_sequence=12), threading.Event())
    run_pretraining(run, threading.Event())
    run_actor(run, ActorOptions(actor_id="robot-0", speed=0, end_sequence=6), threading.Event())
    return run.folder


@pytest.fixture(scope="module")
def finished_base(recorded_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the recorded run that a file of tests may change."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    shutil.copytree(recorded_run, folder)
    return open_run(str(folder))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A plain S3 server whose administrator is `s3_server.environment`; take a prefix of your own in bucket `tests`."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def recovery(record_property: Callable[[str, object], None]) -> Recovery:
    """Measures how long the system takes to be whole again, for the table of faults."""
    return Recovery(record_property)
