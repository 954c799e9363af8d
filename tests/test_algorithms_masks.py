"""Which steps each rule learns from, exactly. 10 Hz: handover is 3 steps, pre-intervention 10."""

import dataclasses
import itertools

import numpy as np
import pytest

from sop.algorithms import make_algorithm
from sop.core.episode import Outcome
from sop.core.experience import Collection, StepLabels
from sop.testing.contracts.algorithm import sample_episode

PLAN = "P" * 15 + "H" * 8 + "P" * 6 + "H" * 5 + "P" * 2
HUMAN = [*range(18, 23), *range(32, 34)]
"""Steps of PLAN under human control, after each handover."""


def annotate(
    plan: str = PLAN, outcome: Outcome = Outcome.SUCCESS, *, demonstration: bool = False, **settings: object
) -> StepLabels:
    algorithm = make_algorithm("hg_dagger", settings, control_hz=10.0)
    return algorithm.annotate(sample_episode(plan, outcome, demonstration=demonstration))


def steps_with_weight(labels: StepLabels) -> list[int]:
    return np.flatnonzero(labels.loss_weight).tolist()


def starts(labels: StepLabels) -> list[int]:
    return np.flatnonzero(labels.can_start).tolist()


def segments(labels: StepLabels) -> list[tuple[int, int]]:
    """Runs [first, stop) of equal segment numbers; every number occurs in one run only."""
    edges = np.flatnonzero(np.diff(labels.segment)) + 1
    assert len(np.unique(labels.segment)) == len(edges) + 1
    bounds = [0, *edges.tolist(), len(labels.segment)]
    return list(itertools.pairwise(bounds))


def test_only_human_steps_after_the_handover_are_learned_from() -> None:
    labels = annotate()
    assert steps_with_weight(labels) == HUMAN
    assert starts(labels) == HUMAN
    assert (labels.loss_weight[HUMAN] == 1).all()


def test_segments_change_wherever_the_sort_of_step_changes() -> None:
    # policy, pre-intervention, handover, human, pre-intervention (all that is between), handover, human, policy
    expected = [(0, 5), (5, 15), (15, 18), (18, 23), (23, 29), (29, 32), (32, 34), (34, 36)]
    assert segments(annotate()) == expected


def test_a_pre_intervention_span_never_reaches_into_an_earlier_correction() -> None:
    labels = annotate("P" * 12 + "H" * 6 + "P" * 3 + "H" * 6)
    assert steps_with_weight(labels) == [15, 16, 17, 24, 25, 26]
    assert (18, 21) in segments(labels)


def test_a_correction_shorter_than_the_handover_teaches_nothing() -> None:
    labels = annotate("PPPPHHHPPPP")
    assert steps_with_weight(labels) == []
    assert starts(labels) == []


def test_times_are_rounded_up_to_whole_steps() -> None:
    """0.31 s at 10 Hz are 4 steps; 0.3 s are 3 although 0.3 * 10 is not exact in binary."""
    assert steps_with_weight(annotate("P" + "H" * 8, handover_s=0.31)) == [5, 6, 7, 8]
    assert steps_with_weight(annotate("P" + "H" * 8, handover_s=0.3)) == [4, 5, 6, 7, 8]
    assert steps_with_weight(annotate("P" + "H" * 8, handover_s=0.0)) == list(range(1, 9))


def test_a_failed_episode_keeps_its_human_steps() -> None:
    assert steps_with_weight(annotate(outcome=Outcome.FAILURE)) == HUMAN


def test_an_aborted_episode_is_not_learned_from() -> None:
    labels = annotate(outcome=Outcome.ABORTED)
    assert steps_with_weight(labels) == []
    assert starts(labels) == []


def test_a_demonstration_counts_from_its_first_step_to_its_last() -> None:
    labels = annotate("H" * 12, demonstration=True)
    assert steps_with_weight(labels) == list(range(12))
    assert starts(labels) == list(range(12))
    assert segments(labels) == [(0, 12)]


def test_an_episode_that_a_person_drove_alone_still_has_a_handover_when_a_policy_was_loaded() -> None:
    assert steps_with_weight(annotate("H" * 12)) == list(range(3, 12))


def test_a_long_correction_keeps_evenly_spread_starts_from_its_first_to_its_last_step() -> None:
    labels = annotate("P" * 5 + "H" * 64, max_segment_s=0.6)
    assert starts(labels) == [8, 20, 32, 44, 56, 68]
    assert steps_with_weight(labels) == list(range(8, 69))


def test_the_cap_counts_per_correction() -> None:
    labels = annotate("P" + "H" * 24 + "P" + "H" * 6, max_segment_s=0.4)
    assert starts(labels) == [4, 11, 17, 24, 29, 30, 31]


def test_iwr_learns_from_the_policy_only_in_a_success_without_help() -> None:
    settings: dict[str, object] = {"mode": "iwr", "w_auto": 0.25}
    labels = annotate("P" * 20, **settings)
    assert (labels.loss_weight == np.float32(0.25)).all()
    assert starts(labels) == list(range(20))
    assert steps_with_weight(annotate("P" * 20, Outcome.FAILURE, **settings)) == []
    assert steps_with_weight(annotate(**settings)) == HUMAN


def test_iwr_learns_nothing_from_the_policy_by_default() -> None:
    assert steps_with_weight(annotate("P" * 20, mode="iwr")) == []


def test_human_only_does_not_depend_on_what_the_policy_did() -> None:
    episode = sample_episode(PLAN)
    noisy = np.where(
        (episode.controller == 0)[:, None],
        np.random.default_rng(1).standard_normal(episode.action.shape).astype(np.float32),
        episode.action,
    )
    algorithm = make_algorithm("hg_dagger", {}, 10.0)
    labels = algorithm.annotate(episode)
    other = algorithm.annotate(dataclasses.replace(episode, action=noisy, policy_action=-noisy))
    assert not np.array_equal(noisy, episode.action)
    for name in ("loss_weight", "segment", "can_start"):
        assert np.array_equal(getattr(labels, name), getattr(other, name))
    # What is learned from, steps with weight inside one segment, holds the same actions in both.
    learned = labels.loss_weight > 0
    assert np.array_equal(episode.action[learned], noisy[learned])


def test_idle_steps_are_dropped_only_when_asked_and_only_when_long_enough() -> None:
    plan = "P" * 2 + "H" * 20
    state = np.cumsum(np.ones((22, 2), np.float32), axis=0)
    state[8:15] = state[8]  # does not move in the steps 8 to 13: idle for 6 steps
    state[17:20] = state[17]  # 2 steps: shorter than 0.5 s
    episode = dataclasses.replace(sample_episode(plan), state=state)
    kept = make_algorithm("hg_dagger", {}, 10.0).annotate(episode)
    assert steps_with_weight(kept) == list(range(5, 22))
    dropped = make_algorithm("hg_dagger", {"drop_idle": True}, 10.0).annotate(episode)
    assert steps_with_weight(dropped) == [*range(5, 8), *range(14, 22)]
    assert (8, 14) in segments(dropped)


@pytest.mark.parametrize(("name", "collection"), [("bc", "nothing"), ("offline_extra", "demonstrations")])
def test_cloning_learns_from_demonstrations_alone(name: str, collection: str) -> None:
    algorithm = make_algorithm(name, {}, 10.0)
    assert algorithm.collection is Collection(collection)
    assert steps_with_weight(algorithm.annotate(sample_episode(PLAN))) == []
    assert steps_with_weight(algorithm.annotate(sample_episode("H" * 5, demonstration=True))) == [0, 1, 2, 3, 4]
    aborted = sample_episode("H" * 5, Outcome.ABORTED, demonstration=True)
    assert steps_with_weight(algorithm.annotate(aborted)) == []


def test_hg_dagger_collects_on_policy() -> None:
    assert make_algorithm("hg_dagger", {}, 10.0).collection is Collection.ON_POLICY


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("hgdagger", {}, "Did you mean 'hg_dagger'"),
        ("ppo", {}, "Known are: bc, filtered_bc, hg_dagger, offline_extra, recap, weighted_bc"),
        ("hg_dagger", {"hand_over_s": 1.0}, "Did you mean 'handover_s'"),
        ("hg_dagger", {"handover_s": -1.0}, r"handover_s must be 0 or more, got -1\.0"),
        ("hg_dagger", {"mode": "sirius"}, "sirius"),
        ("hg_dagger", {"mode": "iwr", "w_auto": 0.6}, r"w_auto must be in \[0, 0.5\], got 0.6"),
        ("hg_dagger", {"w_auto": 0.2}, "set mode to 'iwr'"),
        ("bc", {"handover_s": 0.3}, "no setting is called 'handover_s'"),
    ],
)
def test_a_wrong_name_or_setting_is_answered_with_what_to_do(
    name: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_algorithm(name, settings, 10.0)


def test_a_state_of_another_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps no state, the checkpoint holds \['value'\]"):
        make_algorithm("hg_dagger", {}, 10.0).load_state_dict({"value": 1})
