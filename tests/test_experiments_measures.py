"""What is measured of a policy: separation by hand, chunks against noise, and look-aheads that can be repeated."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sop.core.embodiment import Observation
from sop.core.errors import RunError
from sop.core.experience import Batch, Windows
from sop.core.policy import Conditioning, PolicySpec
from sop.experiments.lookahead import NEGATIVE, POSITIVE, Moment, advantage_of, moments, signed_advantage
from sop.experiments.measures import added, chunk_effect, separation, success
from sop.policies import BranchVelocities
from sop.robots.toy import ToyRobot


def batch_of(size: int) -> Batch:
    zero = np.zeros(size, np.int64)
    return Batch(
        windows=Windows(zero, zero.astype(np.int32), zero.astype(np.int32), zero.astype(np.uint8)),
        images={"top": np.zeros((size, 4, 4, 3), np.uint8)},
        state=np.zeros((size, 2), np.float32),
        action=np.zeros((size, 2, 2), np.float32),
        loss_weight=np.ones((size, 2), np.float32),
        instruction=("go",) * size,
        policy_version=zero,
    )


class Branches:
    """Velocities 2 (null), 3 (positive), 1.5 (negative); chunks of the sign that is asked for, plus noise."""

    def __init__(self, robot: ToyRobot | None = None) -> None:
        body = (robot or ToyRobot()).embodiment
        self.spec = PolicySpec(kind="fake", config={}, embodiment=body, action_horizon=2, execution_horizon=2)
        self.version = 0
        self.seeds: list[int] = []
        self._noise = np.random.default_rng(0)

    def branch_velocities(self, batch: Batch, generator: torch.Generator) -> BranchVelocities:
        """By hand."""
        del generator
        shape = (len(batch), 2, 2)
        return BranchVelocities(*(np.full(shape, value, np.float32) for value in (2.0, 1.5, 3.0)))

    def reset(self, seed: int) -> None:
        """Keep the seed."""
        self.seeds.append(seed)
        self._noise = np.random.default_rng(seed)

    def infer(self, observation: Observation, instruction: str, conditioning: Conditioning) -> np.ndarray:
        """One chunk."""
        return np.asarray(self.infer_many([observation], [instruction], conditioning, [self._noise])[0])

    def infer_many(
        self, observations: Sequence[Any], instructions: Any, conditioning: Conditioning, generators: Sequence[Any]
    ) -> np.ndarray:
        """+0.5, -0.5 or 0, plus up to 0.1."""
        del instructions
        sign = {None: 0.0, True: 0.5, False: -0.5}[conditioning.advantage_indicator]
        noise = np.stack([generator.uniform(0, 0.1, (2, 2)) for generator in generators])
        assert len(observations) == len(generators)
        return (sign + noise).astype(np.float32)


class Places:
    """A value function of the toy: -1 + x, x the hand's horizontal place."""

    version = 1
    task_steps: ClassVar[dict[str, int]] = {"touch-red": 25}

    def predict(self, episode: Any) -> np.ndarray:
        """[T]; looks at every frame."""
        for step in range(episode.num_steps):
            assert episode.frame("top", step).shape == (24, 24, 3)
        return np.asarray(episode.state[:, 0] - 1, np.float32)

    def advantages(self, episode: Any, values: np.ndarray, lookahead: int) -> np.ndarray:
        """V(t + N) - V(t) where both are known."""
        return np.append(values[lookahead:] - values[: len(values) - lookahead], np.zeros(lookahead, np.float32))


def test_separation_is_the_squared_difference_of_the_branches_over_that_of_the_null_branch() -> None:
    found = separation(Branches(), [batch_of(3), batch_of(5)])
    assert found == {"separation": pytest.approx(0.25), "separation_negative": pytest.approx(0.0625)}


def test_a_policy_without_branches_has_no_separation() -> None:
    with pytest.raises(RunError, match="object has no branches"):
        separation(object(), [batch_of(1)])


def test_an_effect_of_the_indicator_is_told_from_noise_by_sharing_the_noise() -> None:
    found = chunk_effect(Branches(), [batch_of(16), batch_of(16)])  # type: ignore[arg-type]
    assert found["told_apart"] == pytest.approx(1.0, abs=1e-6)  # the noise cancels
    assert 0.02 < found["noise"] < 0.05  # mean |u - u'| of two uniform numbers below 0.1 is 0.033
    assert chunk_effect(Branches(), [batch_of(16), batch_of(16)]) == found  # type: ignore[arg-type]


def test_success_counts_every_task_and_nothing_without_seeds() -> None:
    robot = ToyRobot()
    found = success(robot, Branches(robot), Conditioning(), ("touch-red", "touch-blue"), range(3))  # type: ignore[arg-type]
    assert {task: counts[1] for task, counts in found.items()} == {"touch-red": 3, "touch-blue": 3}
    assert success(robot, Branches(robot), Conditioning(), ("touch-red",), range(0)) == {}  # type: ignore[arg-type]
    robot.close()


def test_two_evaluations_under_one_condition_add_up() -> None:
    assert added({"a": [1, 2], "b": [0, 2]}, {"a": [3, 4]}) == {"a": [4, 6], "b": [0, 2]}
    assert added({}, {"a": [3, 4]}) == {"a": [3, 4]}


def test_a_pair_begins_at_the_same_moment_with_the_same_noise_and_gives_the_same_difference_again() -> None:
    robot, moment = ToyRobot(), Moment(task="touch-green", seed=11, chunks=7)  # when the push is over
    policy, values = Branches(robot), Places()
    first = signed_advantage(robot, policy, values, 3, moment)  # type: ignore[arg-type]
    assert policy.seeds == [11, 12, 11, 12]
    assert signed_advantage(robot, Branches(robot), values, 3, moment) == first  # type: ignore[arg-type]
    assert first == pytest.approx(3 * 0.05)  # three steps of +0.5 against three of -0.5, 0.05 wide each: noise cancels
    good, bad = (
        advantage_of(robot, policy, values, 3, moment, conditioning=asked)  # type: ignore[arg-type]
        for asked in (POSITIVE, NEGATIVE)
    )
    assert good is not None
    assert bad is not None
    assert good - bad == pytest.approx(first)
    robot.close()


def test_a_moment_after_the_end_of_the_episode_has_no_advantage() -> None:
    robot = ToyRobot()
    beyond = Moment(task="touch-green", seed=11, chunks=20)
    assert signed_advantage(robot, Branches(robot), Places(), 3, beyond) is None  # type: ignore[arg-type]
    robot.close()


def test_moments_are_all_combinations_in_order() -> None:
    found = [(one.task, one.seed, one.chunks) for one in moments(("a", "b"), (5, 6), (1, 4))]
    assert found[:3] == [("a", 5, 1), ("a", 5, 4), ("a", 6, 1)]
    assert (len(found), found[-1]) == (8, ("b", 6, 4))
