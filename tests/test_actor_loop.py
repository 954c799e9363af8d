"""The control loop: who drives, what is recorded, when policies are swapped. Real parts, fake time and policy."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actor_examples import Bench, CountingRobot, ScriptedOperator, policy
from sop.actor.actor import training_seed
from sop.core.episode import Outcome, PolicyTimes
from sop.core.errors import PolicyRefused
from sop.testing.episodes import TOY_BODY
from sop.testing.policy import FakePolicy


def test_tasks_phrasings_and_numbers_take_turns(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=policy())
    episodes = bench.run()
    assert [(e.sequence, e.task, e.instruction) for e in episodes] == [
        (0, "push", "push it"),
        (1, "pull", "pull it"),
        (2, "push", "shove it"),
    ]
    assert all(e.outcome is Outcome.SUCCESS and e.num_steps == 6 for e in episodes)
    seeds = [seed for seed, _ in bench.robot.resets]
    assert seeds == [training_seed(1, number) for number in range(3)]
    assert all(seed is not None and seed >= 2**31 for seed in seeds)


def test_what_is_executed_is_what_is_recorded_and_the_proposal_is_kept_beside_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator((2, 3)), policy=policy())
    episode = bench.run()[0]
    np.testing.assert_array_equal(episode.action, np.stack(bench.robot.actions[0]))
    assert episode.controller.tolist() == [0, 0, 1, 1, 0, 0]
    assert [(m.start, m.stop, m.operator, m.reason) for m in episode.interventions] == [(2, 4, "anna", "because")]
    np.testing.assert_allclose(episode.action[2:4, 0], -0.25)
    assert episode.proposed.all()
    np.testing.assert_allclose(episode.policy_action[0], 0.0)
    np.testing.assert_allclose(episode.policy_action[2], 0.02, atol=1e-6)


def test_when_control_changes_hands_the_rest_of_the_chunk_is_dropped(tmp_path: Path) -> None:
    """Chunk 0 gives steps 0-2; taken over at 2, so step 3 plans anew; handed back at 4, which acts on a new plan."""
    plans = policy()
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator((2, 3)), policy=plans)
    episode = bench.run()[0]
    np.testing.assert_allclose(episode.policy_action[:, 0], [0, 0.01, 0.02, 1, 2, 2.01], atol=1e-6)


def test_an_observation_is_what_was_seen_before_its_action(tmp_path: Path) -> None:
    episode = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=policy()).run()[0]
    assert episode.state[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert [int(frame.mean()) for frame in episode.images["front"]] == [0, 1, 2, 3, 4, 5]


def test_a_policy_that_plans_nan_makes_the_robot_hold_and_no_proposal_is_recorded(tmp_path: Path) -> None:
    plans = FakePolicy(TOY_BODY, action_horizon=8, execution_horizon=4, bad_chunk=0)
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=plans)
    episode = bench.run()[0]
    np.testing.assert_array_equal(episode.action[:4, 0], 0.0)
    assert episode.proposed.tolist() == [False] * 4 + [True] * 2


def test_a_policy_is_swapped_between_episodes_only(tmp_path: Path) -> None:

    def on_step(step: int) -> None:
        acting = next(made for made in bench.made if made.version == bench.actor.policy_version)
        acting.acting = step < 6
        if step == 2:  # in the middle of an episode the next one is loaded, never into the one that acts
            bench.wait_until_staged(bench.publish())
            assert acting.version == bench.actor.policy_version

    bench = Bench(tmp_path, CountingRobot(on_step=on_step), ScriptedOperator(), policy=policy())
    episodes = bench.run()
    assert [episode.policy_version for episode in episodes] == [0, 1, 2]
    assert [made.loaded for made in bench.made] == [[0, 2], [1, 3]], "two policies take turns"
    assert [swap.version for swap in bench.swaps] == [0, 1, 2]
    assert all(swap.published_utc_ns <= swap.staged_utc_ns for swap in bench.swaps)
    times = {
        swap.version: PolicyTimes(
            published_utc_ns=swap.published_utc_ns,
            staged_utc_ns=swap.staged_utc_ns,
            swapped_utc_ns=swap.swapped_utc_ns,
        )
        for swap in bench.swaps
    }
    assert [episode.policy_times for episode in episodes] == [times[version] for version in (0, 1, 2)]


def test_steps_keep_the_beat_and_resets_take_their_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=policy())
    episode = bench.run()[0]
    assert np.diff(episode.monotonic_ns) == pytest.approx(100_000_000, rel=0.01)
    assert bench.clock.slept_ns[0] == pytest.approx(2_000_000_000, rel=0.01)
    assert bench.actor.counts.overruns == 0


def test_a_late_step_is_counted_and_the_beat_starts_anew(tmp_path: Path) -> None:
    def on_step(step: int) -> None:
        if step == 3:
            bench.clock.advance(0.25)

    bench = Bench(tmp_path, CountingRobot(on_step=on_step), ScriptedOperator(), policy=policy())
    episode = bench.run()[0]
    gaps = np.diff(episode.monotonic_ns) / 1e9
    assert gaps == pytest.approx([0.1, 0.1, 0.25, 0.1, 0.1], abs=0.001)
    assert bench.actor.counts.overruns == 3


def test_a_stopped_actor_commits_the_running_episode_as_aborted(tmp_path: Path) -> None:
    stop = threading.Event()
    robot = CountingRobot(on_step=lambda step: stop.set() if step == 4 else None)
    bench = Bench(tmp_path, robot, ScriptedOperator(), policy=policy())
    bench.actor.run(stop)
    (episode,) = bench.finish()
    assert (episode.outcome, episode.num_steps, episode.truncated) == (Outcome.ABORTED, 5, False), "the last one holds"
    assert bench.actor.counts.episodes == 0


def test_a_demonstration_has_no_version_and_no_proposals(tmp_path: Path) -> None:
    operator = ScriptedOperator(range(100))
    episode = Bench(tmp_path, CountingRobot(), operator, policy=None).run()[0]
    assert episode.is_demonstration
    assert not episode.proposed.any()
    assert operator.seen[:6] == [None] * 6


def test_an_actor_holds_while_nothing_can_be_recorded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=policy())
    bench.writer.full = "the disk of /spool is full: free some room"
    stop = threading.Event()
    thread = threading.Thread(target=bench.actor.run, args=(stop,))
    thread.start()
    for _ in range(1000):
        if bench.actor.problem:
            break
        stop.wait(0.01)
    assert bench.actor.problem == "the disk of /spool is full: free some room"
    assert bench.robot.resets == []
    bench.writer.full = ""
    thread.join(20)
    assert len(bench.finish()) == 3
    assert bench.actor.problem == ""


def test_when_the_robot_fails_the_episode_until_then_is_kept_as_aborted(tmp_path: Path) -> None:
    def on_step(step: int) -> None:
        if step == 3:
            raise OSError("the arm does not answer")

    bench = Bench(tmp_path, CountingRobot(on_step=on_step), ScriptedOperator((1,)), policy=policy())
    with pytest.raises(OSError, match="does not answer"):
        bench.actor.run(threading.Event())
    (episode,) = bench.finish()
    assert (episode.outcome, episode.num_steps) == (Outcome.ABORTED, 3)
    assert [(mark.start, mark.stop) for mark in episode.interventions] == [(1, 2)]


def test_a_policy_that_cannot_be_loaded_is_refused_and_the_old_one_acts_on(tmp_path: Path) -> None:
    def refuse(weights: Any, version: int) -> None:
        raise PolicyRefused("w has shape (2,), this policy has (1,)")

    def on_step(step: int) -> None:
        subscriber = bench.subscriber
        assert subscriber is not None
        if step == 2 and bench.publisher.last_published == 0:
            bench.policies.append(policy())
            bench.policies[0].load = refuse  # type: ignore[method-assign]
            bench.publish()
            with subscriber._changed:
                assert subscriber._changed.wait_for(lambda: 1 in subscriber._refusals, 30)

    bench = Bench(tmp_path, CountingRobot(on_step=on_step), ScriptedOperator(), policy=policy())
    episodes = bench.run()
    assert {episode.policy_version for episode in episodes} == {0}
    assert bench.actor.refusal == "policy 1: it cannot be run here: w has shape (2,), this policy has (1,)"
    assert [swap.version for swap in bench.swaps] == [0]
