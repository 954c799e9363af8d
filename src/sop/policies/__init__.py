"""Trainable policies. To add one: implement `TrainablePolicy`, give it a settings dataclass, add it to `POLICIES`.

The contract test `sop.testing.contracts.policy` says what an implementation has to keep.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch import nn

from sop.core.embodiment import Embodiment
from sop.core.policy import PolicySpec
from sop.core.settings import build_settings, suggestion
from sop.policies.base import BranchVelocities, ConditionedPolicy, TrainablePolicy, freeze
from sop.policies.flow_vla import FlowVLA
from sop.policies.network import flow_blocks
from sop.policies.normalization import compute_normalization
from sop.policies.settings import Settings

__all__ = [
    "POLICIES",
    "BranchVelocities",
    "ConditionedPolicy",
    "PolicyKind",
    "TrainablePolicy",
    "check_policy",
    "compute_normalization",
    "conditioned",
    "freeze",
    "make_policy",
    "make_spec",
    "shard_blocks",
]


def _layers(module: nn.Module) -> list[nn.Module]:
    """The children of all lists of modules in a network, inner ones first: the layers of most transformers."""
    found = [child for part in module.modules() if isinstance(part, nn.ModuleList) for child in part]
    return list(reversed(found))


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """One entry of the registry."""

    settings: type[Any]
    """Frozen dataclass with defaults for everything; has an `action_horizon`."""
    build: Callable[[PolicySpec, int], TrainablePolicy]
    """Makes the policy with fresh weights from a spec and a seed."""
    blocks: Callable[[nn.Module], Iterable[nn.Module]] = _layers
    """Parts of its module whose weights are gathered together when every rank keeps a share of them, inner ones first.
    A block is used by calling it, in no other way; what is in no block is gathered for a whole step."""


POLICIES: dict[str, PolicyKind] = {
    "flow_vla": PolicyKind(Settings, FlowVLA, flow_blocks),
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
        config=_as_json(checked),
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


def shard_blocks(policy: TrainablePolicy) -> list[nn.Module]:
    """The blocks of a policy by its kind, inner ones first; see `PolicyKind.blocks`."""
    return list(_kind(policy.spec.kind).blocks(policy.module))


def conditioned(policy: TrainablePolicy, changes: Mapping[str, Any], seed: int) -> TrainablePolicy:
    """The same weights in a policy with other settings, e.g. `{"indicator": "embed"}` on a base that never saw one.

    Tensors that only the new policy has are as fresh ones are (an indicator's tables: zero, so that the policy acts
    as before), tensors that only the old one has are left behind. The version stays. What is frozen is not carried
    over, nor are the device and the state of the sampling noise: do this before training.

    Args:
        policy: not changed; the result shares no memory with it, except when it is `policy` itself.
        changes: settings of its kind; empty returns `policy` itself.
        seed: of the weights that are new and of the sampling noise until `reset`.

    Raises:
        ValueError: not settings of that kind, or settings that give a tensor of both another shape.
    """
    if not changes:
        return policy
    spec, where = policy.spec, f"policy {policy.spec.kind}"
    settings = build_settings(_kind(spec.kind).settings, {**spec.config, **changes}, where)
    made = make_policy(replace(spec, config=_as_json(settings)), seed)
    old, weights = policy.export(), made.export()
    for name in weights.keys() & old.keys():
        if old[name].shape != weights[name].shape:
            raise ValueError(
                f"{where}: with {dict(changes)} {name} would have shape {weights[name].shape}, "
                f"the weights have {old[name].shape}: change settings that keep the shapes"
            )
        weights[name] = old[name]
    made.load(weights, policy.version)
    return made


def _as_json(settings: Any) -> dict[str, Any]:
    config: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settings))
    return config


def _kind(kind: str) -> PolicyKind:
    if kind not in POLICIES:
        raise ValueError(f"no policy is called {kind!r}. {suggestion(kind, POLICIES)}")
    return POLICIES[kind]
