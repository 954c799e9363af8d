"""Policies for the canary experiment: one that works, trained here, and ways to break it.

The expert of the toy robot moves at half of its full speed, so that a policy that moves twice as fast is possible.
Faults sit in a policy's code, around good weights: what they do is known, and every robot that loads the version has
them. The offline gate and the robots make the policy with the same function.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sop.actor.limits import ElementLimits, RobotLimits
from sop.core.embodiment import Observation
from sop.core.experience import Batch, Source, Windows
from sop.core.policy import ActionChunk, Conditioning, Policy, PolicySpec, Weights
from sop.policies import TrainablePolicy, compute_normalization, make_policy, make_spec
from sop.presets import make_config
from sop.robots import DEPLOYMENT
from sop.robots.toy import STEP, ToyRobot

TASKS = ("touch-red", "touch-green")
SPEED = 0.5
"""Largest command of the expert, share of the robot's."""
LIMIT = 0.9
"""Largest command that the robot's own limits let through: not quite twice the expert's."""
TIME_FACTOR = 1.6
"""Episodes may last so many evaluation horizons, as in the preset's fleet."""
NAN_STEP = 200
_NOISE = 0.35
"""Standard deviation of what is added to the executed action while data is recorded, so that the policy sees more."""


def toy_limits(robot: ToyRobot) -> RobotLimits:
    """Limits of a toy robot, as from its file: velocity above LIMIT is clamped, three clamps in a second stop it."""
    velocity = LIMIT * STEP * robot.embodiment.control_hz
    element = ElementLimits(kind="displacement", scale=STEP, velocity=velocity)
    return RobotLimits(robot=robot.embodiment.name, elements=dict.fromkeys(robot.embodiment.action_names, element))


@dataclass(frozen=True, slots=True)
class _Frames:
    """Everything recorded, one row per step: windows start anywhere and end with their episode."""

    images: Mapping[str, npt.NDArray[np.uint8]]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    episode: npt.NDArray[np.int64]
    instruction: tuple[str, ...]


class Trainer:
    """Trains the preset's policy on the expert's actions; may be asked for more steps later.

    Args:
        seed: of data, weights and batches.
        episodes: that the expert drives, per task.
    """

    def __init__(self, seed: int, episodes: int) -> None:
        config = make_config("debug")
        self._frames = _record(seed, episodes)
        normalization = compute_normalization([self._frames.state], [self._frames.action])
        body = ToyRobot(config.robot.image_size).embodiment
        settings = {**config.policy.settings, "random_shift": 0, "channels": (16, 24, 32), "width": 64}
        self.spec = make_spec(config.policy.kind, settings, body, config.policy.execution_horizon, normalization)
        self._policy = make_policy(self.spec, seed)
        self._optimizer = torch.optim.AdamW(self._policy.module.parameters(), lr=1e-3, weight_decay=1e-4)
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        """Taken so far."""

    def train(self, steps: int, lr: float) -> Weights:
        """Take gradient steps, half a cosine from `lr` down to 0, and return the weights (blocking)."""
        for step in range(steps):
            for group in self._optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
            loss = self._policy.loss(self._batch(64), self._generator).mean()
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._policy.module.parameters(), 1.0)
            self._optimizer.step()
        self.steps += steps
        return self._policy.export()

    def _batch(self, size: int) -> Batch:
        frames, horizon = self._frames, self.spec.action_horizon
        starts = self._rng.integers(0, len(frames.state), size)
        rows = starts[:, None] + np.arange(horizon)
        inside = np.minimum(rows, len(frames.state) - 1)
        weight = (rows == inside) & (frames.episode[inside] == frames.episode[starts][:, None])
        zeros = np.zeros(size, np.int64)
        return Batch(
            windows=Windows(zeros, starts.astype(np.int32), zeros.astype(np.int32), np.full(size, Source.OFFLINE)),
            images={camera: images[starts] for camera, images in frames.images.items()},
            state=frames.state[starts],
            action=frames.action[inside],
            loss_weight=weight.astype(np.float32),
            instruction=tuple(frames.instruction[start] for start in starts),
            policy_version=np.full(size, -1),
        )


class Faulty:
    """A policy with a fault around a good one. Implements `Policy`.

    Args:
        policy: does the planning.
        fault: `unreliable` does nothing at all in some episodes; `fast` doubles every displacement; `frozen` never
            moves; `nan` plans numbers that are not finite from its 200th step on; empty for none.
        lost: share of the episodes that `unreliable` spoils.
    """

    def __init__(self, policy: TrainablePolicy, fault: str, lost: float = 0.0) -> None:
        self._policy = policy
        self._fault = fault
        self._lost = lost
        self._spoiled = False
        self._steps = 0
        self.version = policy.version

    @property
    def spec(self) -> PolicySpec:
        """See `Policy`."""
        return self._policy.spec

    def reset(self, seed: int, coherence: float = 0.0) -> None:
        """See `Policy`."""
        self._policy.reset(seed, coherence)
        self._spoiled = self._fault == "unreliable" and np.random.default_rng((seed, 7)).random() < self._lost

    def load(self, weights: Weights, version: int) -> None:
        """See `Policy`."""
        self._policy.load(weights, version)
        self.version, self._steps = version, 0

    def infer(self, observation: Observation, instruction: str, conditioning: Conditioning) -> ActionChunk:
        """See `Policy`."""
        chunk = self._policy.infer(observation, instruction, conditioning)
        if self._fault == "fast":
            chunk = 2 * chunk
        elif self._fault == "frozen" or self._spoiled:
            chunk = np.zeros_like(chunk)
        elif self._fault == "nan":
            chunk = chunk.copy()
            chunk[max(0, NAN_STEP - self._steps) :] = np.nan
        self._steps += self.spec.execution_horizon
        return chunk


def build(spec: PolicySpec, weights: Weights, version: int, fault: str, lost: float) -> Policy:
    """The policy of a published version as robots and gate run it."""
    policy = make_policy(spec)
    policy.load(weights, version)
    return Faulty(policy, fault, lost)


def _record(seed: int, episodes: int) -> _Frames:
    robot, rng = ToyRobot(make_config("debug").robot.image_size), np.random.default_rng(seed)
    images: dict[str, list[npt.NDArray[np.uint8]]] = {camera: [] for camera in robot.embodiment.cameras}
    states, actions, numbers, instructions = [], [], [], []
    for number in range(episodes * len(TASKS)):
        task, phrasing = TASKS[number % len(TASKS)], int(rng.integers(2))
        seen, _ = robot.reset(
            seed=int(rng.integers(2**30)), options={"task": task, "scene": DEPLOYMENT, "time_factor": TIME_FACTOR}
        )
        over = False
        while not over:
            wanted = np.clip(robot.expert_action() / SPEED, -1, 1) * SPEED
            for camera, frame in seen["images"].items():
                images[camera].append(frame)
            states.append(seen["state"])
            actions.append(wanted.astype(np.float32))
            numbers.append(number)
            instructions.append(robot.instructions[task][phrasing])
            tried = wanted + rng.normal(0, _NOISE, 2) * (rng.random() < 0.5)
            seen, _, success, truncated, _ = robot.step(tried.astype(np.float32))
            over = success or truncated
    robot.close()
    return _Frames(
        images={camera: np.stack(frames) for camera, frames in images.items()},
        state=np.stack(states),
        action=np.stack(actions),
        episode=np.asarray(numbers),
        instruction=tuple(instructions),
    )
