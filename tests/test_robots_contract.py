"""Every simulated robot keeps the contract; the toy robot and the registry, which need no simulator."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

import sop.testing.contracts.robot as contract
from sop.config import RobotConfig
from sop.core.errors import RunError
from sop.robots import DEPLOYMENT, LAB, ROBOTS, Scene, SimulatedRobot, make_robot
from sop.robots.metaworld import MetaWorldRobot
from sop.robots.toy import ToyRobot

OPEN: dict[str, Callable[[], SimulatedRobot]] = {"toy": ToyRobot, "metaworld": lambda: MetaWorldRobot(image_size=32)}


@pytest.fixture(scope="module", params=sorted(OPEN))
def robot(request: pytest.FixtureRequest) -> Iterator[SimulatedRobot]:
    opened = OPEN[request.param]()
    yield opened
    opened.close()


@pytest.mark.parametrize("rule", contract.ROBOT_RULES, ids=lambda rule: rule.__name__)
def test_every_robot_keeps_the_contract(robot: SimulatedRobot, rule: Callable[[SimulatedRobot], None]) -> None:
    rule(robot)


@pytest.mark.parametrize("kind", sorted(OPEN))
@pytest.mark.parametrize("rule", contract.ROBOT_LIFE_RULES, ids=lambda rule: rule.__name__)
def test_every_robot_begins_and_ends_well(kind: str, rule: Callable[[Callable[[], SimulatedRobot]], None]) -> None:
    rule(OPEN[kind])


class _UnseededRobot(ToyRobot):
    def _begin(self, task: str, seed: int, box: float, max_steps: int) -> None:
        super()._begin(task, int(np.random.default_rng().integers(2**31)), box, max_steps)


class _NarrowingRobot(ToyRobot):
    box = 1.0

    def _begin(self, task: str, seed: int, box: float, max_steps: int) -> None:
        self.box *= box
        super()._begin(task, seed, self.box, max_steps)


class _SharingRobot(ToyRobot):
    def _render(self) -> dict[str, npt.NDArray[np.uint8]]:
        fresh = super()._render()
        shared = self.__dict__.setdefault("shared", fresh)
        for camera, image in fresh.items():
            shared[camera][:] = image
        return dict(shared)


class _LateRobot(ToyRobot):
    def time_limit(self, task: str, time_factor: float = 1.0) -> int:
        return super().time_limit(task, time_factor) + 1


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (_UnseededRobot, contract.an_equal_seed_makes_an_equal_episode),
        (_UnseededRobot, contract.switching_tasks_back_and_forth_changes_nothing),
        (_NarrowingRobot, contract.the_lab_is_the_central_half_of_the_deployment_box),
        (_SharingRobot, contract.an_observation_never_changes_after_it_was_returned),
        (_LateRobot, contract.time_runs_out_exactly_at_the_limit),
    ],
)
def test_the_contract_catches_a_broken_robot(
    broken: Callable[[], SimulatedRobot], rule: Callable[[SimulatedRobot], None]
) -> None:
    with pytest.raises(AssertionError):
        rule(broken())


def test_every_registered_robot_is_under_the_contract() -> None:
    assert set(ROBOTS) == set(OPEN)


def test_make_robot_passes_the_image_size_on() -> None:
    robot = make_robot(
        RobotConfig(kind="toy", fleet_tasks=("touch-red",), held_out_tasks=("touch-blue",), image_size=16)
    )
    assert dict(robot.embodiment.cameras) == {"top": (16, 16), "wrist": (16, 16)}
    assert robot.reset(seed=0)[0]["images"]["top"].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("metawrld", "drawer-open", "'metawrld' is not a robot. Did you mean 'metaworld'"),
        ("zzz", "drawer-open", r"'zzz' is not a robot. Known are: metaworld, toy"),
        ("toy", "touch-rod", "'toy' knows no task 'touch-rod'. Did you mean 'touch-red'"),
    ],
)
def test_make_robot_suggests_what_was_meant(kind: str, task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_robot(RobotConfig(kind=kind, fleet_tasks=(task,)))


@pytest.mark.parametrize("wrong", [{"box": 0.0}, {"box": 1.1}, {"push_steps": -1}, {"push_size": 0.0}])
def test_a_scene_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="scene"):
        Scene(name="wrong", **wrong)  # type: ignore[arg-type]


def test_the_robots_can_be_imported_without_a_simulator_or_torch() -> None:
    program = (
        "import sys, sop.robots, sop.operators, sop.robots.toy, sop.robots.metaworld\n"
        "print([name for name in ('mujoco', 'metaworld', 'torch') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert output.stdout.strip() == "[]"


def test_a_missing_simulator_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sop.robots.metaworld as module

    module._import_simulators.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "metaworld.env_dict", None)
        with pytest.raises(RunError, match=r"pip install -e '\.\[metaworld\]'"):
            MetaWorldRobot()
    module._import_simulators.cache_clear()


def test_the_toy_expert_nearly_always_arrives_in_time() -> None:
    robot = ToyRobot()
    robot.render_images = False
    for scene, least in ((LAB, 1.0), (DEPLOYMENT, 0.95)):
        for task in robot.tasks:
            assert _expert_success(robot, task, scene, episodes=60) >= least


def test_the_same_toy_scene_asks_for_different_actions_per_task() -> None:
    robot = ToyRobot()
    actions = {}
    for task in robot.tasks:
        robot.reset(seed=0, options={"task": task, "scene": LAB})
        actions[task] = robot.expert_action()
    assert actions["touch-red"][0] < 0 < actions["touch-green"][0]
    assert actions["touch-red"][1] > 0 > actions["touch-blue"][1]


def test_the_toy_cameras_show_the_blocks_where_they_are() -> None:
    robot = ToyRobot(image_size=32)
    observation, _ = robot.reset(seed=0, options={"task": "touch-red", "scene": LAB})
    start = observation["state"]
    red = observation["images"]["top"].astype(int) @ (2, -1, -1)
    row, column = np.unravel_index(int(red.argmax()), red.shape)
    seen = np.array([(column + 0.5) / 32, 1 - (row + 0.5) / 32])
    direction = seen - start
    np.testing.assert_array_equal(np.sign(direction), np.sign(robot.expert_action()))
    while not (result := robot.step(robot.expert_action()))[2]:
        pass
    wrist = result[0]["images"]["wrist"].astype(int) @ (2, -1, -1)
    assert wrist[12:20, 12:20].max() > 150, "the red block is not under the wrist when it is touched"
    assert np.linalg.norm(result[0]["state"] - seen) < 0.06 + 1 / 32


def _expert_success(robot: SimulatedRobot, task: str, scene: Scene, episodes: int) -> float:
    successes = 0
    for seed in range(episodes):
        robot.reset(seed=seed, options={"task": task, "scene": scene})
        terminated = truncated = False
        while not (terminated or truncated):
            _, _, terminated, truncated, _ = robot.step(robot.expert_action())
        successes += terminated
    return successes / episodes
