"""Learning rules: pure learning, no I/O, no threads; one file per rule. What each learns from:

    name           demonstrations  corrections  the policy's own steps               value function
    bc             yes             -            -                                    -
    offline_extra  yes, and more   -            -                                    -
    hg_dagger      yes             yes          -, or unaided successes (`iwr`)      -
    filtered_bc    yes             yes (*)      of successful episodes               -
    weighted_bc    yes             yes          all, weighted by advantage           yes
    recap          yes             yes          all, told whether they were good     yes

(*) those in successful episodes. Aborted episodes teach nothing to any rule. A rule with a value function needs
rollouts of the base policy before the fleet starts, failures among them.

To add one: implement `Algorithm` (imitation rules inherit `Imitation` and write `annotate`), give it a frozen
settings dataclass with defaults, add both to `ALGORITHMS`, and run `sop.testing.contracts.algorithm` over it.
The loop that trains knows none of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sop.algorithms.base import Algorithm, Imitation, LossPolicy
from sop.algorithms.bc import BehaviourCloning, BehaviourCloningSettings
from sop.algorithms.filtered_bc import FilteredCloning, FilteredCloningSettings
from sop.algorithms.hg_dagger import HgDagger, HgDaggerSettings
from sop.algorithms.offline_extra import OfflineExtra
from sop.algorithms.recap import Recap, RecapSettings
from sop.algorithms.weighted_bc import WeightedCloning, WeightedCloningSettings
from sop.core.settings import build_settings, suggestion

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmKind", "Imitation", "LossPolicy", "make_algorithm"]


@dataclass(frozen=True, slots=True)
class AlgorithmKind:
    """One entry of the registry."""

    settings: type[Any]
    """Frozen dataclass with defaults for everything."""
    build: Callable[[Any, float], Algorithm]
    """Makes the rule from its settings and the robot's control steps per second."""


ALGORITHMS: dict[str, AlgorithmKind] = {
    "hg_dagger": AlgorithmKind(HgDaggerSettings, HgDagger),
    "bc": AlgorithmKind(BehaviourCloningSettings, lambda _settings, _control_hz: BehaviourCloning()),
    "offline_extra": AlgorithmKind(BehaviourCloningSettings, lambda _settings, _control_hz: OfflineExtra()),
    "filtered_bc": AlgorithmKind(FilteredCloningSettings, FilteredCloning),
    "weighted_bc": AlgorithmKind(WeightedCloningSettings, WeightedCloning),
    "recap": AlgorithmKind(RecapSettings, Recap),
}
"""Every rule that a run can name; see the table at the top."""


def make_algorithm(name: str, settings: Mapping[str, Any], control_hz: float) -> Algorithm:
    """A learning rule by name.

    Args:
        name: in `ALGORITHMS`.
        settings: values that differ from the rule's defaults (JSON values).
        control_hz: control steps per second of the robots.

    Raises:
        ValueError: unknown name or setting (with the nearest known one), or a value out of range.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"no algorithm is called {name!r}. {suggestion(name, ALGORITHMS)}")
    kind = ALGORITHMS[name]
    checked = build_settings(kind.settings, settings, f"algorithm {name}")
    return kind.build(checked, control_hz)
