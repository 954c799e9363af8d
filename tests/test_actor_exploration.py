"""Exploration: one offset per chunk, bounded, recorded beside the proposal, repeatable, gone when a person drives."""

import inspect
import shutil
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sop.evaluation
from actor_examples import Bench, CountingRobot, ScriptedOperator, policy
from sop.actor import Exploration, SafetyGate
from sop.actor.actor import training_seed
from sop.actor.exploration import explored_elements, make_exploration
from sop.config import ExplorationConfig
from sop.core import layout
from sop.core.codec import decode
from sop.core.embodiment import Embodiment
from sop.core.episode import Outcome
from sop.runs import open_run
from sop.system import ActorOptions, run_actor
from sop.testing.episodes import TOY_BODY

ALWAYS = ExplorationConfig(kind="offset", probability=1.0)
ARM = Embodiment(
    name="arm",
    cameras={"front": (16, 16)},
    state_names=("x",),
    action_names=("dx", "dy", "gripper"),
    action_low=(-2.0, 0.0, -1.0),
    action_high=(2.0, 1.0, 1.0),
    hold_action=(0.0, 0.0, None),
    max_action_change=(None, None, None),
    control_hz=10.0,
)
REST = np.asarray([0.0, 0.5, 0.25], np.float32)


def offset_of(exploration: Exploration) -> np.ndarray:
    """[A] of the running chunk, NaN when it has none."""
    return np.full(3, np.nan, np.float32) if exploration.offset is None else exploration.offset


def offsets(config: ExplorationConfig, chunks: int, *, seed: int = 5, sequence: int = 0) -> np.ndarray:
    """[chunks, A] of an episode, NaN for a chunk without an offset."""
    exploration = Exploration(config, ARM)
    exploration.reset(seed, sequence)
    found = []
    for _ in range(chunks):
        exploration.explore(REST, new_chunk=True)
        found.append(offset_of(exploration))
    return np.stack(found)


@pytest.mark.parametrize("config", [{"kind": "offset", "probability": 0.0}, {"kind": "noise"}])
def test_a_tempo_stretches_a_chunk_along_its_way(config: dict[str, Any]) -> None:
    exploration = Exploration(ExplorationConfig(tempo=0.3, **config), ARM)
    exploration.reset(5, 0)
    small = np.asarray([0.1, 0.2, 0.5], np.float32)
    factors = []
    for _ in range(400):
        command = exploration.explore(small, new_chunk=True)
        factors.append(exploration.factor)
        np.testing.assert_allclose(command, small * [factors[-1], factors[-1], 1.0], rtol=1e-6)
        np.testing.assert_array_equal(exploration.explore(small, new_chunk=False), command)
    assert abs(np.mean(np.log(factors))) < 0.05, "as often slower as faster"
    assert 0.25 < np.std(np.log(factors)) < 0.35
    fast = exploration.explore(np.asarray([2.0, 1.0, 0.5], np.float32), new_chunk=True)
    assert fast[0] <= 2.0
    assert fast[1] <= 1.0
    exploration.drop()
    assert exploration.factor == 1.0


def test_a_tempo_may_be_faster_on_the_whole_and_lasts_the_chunks_that_are_held_together() -> None:
    exploration = Exploration(ExplorationConfig(kind="noise", tempo=0.2, tempo_mean=0.15, hold_chunks=3), ARM)

    def factors() -> list[float]:
        exploration.reset(5, 0)
        found = []
        for _ in range(600):
            exploration.explore(REST, new_chunk=True)
            found.append(exploration.factor)
        return found

    first = factors()
    assert first[0] == first[1] == first[2] != first[3] == first[4] == first[5]
    assert abs(np.mean(np.log(first)) - 0.15) < 0.04
    assert factors() == first, "the episode's seed decides"
    always = Exploration(ExplorationConfig(kind="noise", tempo_mean=0.5), ARM)
    always.explore(REST, new_chunk=True)
    assert always.factor == pytest.approx(np.exp(0.5))


def test_without_a_tempo_the_offsets_are_those_of_before() -> None:
    plain, stretched = (Exploration(ExplorationConfig(kind="offset", tempo=tempo), ARM) for tempo in (0.0, 0.3))
    for exploration in (plain, stretched):
        exploration.reset(5, 0)
        exploration.explore(REST, new_chunk=True)
    np.testing.assert_array_equal(offset_of(plain), offset_of(stretched))
    assert plain.factor == 1.0
    assert stretched.factor != 1.0


def test_an_offset_lasts_a_chunk_and_leaves_the_gripper_alone() -> None:
    exploration = Exploration(ALWAYS, ARM)
    exploration.reset(5, 0)
    first = exploration.explore(REST, new_chunk=True)
    offset = offset_of(exploration)
    assert offset[2] == 0
    assert (offset[:2] != 0).all()
    np.testing.assert_allclose(first, REST + offset)
    proposal = np.asarray([0.1, 0.4, 7.0], np.float32)
    np.testing.assert_array_equal(exploration.explore(proposal, new_chunk=False)[:2], (proposal + offset)[:2])
    assert exploration.explore(proposal, new_chunk=False)[2] == 7.0, "what is not explored is the gate's business"
    exploration.explore(REST, new_chunk=True)
    assert not np.array_equal(offset_of(exploration), offset)


def test_offsets_have_the_asked_spread_as_a_share_of_half_the_range() -> None:
    found = offsets(ALWAYS, 4000)
    np.testing.assert_allclose(found.std(0), [0.3 * 2.0, 0.3 * 0.5, 0.0], rtol=0.05)
    np.testing.assert_allclose(found.mean(0), 0.0, atol=0.03)


def test_the_asked_share_of_chunks_gets_an_offset_and_the_others_execute_the_proposal_itself() -> None:
    config = ExplorationConfig(kind="offset", probability=0.25)
    found = offsets(config, 4000)
    assert np.isfinite(found[:, 0]).mean() == pytest.approx(0.25, abs=0.02)
    never = Exploration(ExplorationConfig(kind="offset", probability=0.0), ARM)
    assert never.explore(REST, new_chunk=True) is REST


def test_an_offset_may_hold_for_several_chunks() -> None:
    found = offsets(ExplorationConfig(kind="offset", probability=1.0, hold_chunks=3), 7)
    same = [np.array_equal(a, b) for a, b in pairwise(found)]
    assert same == [True, True, False, True, True, False]


def test_the_seed_decides_the_draws_and_neither_std_nor_probability_moves_them() -> None:
    first = offsets(ALWAYS, 20)
    np.testing.assert_array_equal(first, offsets(ALWAYS, 20))
    assert not np.array_equal(first[0], offsets(ALWAYS, 20, seed=6)[0])
    twice = offsets(ExplorationConfig(kind="offset", probability=1.0, std=0.6), 20)
    np.testing.assert_allclose(twice, 2 * first, rtol=1e-6)
    sometimes = offsets(ExplorationConfig(kind="offset", probability=0.5), 20)
    chosen = np.isfinite(sometimes[:, 0])
    assert 0 < chosen.sum() < 20
    np.testing.assert_array_equal(sometimes[chosen], first[chosen])


def test_what_is_shown_and_executed_stays_within_the_bounds_and_what_is_not_finite_stays_so() -> None:
    exploration = Exploration(ExplorationConfig(kind="offset", probability=1.0, std=1e6), ARM)
    for seed in range(20):
        exploration.reset(seed, 0)
        command = exploration.explore(REST, new_chunk=True)
        assert command[0] in (-2.0, 2.0)
        assert command[1] in (0.0, 1.0)
        assert SafetyGate(ARM).check(command).reason == ""
    for number in (np.nan, np.inf, -np.inf):
        bad = exploration.explore(np.asarray([number, 0.5, 0.0], np.float32), new_chunk=True)
        assert SafetyGate(ARM).check(bad).action.tolist() == [0.0, 0.0, 0.0], "clipping must not hide it"


def test_a_dropped_offset_is_gone_and_the_next_chunk_draws_anew() -> None:
    exploration = Exploration(ExplorationConfig(kind="offset", probability=1.0, hold_chunks=5), ARM)
    exploration.reset(5, 0)
    exploration.explore(REST, new_chunk=True)
    before = offset_of(exploration)
    exploration.drop()
    assert np.isnan(offset_of(exploration)).all()
    assert exploration.explore(REST, new_chunk=False) is REST
    exploration.explore(REST, new_chunk=True)
    assert np.isfinite(offset_of(exploration)).all()
    assert not np.array_equal(offset_of(exploration), before)


def test_a_linear_schedule_ends_at_its_final_share() -> None:
    config = ExplorationConfig(kind="offset", schedule="linear", final_share=0.2, over_episodes=4)
    assert [config.share(number) for number in (0, 1, 2, 4, 9)] == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])
    assert [ALWAYS.share(number) for number in (0, 1000)] == [1.0, 1.0]
    linear = ExplorationConfig(kind="offset", probability=1.0, schedule="linear", over_episodes=4)
    full, half, none = (offsets(linear, 1, sequence=number)[0] for number in (0, 2, 4))
    np.testing.assert_allclose(half, full / 2, rtol=1e-6)
    np.testing.assert_array_equal(none, 0.0)


def test_elements_are_chosen_by_number_and_unknown_ones_refused() -> None:
    assert explored_elements(ALWAYS, ARM).tolist() == [True, True, False]
    chosen = ExplorationConfig(kind="offset", elements=(2,))
    assert explored_elements(chosen, ARM).tolist() == [False, False, True]
    with pytest.raises(ValueError, match=r"arm has the action elements 0 to 2, got \[3\]"):
        Exploration(ExplorationConfig(kind="offset", elements=(0, 3)), ARM)
    assert make_exploration(ExplorationConfig(), ARM) is None


def test_an_actor_executes_and_records_proposal_plus_offset_through_the_gate(tmp_path: Path) -> None:
    operator = ScriptedOperator()
    bench = Bench(tmp_path, CountingRobot(), operator, policy=policy(), exploration=Exploration(ALWAYS, TOY_BODY))
    episodes = bench.run()
    twin = Exploration(ALWAYS, TOY_BODY)
    shown = iter(operator.seen)
    for number, episode in enumerate(episodes):
        np.testing.assert_allclose(episode.policy_action[:, 0], [0, 0.01, 0.02, 0.03, 1, 1.01], atol=1e-6)
        twin.reset(training_seed(1, number), number)
        gate, chunk_offsets = SafetyGate(TOY_BODY), []
        for step, proposal in enumerate(episode.policy_action):
            command = twin.explore(proposal, new_chunk=step in (0, 4))
            np.testing.assert_array_equal(command, np.asarray(next(shown)))
            np.testing.assert_array_equal(episode.action[step], gate.check(command).action)
            chunk_offsets.append(None if twin.offset is None else float(twin.offset[0]))
        assert len(set(chunk_offsets[:4])) == len(set(chunk_offsets[4:])) == 1
        assert chunk_offsets[3] != chunk_offsets[4]
        assert not np.array_equal(episode.action[:4, 0], episode.policy_action[:4, 0])
    np.testing.assert_array_equal(episodes[0].action, np.stack(bench.robot.actions[0]))


def test_nothing_is_explored_while_a_person_drives_and_control_comes_back_with_a_new_offset(tmp_path: Path) -> None:
    """Chunk 0 gives steps 0-2; taken over at 2; handed back at 4, where a new plan gets a new offset."""
    operator = ScriptedOperator((2, 3))
    exploration = Exploration(ALWAYS, TOY_BODY)
    episode = Bench(tmp_path, CountingRobot(), operator, policy=policy(), exploration=exploration).run()[0]
    twin = Exploration(ALWAYS, TOY_BODY)
    twin.reset(training_seed(1, 0), 0)
    first, second = (twin.explore(episode.policy_action[step], new_chunk=True) for step in (0, 4))
    np.testing.assert_allclose(episode.policy_action[:, 0], [0, 0.01, 0.02, 1, 2, 2.01], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(operator.seen[3]), episode.policy_action[3])
    human, gate = np.asarray([-0.25, 0.5], np.float32), SafetyGate(TOY_BODY)
    third = episode.policy_action[1] + first - episode.policy_action[0]
    last = episode.policy_action[5] + np.asarray([offset_of(twin)[0], 0.0])
    commands = (first, third, human, human, second, np.clip(last, -1, 1).astype(np.float32))
    expected = [gate.check(command).action for command in commands]
    np.testing.assert_allclose(episode.action, np.stack(expected), atol=1e-6)


def test_a_repeated_episode_gets_the_same_offsets_whatever_came_before(tmp_path: Path) -> None:
    def record(folder: str) -> list[np.ndarray]:
        exploration = Exploration(ExplorationConfig(kind="offset"), TOY_BODY)
        bench = Bench(
            tmp_path / folder, CountingRobot(12), ScriptedOperator(), policy=policy(), exploration=exploration
        )
        return [episode.action for episode in bench.run()]

    first, again = record("a"), record("b")
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_evaluations_never_explore() -> None:
    names = set(vars(sop.evaluation)) | set(vars(sop.evaluation.PolicyDriver))
    assert not {name for name in names if "explor" in name.lower()}
    assert "Actor" not in names
    assert "explor" not in inspect.getsource(sop.evaluation).lower()


def test_rollouts_are_the_base_policys_alone_whatever_else_is_published(recorded_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(recorded_run, folder)
    run = open_run(str(folder))
    newer = run.store.get(layout.policy_manifest(0)).replace(b'"version":0', b'"version":1')
    run.store.put(layout.policy_manifest(1), newer)
    run_actor(run, ActorOptions(actor_id="base-0", rollout=True, speed=0, end_sequence=3), threading.Event())
    run_actor(run, ActorOptions(actor_id="base-0", rollout=True, speed=0, end_sequence=4), threading.Event())
    keys = list(run.store.keys("demonstrations/base-0/"))
    assert [layout.EpisodeKey.parse(key).sequence for key in keys] == [0, 1, 2, 3]
    assert not list(run.store.keys("episodes/base-"))
    episodes = [decode(run.store.get(key)) for key in keys]
    assert {episode.policy_version for episode in episodes} == {0}
    assert {episode.task for episode in episodes} == {"touch-red", "touch-green"}
    assert not any(episode.interventions or episode.is_demonstration for episode in episodes)
    assert all(episode.outcome in (Outcome.SUCCESS, Outcome.FAILURE) for episode in episodes)
    assert Outcome.FAILURE in {episode.outcome for episode in episodes}, "a base policy of three steps"
    assert max(episode.num_steps for episode in episodes) == 40, "as long as an episode of the fleet may last"
    explored = [np.clip(episode.policy_action, -1, 1) != episode.action for episode in episodes]
    assert any(steps.any() for steps in explored)
    assert not all(steps.all() for steps in explored)


@pytest.mark.parametrize(("actor_id", "rollout"), [("base-0", False), ("robot-0", True)])
def test_the_names_of_rollout_actors_are_theirs_alone(actor_id: str, rollout: bool) -> None:
    with pytest.raises(ValueError, match="ids that begin with base- are for --rollout alone"):
        ActorOptions(actor_id=actor_id, rollout=rollout)
    with pytest.raises(ValueError, match="ids that begin with lab- are for --demonstrate alone"):
        ActorOptions(actor_id="lab-9")
    assert ActorOptions(actor_id="robot-7", demonstrate=True).demonstrate


def test_exploring_the_noise_leaves_proposals_alone_and_says_how_coherent_it_is() -> None:
    exploration = Exploration(ExplorationConfig(kind="noise", coherence=0.7, probability=1.0), ARM)
    proposal = np.array([0.3, -0.2, 0.9], np.float32)
    for _ in range(5):
        assert exploration.explore(proposal, new_chunk=True) is proposal
    assert exploration.coherence == 0.7
    assert Exploration(ALWAYS, ARM).coherence == 0
