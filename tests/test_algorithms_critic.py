"""The value function of a rule: what it is fitted on, when it refuses, what is kept, and what a resume restores."""

import json
import logging
from typing import Any

import numpy as np
import pytest

from sop.algorithms import make_algorithm
from sop.algorithms.critic import Critic
from sop.algorithms.critic_settings import CriticSettings
from sop.core.episode import Episode, Outcome
from sop.core.errors import InvalidRecord, RunError
from sop.core.experience import Source
from sop.testing.episodes import TOY_BODY, make_episode
from sop.testing.library import MemoryLibrary, tiny_policy
from sop.testing.values import WrittenValues

QUICK: dict[str, Any] = {"steps": 2, "batch_size": 4, "num_bins": 5}
GOOD, BAD = Outcome.SUCCESS, Outcome.FAILURE


def critic(max_bytes: int = 1 << 20, **settings: Any) -> Critic:
    return Critic(CriticSettings(value=QUICK, lookahead_s=0.2, **settings), 10.0, max_bytes)


def written(**settings: Any) -> tuple[Critic, WrittenValues]:
    made, function = critic(**settings), WrittenValues({"push": 10}, lambda _: -0.2)
    made.function = function
    return made, function


def rollouts(*outcomes: Outcome, task: str = "push") -> list[Episode]:
    return [
        make_episode("p" * 8, actor_id=f"base-{task}", policy_version=0, sequence=n, outcome=end, task=task)
        for n, end in enumerate(outcomes)
    ]


DEMONSTRATION = make_episode("h" * 10, actor_id="lab-0", policy_version=None)


def test_it_refuses_to_start_without_rollouts_of_the_base_policy() -> None:
    fleet = [make_episode("pppp", outcome=BAD)]
    with pytest.raises(RunError, match=r"needs rollouts of the base policy.*none in 1 episodes.*--rollout"):
        critic().prepare(MemoryLibrary([DEMONSTRATION], fleet), tiny_policy(TOY_BODY))


def test_it_refuses_a_task_without_a_failure_and_says_what_to_do() -> None:
    library = MemoryLibrary([DEMONSTRATION, *rollouts(GOOD, BAD), *rollouts(GOOD, GOOD, Outcome.ABORTED, task="pull")])
    with pytest.raises(RunError, match=r"task 'pull' has no failed episode \(2 successful, 0 failed.*more base roll"):
        critic().prepare(library, tiny_policy(TOY_BODY))


def test_it_refuses_a_task_whose_rollouts_were_all_aborted() -> None:
    library = MemoryLibrary([DEMONSTRATION, *rollouts(Outcome.ABORTED), *rollouts(GOOD, BAD, task="pull")])
    with pytest.raises(RunError, match=r"task 'push' has no failed episode \(1 successful, 0 failed, 1 aborted\)"):
        critic().prepare(library, tiny_policy(TOY_BODY))


def test_a_demonstration_is_a_success_of_its_task_and_needs_no_rollouts_of_its_own() -> None:
    other = make_episode("h" * 10, actor_id="lab-0", policy_version=None, sequence=1, task="only-shown")
    made = critic()
    made.prepare(MemoryLibrary([DEMONSTRATION, other, *rollouts(BAD, BAD)]), tiny_policy(TOY_BODY))
    assert made.ready
    assert made.version == 1


def test_a_fifth_of_the_rollouts_is_held_out_per_outcome_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [GOOD] * 7 + [BAD] * 3 + [Outcome.ABORTED]
    episodes = [DEMONSTRATION, *rollouts(*ends)]
    seen: list[list[int]] = []
    fit = "sop.algorithms.critic.ValueFunction.fit"
    from sop.values import ValueFunction

    original = ValueFunction.fit
    monkeypatch.setattr(fit, lambda self, some: seen.append([one.sequence for one in some[1:]]) or original(self, some))
    made = critic()
    made.prepare(MemoryLibrary(episodes), tiny_policy(TOY_BODY))
    assert seen == [[0, 2, 3, 4, 5, 7, 9]]  # not the 2nd and 7th success, nor the 2nd failure, nor what was aborted
    found = made.metrics()
    assert found["value/held_out_episodes"] == 3
    assert found["value/version"] == 1
    assert {"value/rank_correlation", "value/calibration_error", "value/auc_middle"} <= found.keys()
    assert "value/drift" not in found  # the fleet has recorded nothing


def test_what_cannot_be_measured_is_left_out() -> None:
    made = critic()
    made.prepare(MemoryLibrary([DEMONSTRATION, *rollouts(BAD)]), tiny_policy(TOY_BODY))
    assert made.metrics()["value/held_out_episodes"] == 0
    assert "value/rank_correlation" not in made.metrics()


def test_scores_are_computed_once_and_the_oldest_are_forgotten_first() -> None:
    made, function = written(max_bytes=2 * (300 + 8 * 4))
    first, second, third = (make_episode("pppp", sequence=n) for n in range(3))
    for episode in (first, second, first, third, first):
        made.scores(episode)
    assert function.predicted == [("robot-0", 0), ("robot-0", 1), ("robot-0", 2)]
    made.scores(second)  # went when the third came
    assert function.predicted[3:] == [("robot-0", 1)]


def test_scores_need_a_value_function() -> None:
    with pytest.raises(RunError, match="prepare the rule, or load its state"):
        critic().scores(make_episode("pp"))


def test_scores_that_a_fit_overtook_are_not_kept() -> None:
    """Whoever predicts while a fit ends has an answer, but it is not the new version's."""
    made, function = written()
    episode = make_episode("pppp")

    def slow(_: Episode) -> float:
        function.version = 2
        return -0.5

    function.value = slow
    assert made.scores(episode).value.tolist() == [-0.5] * 4
    function.value = lambda _: -0.75
    assert made.scores(episode).value.tolist() == [-0.75] * 4


def test_drift_is_predicted_minus_realised_on_the_newest_32_episodes() -> None:
    made, _ = written()
    made.observe(make_episode("p" * 10, outcome=BAD, sequence=99))  # goes when 32 more have come
    for number in range(32):
        made.observe(make_episode("p" * 5, sequence=number))
    realised = np.array([-4, -3, -2, -1, 0]) / 20
    assert made.metrics()["value/drift"] == pytest.approx(float((-0.2 - realised).mean()))
    assert "value/drift_rank" not in made.metrics()  # a constant ranks nothing


def test_a_refresh_comes_on_schedule_and_only_when_the_fleet_recorded_more() -> None:
    made, function = written(value_refresh=5, refresh_steps=3, refresh_episodes=2)
    library = MemoryLibrary(rollouts(GOOD, GOOD, BAD))
    assert not made.refresh(5, library)
    for number in range(3):
        library.add(make_episode("pppp", sequence=number), Source.ONLINE)
    assert [made.refresh(step, library) for step in (4, 5, 6, 9, 10)] == [False, True, False, False, False]
    # the second success is held out for ever; of the fleet's the newest two
    assert function.fitted == [[("base-push", 0), ("base-push", 2), ("robot-0", 1), ("robot-0", 2)]]
    library.add(make_episode("pppp", sequence=3), Source.ONLINE)
    assert made.refresh(12, library)
    assert made.version == 3


def test_what_is_held_out_does_not_depend_on_the_order_in_which_it_comes() -> None:
    made, function = written(value_refresh=5, refresh_steps=3, refresh_episodes=1)
    library = MemoryLibrary(list(reversed(rollouts(GOOD, GOOD, BAD))))
    library.add(make_episode("pppp"), Source.ONLINE)
    assert made.refresh(5, library)
    assert function.fitted == [[("base-push", 2), ("base-push", 0), ("robot-0", 0)]]


def test_a_refresh_that_cannot_read_leaves_the_value_function_as_it_is() -> None:
    made, function = written(value_refresh=5, refresh_steps=3)
    library = MemoryLibrary(rollouts(GOOD, BAD), [make_episode("pppp")])

    def damaged(_: Episode) -> float:
        raise InvalidRecord("images.front", "not a readable JPEG")

    function.value = damaged
    assert not made.refresh(5, library)
    assert (made.version, function.fitted) == (1, [])


def test_a_frozen_value_function_is_never_fitted_again() -> None:
    made, function = written()
    library = MemoryLibrary(rollouts(GOOD, BAD), [make_episode("pppp")])
    assert not made.refresh(10_000, library)
    assert function.fitted == []


def test_a_refresh_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    made, function = written(value_refresh=5)
    library = MemoryLibrary(rollouts(GOOD, BAD), [make_episode("pppp")])
    scores = made.scores(library.get(library.keys(Source.ONLINE)[0]))

    def fit(*_: object) -> None:
        raise RunError("not finite")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(function, "fit", fit)
        assert not made.refresh(5, library)
    assert "the value function stays as it is: not finite" in caplog.text
    assert made.scores(library.get(library.keys(Source.ONLINE)[0])) is scores
    # it is tried again when the next one is due, although nothing more was recorded; then all is done
    assert [made.refresh(step, library) for step in (6, 9, 10, 15)] == [False, False, True, False]


def test_a_resume_predicts_what_was_predicted_and_keeps_the_schedule() -> None:
    settings = {"value": QUICK, "value_refresh": 4, "refresh_steps": 1, "lookahead_s": 0.2}
    library = MemoryLibrary([DEMONSTRATION, *rollouts(GOOD, BAD, GOOD, BAD)], [make_episode("pppp")])
    first: Any = make_algorithm("recap", settings, 10.0)
    first.prepare(library, tiny_policy(TOY_BODY))
    assert first.refresh(4, library)
    state = first.state_dict()
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    assert any(name.startswith("value/") for name in arrays)
    again: Any = make_algorithm("recap", settings, 10.0)
    again.load_state_dict({**json.loads(json.dumps({k: v for k, v in state.items() if k not in arrays})), **arrays})
    episode = make_episode("pppp" * 3, sequence=7)
    np.testing.assert_array_equal(again.critic.scores(episode).value, first.critic.scores(episode).value)
    assert (again.critic.version, first.critic.version) == (2, 2)
    assert not again.critic.refresh(8, library)  # nothing new was recorded since step 4
    library.add(episode, Source.ONLINE)
    assert not again.critic.refresh(7, library)
    assert again.critic.refresh(8, library)
    kept = {name: value for name, value in first.metrics().items() if name.startswith("value/auc")}
    assert kept.items() <= again.metrics().items()
