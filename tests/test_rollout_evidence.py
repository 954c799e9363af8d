"""Facts of stored episodes, the rounds in which they are compared, and the replay before any of it."""

from collections.abc import Callable

import numpy as np
import pytest

from rollout_fakes import facts
from sop.core import layout
from sop.core.codec import EncodedEpisode, content_hash, encode
from sop.core.episode import Outcome, SafetyCounts
from sop.core.policy import ActionChunk, Conditioning, PolicySpec
from sop.rollout import Limits, ReplayLimits, StoredEpisodes, replay
from sop.rollout.comparison import Arms, Comparison
from sop.testing.episodes import TOY_BODY, make_episode
from sop.testing.memory import MemoryStore


def put(store: MemoryStore, sequence: int, actor: str = "robot-0", **changes: object) -> str:
    episode = make_episode(actor_id="robot-0", sequence=sequence, **changes)  # type: ignore[arg-type]
    data = encode(episode)
    key = str(layout.EpisodeKey("episodes", actor, sequence, episode.num_steps, content_hash(data)))
    store.put(key, data)
    return key


def test_facts_are_those_of_the_header() -> None:
    store = MemoryStore()
    put(store, 0, safety=SafetyCounts(clamped=2, late=1))
    put(store, 1, controllers="pphh")
    put(store, 2, outcome=Outcome.ABORTED)
    put(store, 3, outcome=Outcome.FAILURE, truncated=True)
    found = list(StoredEpisodes(store).read("robot-0", 0))
    assert [one.success for one in found] == [True, False, None, False]  # a success with help is none of the policy
    assert [one.intervened for one in found] == [False, True, False, False]
    assert found[0].safety == SafetyCounts(clamped=2, late=1)
    assert found[1].safety is None
    assert (found[0].robot, found[0].version, found[0].task, found[0].steps) == ("robot-0", 3, "push", 4)


def test_reading_stops_at_a_gap_and_goes_on_when_it_is_filled() -> None:
    store = MemoryStore()
    source = StoredEpisodes(store)
    assert source.next_sequence("robot-0") == 0
    for sequence in (0, 1, 3, 4):
        put(store, sequence)
    assert [one.sequence for one in source.read("robot-0", 1)] == [1]
    assert source.next_sequence("robot-0") == 5
    put(store, 2)
    assert [one.sequence for one in source.read("robot-0", 2)] == [2, 3, 4]


def test_rubbish_and_foreign_episodes_are_episodes_without_data() -> None:
    store = MemoryStore()
    store.tamper(put(store, 0), b"rubbish")
    put(store, 1, actor="robot-9")  # robot-0's episode under the name of another
    store.put("episodes/robot-0/not-an-episode", b"")
    assert [(one.success, one.safety, one.version) for one in StoredEpisodes(store).read("robot-0", 0)] == [
        (None, None, None)
    ]
    assert [one.version for one in StoredEpisodes(store).read("robot-9", 1)] == [None]


def compared() -> Comparison:
    arms = Arms(
        candidate=7,
        stable=3,
        canaries=("a", "b"),
        controls=("c", "d"),
        first=dict.fromkeys("abcd", 0),
        execution_horizon=5,
    )
    return Comparison(arms, ("push", "pull"), Limits())


def test_a_round_is_compared_when_its_last_robot_has_sent_it() -> None:
    comparison = compared()
    for robot in "abc":
        for sequence in range(2):
            comparison.add(facts(robot, sequence, 7 if robot in "ab" else 3))
    assert comparison.success.pairs == {"push": 0, "pull": 0}
    comparison.add(facts("d", 0, 3))
    assert comparison.success.pairs == {"push": 2, "pull": 0}
    comparison.add(facts("d", 1, 3))
    assert comparison.success.pairs == {"push": 2, "pull": 2}


def test_the_order_of_arrival_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    outcomes = {(robot, sequence): bool(rng.random() < 0.6) for robot in "abcd" for sequence in range(12)}
    states = []
    for seed in range(5):
        comparison, sent = compared(), dict.fromkeys("abcd", 0)
        order = np.random.default_rng(seed).permutation([robot for robot in "abcd" for _ in range(12)])
        for robot in order:
            sequence, sent[robot] = sent[robot], sent[robot] + 1
            comparison.add(facts(robot, sequence, 7 if robot in "ab" else 3, success=outcomes[robot, sequence]))
        states.append(comparison.success.state_dict())
    assert all(state == states[0] for state in states)


def test_an_aborted_episode_takes_its_place_in_the_round_and_no_part_in_the_comparison() -> None:
    comparison = compared()
    for robot in "abcd":
        comparison.add(facts(robot, 0, 7 if robot in "ab" else 3, success=None if robot == "a" else True))
    assert comparison.success.pairs == {"push": 1, "pull": 0}
    assert comparison.candidate.episodes == 1


def test_episodes_of_before_the_swap_are_passed_over() -> None:
    comparison = compared()
    comparison.add(facts("a", 0, 3))
    comparison.add(facts("a", 1, 7))
    assert comparison.progress["a"].episodes == 1
    with pytest.raises(ValueError, match="a: episode 5 where 2 is next"):
        comparison.add(facts("a", 5, 7))


class Planner:
    """`Policy` that plans what a function says."""

    version = 1

    def __init__(self, plan: Callable[[int], float]) -> None:
        self.spec = PolicySpec(kind="x", config={}, embodiment=TOY_BODY, action_horizon=4, execution_horizon=2)
        self._plan = plan
        self.steps = 0

    def infer(self, observation: object, instruction: str, conditioning: Conditioning) -> ActionChunk:
        chunk = np.asarray([[self._plan(self.steps + i), 0.0] for i in range(4)], np.float32)
        self.steps += 2
        return chunk

    def load(self, weights: object, version: int) -> None:
        raise AssertionError

    def reset(self, seed: int, coherence: float = 0.0) -> None:
        self.steps = 0


def replayed(plan: Callable[[int], float], *, seconds: float = 0.0, held_up_s: float = 0.0) -> str:
    times = np.arange(10_000) * seconds
    times[21:] += held_up_s  # while the 11th inference goes on
    ticks = iter(times)
    episodes = [EncodedEpisode(encode(make_episode("p" * 7, sequence=number))) for number in range(3)]
    limits = ReplayLimits(steps=300)
    return replay(Planner(plan), Conditioning(), episodes, limits, now=lambda: float(next(ticks))).problem


def test_a_policy_that_breaks_at_its_200th_step_does_not_pass_the_replay() -> None:
    assert replayed(lambda step: np.nan if step >= 200 else 0.0) == "its action is not finite at step 200 of the replay"
    assert replayed(lambda step: np.inf if step == 299 else 0.0).startswith("its action is not finite at step 299")
    assert replayed(lambda step: np.nan if step >= 300 else 0.0) == ""


def test_actions_far_outside_do_not_pass_and_a_few_may() -> None:
    assert replayed(lambda step: 1.5) == ""  # the margin itself
    assert replayed(lambda step: 1.51) == "300 of 300 actions are far outside of the robot's bounds"
    assert replayed(lambda step: 9.0 if step < 3 else 0.0) == ""
    assert replayed(lambda step: 9.0 if step < 4 else 0.0).startswith("4 of 300")


def test_a_policy_that_is_too_slow_for_the_robot_does_not_pass() -> None:
    assert replayed(lambda step: 0.0, seconds=0.1) == ""  # 2 steps at 10 Hz are 200 ms, half of it is allowed
    assert replayed(lambda step: 0.0, seconds=0.11) == "an inference takes 110.0 ms, 100.0 ms are allowed"
    assert replayed(lambda step: 0.0, seconds=0.05, held_up_s=60.0) == ""  # the machine's doing, not the policy's


def test_a_replay_needs_episodes() -> None:
    with pytest.raises(ValueError, match="at least one recorded episode"):
        replay(Planner(lambda _: 0.0), Conditioning(), [])
