"""The robot of link.py: a real subscriber behind an emulated link, two copies of a torch policy, one swap."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from weights_artifact import ROBOT

from sop.broadcast import PolicyManifest, PolicyReader, StagedPolicy, Subscriber, fetch_manifest, prepare_with
from sop.core.embodiment import Observation
from sop.core.policy import ActionChunk, Conditioning, Policy, PolicySpec, Weights
from sop.policies.base import load_weights
from sop.testing.link import LinkStore
from sop.transport import Cursor, Data, EventBus, ObjectStore

TIMEOUT_S = 600.0
_TORCH = {np.dtype(ml_dtypes.bfloat16): torch.bfloat16, np.dtype(np.float32): torch.float32}


class LoadedPolicy:
    """A policy that cannot act, with the real cost of loading: every tensor is checked and copied into torch memory."""

    def __init__(self, spec: PolicySpec, like: Weights) -> None:
        self.version = -1
        self._spec = spec
        self._module = nn.Module()
        for name, array in like.items():
            tensor = torch.zeros(array.shape, dtype=_TORCH[array.dtype])
            self._module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def spec(self) -> PolicySpec:
        """See `Policy`."""
        return self._spec

    def load(self, weights: Weights, version: int) -> None:
        """See `Policy`."""
        load_weights(self._module, weights)
        self.version = version

    def infer(self, observation: Observation, instruction: str, conditioning: Conditioning) -> ActionChunk:
        """Not what is measured here."""
        raise NotImplementedError

    def reset(self, seed: int) -> None:
        """Nothing to forget."""


class Road:
    """`ObjectStore` that goes over whatever `way` it is told: first none, to give the robot its past, then the link."""

    def __init__(self, way: ObjectStore) -> None:
        self.way = way

    def put(self, key: str, data: Data, *, durable: bool = True) -> None:
        """See `ObjectStore`."""
        self.way.put(key, data, durable=durable)

    def get(self, key: str, span: slice | None = None) -> bytes:
        """See `ObjectStore`."""
        return self.way.get(key, span)

    def keys(self, prefix: str, after: str | None = None) -> Iterator[str]:
        """See `ObjectStore`."""
        return self.way.keys(prefix, after)

    def folders(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore`."""
        return self.way.folders(prefix)

    def delete(self, key: str) -> None:
        """See `ObjectStore`."""
        self.way.delete(key)


class DelayedBus:
    """`EventBus` whose events take a delay to arrive."""

    def __init__(self, bus: EventBus, delay_s: float) -> None:
        self._bus = bus
        self._delay_s = delay_s

    def publish(self, topic: str, event: bytes, event_id: str) -> None:
        """See `EventBus`."""
        self._bus.publish(topic, event, event_id)

    def poll(self, topic: str, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
        """See `EventBus`."""
        found = self._bus.poll(topic, after, timeout_s)
        if found:
            time.sleep(self._delay_s)
        return found

    def close(self) -> None:
        """See `EventBus`; the bus behind stays open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """How a policy came to a robot."""

    version: int
    seconds: float
    """Until the policy was swapped in."""
    num_bytes: int
    """Over the link, manifests and listings included."""
    phases: Mapping[str, Any]


class Robot:
    """A robot behind a link that holds a version, or nothing, and waits between two episodes.

    A robot that has acted has two copies of the policy, one of them spare; a new robot makes its first one.

    Args:
        store: the learner's.
        bus: as the robot sees it.
        link: between the robot and the store.
        held: version that it acts with already, None for a new robot; got before the link counts.
        like: names, shapes and dtypes of the policy.
    """

    def __init__(self, store: ObjectStore, bus: EventBus, link: LinkStore, *, held: int | None, like: Weights) -> None:
        self._link = link
        self._bus = bus
        self._held = held
        self._road = Road(store)
        self._reader = PolicyReader(self._road)
        self._load = prepare_with(lambda spec: LoadedPolicy(spec, like))
        self._acting: Policy | None = None
        self._spare: Policy | None = None
        if held is not None:
            past = self._reader.read(fetch_manifest(store, held))
            self._acting = self._load(past.manifest, past.weights, None)
            self._spare = self._load(past.manifest, past.weights, None)
        self._road.way = link
        self._received_before = link.received_bytes

    def connect(self) -> Subscriber:
        """Begin to listen. The caller closes it."""
        return Subscriber(
            self._road,
            self._bus,
            ROBOT,
            prepare=self._prepare,
            reader=self._reader,
            newer_than=self._held,
            poll_s=0.1,
            clock_ns=time.monotonic_ns,
        )

    def swap(self, subscriber: Subscriber, start_ns: int) -> Arrival:
        """Wait until a version is staged and act with it; its time begins at `start_ns`, monotonic."""
        staged = subscriber.wait_first(TIMEOUT_S)
        self._acting = staged.policy
        end_ns = time.monotonic_ns()
        return Arrival(
            version=staged.version,
            seconds=(end_ns - start_ns) / 1e9,
            num_bytes=self._link.received_bytes - self._received_before,
            phases=_phases(staged, start_ns),
        )

    def _prepare(self, manifest: PolicyManifest, weights: Weights, spare: Policy | None) -> Policy:
        own, self._spare = self._spare, None
        return self._load(manifest, weights, spare or own)


def _phases(staged: StagedPolicy, start_ns: int) -> dict[str, Any]:
    return {
        "published_s": max(0.0, (staged.published_utc_ns - start_ns) / 1e9),
        "fetch_s": staged.cost.fetch_s,
        "decode_s": staged.cost.decode_s,
        "verify_s": staged.cost.verify_s,
        "prepare_s": staged.prepare_s,
    }
