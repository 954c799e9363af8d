"""What `create_run` writes down of its robots."""

from pathlib import Path

import gymnasium
import pytest

from sop.buffer.screening import SIMULATED, Screening, limits_for
from sop.presets import make_config
from sop.robots import ROBOTS
from sop.robots.toy import ToyRobot
from sop.runs import create_run


class BenchArm(gymnasium.Env):
    """A real arm, as far as a run is concerned: an environment that is no `SimulatedRobot`."""

    def __init__(self) -> None:
        toy = ToyRobot(image_size=24)
        self.embodiment, self.instructions, self.tasks = toy.embodiment, toy.instructions, toy.tasks


def test_a_simulated_robot_is_known_as_one(tmp_path: Path) -> None:
    assert create_run(tmp_path / "run", make_config("debug")).manifest.simulated


def test_frozen_cameras_and_dropped_steps_matter_on_real_robots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROBOTS, "bench_arm", lambda config: BenchArm())
    run = create_run(tmp_path / "run", make_config("debug", ["robot.kind=bench_arm"]))
    assert not run.manifest.simulated
    assert limits_for(run.manifest.simulated) == Screening()
    assert limits_for(True) == SIMULATED != Screening()
