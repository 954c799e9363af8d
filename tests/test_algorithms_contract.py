"""Every algorithm keeps the rules of `Algorithm`."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from sop.algorithms import ALGORITHMS, Imitation, make_algorithm
from sop.algorithms.base import demonstration_labels
from sop.core.experience import Collection, Library, StepLabels, StoredEpisode
from sop.testing.contracts.algorithm import (
    ALGORITHM_RULES,
    CONTROL_HZ,
    MakeAlgorithm,
    labels_stay_until_refresh_says_otherwise,
)

QUICK = {"value": {"steps": 1, "batch_size": 4, "num_bins": 5}, "threshold_least": 1}
"""For rules with a value function."""
SETTINGS = [(name, QUICK if name in ("recap", "weighted_bc") else {}) for name in ALGORITHMS] + [
    ("hg_dagger", {"mode": "iwr", "w_auto": 0.5}),
    ("hg_dagger", {"drop_idle": True, "idle_speed": 20.0}),
    ("hg_dagger", {"handover_s": 0.0, "pre_intervention_s": 0.0, "max_segment_s": 0.2}),
    ("filtered_bc", {"policy_weight": 0.2, "policy_stride": 1}),
    ("recap", QUICK | {"rollouts": "value_and_policy", "demonstrations": "advantage", "takeover": "cut"}),
    ("recap", QUICK | {"value_refresh": 2, "refresh_steps": 1, "condition_negatives": False, "install": "cold"}),
    ("weighted_bc", QUICK | {"rollouts": "value_and_policy", "value_refresh": 3, "refresh_steps": 1}),
]


@pytest.mark.parametrize("rule", ALGORITHM_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_algorithm_keeps(rule: Callable[[MakeAlgorithm], None], name: str, settings: dict[str, object]) -> None:
    rule(lambda: make_algorithm(name, settings, CONTROL_HZ))


class Fickle(Imitation):
    """Another opinion at every learner step."""

    collection = Collection.NOTHING

    def __init__(self, version: Callable[[int], int]) -> None:
        self._step = 0
        self._version = version

    def refresh(self, learner_step: int, library: Library) -> bool:
        before, self._step = self._step, learner_step
        return before != learner_step

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        labels = demonstration_labels(episode.num_steps)
        weight = labels.loss_weight / (1 + self._step)
        return replace(labels, loss_weight=weight, label_version=self._version(self._step))


def test_labels_that_change_have_to_say_which_they_are() -> None:
    labels_stay_until_refresh_says_otherwise(lambda: Fickle(lambda step: step))
    with pytest.raises(AssertionError, match="label_version is 0"):
        labels_stay_until_refresh_says_otherwise(lambda: Fickle(lambda _: 0))
    with pytest.raises(AssertionError, match="label_version did not"):
        labels_stay_until_refresh_says_otherwise(lambda: Fickle(lambda _: 1))
