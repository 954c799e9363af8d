"""The learner's side: snapshots go to the store on a thread of their own, tensors first, manifest last."""

import logging
import random
import threading
import time
from bisect import insort
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sop.broadcast.announce import announce
from sop.broadcast.encoder import EncodedPolicy, PolicyEncoder, stored_manifest
from sop.broadcast.fetch import fetch_manifest, parent_at, published_versions
from sop.broadcast.manifest import BASE_VERSION, FULL, LINEAGE, FileEntry, PolicyFacts, TensorEntry
from sop.broadcast.retention import Retention
from sop.broadcast.vouching import Vouching
from sop.broadcast.weights import undescribed
from sop.core import layout
from sop.core.codec import content_hash
from sop.core.errors import AlreadyExists, RunError, StoreUnavailable
from sop.core.events import PolicyPublished
from sop.core.lineage import Lineage
from sop.core.policy import Weights
from sop.transport.base import Data, EventBus, ObjectStore
from sop.transport.retry import Backoff, put_retrying, retrying
from sop.trust import SigningKey

_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class _Snapshot:
    weights: Weights
    facts: PolicyFacts
    lineage: Lineage | None
    created_utc_ns: int
    durable: bool


class Publisher:
    """Publishes policies without making the learner wait. One per run; used from one thread.

        publisher.publish_now(weights, facts)        # version 0, before the fleet starts
        while training:
            ...
            publisher.publish(weights, facts, lineage)   # every 25 steps, returns at once
        publisher.publish_now(weights, facts)        # the final policy
        publisher.close()

    Per policy, on the thread: hash, encode -> put tensors, lineage, signature, manifest -> publish event ->
    retention. A kill between any two leaves no half policy: readers believe manifests only. Version numbers go
    up by one and start above everything in the store, folders without a manifest included (a put never
    replaces, so these are spent). Weights may lack tensors of version 0: these have not changed since.

    What `publish` writes survives a killed process, not a power cut: it is verified by hash and soon replaced.
    What `publish_now` writes survives both, and one form of it stands alone.

    Bounded: at most one snapshot waits while another is written; a newer one replaces it (`skipped`).
    An unavailable store is tried again with growing pauses, about 13 s in all by default; an unavailable bus
    is not (`lost_events`): subscribers find the policy by listing.

    Args:
        store: where policies go.
        bus: where they are announced.
        keep_policies: newest published versions whose tensors are kept; manifests are kept for ever.
        signer, run, fence: as for `Vouching`: who signs for which run, and how long it may.
        protected: versions whose tensors are kept too.
        encoding: "full" writes one file for readers on this machine; "packed" writes deltas for those behind a
            link; "auto" is full when the store maps its objects.
        keyframe_every: with "packed", every so many versions one that stands alone.
        threads: processor threads that hash and encode.
        clock_ns: UTC nanoseconds.
        rng: jitter of the pauses.
        attempts: tries per put.
        pause: waits for so many seconds between tries.

    Raises:
        ValueError: keep_policies or attempts below 1, or an unknown encoding or cadence.
        StoreUnavailable: the store cannot be listed.
    """

    def __init__(
        self,
        store: ObjectStore,
        bus: EventBus,
        *,
        keep_policies: int,
        signer: SigningKey | None = None,
        run: str = "",
        fence: Callable[[], int] | None = None,
        protected: Collection[int] = (0,),
        encoding: str = FULL,
        keyframe_every: int = 4,
        threads: int = 2,
        clock_ns: Callable[[], int] = time.time_ns,
        rng: random.Random | None = None,
        attempts: int = 8,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        if keep_policies < 1 or attempts < 1:
            raise ValueError(f"keep_policies and attempts must be at least 1, got {keep_policies} and {attempts}")
        self._store = store
        self._bus = bus
        self._vouching = Vouching(signer, run, fence, clock_ns)
        self._encoder = PolicyEncoder(
            store,
            encoding,
            keyframe_every,
            threads,
            lambda: self._retrying(lambda: fetch_manifest(store, BASE_VERSION)),
        )
        self._clock_ns = clock_ns
        self._attempts = attempts
        self._backoff = Backoff(rng or random.Random())
        self._pause = pause
        self._published = list(published_versions(store))
        self._retention = Retention(store, keep_policies, protected)
        self._next_version = self._retention.next_version
        self._parent: int | None = None
        self._published_step = 0
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
    def branch(self) -> tuple[int, int] | None:
        """(parent of the next version, newest version of all): what `continue_from_step` takes; None before there
        is a parent."""
        with self._changed:
            return None if self._parent is None else (self._parent, self._published[-1])

    @property
    def published_step(self) -> int:
        """Learner step of the policy that the next one will have as its parent; 0 for the base policy."""
        with self._changed:
            return self._published_step

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

    def continue_from(self, version: int | None) -> None:
        """The version that the training goes on from: the parent of the next policy. Call it after a restart.

        Without it the first policy of a publisher has no parent; each further one has the one before.
        """
        with self._changed:
            self._parent = version

    def continue_from_step(self, learner_step: int, then: tuple[int, int] | None = None) -> int:
        """As `continue_from`, with the policy that a checkpoint at `learner_step` continues: see `parent_at`. Blocks.

        Returns:
            `published_step`.
        """
        with self._changed:
            versions = list(self._published)
        found = self._retrying(lambda: parent_at(self._store, versions, learner_step, then))
        if found is not None:
            with self._changed:
                self._parent, self._published_step = found
        return self.published_step

    def publish(self, weights: Weights, facts: PolicyFacts, lineage: Lineage | None = None) -> None:
        """Hand over a snapshot and return at once. The arrays must not be changed afterwards.

        Args:
            weights: all tensors, or those that can differ from version 0.
            facts: what is known about them.
            lineage: what they learned from since the snapshot before. When that one is replaced by this one, both
                are stored as one.

        Raises:
            ValueError: the publisher is closed.
            Exception: what went wrong with an earlier snapshot on the thread; this one is not taken.
        """
        with self._changed:
            self._require_open()
            self._raise_failure()
            if self._waiting is not None:
                self._skipped += 1
                older = self._waiting.lineage
                lineage = older if lineage is None else lineage if older is None else older.followed_by(lineage)
            self._waiting = _Snapshot(dict(weights), facts, lineage, self._clock_ns(), durable=False)
            self._changed.notify_all()

    def publish_now(self, weights: Weights, facts: PolicyFacts, lineage: Lineage | None = None) -> int:
        """Write what waits, then this snapshot; returns its version. Blocks until it is durable in the store.

        Args:
            weights, facts, lineage: as for `publish`.

        Raises:
            ValueError: the publisher is closed, or the weights cannot travel.
            StoreUnavailable: the store stayed away for all attempts.
            RunError: another learner publishes to the same run.
            Exception: what went wrong with an earlier snapshot on the thread; this one is not taken.
        """
        snapshot = _Snapshot(weights, facts, lineage, self._clock_ns(), durable=True)
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
        version = self._next_version
        encoded = self._encoder.encode(version, snapshot.weights, alone=snapshot.durable)
        lineage = None if snapshot.lineage is None else snapshot.lineage.encode()
        draft = encoded.tensors if encoded.table.done() else undescribed(encoded.arrays)
        self._stored_manifest(snapshot, encoded, lineage, draft)  # nothing is written when the facts are wrong
        self._next_version += 1
        self._retention.begun(version, [file.key for file in encoded.files], on_base=encoded.on_base)
        try:
            for file, form in zip(encoded.files, encoded.forms, strict=True):
                self._put(file.key, form.parts, snapshot.durable)
            stored = self._stored_manifest(snapshot, encoded, lineage, encoded.tensors)
            if lineage is not None:
                self._put(layout.policy_lineage(version), lineage, durable=True)
            for key, data in self._vouching.objects(version, stored):  # the manifest is the last
                self._put(key, data, durable=snapshot.durable or data is stored)
        except AlreadyExists as error:
            raise RunError(
                f"policy {version} appeared in the store while this learner runs: another learner publishes to the "
                "same run. Stop one of them, then start again"
            ) from error
        self._encoder.published(encoded)
        with self._changed:
            insort(self._published, version)
            self._parent = version
            self._published_step = snapshot.facts.learner_step
        event = PolicyPublished(version=version, manifest=key, published_utc_ns=self._clock_ns())
        if not announce(self._bus, event, key):
            with self._changed:
                self._lost_events += 1
        self._put_further_forms(encoded)
        self._retention.apply(self._published)
        return version

    def _put_further_forms(self, encoded: EncodedPolicy) -> None:
        """What robots that keep up do not need; found through the next manifest."""
        stored: list[FileEntry] = []
        try:
            for file, form in self._encoder.afterwards(encoded):
                self._put(file.key, form.parts, durable=False)
                self._retention.begun(encoded.version, [file.key], on_base=encoded.on_base)
                stored.append(file)
        except (StoreUnavailable, AlreadyExists) as error:
            _log.warning("policy %d has no keyframe: the next one stands alone (%s)", encoded.version, error)
            self._encoder.start_over()
            return
        if stored:
            self._encoder.added(encoded, stored)

    def _stored_manifest(
        self, snapshot: _Snapshot, encoded: EncodedPolicy, lineage: bytes | None, tensors: Mapping[str, TensorEntry]
    ) -> bytes:
        entry = None
        if lineage is not None:
            entry = FileEntry(layout.policy_lineage(encoded.version), len(lineage), content_hash(lineage), LINEAGE)
        with self._changed:
            parent = self._parent
        return stored_manifest(
            encoded, snapshot.facts, tensors, entry, parent_version=parent, created_utc_ns=snapshot.created_utc_ns
        )

    def _retrying(self, read: Callable[[], Answer]) -> Answer:
        return retrying(read, attempts=self._attempts, backoff=self._backoff, pause=self._pause)

    def _put(self, key: str, data: Data, durable: bool) -> None:
        put_retrying(
            self._store, key, data, attempts=self._attempts, backoff=self._backoff, pause=self._pause, durable=durable
        )
