"""Small policies for the tests of publisher and subscriber."""

import random
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from sop.broadcast import Subscriber
from sop.broadcast.manifest import FileEntry, PolicyFacts, PolicyManifest
from sop.broadcast.weights import describe, encode_full, open_full, travelling, verify
from sop.core import layout
from sop.core.codec import content_hash
from sop.core.embodiment import Embodiment
from sop.core.events import TOPIC_POLICIES, PolicyPublished, encode_event
from sop.core.policy import Conditioning, PolicySpec, Weights
from sop.testing.memory import MemoryBus, MemoryStore
from sop.transport import ObjectStore

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
    arrays = travelling(weights(version) if tensors is None else tensors)
    full, entries = encode_full(arrays), describe(arrays)
    data = b"".join(full.parts)
    file = FileEntry(layout.policy_weights(version), full.num_bytes, full.hash)
    fields: dict[str, Any] = {name: getattr(facts(version), name) for name in PolicyFacts.__dataclass_fields__}
    fields |= {"version": version, "parent_version": None, "created_utc_ns": 1000 + version}
    fields |= {"files": (file,), "tensors": entries}
    return PolicyManifest(**(fields | changes)), data


def file_of(version: int, data: bytes) -> FileEntry:
    """The entry of somebody who vouches for these bytes of a full form."""
    start = 8 + int.from_bytes(data[:8], "little")
    return FileEntry(layout.policy_weights(version), len(data), content_hash(data[:start]))


def read_weights(data: bytes, manifest: PolicyManifest) -> Weights:
    """The tensors of a full form, every byte of them verified."""
    (file,) = manifest.files
    name = f"policy {manifest.version}"
    found = open_full(data, file, manifest.tensors, name)
    verify(found, manifest.tensors, name)
    return found


def as_json(manifest: PolicyManifest) -> dict[str, Any]:
    """A manifest as plain values, to be changed into what a hostile or newer publisher would write."""
    plain: dict[str, Any] = msgspec.json.decode(manifest.to_json())
    return plain


def place(store: MemoryStore, manifest: PolicyManifest | dict[str, Any], data: bytes | None, version: int) -> None:
    """Put a policy under a version, valid or not."""
    if data is not None:
        store.tamper(layout.policy_weights(version), data)
    store.tamper(layout.policy_manifest(version), msgspec.json.encode(manifest))


def bytes_of(tensors: object) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in dict(tensors).items()}  # type: ignore[call-overload]


class Gate:
    """Lets a hook be held at one place until the test opens it."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE_S)


NEVER_S = 1e9
"""A listing that is not due while a test runs."""


class FarStore:
    """A store behind a link: its objects cannot be mapped. Counts the bytes that came over it."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.put, self.keys, self.delete = store.put, store.keys, store.delete
        self.got: list[tuple[str, slice | None]] = []
        self.num_bytes = 0

    def get(self, key: str, span: slice | None = None) -> bytes:
        self.got.append((key, span))
        data = self.store.get(key, span)
        self.num_bytes += 0 if key.endswith(".json") else len(data)
        return data


class World:
    """A store, a bus, a hand-wound clock for the listings, and subscribers that are closed at the end."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.store = MemoryStore(before=lambda *call: self.log.append(call))
        self.bus = MemoryBus()
        self.now_s = 0.0
        self.subscribers: list[Subscriber] = []

    def subscribe(self, store: ObjectStore | None = None, **options: Any) -> Subscriber:
        settings: dict[str, Any] = {
            "list_every_s": NEVER_S,
            "poll_s": 0.01,
            "monotonic": lambda: self.now_s,
            "clock_ns": lambda: 777,
            "rng": random.Random(0),
        }
        robot = options.pop("embodiment", ROBOT)
        subscriber = Subscriber(store or self.store, self.bus, robot, **(settings | options))
        self.subscribers.append(subscriber)
        return subscriber

    def announce(self, version: int, attempt: int = 0, manifest: str | None = None) -> None:
        key = layout.policy_manifest(version) if manifest is None else manifest
        event = PolicyPublished(version=version, manifest=key, published_utc_ns=5000 + version)
        self.bus.publish(TOPIC_POLICIES, encode_event(event), f"{key}-{attempt}")

    def publish(self, version: int) -> None:
        place(self.store, *policy(version), version)
        self.announce(version)

    def fetched(self, name: str) -> list[int]:
        """Versions whose object of this name was asked for."""
        asked = [key for operation, key in self.log if operation in ("get", "map")]
        return [layout.version_of(key) for key in asked if key.endswith(name)]


def eventually(subscriber: Subscriber, condition: Callable[[], bool]) -> None:
    with subscriber._changed:
        assert subscriber._changed.wait_for(condition, PATIENCE_S)
