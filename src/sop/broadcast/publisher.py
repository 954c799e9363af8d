"""The learner's side: snapshots go to the store on a thread of their own, tensors first, manifest last."""

import logging
import random
import threading
import time
from bisect import insort
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

from sop.broadcast.fetch import published_versions
from sop.broadcast.manifest import FileEntry, PolicyFacts, PolicyManifest
from sop.broadcast.weights import encode_weights
from sop.core import layout
from sop.core.codec import content_hash
from sop.core.errors import AlreadyExists, RunError, StoreUnavailable
from sop.core.events import TOPIC_POLICIES, PolicyPublished, encode_event
from sop.core.policy import Weights
from sop.transport.base import EventBus, ObjectStore
from sop.transport.retry import Backoff, put_retrying

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    weights: Weights
    facts: PolicyFacts
    created_utc_ns: int


class Publisher:
    """Publishes policies without making the learner wait. One per run; used from one thread.

        publisher.publish_now(weights, facts)        # version 0, before the fleet starts
        while training:
            ...
            publisher.publish(weights, facts)        # every 25 steps, returns at once
        publisher.publish_now(weights, facts)        # the final policy
        publisher.close()

    Per policy, on the thread: put tensors -> put manifest -> publish event -> retention. A kill between any
    two leaves no half policy: readers believe manifests only. Version numbers go up by one and start above
    everything in the store, folders without a manifest included (a put never replaces, so these are spent).

    Bounded: at most one snapshot waits while another is written; a newer one replaces it (`skipped`).
    An unavailable store is tried again with growing pauses, about 13 s in all by default; an unavailable bus
    is not (`lost_events`): subscribers find the policy by listing.

    Args:
        store: where policies go.
        bus: where they are announced.
        keep_policies: newest published versions whose tensors are kept; manifests are kept for ever.
        protected: versions whose tensors are kept too.
        clock_ns: UTC nanoseconds.
        rng: jitter of the pauses.
        attempts: tries per put.
        pause: waits for so many seconds between tries.

    Raises:
        ValueError: keep_policies or attempts below 1.
        StoreUnavailable: the store cannot be listed.
    """

    def __init__(
        self,
        store: ObjectStore,
        bus: EventBus,
        *,
        keep_policies: int,
        protected: Collection[int] = (0,),
        clock_ns: Callable[[], int] = time.time_ns,
        rng: random.Random | None = None,
        attempts: int = 8,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        if keep_policies < 1 or attempts < 1:
            raise ValueError(f"keep_policies and attempts must be at least 1, got {keep_policies} and {attempts}")
        self._store = store
        self._bus = bus
        self._keep_policies = keep_policies
        self._protected = frozenset(protected)
        self._clock_ns = clock_ns
        self._attempts = attempts
        self._backoff = Backoff(rng or random.Random())
        self._pause = pause
        self._published = list(published_versions(store))
        self._tensors, self._next_version = _read_folders(store)
        self._skipped = 0
        self._lost_events = 0
        self._waiting: _Snapshot | None = None
        self._writing = False
        self._closing = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    @property
    def last_published(self) -> int | None:
        """Newest version in the store that has a manifest, None when there is none."""
        with self._changed:
            return self._published[-1] if self._published else None

    @property
    def skipped(self) -> int:
        """Snapshots that were replaced by newer ones before they were written."""
        with self._changed:
            return self._skipped

    @property
    def lost_events(self) -> int:
        """Policies that could not be announced on the bus."""
        with self._changed:
            return self._lost_events

    def publish(self, weights: Weights, facts: PolicyFacts) -> None:
        """Hand over a snapshot and return at once. The arrays must not be changed afterwards.

        Raises:
            ValueError: the publisher is closed.
            Exception: what went wrong with an earlier snapshot on the thread; this one is not taken.
        """
        with self._changed:
            self._require_open()
            self._raise_failure()
            if self._waiting is not None:
                self._skipped += 1
            self._waiting = _Snapshot(dict(weights), facts, self._clock_ns())
            self._changed.notify_all()

    def publish_now(self, weights: Weights, facts: PolicyFacts) -> int:
        """Write what waits, then this snapshot; returns its version. Blocks until it is in the store.

        Raises:
            ValueError: the publisher is closed, or the weights cannot travel.
            StoreUnavailable: the store stayed away for all attempts.
            RunError: another learner publishes to the same run.
            Exception: what went wrong with an earlier snapshot on the thread; this one is not taken.
        """
        snapshot = _Snapshot(weights, facts, self._clock_ns())
        with self._changed:
            self._require_open()
            self._changed.wait_for(lambda: self._waiting is None and not self._writing)
            self._raise_failure()
            self._writing = True
        try:
            return self._write(snapshot)
        finally:
            self._written()

    def close(self, timeout_s: float | None = None) -> None:
        """Write what waits, then stop the thread. Blocks for at most `timeout_s` (None: as long as it takes).

        Raises:
            RunError: the store hangs, the time is over.
            Exception: what went wrong on the thread and was not raised yet.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise RunError(f"the last policy was not written within {timeout_s} s: check the store")
        with self._changed:
            self._raise_failure()

    def _require_open(self) -> None:
        if self._closing:
            raise ValueError("the publisher is closed")

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        """Wait for a snapshot and write it; False when closing. Holds no snapshot while it waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (self._waiting is not None and not self._writing))
            snapshot, self._waiting = self._waiting, None
            if snapshot is None:
                return False
            self._writing = True
        try:
            self._write(snapshot)
        except BaseException as error:  # noqa: BLE001  the thread hands what went wrong to its owner
            with self._changed:
                self._failure = error
        finally:
            self._written()
        return True

    def _written(self) -> None:
        with self._changed:
            self._writing = False
            self._changed.notify_all()

    def _write(self, snapshot: _Snapshot) -> int:
        data, manifest = self._prepare(snapshot)
        stored = manifest.to_json()
        PolicyManifest.from_json(stored)  # what a robot would refuse must not be published
        version = manifest.version
        self._next_version += 1
        self._tensors.add(version)
        try:
            self._put(manifest.files[0].key, data)
            self._put(layout.policy_manifest(version), stored)
        except AlreadyExists as error:
            raise RunError(
                f"policy {version} appeared in the store while this learner runs: another learner publishes to the "
                "same run. Stop one of them, then start again"
            ) from error
        with self._changed:
            insort(self._published, version)
        self._announce(version)
        self._delete_old()
        return version

    def _prepare(self, snapshot: _Snapshot) -> tuple[memoryview, PolicyManifest]:
        data, tensors = encode_weights(snapshot.weights)
        version = self._next_version
        manifest = PolicyManifest(
            **{field.name: getattr(snapshot.facts, field.name) for field in fields(PolicyFacts)},
            version=version,
            parent_version=self.last_published,
            created_utc_ns=snapshot.created_utc_ns,
            files=(FileEntry(layout.policy_weights(version), len(data), content_hash(data)),),
            tensors=tensors,
        )
        return data, manifest

    def _put(self, key: str, data: bytes | memoryview) -> None:
        put_retrying(self._store, key, data, attempts=self._attempts, backoff=self._backoff, pause=self._pause)

    def _announce(self, version: int) -> None:
        key = layout.policy_manifest(version)
        event = PolicyPublished(version=version, manifest=key, published_utc_ns=self._clock_ns())
        try:
            self._bus.publish(TOPIC_POLICIES, encode_event(event), event_id=key)
        except StoreUnavailable as error:
            with self._changed:
                self._lost_events += 1
            _log.warning("policy %d is published, but was not announced: %s", version, error)

    def _delete_old(self) -> None:
        """Retention. A version leaves the list only when its tensors are gone: what failed is tried next time."""
        oldest_kept = self._published[-self._keep_policies :][0]
        for version in sorted(self._tensors - self._protected):
            if version >= oldest_kept:
                return
            try:
                self._store.delete(layout.policy_weights(version))
            except StoreUnavailable as error:
                _log.warning("tensors of policy %d are not deleted yet: %s", version, error)
                return
            self._tensors.discard(version)


def _read_folders(store: ObjectStore) -> tuple[set[int], int]:
    """(versions that have tensors, first version above every folder), manifest or not."""
    tensors: set[int] = set()
    next_version = 0
    for key in store.keys(f"{layout.POLICIES}/"):
        folder = key.split("/")[1]
        if folder.isdecimal():
            version = int(folder)
            next_version = max(next_version, version + 1)
            if key == layout.policy_weights(version):
                tensors.add(version)
    return tensors, next_version
