"""Learning rules: pure learning, no I/O, no threads; one file per rule.

To add one: implement `Algorithm` (imitation rules inherit `Imitation` and write `annotate`), give it a frozen
settings dataclass with defaults, add both to `ALGORITHMS`, and run `sop.testing.contracts.algorithm` over it.
The loop that trains knows none of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sop.algorithms.base import Algorithm, Imitation, LossPolicy
from sop.algorithms.bc import BehaviourCloning, BehaviourCloningSettings
from sop.algorithms.hg_dagger import HgDagger, HgDaggerSettings
from sop.algorithms.offline_extra import OfflineExtra
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
}


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
