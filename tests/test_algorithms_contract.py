"""Every algorithm keeps the rules of `Algorithm`."""

from collections.abc import Callable

import pytest

from sop.algorithms import ALGORITHMS, make_algorithm
from sop.testing.contracts.algorithm import ALGORITHM_RULES, CONTROL_HZ, MakeAlgorithm

SETTINGS = [(name, {}) for name in ALGORITHMS] + [
    ("hg_dagger", {"mode": "iwr", "w_auto": 0.5}),
    ("hg_dagger", {"drop_idle": True, "idle_speed": 20.0}),
    ("hg_dagger", {"handover_s": 0.0, "pre_intervention_s": 0.0, "max_segment_s": 0.2}),
]


@pytest.mark.parametrize("rule", ALGORITHM_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_algorithm_keeps(rule: Callable[[MakeAlgorithm], None], name: str, settings: dict[str, object]) -> None:
    rule(lambda: make_algorithm(name, settings, CONTROL_HZ))
