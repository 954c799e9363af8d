"""What every simulated robot offers, and the scenes in which it acts.

A robot is a `gymnasium.Env`. The part that all simulated robots share is here: tasks, scenes, seeds,
disturbances, time limits, the observation and the refusal of bad actions. A new robot fills in six hooks
(`_begin`, `_apply`, `_render`, `_state`, `expert_action`, `progress`) and passes `sop.testing.contracts.robot`.

The shift between the two scenes is what gives online post-training something to repair: demonstrations are
recorded in the LAB (central half of the initial-state box, undisturbed), the fleet works and is judged in
DEPLOYMENT (the whole box, a displaced hand, one push).
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, cast

import gymnasium
import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment


class RobotObservation(TypedDict):
    """What `reset`, `step` and `observe` return."""

    images: dict[str, npt.NDArray[np.uint8]]
    """Camera -> RGB [h, w, 3]; the arrays are never written to again."""
    state: npt.NDArray[np.float32]
    """Proprioception [S]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """How hard the world makes it."""

    name: str
    box: float = 1.0
    """Share of the initial-state box that is used, centred; in (0, 1]."""
    start_steps: int = 0
    """The hand begins 0 to this many full steps away from its home, in one random direction."""
    push_steps: int = 0
    """Length of the one push per episode, steps; 0 for none."""
    push_size: float = 0.5
    """Size of the push, share of a full displacement per step; the direction is random."""

    def __post_init__(self) -> None:
        if not 0 < self.box <= 1:
            raise ValueError(f"scene.box must be in (0, 1], got {self.box}")
        if self.start_steps < 0 or self.push_steps < 0:
            raise ValueError(f"scene steps must be 0 or more, got {self.start_steps} and {self.push_steps}")
        if not 0 < self.push_size <= 1:
            raise ValueError(f"scene.push_size must be in (0, 1], got {self.push_size}")


LAB = Scene(name="lab", box=0.5)
"""Where demonstrations are recorded."""
DEPLOYMENT = Scene(name="deployment", box=1.0, start_steps=8, push_steps=8)
"""Where the fleet works and is evaluated. The push has half the hand's speed: at full speed the expert needs
so long to come back that it misses the evaluation horizon in 40 % of the drawer-open episodes."""


@dataclass(frozen=True, slots=True)
class _Disturbance:
    """What happens to the robot in one episode; drawn before the first step, so it depends on the seed only."""

    start_steps: int
    start: npt.NDArray[np.float64]
    """[D] unit direction of the displacement before the episode."""
    push_start: int
    push_stop: int
    push: npt.NDArray[np.float64]
    """[D] displacement command that replaces the caller's while the push lasts."""


class SimulatedRobot(gymnasium.Env[RobotObservation, npt.NDArray[np.float32]], ABC):
    """A robot in simulation: `gymnasium.Env` plus tasks, scenes and a privileged expert.

    Used like this, by one thread (renderers belong to the thread that made them):

        observation, info = robot.reset(seed=7, options={"task": "drawer-open", "scene": DEPLOYMENT})
        while not (terminated or truncated):
            observation, reward, terminated, truncated, info = robot.step(action)    # action: float32 [A]

    `terminated` means success, `truncated` that `horizon(task) * time_factor` steps have passed without it.
    An equal seed and equal options give an identical episode, disturbance included, as long as the actions
    are identical. A push replaces the displacement part of what is executed; the caller's action stays what it
    commanded: for those steps a recorded action shows no effect, exactly as when somebody pushes a real robot.
    """

    embodiment: Embodiment
    instructions: Mapping[str, tuple[str, ...]]
    """Task -> phrasings of its instruction, at least two; the first is used in evaluation."""
    num_displacements: ClassVar[int]
    """D: the first D action elements move the hand, the others drive grippers."""
    idle_action: ClassVar[tuple[float, ...]]
    """[A] the action during which the hand stays and the gripper is as after a reset."""
    push_window: ClassVar[tuple[int, int]]
    """First and last step at which a push may begin."""

    def __init__(self) -> None:
        self.action_space, self.observation_space = _spaces(self.embodiment)
        self._low = np.asarray(self.embodiment.action_low, np.float32)
        self._high = np.asarray(self.embodiment.action_high, np.float32)
        self.render_images = True
        """Whether `step` renders. Rendering dominates the cost: who looks only now and then sets this to False
        and calls `observe` when it looks; `step` then repeats the last images."""
        self._images: dict[str, npt.NDArray[np.uint8]] = {}
        self._acting = False
        self._closed = False
        self._steps = 0
        self._time_limit = 0
        self._disturbance: _Disturbance | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Ids of all tasks that this robot knows."""
        return tuple(self.instructions)

    @abstractmethod
    def horizon(self, task: str) -> int:
        """Time limit of an evaluation episode, steps.

        Raises:
            ValueError: the robot does not know the task.
        """

    @abstractmethod
    def expert_action(self) -> npt.NDArray[np.float32]:
        """What an expert with privileged knowledge does now: [A], within the bounds. For stand-ins only."""

    @abstractmethod
    def progress(self) -> float:
        """Dense reward of the current state, between 0 and 10. Privileged: for stand-ins only."""

    @property
    @abstractmethod
    def start_in_box(self) -> npt.NDArray[np.float64]:
        """Where in the initial-state box this episode began: -1 to 1 per random quantity, 0 the centre."""

    @abstractmethod
    def _begin(self, task: str, seed: int, box: float, max_steps: int) -> None:
        """Put the world into the initial state of an episode that needs at most `max_steps` calls of `_apply`."""

    @abstractmethod
    def _apply(self, action: npt.NDArray[np.float32]) -> bool:
        """Execute one admissible action; True when the task is done."""

    @abstractmethod
    def _render(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Take a fresh picture with every camera."""

    @abstractmethod
    def _state(self) -> npt.NDArray[np.float32]:
        """Proprioception now, a fresh array."""

    def time_limit(self, task: str, time_factor: float = 1.0) -> int:
        """Steps after which an episode is truncated: `horizon(task) * time_factor`, rounded up."""
        if not time_factor > 0 or not math.isfinite(time_factor):
            raise ValueError(f"time_factor must be positive, got {time_factor}")
        return math.ceil(round(self.horizon(task) * time_factor, 6))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[RobotObservation, dict[str, Any]]:
        """Begin an episode; always renders, whatever `render_images` says.

        Args:
            seed: decides everything that is random; None draws one from the previous seed's generator.
            options: `task` (default the first one), `scene` (a `Scene`, default DEPLOYMENT) and
                `time_factor` (default 1: the evaluation horizon).

        Raises:
            ValueError: unknown task or option, or the robot is closed.
        """
        if self._closed:
            raise ValueError(f"the robot {self.embodiment.name!r} is closed: make a new one")
        super().reset(seed=seed)
        task, scene, time_factor = self._read_options(options or {})
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._time_limit = self.time_limit(task, time_factor)
        self._disturbance = self._draw_disturbance(task, seed, scene)
        self._begin(task, seed, scene.box, self._disturbance.start_steps + self._time_limit)
        away = self._with_displacement(np.asarray(self.idle_action, np.float32), self._disturbance.start)
        for _ in range(self._disturbance.start_steps):
            self._apply(away)
        self._steps = 0
        self._acting = True
        return self.observe(), {"success": False, "disturbed": False}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[RobotObservation, float, bool, bool, dict[str, Any]]:
        """Act for one control step. Values beyond the embodiment's bounds are clipped to them.

        Returns:
            Observation, reward (`progress`), terminated (success), truncated (out of time), and info with
            `success` and `disturbed` (a push replaced the commanded displacement in this step).

        Raises:
            ValueError: no episode is running, or the action has a wrong shape or is not finite.
        """
        action = self._admissible(action)
        disturbance = self._disturbance
        disturbed = disturbance is not None and disturbance.push_start <= self._steps < disturbance.push_stop
        if disturbance is not None and disturbed:
            action = self._with_displacement(action, disturbance.push)
        success = self._apply(action)
        self._steps += 1
        truncated = not success and self._steps >= self._time_limit
        self._acting = not (success or truncated)
        if self.render_images:
            self._images = self._render()
        info = {"success": success, "disturbed": disturbed}
        return self._observation(), self.progress(), success, truncated, info

    def observe(self) -> RobotObservation:
        """Render and return the current observation, whatever `render_images` says. Moves nothing.

        Raises:
            ValueError: there was no `reset` yet, or the robot is closed.
        """
        self._require_world()
        self._images = self._render()
        return self._observation()

    def close(self) -> None:
        """Free the simulator and its renderers. Idempotent; a closed robot cannot be reset."""
        self._closed = True
        self._acting = False

    def _observation(self) -> RobotObservation:
        return {"images": dict(self._images), "state": self._state()}

    def _require_world(self) -> None:
        if self._closed or not self._time_limit:
            raise ValueError(f"the robot {self.embodiment.name!r} has no world yet or is closed: call reset() first")

    def _require_task(self, task: object) -> str:
        if task not in self.instructions:
            known = ", ".join(self.tasks)
            raise ValueError(f"the robot {self.embodiment.name!r} knows no task {task!r}; its tasks are: {known}")
        return str(task)

    def _read_options(self, options: Mapping[str, Any]) -> tuple[str, Scene, float]:
        unknown = sorted(set(options) - {"task", "scene", "time_factor"})
        if unknown:
            raise ValueError(f"unknown reset options {unknown}; known are task, scene and time_factor")
        scene = options.get("scene", DEPLOYMENT)
        if not isinstance(scene, Scene):
            raise ValueError(f"the reset option scene must be a Scene, got {scene!r}")  # noqa: TRY004
        return self._require_task(options.get("task", self.tasks[0])), scene, float(options.get("time_factor", 1.0))

    def _admissible(self, action: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not self._acting:
            raise ValueError(f"the robot {self.embodiment.name!r} has no running episode: call reset() before step()")
        action = np.asarray(action, np.float32)
        names = self.embodiment.action_names
        if action.shape != (len(names),):
            raise ValueError(f"an action needs shape ({len(names)},) for {names}, got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"an action must be finite, got {action} for {names}")
        return np.minimum(np.maximum(action, self._low), self._high)

    def _draw_disturbance(self, task: str, seed: int, scene: Scene) -> _Disturbance:
        generator = np.random.default_rng((seed, zlib.crc32(task.encode())))
        start = _direction(generator, self.num_displacements)
        push = _direction(generator, self.num_displacements) * scene.push_size
        push_start = int(generator.integers(self.push_window[0], self.push_window[1], endpoint=True))
        return _Disturbance(
            start_steps=int(generator.integers(0, scene.start_steps, endpoint=True)),
            start=start,
            push_start=push_start,
            push_stop=push_start + scene.push_steps,
            push=push,
        )

    def _with_displacement(
        self, action: npt.NDArray[np.float32], displacement: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float32]:
        executed = action.copy()
        executed[: self.num_displacements] = displacement
        return executed


def _spaces(spec: Embodiment) -> tuple[gymnasium.Space[npt.NDArray[np.float32]], gymnasium.Space[RobotObservation]]:
    box = gymnasium.spaces.Box
    images: dict[str, gymnasium.Space[Any]] = {
        camera: box(0, 255, (*size, 3), np.uint8) for camera, size in spec.cameras.items()
    }
    state = box(-np.inf, np.inf, (spec.num_states,), np.float32)
    observation = gymnasium.spaces.Dict({"images": gymnasium.spaces.Dict(images), "state": state})
    action = box(np.asarray(spec.action_low, np.float32), np.asarray(spec.action_high, np.float32), dtype=np.float32)
    return action, cast("gymnasium.Space[RobotObservation]", observation)


def _direction(generator: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """A unit vector, uniform on the sphere."""
    vector = generator.normal(size=size)
    return np.asarray(vector / np.linalg.norm(vector))
