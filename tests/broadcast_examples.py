"""Small policies for the tests of publisher and subscriber."""

from typing import Any

import msgspec
import numpy as np

from sop.broadcast.manifest import FileEntry, PolicyFacts, PolicyManifest
from sop.broadcast.weights import encode_weights, file_hash
from sop.core import layout
from sop.core.embodiment import Embodiment
from sop.core.policy import Conditioning, PolicySpec, Weights
from sop.testing.memory import MemoryStore

PATIENCE_S = 30.0
"""Upper bound of waits that end as soon as what they wait for has happened."""

ROBOT = Embodiment(
    name="arm",
    cameras={"front": (64, 64)},
    state_names=("x", "gripper"),
    action_names=("dx", "gripper"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    hold_action=(0.0, None),
    max_action_change=(0.5, None),
    control_hz=20.0,
)


def weights(number: int) -> Weights:
    """Tensors that differ for every number."""
    return {
        "body.weight": np.arange(12, dtype=np.float32).reshape(3, 4) + number,
        "head.bias": np.full(5, number, np.float16),
        "steps": np.asarray(number, np.int64),
    }


def facts(step: int = 0, embodiment: Embodiment = ROBOT) -> PolicyFacts:
    spec = PolicySpec(
        kind="flow_vla",
        config={"width": 64, "layers": [1, 2]},
        embodiment=embodiment,
        action_horizon=16,
        execution_horizon=8,
        normalization={"state_mean": (0.5, 1.5)},
    )
    return PolicyFacts(
        learner_step=step,
        algorithm="hg_dagger",
        spec=spec,
        conditioning=Conditioning(advantage_indicator=True, guidance=1.5),
        online_episodes=3,
        offline_episodes=40,
        config_hash="c0ffee",
        code_version="0.1.0",
    )


def policy(version: int, tensors: Weights | None = None, **changes: Any) -> tuple[PolicyManifest, bytes]:
    """(manifest, weights file) of a version as the publisher makes them, with changed fields of the manifest."""
    data, entries = encode_weights(weights(version) if tensors is None else tensors)
    file = FileEntry(layout.policy_weights(version), len(data), file_hash(data))
    fields: dict[str, Any] = {name: getattr(facts(version), name) for name in PolicyFacts.__dataclass_fields__}
    fields |= {"version": version, "parent_version": None, "created_utc_ns": 1000 + version}
    fields |= {"files": (file,), "tensors": entries}
    return PolicyManifest(**(fields | changes)), bytes(data)


def as_json(manifest: PolicyManifest) -> dict[str, Any]:
    """A manifest as plain values, to be changed into what a hostile or newer publisher would write."""
    plain: dict[str, Any] = msgspec.json.decode(manifest.to_json())
    return plain


def place(store: MemoryStore, manifest: PolicyManifest | dict[str, Any], data: bytes | None, version: int) -> None:
    """Put a policy under a version, valid or not."""
    if data is not None:
        store.tamper(layout.policy_weights(version), data)
    store.tamper(layout.policy_manifest(version), msgspec.json.encode(manifest))
