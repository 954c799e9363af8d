"""RECAP's labels by hand. 10 Hz; the longest episode has 10 steps and a failure costs as much: returns in 1/20."""

from typing import Any

import numpy as np
import pytest

from sop.algorithms import make_algorithm
from sop.algorithms.advantage import GENERATIONS, AdvantageRule
from sop.algorithms.recap import Recap
from sop.core.episode import Episode, Outcome
from sop.core.experience import Source, StepLabels
from sop.core.policy import Conditioning
from sop.testing.episodes import make_episode
from sop.testing.library import MemoryLibrary
from sop.testing.values import WrittenValues

SETTINGS: dict[str, Any] = {"lookahead_s": 0.2, "threshold_least": 1, "pre_takeover_s": 0.3, "policy_stride": 1}
NOTHING = MemoryLibrary()


def rule(name: str = "recap", value: float = -0.2, task_steps: tuple[str, ...] = ("push",), **settings: Any) -> Any:
    made = make_algorithm(name, SETTINGS | settings, 10.0)
    assert isinstance(made, AdvantageRule)
    made.critic.function = WrittenValues(dict.fromkeys(task_steps, 10), lambda _: value)
    return made


def indexed(made: Any, *episodes: Episode, source: Source = Source.ONLINE) -> None:
    for episode in episodes:
        made.indexed(episode, source)
    made.refresh(1, NOTHING)


def rollout(outcome: Outcome = Outcome.SUCCESS, sequence: int = 0, steps: int = 6) -> Episode:
    return make_episode("p" * steps, actor_id="base-0", policy_version=0, outcome=outcome, sequence=sequence)


def signs(labels: StepLabels) -> list[int]:
    assert labels.advantage_indicator is not None
    return labels.advantage_indicator.tolist()


def test_an_autonomous_success_by_hand() -> None:
    """Two steps cost .1 and change no value: A = -.1, but at the end, where nothing follows: .15 and .2. Of six
    steps 40 % are two."""
    recap, episode = rule(), make_episode("pppppp")
    indexed(recap, episode)
    advantage = recap.sidecar(episode).columns["advantage"]
    assert advantage == pytest.approx([-0.1, -0.1, -0.1, -0.1, 0.15, 0.2])
    labels = recap.annotate(episode)
    assert signs(labels) == [-1, -1, -1, -1, 1, 1]
    assert labels.loss_weight.tolist() == [1] * 6
    assert labels.segment.tolist() == [0] * 6
    assert labels.can_start.all()


def test_a_failure_is_negative_where_a_success_of_its_task_is_positive() -> None:
    recap, success = rule(), make_episode("pppppp")
    failure = make_episode("pppppp", outcome=Outcome.FAILURE, sequence=1)
    indexed(recap, success, failure)
    assert recap.sidecar(failure).columns["advantage"] == pytest.approx([-0.1, -0.1, -0.1, -0.1, -0.35, -0.3])
    assert signs(recap.annotate(failure)) == [-1] * 6
    assert signs(recap.annotate(success)) == [-1, -1, -1, -1, 1, 1]
    assert recap.annotate(failure).loss_weight.tolist() == [1] * 6  # failures are learned from


def test_people_are_positive_and_what_led_to_them_is_negative_whatever_the_advantage() -> None:
    """V = -.9 makes even a charged takeover (-.5) look like good news: .4, more than anything else here."""
    recap = rule(value=-0.9)
    episode = make_episode("ppppp" + "hhhhhh" + "ppp")
    indexed(recap, episode)
    advantage = recap.sidecar(episode).columns["advantage"]
    assert advantage[4] == pytest.approx(0.4)
    assert np.isnan(advantage[5:11]).all()
    labels = recap.annotate(episode)
    # policy | before the takeover | handover, human | policy
    assert signs(labels) == [-1, -1, -1, -1, -1, 0, 0, 0, 1, 1, 1, -1, 1, 1]
    assert labels.loss_weight.tolist() == [1] * 5 + [0] * 3 + [1] * 6
    assert labels.segment.tolist() == [0] * 2 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert labels.can_start.tolist() == [True] * 5 + [False] * 3 + [True] * 6


def test_every_kth_step_of_a_policy_run_and_every_step_of_a_person_may_start_a_window() -> None:
    episode = make_episode("p" * 9 + "h" * 5 + "p" * 4)
    labels = rule(policy_stride=4, pre_takeover_s=0.0).annotate(episode)
    assert np.flatnonzero(labels.can_start).tolist() == [0, 4, 8, 12, 13, 14]
    assert labels.loss_weight.tolist() == [1] * 9 + [0] * 3 + [1] * 6
    before = rule(policy_stride=4).annotate(episode)  # a segment of its own counts from its own beginning
    assert np.flatnonzero(before.can_start).tolist() == [0, 4, 6, 12, 13, 14]


def test_tasks_are_judged_independently() -> None:
    """The harder task's best steps are positive although they are worse than all of the easy one's."""
    recap = rule(task_steps=("push", "pull"))
    recap.critic.function.value = lambda episode: -0.2 if episode.task == "push" else np.linspace(-0.1, -0.9, 6)
    easy = make_episode("pppppp")
    hard = make_episode("pppppp", task="pull", sequence=1, outcome=Outcome.FAILURE)
    indexed(recap, easy, hard)
    assert signs(recap.annotate(easy)) == [-1, -1, -1, -1, 1, 1]
    assert max(recap.sidecar(hard).columns["advantage"][:4]) < min(recap.sidecar(easy).columns["advantage"])
    assert signs(recap.annotate(hard)) == [-1, -1, -1, -1, 1, 1]


def test_nothing_is_said_of_a_task_before_it_has_a_threshold() -> None:
    recap, episode = rule(), make_episode("pppppp" + "hhhhh")
    assert signs(recap.annotate(episode)) == [0, 0, 0, -1, -1, -1, 0, 0, 0, 1, 1]
    recap.indexed(episode, Source.ONLINE)
    assert signs(recap.annotate(episode)) == [0, 0, 0, -1, -1, -1, 0, 0, 0, 1, 1]  # it is not applied yet
    assert recap.refresh(1, NOTHING)
    assert 0 not in signs(recap.annotate(episode))[:3]
    unknown = make_episode("pppp", task="pull", sequence=5)
    indexed(recap, unknown)
    assert signs(recap.annotate(unknown)) == [0] * 4
    assert np.isnan(recap.sidecar(unknown).columns["value"]).all()


def test_steps_without_a_value_are_unknown() -> None:
    recap, episode = rule(), make_episode("pppppp")
    recap.critic.function.value = lambda _: [-0.2, -0.2, np.nan, -0.2, -0.2, -0.2]
    indexed(recap, episode)
    assert signs(recap.annotate(episode)) == [0, -1, 0, -1, 1, 1]  # step 0 looks two ahead


def test_before_there_is_a_value_function_people_are_positive_and_the_policy_unknown() -> None:
    recap = make_algorithm("recap", SETTINGS, 10.0)
    assert signs(recap.annotate(make_episode("pppp" + "hhhhh"))) == [0, -1, -1, -1, 0, 0, 0, 1, 1]
    assert recap.sidecar(make_episode("pp")) is None
    assert recap.metrics() == {}


def test_demonstrations_are_positive() -> None:
    recap = rule()
    demonstration = make_episode("hhhh", actor_id="lab-0", policy_version=None)
    indexed(recap, demonstration, source=Source.OFFLINE)
    labels = recap.annotate(demonstration)
    assert signs(labels) == [1] * 4
    assert labels.loss_weight.tolist() == [1] * 4
    assert labels.can_start.all()
    assert recap.sidecar(demonstration) is None
    assert recap.critic.function.predicted == []  # nobody asks what they are worth


def test_demonstrations_can_be_judged_like_the_rest_of_the_offline_buffer() -> None:
    recap = rule(demonstrations="advantage", offline_positive=0.5)
    demonstration = make_episode("hhhh", actor_id="lab-0", policy_version=None)
    indexed(recap, demonstration, source=Source.OFFLINE)
    assert signs(recap.annotate(demonstration)) == [-1, -1, 1, 1]  # -.1, -.1, .15, .2
    assert recap.sidecar(demonstration) is not None


def test_base_rollouts_train_the_value_function_alone() -> None:
    recap = rule(rollouts="value_only")
    indexed(recap, rollout(), source=Source.OFFLINE)
    labels = recap.annotate(rollout())
    assert signs(labels) == [0] * 6
    assert not labels.loss_weight.any()
    assert not labels.can_start.any()
    judged = rule(demonstrations="advantage", rollouts="value_only")
    indexed(judged, make_episode("hhhh", actor_id="lab-0", policy_version=None), rollout(), source=Source.OFFLINE)
    assert signs(judged.annotate(rollout())) == [0] * 6
    assert recap.sidecar(rollout()).columns["realised"] == pytest.approx([-0.25, -0.2, -0.15, -0.1, -0.05, 0])


def test_base_rollouts_for_the_policy_have_a_threshold_of_their_own() -> None:
    recap = rule(offline_positive=0.3, rollout_stride=4)
    good, bad = rollout(steps=10), rollout(Outcome.FAILURE, 1, steps=10)
    indexed(recap, good, bad, source=Source.OFFLINE)
    indexed(recap, make_episode("p" * 10, sequence=3))
    assert signs(recap.annotate(good)) == [-1] * 8 + [1] * 2
    assert signs(recap.annotate(bad)) == [-1] * 10
    assert np.flatnonzero(recap.annotate(bad).can_start).tolist() == [0, 4, 8]
    assert set(recap.metrics()) >= {"recap/threshold/push", "recap/offline_threshold/push"}
    fleet_with_the_base = make_episode("pppp", policy_version=0, sequence=9)
    assert rule().annotate(fleet_with_the_base).can_start.all()  # version 0, and still the fleet


def test_positive_only_conditioning_leaves_the_rest_to_the_null_branch() -> None:
    recap, episode = rule(condition_negatives=False), make_episode("pppppp" + "hhhhh")
    indexed(recap, episode)
    labels = recap.annotate(episode)
    assert set(signs(labels)) == {0, 1}
    assert signs(labels)[3:] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert labels.loss_weight.tolist() == [1] * 6 + [0] * 3 + [1] * 2


def test_bad_steps_may_weigh_less_than_good_ones_and_people_weigh_what_they_do() -> None:
    recap = rule(value=-0.9, negative_weight=0.25, policy_weight=0.8)
    episode = make_episode("ppppp" + "hhhhhh" + "ppp")
    indexed(recap, episode)
    labels = recap.annotate(episode)
    assert signs(labels) == [-1, -1, -1, -1, -1, 0, 0, 0, 1, 1, 1, -1, 1, 1]
    assert labels.loss_weight == pytest.approx([0.2] * 5 + [0] * 3 + [1] * 3 + [0.2, 0.8, 0.8])


def test_an_aborted_episode_teaches_nothing_and_counts_nowhere() -> None:
    recap, episode = rule(), make_episode("ppppphhhhh", outcome=Outcome.ABORTED)
    indexed(recap, episode)
    labels = recap.annotate(episode)
    assert not labels.loss_weight.any()
    assert not labels.can_start.any()
    assert signs(labels) == [0] * 10
    assert recap.critic.function.predicted == []
    assert "recap/threshold/push" not in recap.metrics()


def test_labels_carry_the_version_of_values_and_thresholds() -> None:
    recap, episode = rule(), make_episode("pppppp")
    assert recap.annotate(episode).label_version == 0
    indexed(recap, episode)
    assert recap.annotate(episode).label_version == GENERATIONS + 1
    indexed(recap, make_episode("pppppp", outcome=Outcome.FAILURE, sequence=1))
    assert recap.annotate(episode).label_version == GENERATIONS + 2
    assert not recap.refresh(5, NOTHING)
    assert recap.sidecar(episode).version == 1


def test_a_refreshed_value_function_judges_everything_anew() -> None:
    """The fit comes when it is due and the fleet recorded something; thresholds are made from new advantages alone."""
    recap = rule(value_refresh=10, refresh_episodes=1, rollouts="value_only")
    old, new = make_episode("pppppp"), make_episode("pppppp", outcome=Outcome.FAILURE, sequence=1)
    library = MemoryLibrary([rollout(), rollout(Outcome.FAILURE, 1)], [old, new])
    indexed(recap, old, new)
    function = recap.critic.function
    assert not recap.refresh(9, library)
    function.value = lambda _: -0.9
    assert signs(recap.annotate(old)) == [-1, -1, -1, -1, 1, 1]  # values are kept
    assert recap.refresh(10, library)
    assert function.fitted == [[("base-0", 0), ("base-0", 1), ("robot-0", 1)]]
    # -.1 four times, then (-1 - 10) / 20 + .9 = .35 and -.5 + .9 = .4: two of the new episode's six are positive
    assert signs(recap.annotate(new)) == [-1, -1, -1, -1, 1, 1]
    assert recap.annotate(new).label_version == 2 * GENERATIONS + 2
    assert recap.sidecar(new).version == 2
    assert len(recap._thresholds.state_dict()["threshold/0000"]) == 6  # the old function's advantages are forgotten
    found = recap.metrics()
    assert found["value/drift"] == pytest.approx(np.mean(DRIFT_OF_FAILURE) - 0.7)  # so is its drift
    assert found["value/drift_before"] == pytest.approx(np.mean([0.05, 0, -0.05, -0.1, -0.15, -0.2, *DRIFT_OF_FAILURE]))
    assert found["value/drift_after"] == pytest.approx(found["value/drift_before"] - 0.7)
    assert not recap.refresh(20, library)  # due, but nothing new was recorded


def test_a_task_of_which_a_refresh_saw_too_little_is_unknown_until_more_of_it_comes() -> None:
    recap = rule(value_refresh=10, refresh_episodes=1, threshold_least=6, task_steps=("push", "pull"))
    other, push = make_episode("pppppp", task="pull"), make_episode("pppppp", sequence=1)
    library = MemoryLibrary([rollout(), rollout(Outcome.FAILURE, 1)], [other, push])
    indexed(recap, other, push)
    assert signs(recap.annotate(other)) == [-1, -1, -1, -1, 1, 1]
    recap.critic.function.value = lambda _: -0.9
    assert recap.refresh(10, library)  # with the newest episode, of the other task
    assert signs(recap.annotate(push)) == [-1, -1, -1, -1, 1, 1]
    assert signs(recap.annotate(other)) == [0] * 6, "an old threshold judged new advantages"
    indexed(recap, make_episode("pppppp", task="pull", sequence=2))
    assert signs(recap.annotate(other)) == [-1, -1, -1, -1, 1, 1]


DRIFT_OF_FAILURE = [0.55, 0.5, 0.45, 0.4, 0.35, 0.3]
"""-.2 minus (-(5 - t) - 10) / 20."""


def test_an_episode_counts_once_whether_it_is_indexed_before_or_after_the_preparation() -> None:
    recap, episode = rule(), make_episode("pppppp")
    library = MemoryLibrary([], [episode])
    recap.critic.prepare = lambda *_: None
    recap.prepare(library, None)
    recap.indexed(episode, Source.ONLINE)
    assert recap.refresh(1, library)
    assert len(recap._thresholds.state_dict()["threshold/0000"]) == 6


def test_what_the_policy_and_the_fleet_are_told() -> None:
    recap = make_algorithm("recap", {"indicator": "text", "indicator_dropout": 0.1, "guidance": 1.5}, 10.0)
    assert isinstance(recap, Recap)
    assert recap.policy_settings == {"indicator": "text", "indicator_dropout": 0.1}
    assert recap.conditioning() == Conditioning(advantage_indicator=True, guidance=1.5)
    assert recap.needs_rollouts
    assert recap.warm_up is recap.settings
    assert (recap.warm_up.install, recap.warm_up.warmup_separation, recap.warm_up.warmup_null_tolerance) == (
        "warmup", 0.0003, 0.05,
    )  # fmt: skip


def test_a_state_of_another_rule_is_refused() -> None:
    recap = make_algorithm("recap", SETTINGS, 10.0)
    with pytest.raises(ValueError, match="the state of another rule"):
        recap.load_state_dict(make_algorithm("weighted_bc", {}, 10.0).state_dict())
    state = recap.state_dict()
    with pytest.raises(ValueError, match="damaged: KeyError"):
        recap.load_state_dict({"rule": "recap", "critic": state["critic"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"online_positive": 1.0}, "online_positive must lie between 0 and 1"),
        ({"policy_stride": 0}, "policy_stride must be 1 or more"),
        ({"policy_weight": 0.0}, r"policy_weight must be in \(0, 1\]"),
        ({"negative_weight": 1.5}, r"negative_weight must be in \[0, 1\], got 1.5"),
        ({"threshold_window": 50}, "threshold_least is 100, threshold_window keeps 50 steps only"),
        ({"lookahead_s": 0.0}, "lookahead_s must be positive"),
        ({"value": {"step": 3}}, "value: no setting is called 'step'. Did you mean 'steps'"),
        ({"takeover": "ignore"}, "takeover|ignore"),
        ({"guidance": -1.0}, "guidance must be 0 or more"),
        ({"indicator": "sound"}, "sound"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_algorithm("recap", settings, 10.0)
