"""Learning rules: pure learning, no I/O, no threads; one file per rule.

To add one: implement `Algorithm` (imitation rules inherit `Imitation` and write `annotate`), give it a frozen
settings dataclass with defaults, add both to `ALGORITHMS`, and run `sop.testing.contracts.algorithm` over it.
The loop that trains knows none of them.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from sop.algorithms.base import Algorithm, EpisodeFacts, LossPolicy
from sop.algorithms.bc import BehaviourCloning, BehaviourCloningSettings
from sop.algorithms.hg_dagger import HgDagger, HgDaggerSettings
from sop.algorithms.offline_extra import OfflineExtra

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmKind", "EpisodeFacts", "LossPolicy", "make_algorithm"]


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
        raise ValueError(f"no algorithm is called {name!r}. {_hint(name, ALGORITHMS)}")
    kind = ALGORITHMS[name]
    known = [field.name for field in dataclasses.fields(kind.settings)]
    for given in settings:
        if given not in known:
            raise ValueError(f"algorithm {name}: no setting is called {given!r}. {_hint(given, known)}")
    try:
        checked = msgspec.convert(dict(settings), type=kind.settings)
    except msgspec.ValidationError as error:
        raise ValueError(f"algorithm {name}: {error}") from error
    return kind.build(checked, control_hz)


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(known)}."
