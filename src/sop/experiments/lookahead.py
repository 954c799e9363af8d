"""Signed advantage: what the frozen value function thinks of what the policy does when it is asked for good and for
bad actions, from the same moment and with the same noise.

    reset(task, seed) -> null branch for k chunks -> o_k -> N steps with I = positive -> A(+)
    reset(task, seed) -> null branch for k chunks -> o_k -> N steps with I = negative -> A(-)     difference A(+) - A(-)

Equal seeds and equal actions give an identical episode, so both begin at the same o_k, whose value cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sop.algorithms.critic import ValueModel
from sop.core.episode import Intervention, Outcome
from sop.core.policy import Conditioning
from sop.evaluation import PolicyDriver
from sop.policies import TrainablePolicy
from sop.robots import DEPLOYMENT, RobotObservation, SimulatedRobot

NULL = Conditioning()
POSITIVE = Conditioning(advantage_indicator=True)
NEGATIVE = Conditioning(advantage_indicator=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where a look-ahead begins."""

    task: str
    seed: int
    chunks: int
    """Of the null branch, before it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Glimpse:
    """A `StoredEpisode` of the policy, of which only some frames were looked at."""

    task: str
    instruction: str
    num_steps: int
    outcome: Outcome
    seen: Mapping[int, RobotObservation]
    """Step -> what was seen before its action."""
    actor_id: str = "look-ahead"
    sequence: int = 0
    policy_version: int | None = 0
    interventions: tuple[Intervention, ...] = ()
    controller: npt.NDArray[np.uint8] = field(init=False)
    state: npt.NDArray[np.float32] = field(init=False)
    action: npt.NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        size = len(next(iter(self.seen.values()))["state"])
        state = np.zeros((self.num_steps, size), np.float32)
        for step, observation in self.seen.items():
            state[step] = observation["state"]
        object.__setattr__(self, "controller", np.zeros(self.num_steps, np.uint8))
        object.__setattr__(self, "state", state)
        object.__setattr__(self, "action", np.zeros((self.num_steps, 0), np.float32))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras."""
        return tuple(next(iter(self.seen.values()))["images"])

    def frame(self, camera: str, step: int) -> npt.NDArray[np.uint8]:
        """The image [h, w, 3]; of steps that were not looked at there is none (KeyError)."""
        return self.seen[step]["images"][camera]


def moments(tasks: Sequence[str], seeds: Sequence[int], chunks: Sequence[int]) -> list[Moment]:
    """All combinations, in the order task, seed, chunks."""
    return [Moment(task=task, seed=seed, chunks=number) for task in tasks for seed in seeds for number in chunks]


def signed_advantage(
    robot: SimulatedRobot, policy: TrainablePolicy, values: ValueModel, lookahead: int, moment: Moment
) -> float | None:
    """A(+) - A(-) from a moment, normalised return; None when the episode is over before it (blocking)."""
    found = []
    for conditioning in (POSITIVE, NEGATIVE):
        advantage = advantage_of(robot, policy, values, lookahead, moment, conditioning=conditioning)
        if advantage is None:
            return None
        found.append(advantage)
    return found[0] - found[1]


def advantage_of(
    robot: SimulatedRobot,
    policy: TrainablePolicy,
    values: ValueModel,
    lookahead: int,
    moment: Moment,
    *,
    conditioning: Conditioning,
) -> float | None:
    """The N-step advantage of what the policy does from a moment on under a condition; None as above (blocking).

    N is `lookahead`; an episode that ends earlier has its terminal reward instead of a last value, see
    `sop.values.returns.advantages`.
    """
    robot.render_images = False
    task, chunk = moment.task, policy.spec.execution_horizon
    options = {"task": task, "scene": DEPLOYMENT, "time_factor": 1.0}
    first, _ = robot.reset(seed=moment.seed, options=options)
    driver, start = PolicyDriver(robot, policy, NULL), moment.chunks * chunk
    driver.begin(task, moment.seed)
    for _ in range(start):
        _, _, success, truncated, _ = robot.step(driver.act())
        if success or truncated:
            return None
    seen = {start: robot.observe() if start else first}
    driver = PolicyDriver(robot, policy, conditioning)
    driver.begin(task, moment.seed + 1)
    steps, success, truncated = 0, False, False
    while steps < lookahead and not (success or truncated):
        _, _, success, truncated, _ = robot.step(driver.act())
        steps += 1
    over = success or truncated
    if not over:
        seen[start + steps] = robot.observe()
    episode = Glimpse(
        task=task,
        instruction=robot.instructions[task][0],
        num_steps=start + steps + (not over),
        outcome=Outcome.SUCCESS if success else Outcome.FAILURE,
        seen=seen,
    )
    return float(values.advantages(episode, _values_where_seen(episode, values), lookahead)[start])


def _values_where_seen(episode: Glimpse, values: ValueModel) -> npt.NDArray[np.float32]:
    """[T] value at the steps that were looked at, 0 elsewhere."""
    steps = sorted(episode.seen)
    looked = Glimpse(
        task=episode.task,
        instruction=episode.instruction,
        num_steps=len(steps),
        outcome=episode.outcome,
        seen={place: episode.seen[step] for place, step in enumerate(steps)},
    )
    result = np.zeros(episode.num_steps, np.float32)
    result[steps] = values.predict(looked)
    return result
