"""A simulated Sawyer arm on the tabletop tasks of Meta-World (MuJoCo), with two cheap 64-pixel cameras.

This is the only module that imports `mujoco` and `metaworld`, and it does so when the first robot is made.

What makes it cheap (one frame costs 100 ms as delivered, about 1 ms here):
  - no multisampling and no shadow map, set before the renderer exists; no shadows, reflections, sky;
  - the eleven arm meshes go to a geom group that is not drawn; claws, pads and objects stay;
  - software rasterisation runs in the calling thread instead of a pool of its own.

What Meta-World does differently from gymnasium, and how it is handled:
  - `reset(seed=)` is ignored: `seed(s)` is called first;
  - initial states are drawn from `_random_reset_space`, which is narrowed from the original at every reset;
  - the goal is clipped to zero unless the cached observation space is dropped after `_partially_observable`;
  - it raises after `max_path_length` steps: that limit follows the robot's own time limit;
  - experts write into their observation and warn about their own constants: they get a copy, in silence.
"""

import atexit
import functools
import os
import warnings
import weakref
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment
from sop.core.errors import RunError
from sop.robots.base import SimulatedRobot
from sop.robots.metaworld_tasks import METAWORLD_TASKS, OWN_EXPERTS, ScriptedExpert

CAMERAS = ("corner4", "gripperPOV")
MAX_IMAGE_SIZE = 1024
_HIDDEN_GROUP = 5
"""A geom group that MuJoCo does not draw by default."""
_MESH = 7
"""mujoco.mjtGeom.mjGEOM_MESH."""


def metaworld_embodiment(image_size: int = 64) -> Embodiment:
    """The Sawyer arm as policies see it: square images, hand position and gripper, displacement commands."""
    return Embodiment(
        name="metaworld-sawyer",
        cameras=dict.fromkeys(CAMERAS, (image_size, image_size)),
        state_names=("hand_x", "hand_y", "hand_z", "gripper"),
        action_names=("dx", "dy", "dz", "gripper"),
        action_low=(-1.0, -1.0, -1.0, -1.0),
        action_high=(1.0, 1.0, 1.0, 1.0),
        hold_action=(0.0, 0.0, 0.0, None),
        # An action is a displacement of at most 1 cm per axis and step, so the bounds are the speed limit.
        # A slew limit on top of them would hinder the experts: they reverse an axis completely (change 2.0)
        # when a phase ends, and change by more than 1.0 in 1-3 % of the steps (door-close, handle-pull: 11-14 %).
        max_action_change=(None, None, None, None),
        control_hz=20.0,
    )


class _Simulators(NamedTuple):
    """The imported packages."""

    mujoco: ModuleType
    environments: Any
    experts: Any


class _Stage:
    """The world of one task: environment, renderer, expert. Made on first use, reused by later episodes."""

    def __init__(self, task: str, image_size: int) -> None:
        simulators = _import_simulators()
        self._size = image_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium and metaworld warn about each other's versions
            self.env = simulators.environments[f"{task}-v3"]()
        self.env._partially_observable = False
        self.env.__dict__.pop("sawyer_observation_space", None)
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.env._set_task_called = True
        self.box = self.env._random_reset_space
        own = OWN_EXPERTS.get(task)
        self.expert: ScriptedExpert = own() if own else simulators.experts[f"{task}-v3"]()
        self._renderer = _make_renderer(self.env.model, image_size, simulators.mujoco)
        self.observation = np.zeros(39)
        self.reward = 0.0

    def begin(self, seed: int, box: float, max_steps: int) -> None:
        centre, half = (self.box.low + self.box.high) / 2, (self.box.high - self.box.low) / 2
        self.env._random_reset_space = type(self.box)(centre - half * box, centre + half * box, dtype=np.float64)
        self.env.max_path_length = max_steps
        self.env.seed(seed)
        self.observation, _ = self.env.reset()
        self.reward, _ = self.env.evaluate_state(self.observation, np.array([0.0, 0.0, 0.0, -1.0]))

    def apply(self, action: npt.NDArray[np.float32]) -> bool:
        self.observation, self.reward, _, _, info = self.env.step(action)
        return bool(info["success"])

    def expert_action(self) -> npt.NDArray[np.float32]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action = self.expert.get_action(self.observation.copy())
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def render(self) -> dict[str, npt.NDArray[np.uint8]]:
        for site, position in self.env._target_site_config:
            self.env._set_pos_site(site, position)
        images = {}
        for camera in CAMERAS:
            self._renderer.update_scene(self.env.data, camera)
            images[camera] = self._renderer.render()
        # Meta-World mounts this camera upside down.
        images["corner4"] = np.ascontiguousarray(images["corner4"][::-1, ::-1])
        return images

    def close(self) -> None:
        self._renderer.close()
        self.env.close()


class MetaWorldRobot(SimulatedRobot):
    """One Sawyer arm that can do every task of `METAWORLD_TASKS`; switches between them at `reset`.

    The first episode of a task takes about 0.5 s longer and 80 MB: the world and its renderer are built, then
    kept until `close`. A step costs 0.2-0.3 ms, the pictures of both cameras 2.5 ms, a reset 10 ms, on one core.

    Args:
        image_size: height and width of both cameras, pixels.

    Raises:
        RunError: `metaworld` is not installed, or the machine cannot render without a display.
    """

    num_displacements: ClassVar[int] = 3
    idle_action: ClassVar[tuple[float, ...]] = (0.0, 0.0, 0.0, -1.0)
    push_window: ClassVar[tuple[int, int]] = (8, 70)

    def __init__(self, image_size: int = 64) -> None:
        if not 1 <= image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"robot.image_size must be in [1, {MAX_IMAGE_SIZE}] for metaworld, got {image_size}")
        self.embodiment = metaworld_embodiment(image_size)
        self.instructions = {name: task.instructions for name, task in METAWORLD_TASKS.items()}
        super().__init__()
        _import_simulators()
        self._image_size = image_size
        self._stages: dict[str, _Stage] = {}
        self._stage: _Stage | None = None
        _OPEN_ROBOTS.add(self)

    def horizon(self, task: str) -> int:
        """Evaluation horizon, steps."""
        return METAWORLD_TASKS[self._require_task(task)].horizon

    def expert_action(self) -> npt.NDArray[np.float32]:
        """Action [4] of the scripted expert in the current state, clipped."""
        return self._current.expert_action()

    def progress(self) -> float:
        """Meta-World's dense reward of the last step, 0 to 10."""
        return float(self._current.reward)

    @property
    def start_in_box(self) -> npt.NDArray[np.float64]:
        """Drawn initial quantities (positions of objects and goals) in [-1, 1], fixed ones 0."""
        stage = self._current
        centre, half = (stage.box.low + stage.box.high) / 2, (stage.box.high - stage.box.low) / 2
        offset = np.asarray(stage.env._last_rand_vec) - centre
        return np.asarray(np.divide(offset, half, out=np.zeros_like(offset), where=half > 0))

    def close(self) -> None:
        """Close all worlds and their renderers. Idempotent."""
        super().close()
        self._stage = None
        while self._stages:
            self._stages.popitem()[1].close()
        _OPEN_ROBOTS.discard(self)

    def _begin(self, task: str, seed: int, box: float, max_steps: int) -> None:
        if task not in self._stages:
            self._stages[task] = _Stage(task, self._image_size)
        self._stage = self._stages[task]
        self._stage.begin(seed, box, max_steps)

    def _apply(self, action: npt.NDArray[np.float32]) -> bool:
        return self._current.apply(action)

    def _render(self) -> dict[str, npt.NDArray[np.uint8]]:
        return self._current.render()

    def _state(self) -> npt.NDArray[np.float32]:
        return self._current.observation[:4].astype(np.float32)

    @property
    def _current(self) -> _Stage:
        self._require_world()
        assert self._stage is not None  # noqa: S101  (set by the reset that made the world)
        return self._stage


_OPEN_ROBOTS: "weakref.WeakSet[MetaWorldRobot]" = weakref.WeakSet()
"""Closed at exit: a renderer that is destroyed with the interpreter prints errors."""


def _close_open_robots() -> None:
    for robot in list(_OPEN_ROBOTS):
        robot.close()


@functools.cache
def _close_robots_at_exit() -> None:
    """To be called once a renderer exists: hooks run in reverse order, and mujoco's own one ends EGL."""
    atexit.register(_close_open_robots)


@functools.cache
def _import_simulators() -> _Simulators:
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software rasteriser: no threads of its own
    try:
        import mujoco
        from mujoco import gl_context  # noqa: F401  (the import that fails without a GL library)
    except ModuleNotFoundError as error:
        raise RunError(f"the robot 'metaworld' needs more packages ({error}): pip install -e '.[metaworld]'") from error
    except (ImportError, AttributeError, RuntimeError) as error:
        raise _cannot_render(error) from error
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ModuleNotFoundError as error:
        raise RunError(f"the robot 'metaworld' needs more packages ({error}): pip install -e '.[metaworld]'") from error
    return _Simulators(mujoco, ALL_V3_ENVIRONMENTS, ENV_POLICY_MAP)


def _make_renderer(model: Any, size: int, mujoco: ModuleType) -> Any:
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    model.vis.global_.offwidth = model.vis.global_.offheight = size
    for geom in range(model.ngeom):
        body = model.body(model.geom_bodyid[geom]).name
        if "claw" in body:
            model.geom_group[geom] = 1
        elif model.geom_type[geom] == _MESH and (body.startswith("right_") or body in ("head", "pedestal")):
            model.geom_group[geom] = _HIDDEN_GROUP
    try:
        renderer = mujoco.Renderer(model, size, size)
    except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
        raise _cannot_render(error) from error
    _close_robots_at_exit()
    for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX"):
        renderer.scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
    return renderer


def _cannot_render(error: Exception) -> RunError:
    backend = os.environ.get("MUJOCO_GL")
    return RunError(
        f"MuJoCo cannot render without a display (MUJOCO_GL={backend}: {error}). On Debian or Ubuntu run "
        "`apt install libegl1 libegl-mesa0 libgl1-mesa-dri`, or `apt install libosmesa6` and set MUJOCO_GL=osmesa"
    )
