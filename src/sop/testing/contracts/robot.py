"""The contract of `sop.robots.base.SimulatedRobot`, one function per rule.

`ROBOT_RULES` take a robot that stays open (worlds are expensive to build); `ROBOT_LIFE_RULES` take a function that
opens a fresh one, and close what they open.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sop.robots.base import DEPLOYMENT, LAB, RobotObservation, Scene, SimulatedRobot
from sop.testing.contracts import require, require_equal, require_raises

Action = npt.NDArray[np.float32]


class _Trace(NamedTuple):
    """One step as the rules compare it: equal traces are equal byte for byte."""

    state: bytes
    images: tuple[bytes, ...]
    progress: float
    terminated: bool
    truncated: bool
    disturbed: bool


def an_observation_has_exactly_the_cameras_and_the_state_of_the_embodiment(robot: SimulatedRobot) -> None:
    """Also after a step and from `observe`; nothing more, in the types and shapes that were promised."""
    first, info = robot.reset(seed=1, options={"task": robot.tasks[0]})
    require_equal(info["success"], False, "info['success'] after reset")
    after, *_ = robot.step(idle(robot))
    for where, observation in (("reset", first), ("step", after), ("observe", robot.observe())):
        require_equal(set(observation), {"images", "state"}, f"keys of the observation of {where}")
        require_equal(list(observation["images"]), list(robot.embodiment.cameras), f"cameras of {where}")
        require(robot.observation_space.contains(observation), f"{where} returns what observation_space excludes")
        require_equal(observation["state"].shape, (robot.embodiment.num_states,), f"shape of the state of {where}")


def an_observation_never_changes_after_it_was_returned(robot: SimulatedRobot) -> None:
    """Who keeps observations does not have to copy them."""
    observation, _ = robot.reset(seed=1)
    kept = _bytes(observation)
    for _ in range(3):
        robot.step(np.asarray(robot.embodiment.action_high, np.float32))
    require_equal(_bytes(observation) == kept, True, "the first observation is unchanged")


def every_task_has_two_phrasings_and_a_horizon(robot: SimulatedRobot) -> None:
    """And no two tasks share a phrasing: the instruction alone tells what to do."""
    phrasings = [phrasing for task in robot.tasks for phrasing in robot.instructions[task]]
    require_equal(len(set(phrasings)), len(phrasings), "number of different phrasings")
    for task in robot.tasks:
        require_equal(len(robot.instructions[task]), 2, f"phrasings of {task}")
        require(robot.horizon(task) > 0, f"the horizon of {task} is not positive")


def an_equal_seed_makes_an_equal_episode(robot: SimulatedRobot) -> None:
    """Pictures and disturbance included, whatever happened in between; another seed makes another one."""
    task = robot.tasks[0]
    first = run(robot, task, seed=5)
    run(robot, task, seed=6, steps=3)
    require_equal(run(robot, task, seed=5) == first, True, "the episode of seed 5 repeats")
    require(run(robot, task, seed=6) != first, "seeds 5 and 6 make the same episode")


def an_episode_without_a_seed_follows_from_the_last_seed(robot: SimulatedRobot) -> None:
    """`reset()` goes on with the generator that the last seed started."""
    episodes = []
    for _ in range(2):
        robot.reset(seed=11)
        episodes.append([_bytes(robot.reset()[0]) for _ in range(2)])
    require_equal(episodes[0] == episodes[1], True, "unseeded episodes after the same seed")
    require(episodes[0][0] != episodes[0][1], "two unseeded episodes in a row are the same")


def switching_tasks_back_and_forth_changes_nothing(robot: SimulatedRobot) -> None:
    """A task's episode does not depend on the tasks before it."""
    one, other = robot.tasks[:2]
    first = run(robot, one, seed=3)
    run(robot, other, seed=3)
    require_equal(run(robot, one, seed=3) == first, True, f"the episode of {one} after {other} repeats")


def the_lab_is_the_central_half_of_the_deployment_box(robot: SimulatedRobot) -> None:
    """In every order of scenes: a box is never narrowed twice."""
    for task in robot.tasks[:2]:
        starts: dict[str, list[float]] = {"lab": [], "deployment": []}
        for seed in range(12):
            for scene in (LAB, DEPLOYMENT):
                robot.reset(seed=seed, options={"task": task, "scene": scene})
                starts[scene.name].append(float(np.abs(robot.start_in_box).max()))
        require(max(starts["lab"]) <= 0.5, f"{task}: a lab episode began outside the central half")
        require(max(starts["lab"]) > 0.4, f"{task}: lab episodes begin at the centre only")
        require(0.8 < max(starts["deployment"]) <= 1, f"{task}: deployment does not use the whole box")


def start_steps_displace_the_hand_before_the_episode(robot: SimulatedRobot) -> None:
    """By a random number of steps; the rest of the world is the same."""
    home = Scene(name="home", box=0.5)
    away = Scene(name="away", box=0.5, start_steps=8)
    moved = []
    for seed in range(8):
        at_home = robot.reset(seed=seed, options={"scene": home})[0]["state"]
        moved.append(float(np.abs(robot.reset(seed=seed, options={"scene": away})[0]["state"] - at_home).max()))
    require(len(set(moved)) >= 4, f"the start is hardly ever displaced: {moved}")


def a_push_replaces_the_commanded_displacement(robot: SimulatedRobot) -> None:
    """For exactly `push_steps` steps in a row that begin inside the push window, in the deployment only."""
    first, last = robot.push_window
    for seed in range(4):
        command = idle(robot)
        moved, disturbed = [], []
        state = robot.reset(seed=seed, options={"scene": DEPLOYMENT, "time_factor": 2.0})[0]["state"]
        for _ in range(last + DEPLOYMENT.push_steps + 1):
            observation, _, terminated, _, info = robot.step(command)
            if terminated:
                break
            moved.append(float(np.abs(observation["state"] - state).max()))
            disturbed.append(info["disturbed"])
            state = observation["state"]
        require_equal(command.tobytes(), idle(robot).tobytes(), "the caller's action after the push")
        steps = np.flatnonzero(disturbed)
        require(first <= steps[0] <= last, f"the push begins at step {steps[0]}, outside {robot.push_window}")
        require_equal(steps.tolist(), list(range(steps[0], steps[0] + len(steps))), "steps of the push")
        require(
            len(steps) == DEPLOYMENT.push_steps or len(disturbed) == steps[-1] + 1, f"pushed for {len(steps)} steps"
        )
        require(max(moved[step] for step in steps) > 2 * moved[steps[0] - 1], "the push does not move the hand")
    trace = run(robot, robot.tasks[0], seed=0, scene=LAB)
    require(not any(step.disturbed for step in trace), "a push in the lab")


def success_terminates_and_ends_the_episode(robot: SimulatedRobot) -> None:
    """The expert gets there in the lab; `terminated` comes with success, once, without `truncated`."""
    for task in robot.tasks[:2]:
        robot.reset(seed=0, options={"task": task, "scene": LAB})
        terminated = truncated = False
        while not (terminated or truncated):
            _, reward, terminated, truncated, info = robot.step(robot.expert_action())
            require_equal(info["success"], terminated, f"{task}: success and terminated")
            require_equal(reward, robot.progress(), f"{task}: reward and progress")
        require_equal((terminated, truncated), (True, False), f"{task}: how the expert's episode ends")
        require_raises(ValueError, "a step after the end", robot.step, idle(robot))


def time_runs_out_exactly_at_the_limit(robot: SimulatedRobot) -> None:
    """After `horizon * time_factor` steps, rounded up, and not one earlier."""
    task = robot.tasks[0]
    for factor in (1.0, 1.6):
        limit = int(np.ceil(round(robot.horizon(task) * factor, 6)))
        trace = run(robot, task, seed=2, scene=LAB, steps=2 * limit, time_factor=factor, still=True)
        expected = [False] * (limit - 1) + [True]
        require_equal([step.truncated for step in trace], expected, f"truncated with time_factor {factor}")
        require(not any(step.terminated for step in trace), "an idle robot succeeded")


def rendering_does_not_change_what_happens(robot: SimulatedRobot) -> None:
    """Without `render_images` steps repeat the last pictures; `observe` brings fresh ones and moves nothing."""
    task = robot.tasks[0]
    seen = run(robot, task, seed=4)
    robot.render_images = False
    try:
        blind = run(robot, task, seed=4)
        looked = robot.observe()
    finally:
        robot.render_images = True
    require_equal([step[2:] for step in blind], [step[2:] for step in seen], "progress and ends without rendering")
    require_equal([step.state for step in blind] == [step.state for step in seen], True, "states without rendering")
    require_equal({step.images for step in blind}, {blind[0].images}, "pictures without rendering")
    require_equal(_bytes(looked)[1] == seen[-1].images, True, "observe() shows the current state")


def the_expert_and_the_progress_only_look(robot: SimulatedRobot) -> None:
    """Asking them changes nothing; the expert's action is one that the robot accepts."""
    robot.reset(seed=8)
    before = _bytes(robot.observe())
    actions = [robot.expert_action() for _ in range(3)]
    progress = [robot.progress() for _ in range(3)]
    for action in actions:
        require(robot.action_space.contains(action), f"the expert's action is not admissible: {action}")
        require_equal(action.tobytes(), actions[0].tobytes(), "the expert's answer in one state")
    require_equal(progress, progress[:1] * 3, "the progress of one state")
    require_equal(_bytes(robot.observe()) == before, True, "the world after being looked at")


def an_action_beyond_the_bounds_is_clipped(robot: SimulatedRobot) -> None:
    """Twice the largest command does what the largest command does."""
    states = []
    for scale in (1.0, 2.0):
        robot.reset(seed=1, options={"scene": LAB})
        command = np.asarray(robot.embodiment.action_high, np.float32) * np.float32(scale)
        states.append([robot.step(command)[0]["state"].tobytes() for _ in range(3)])
    require_equal(states[0] == states[1], True, "states after the same clipped commands")


def a_bad_action_is_refused_and_moves_nothing(robot: SimulatedRobot) -> None:
    """A wrong length, a batch, or a number that is not finite."""
    robot.reset(seed=1)
    before = _bytes(robot.observe())
    size = robot.embodiment.num_actions
    broken = np.zeros(size, np.float32)
    broken[-1] = np.nan
    for bad in (np.zeros(size + 1, np.float32), np.zeros((1, size), np.float32), broken, broken + np.inf):
        require_raises(ValueError, f"step({bad})", robot.step, bad)
    require_equal(_bytes(robot.observe()) == before, True, "the world after refused actions")


def a_bad_reset_is_refused_with_what_would_be_right(robot: SimulatedRobot) -> None:
    """An unknown task is answered with the list of tasks."""

    def reset(options: dict[str, Any]) -> object:
        return robot.reset(seed=0, options=options)

    calls: tuple[Callable[[], object], ...] = (
        lambda: reset({"task": "make-tea"}),
        lambda: robot.horizon("make-tea"),
    )
    for call in calls:
        try:
            call()
        except ValueError as error:
            require(all(task in str(error) for task in ("make-tea", *robot.tasks)), f"no list of tasks in: {error}")
        else:
            raise AssertionError("the task 'make-tea' was accepted")
    bad: tuple[dict[str, Any], ...] = ({"scene": "lab"}, {"time_factor": 0.0}, {"tasks": robot.tasks[0]})
    for options in bad:
        require_raises(ValueError, f"reset with {options}", reset, options)


def a_fresh_robot_refuses_to_act_before_reset(open_robot: Callable[[], SimulatedRobot]) -> None:
    """There is no world to look at yet."""
    robot = open_robot()
    try:
        for call in (lambda: robot.step(idle(robot)), robot.expert_action, robot.progress, robot.observe):
            require_raises(ValueError, "acting before reset", call)
    finally:
        robot.close()


def a_closed_robot_stays_closed(open_robot: Callable[[], SimulatedRobot]) -> None:
    """Closing twice is fine; a reset is refused."""
    robot = open_robot()
    robot.reset(seed=0)
    robot.close()
    robot.close()
    require_raises(ValueError, "a step of a closed robot", robot.step, idle(robot))
    require_raises(ValueError, "the reset of a closed robot", robot.reset)


def idle(robot: SimulatedRobot) -> Action:
    """The action [A] that leaves the hand where it is."""
    return np.asarray(robot.idle_action, np.float32)


def run(
    robot: SimulatedRobot,
    task: str,
    *,
    seed: int,
    scene: Scene = DEPLOYMENT,
    steps: int = 30,
    time_factor: float = 1.0,
    still: bool = False,
) -> list[_Trace]:
    """Up to `steps` steps with actions that depend on the seed only (idle ones when `still`)."""
    generator = np.random.default_rng(seed)
    robot.reset(seed=seed, options={"task": task, "scene": scene, "time_factor": time_factor})
    trace = []
    for _ in range(steps):
        random = generator.uniform(-1, 1, robot.embodiment.num_actions).astype(np.float32)
        observation, _, terminated, truncated, info = robot.step(idle(robot) if still else random)
        state, images = _bytes(observation)
        trace.append(_Trace(state, images, robot.progress(), terminated, truncated, info["disturbed"]))
        if terminated or truncated:
            break
    return trace


def _bytes(observation: RobotObservation) -> tuple[bytes, tuple[bytes, ...]]:
    return observation["state"].tobytes(), tuple(image.tobytes() for image in observation["images"].values())


ROBOT_RULES: tuple[Callable[[SimulatedRobot], None], ...] = (
    an_observation_has_exactly_the_cameras_and_the_state_of_the_embodiment,
    an_observation_never_changes_after_it_was_returned,
    every_task_has_two_phrasings_and_a_horizon,
    an_equal_seed_makes_an_equal_episode,
    an_episode_without_a_seed_follows_from_the_last_seed,
    switching_tasks_back_and_forth_changes_nothing,
    the_lab_is_the_central_half_of_the_deployment_box,
    start_steps_displace_the_hand_before_the_episode,
    a_push_replaces_the_commanded_displacement,
    success_terminates_and_ends_the_episode,
    time_runs_out_exactly_at_the_limit,
    rendering_does_not_change_what_happens,
    the_expert_and_the_progress_only_look,
    an_action_beyond_the_bounds_is_clipped,
    a_bad_action_is_refused_and_moves_nothing,
    a_bad_reset_is_refused_with_what_would_be_right,
)
"""Every rule a simulated robot keeps."""

ROBOT_LIFE_RULES: tuple[Callable[[Callable[[], SimulatedRobot]], None], ...] = (
    a_fresh_robot_refuses_to_act_before_reset,
    a_closed_robot_stays_closed,
)
"""Rules about the beginning and the end of a robot."""
