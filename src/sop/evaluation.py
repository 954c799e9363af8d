"""How good is a policy? Separate from the fleet's data: deployment scenes, nobody helps, seeds no robot trains on.

The same seeds for every version and every run, so that two policies meet the same scenes, pushes included.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sop.actor.chunk import ChunkPlayback
from sop.actor.safety import SafetyGate
from sop.core.embodiment import Observation
from sop.core.evaluation import EvaluationResult, TaskResult
from sop.core.policy import Conditioning, Policy
from sop.robots import DEPLOYMENT, SimulatedRobot


class Driver(Protocol):
    """Who acts in an evaluation."""

    def begin(self, task: str, seed: int) -> None:
        """The robot has been reset."""
        ...

    def act(self) -> npt.NDArray[np.float32]:
        """The action [A] of the next step."""
        ...


class PolicyDriver:
    """The policy acts, behind the same safety gate as in the fleet; renders only when it plans.

    Args:
        robot: looked at when a chunk is played out.
        policy: in control.
        conditioning: from its manifest.
    """

    def __init__(self, robot: SimulatedRobot, policy: Policy, conditioning: Conditioning) -> None:
        self._robot = robot
        self._policy = policy
        self._playback = ChunkPlayback(policy, conditioning)
        self._gate = SafetyGate(robot.embodiment)
        self._instruction = ""

    def begin(self, task: str, seed: int) -> None:
        """See `Driver`."""
        self._instruction = self._robot.instructions[task][0]
        self._policy.reset(seed)
        self._playback.drop()
        self._gate.reset()

    def act(self) -> npt.NDArray[np.float32]:
        """See `Driver`."""
        if self._playback.plans_next:
            seen = self._robot.observe()
            self._seen = Observation(seen["images"], seen["state"])
        return self._gate.check(self._playback.next(self._seen, self._instruction)).action


class ExpertDriver:
    """The scripted expert acts: the ceiling of what the task allows."""

    def __init__(self, robot: SimulatedRobot) -> None:
        self._robot = robot

    def begin(self, task: str, seed: int) -> None:
        """See `Driver`."""

    def act(self) -> npt.NDArray[np.float32]:
        """See `Driver`."""
        return self._robot.expert_action()


def evaluate_task(robot: SimulatedRobot, driver: Driver, task: str, seeds: Sequence[int], reset_s: float) -> TaskResult:
    """One episode per seed within the task's evaluation horizon (blocking).

    Args:
        robot: reset to the deployment scene; its `render_images` is switched off.
        driver: acts.
        task: what to do.
        seeds: decide scene and push of each episode, and the policy's noise.
        reset_s: robot time charged for putting the scene back, seconds.
    """
    robot.render_images = False
    successes, robot_s = 0, 0.0
    for seed in seeds:
        robot.reset(seed=seed, options={"task": task, "scene": DEPLOYMENT, "time_factor": 1.0})
        driver.begin(task, seed)
        steps, over, success = 0, False, False
        while not over:
            _, _, success, truncated, _ = robot.step(driver.act())
            over = success or truncated
            steps += 1
        successes += success
        robot_s += steps / robot.embodiment.control_hz + reset_s
    return TaskResult(episodes=len(seeds), successes=successes, robot_s=robot_s)


def merge(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """Results of the same evaluation, each with a share of the episodes, as one."""
    first = parts[0]
    tasks: dict[str, TaskResult] = {}
    for task in first.tasks:
        results = [part.tasks[task] for part in parts]
        tasks[task] = TaskResult(
            episodes=sum(result.episodes for result in results),
            successes=sum(result.successes for result in results),
            robot_s=sum(result.robot_s for result in results),
        )
    return EvaluationResult(
        version=first.version,
        name=first.name,
        first_seed=first.first_seed,
        tasks=tasks,
        online_episodes=first.online_episodes,
        utc_ns=time.time_ns(),
        published_utc_ns=first.published_utc_ns,
    )


def shard(first_seed: int, episodes: int, part: int, parts: int) -> list[int]:
    """Seeds of part `part` of `parts`: together all of first_seed, ..., first_seed + episodes - 1, each once."""
    return list(range(first_seed + part, first_seed + episodes, parts))
