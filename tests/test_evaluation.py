"""Evaluation: each seed once, the same for everybody, nobody helps."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from sop.config import RobotConfig
from sop.core.evaluation import EvaluationResult, TaskResult, wilson_interval
from sop.core.policy import Conditioning
from sop.evaluation import ExpertDriver, PolicyDriver, evaluate_task, merge, shard
from sop.evaluator import asking, evaluate, evaluate_part, make_request
from sop.processes import Job
from sop.robots import make_robot
from sop.runs import Run
from sop.testing.policy import FakePolicy

CONFIG = RobotConfig(kind="toy", fleet_tasks=("touch-red",), image_size=24)


def test_shards_hold_every_seed_once() -> None:
    parts = [shard(100, 11, part, 3) for part in range(3)]
    assert sorted(seed for part in parts for seed in part) == list(range(100, 111))
    assert parts[0] == [100, 103, 106, 109]


def test_the_expert_succeeds_and_the_result_does_not_depend_on_the_shards() -> None:
    robot = make_robot(CONFIG)
    driver = ExpertDriver(robot)
    whole = evaluate_task(robot, driver, "touch-red", shard(0, 20, 0, 1), 1.0)
    parts = [evaluate_task(robot, driver, "touch-red", shard(0, 20, part, 2), 1.0) for part in range(2)]
    assert whole.success >= 0.9
    assert whole.successes == sum(part.successes for part in parts)
    assert whole.robot_s == pytest.approx(sum(part.robot_s for part in parts))


def test_a_policy_is_seeded_per_episode_and_looks_only_when_it_plans() -> None:
    robot = make_robot(CONFIG)
    policy = FakePolicy(robot.embodiment, action_horizon=8, execution_horizon=5)
    seeds: list[int] = []
    policy.reset = seeds.append  # type: ignore[method-assign]
    result = evaluate_task(robot, PolicyDriver(robot, policy, Conditioning()), "touch-red", [7, 8], 0.5)
    assert seeds == [7, 8]
    steps = round((result.robot_s - 2 * 0.5) * robot.embodiment.control_hz)
    assert result.episodes == 2
    assert len(policy.chunks) >= steps / 5
    assert len(policy.chunks) <= steps / 5 + 2


def test_a_safety_gate_stands_between_an_evaluated_policy_and_the_robot() -> None:
    robot = make_robot(CONFIG)
    policy = FakePolicy(robot.embodiment, bad_chunk=0)
    driver = PolicyDriver(robot, policy, Conditioning())
    robot.reset(seed=0, options={"task": "touch-red"})
    driver.begin("touch-red", 0)
    assert np.isfinite(driver.act()).all()


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 50, 0.9286, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals_are_the_published_ones(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-3)


def test_merged_and_pooled_results_add_up_and_survive_json() -> None:
    def part(successes: int) -> EvaluationResult:
        tasks = {
            "a": TaskResult(episodes=5, successes=successes, robot_s=10.0),
            "b": TaskResult(episodes=5, successes=5, robot_s=20.0),
        }
        return EvaluationResult(
            version=3, name="final", first_seed=9, tasks=tasks, online_episodes=4, utc_ns=1, published_utc_ns=2
        )

    merged = merge([part(1), part(2)])
    assert merged.tasks["a"] == TaskResult(episodes=10, successes=3, robot_s=20.0)
    assert merged.pooled(("a", "b")).success == pytest.approx(13 / 20)
    assert merged.pooled(("b",)).throughput == pytest.approx(3600 * 10 / 40)
    assert EvaluationResult.from_json(merged.to_json()) == merged


def test_a_policy_can_be_asked_for_something_else_than_its_manifest_says(finished_base: Run) -> None:
    plain = make_request(finished_base, "final", 0)
    bad = asking(plain, "bad", 1.5)
    assert bad.name == "final-bad-1.5"
    assert bad.key == "evaluations/00000000/final-bad-1.5.json", "the evaluation itself is not touched"
    assert bad.conditioning == Conditioning(advantage_indicator=False, guidance=1.5)
    with pytest.raises(ValueError, match="indicator"):
        evaluate_part(finished_base, bad, 0, 10)
    nothing = evaluate_part(finished_base, asking(plain, "nothing", 1.0), 0, 10)
    assert nothing.tasks == evaluate_part(finished_base, plain, 0, 10).tasks
    with pytest.raises(ValueError, match="good, bad, nothing"):
        asking(plain, "better", 1.0)
    for guidance in (float("nan"), float("inf"), -0.5):
        with pytest.raises(ValueError, match="0 or more and finite"):
            asking(plain, "good", guidance)


class Done:
    """A process that has already ended well."""

    pid = 0

    def poll(self) -> int:
        """0"""
        return 0

    def terminate(self) -> None:
        """Nothing runs."""

    def kill(self) -> None:
        """Nothing runs."""

    def wait(self, timeout: float | None = None) -> int:
        """0"""
        return 0


def test_every_worker_of_an_evaluation_has_the_identity_that_it_is_given_and_does_its_own_part(
    finished_base: Run,
) -> None:
    request = replace(make_request(finished_base, "final", 0), tasks=("touch-red",), episodes=5)
    started: list[Job] = []

    def spawn(job: Job) -> Done:
        started.append(job)
        part, parts = map(int, job.arguments[-1].split("/"))
        job.output.write_bytes(evaluate_part(finished_base, request, part, parts).to_json())
        return Done()

    own = {"SOP_IDENTITY": "/etc/sop/evaluator"}
    found = evaluate(finished_base, request, workers=2, stop=threading.Event(), spawn=spawn, environment=own)
    assert [(job.arguments[-1], job.environment) for job in started] == [("0/2", own), ("1/2", own)]
    assert found.tasks["touch-red"].episodes == 5
    assert finished_base.store.get(request.key) == found.to_json()
