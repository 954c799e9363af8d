"""Trainable policies. To add one: implement `TrainablePolicy`, give it a settings dataclass, add it to `POLICIES`.

The contract test `sop.testing.contracts.policy` says what an implementation has to keep.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from sop.core.embodiment import Embodiment
from sop.core.policy import PolicySpec
from sop.core.settings import build_settings, suggestion
from sop.policies.base import TrainablePolicy, freeze
from sop.policies.flow_vla import FlowVLA
from sop.policies.normalization import compute_normalization
from sop.policies.settings import Settings

__all__ = [
    "POLICIES",
    "PolicyKind",
    "TrainablePolicy",
    "check_policy",
    "compute_normalization",
    "freeze",
    "make_policy",
    "make_spec",
]


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """One entry of the registry."""

    settings: type[Any]
    """Frozen dataclass with defaults for everything; has an `action_horizon`."""
    build: Callable[[PolicySpec, int], TrainablePolicy]
    """Makes the policy with fresh weights from a spec and a seed."""


POLICIES: dict[str, PolicyKind] = {
    "flow_vla": PolicyKind(Settings, FlowVLA),
}


def make_spec(
    kind: str,
    settings: Mapping[str, Any],
    embodiment: Embodiment,
    execution_horizon: int,
    normalization: Mapping[str, tuple[float, ...]],
) -> PolicySpec:
    """Describe a policy completely: settings that are not named are written down with their defaults.

    Args:
        kind: name in `POLICIES`.
        settings: settings of that kind that differ from the defaults.
        embodiment: the robot.
        execution_horizon: steps executed before the next inference.
        normalization: from `compute_normalization`.

    Raises:
        ValueError: unknown kind or setting, or a value out of range.
    """
    checked = build_settings(_kind(kind).settings, settings, f"policy {kind}")
    return PolicySpec(
        kind=kind,
        config=msgspec.json.decode(msgspec.json.encode(checked)),
        embodiment=embodiment,
        action_horizon=checked.action_horizon,
        execution_horizon=execution_horizon,
        normalization={name: tuple(values) for name, values in normalization.items()},
    )


def check_policy(kind: str, settings: Mapping[str, Any]) -> None:
    """Make sure that a kind exists and takes these settings, without making a policy.

    Raises:
        ValueError: unknown kind or setting, or a value out of range.
    """
    build_settings(_kind(kind).settings, settings, f"policy {kind}")


def make_policy(spec: PolicySpec, seed: int = 0) -> TrainablePolicy:
    """A policy with fresh weights (equal seeds give equal weights), version 0.

    Raises:
        ValueError: the spec names an unknown kind or does not fit together.
    """
    return _kind(spec.kind).build(spec, seed)


def _kind(kind: str) -> PolicyKind:
    if kind not in POLICIES:
        raise ValueError(f"no policy is called {kind!r}. {suggestion(kind, POLICIES)}")
    return POLICIES[kind]
