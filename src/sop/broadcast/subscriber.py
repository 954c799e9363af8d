"""The robot's side: a thread finds the newest policy, verifies every byte of it, and has it ready to swap in."""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sop.broadcast.fetch import fetch_manifest, fetch_weights, published_versions
from sop.broadcast.manifest import MAX_VERSION, PolicyManifest
from sop.broadcast.weights import check_encoding
from sop.core import layout
from sop.core.embodiment import Embodiment
from sop.core.errors import InvalidRecord, NotFound, PolicyRefused, RunError, StoreUnavailable
from sop.core.events import TOPIC_POLICIES, PolicyPublished, decode_event
from sop.core.policy import Weights
from sop.transport.base import Cursor, EventBus, ObjectStore
from sop.transport.retry import Backoff

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StagedPolicy:
    """A policy that passed every check and waits in memory for the end of the episode."""

    manifest: PolicyManifest
    weights: Weights
    """Read-only arrays."""
    published_utc_ns: int
    """By the learner's clock: when the manifest was in the store; when the event was lost, the earlier moment
    at which the learner handed the snapshot over."""
    staged_utc_ns: int
    """By this robot's clock."""

    @property
    def version(self) -> int:
        """The policy's version."""
        return self.manifest.version


def _accept_all(_manifest: PolicyManifest) -> str | None:
    return None


class Subscriber:
    """Keeps the newest acceptable policy ready. The actor's use of it:

        staged = subscriber.wait_first(timeout_s=60)        # or take() again and again until there is one
        while acting:
            ...                                             # one episode
            if (staged := subscriber.take()) is not None:   # never blocks
                policy.load(staged.weights, staged.version)

    Events are a hint: the store is listed at the start and every `list_every_s`. Only the newest version is
    fetched, those between are skipped; versions never go back. A version that fails a check is refused once
    and for all, said once in the log, and the next older one that is still newer than ours gets its chance;
    until then the robot keeps what it has. An unavailable store or bus is tried again for ever, with pauses.

    Args:
        store: where policies are; read only.
        bus: where they are announced.
        embodiment: this robot; policies for another one are refused.
        accepts: further check of the owner: None, or in words why this robot cannot run the policy. Called on
            the thread, before the tensors are fetched.
        newer_than: the version that the actor has already; older ones are not staged.
        list_every_s: seconds between two listings.
        poll_s: longest wait for an event; `close` takes about as long.
        clock_ns: UTC nanoseconds.
        monotonic: seconds, for when the next listing is due.
        rng: jitter of the pauses.
    """

    def __init__(
        self,
        store: ObjectStore,
        bus: EventBus,
        embodiment: Embodiment,
        *,
        accepts: Callable[[PolicyManifest], str | None] = _accept_all,
        newer_than: int | None = None,
        list_every_s: float = 30.0,
        poll_s: float = 0.5,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._bus = bus
        self._embodiment = embodiment
        self._accepts = accepts
        self._list_every_s = list_every_s
        self._poll_s = poll_s
        self._clock_ns = clock_ns
        self._monotonic = monotonic
        self._backoff = Backoff(rng or random.Random())
        self._list_due_s = monotonic()
        self._cursor: Cursor | None = None
        self._candidates: dict[int, int | None] = {}  # version -> published_utc_ns; None when found by listing
        self._current = newer_than  # newest version that was ever staged
        self._newest = newer_than
        self._staged: StagedPolicy | None = None
        self._refusals: dict[int, str] = {}
        self._problem = ""
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="subscriber", daemon=True)
        self._thread.start()

    @property
    def newest_version(self) -> int | None:
        """Newest version that is known to be published, refused ones included; None when none is."""
        with self._changed:
            return self._newest

    @property
    def refusals(self) -> Mapping[int, str]:
        """Version -> why it was refused, in a sentence. A copy."""
        with self._changed:
            return dict(self._refusals)

    @property
    def problem(self) -> str:
        """Why store or bus cannot be reached at the moment; empty when they can."""
        with self._changed:
            return self._problem

    def take(self) -> StagedPolicy | None:
        """The staged policy, once; None when there is nothing new. Never blocks.

        Raises:
            Exception: the thread died of it; no further policy will come.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            staged, self._staged = self._staged, None
            return staged

    def wait_first(self, timeout_s: float) -> StagedPolicy:
        """Like `take`, but blocks until there is a policy.

        Raises:
            RunError: none within `timeout_s`; says why as far as it is known.
            Exception: the thread died of it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._staged is not None or self._failure is not None, timeout_s)
            refusal = self._refusals[max(self._refusals)] if self._refusals else ""
            reason = self._problem or refusal or "none is published: is the learner running on this store?"
        staged = self.take()
        if staged is None:
            raise RunError(f"no policy to start with after {timeout_s} s: {reason}")
        return staged

    def close(self) -> None:
        """Stop the thread. Blocks until it has noticed: `poll_s`, or the end of a transfer. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._list_when_due()
                    self._stage_newest()
                    self._listen()
                except StoreUnavailable as error:
                    self._say_problem(str(error))
                    self._stop.wait(self._backoff.next_s())
                else:
                    self._say_problem("")
                    self._backoff.reset()
        except BaseException as error:  # noqa: BLE001  the thread hands what went wrong to its owner
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _list_when_due(self) -> None:
        if self._monotonic() < self._list_due_s:
            return
        for version in published_versions(self._store, self._current):
            self._candidates.setdefault(version, None)
            self._know(version)
        self._list_due_s = self._monotonic() + self._list_every_s

    def _listen(self) -> None:
        """Wait for events and note the versions that they announce; what is not one of ours is ignored."""
        wait_s = min(self._poll_s, max(0.0, self._list_due_s - self._monotonic()))
        for cursor, data in self._bus.poll(TOPIC_POLICIES, self._cursor, wait_s):
            self._cursor = cursor
            try:
                event = decode_event(data, PolicyPublished)
            except InvalidRecord as error:
                _log.warning("ignored an event on topic %s: %s", TOPIC_POLICIES, error)
                continue
            if 0 <= event.version <= MAX_VERSION and event.manifest == layout.policy_manifest(event.version):
                self._candidates[event.version] = event.published_utc_ns

    def _stage_newest(self) -> None:
        """Try candidates from the newest down until one is staged. Forgets those that are settled."""
        while self._candidates and not self._stop.is_set():
            version = max(self._candidates)
            if self._current is not None and version <= self._current:
                self._candidates.clear()
                return
            if version not in self._refusals:
                self._try(version, self._candidates[version])
            self._candidates.pop(version)

    def _try(self, version: int, published_utc_ns: int | None) -> None:
        try:
            manifest = fetch_manifest(self._store, version)
            self._know(version)
            self._check(manifest)
            weights = fetch_weights(self._store, manifest)
        except NotFound as error:
            _log.info("policy %d is announced, but not (or no longer) in the store: %s", version, error)
            return
        except PolicyRefused as error:
            self._refuse(version, str(error))
            return
        except InvalidRecord as error:
            self._refuse(version, f"policy {version}: the manifest is not valid: {error}")
            return
        published = manifest.created_utc_ns if published_utc_ns is None else published_utc_ns
        with self._changed:
            self._staged = StagedPolicy(manifest, weights, published, self._clock_ns())
            self._current = version
            self._changed.notify_all()

    def _check(self, manifest: PolicyManifest) -> None:
        """What can be refused without fetching the tensors."""
        check_encoding(manifest)
        difference = self._embodiment.difference(manifest.spec.embodiment)
        if difference is not None:
            raise PolicyRefused(f"policy {manifest.version}: made for another robot: {difference}")
        objection = self._accepts(manifest)
        if objection is not None:
            raise PolicyRefused(f"policy {manifest.version}: {objection}")

    def _refuse(self, version: int, reason: str) -> None:
        with self._changed:
            self._refusals[version] = reason
            self._know(version)
            self._changed.notify_all()
        kept = "no policy" if self._current is None else f"policy {self._current}"
        _log.warning("refused %s; this robot keeps %s", reason, kept)

    def _know(self, version: int) -> None:
        with self._changed:
            self._newest = version if self._newest is None else max(self._newest, version)

    def _say_problem(self, problem: str) -> None:
        with self._changed:
            if problem and not self._problem:
                _log.warning("policies cannot be fetched, trying again: %s", problem)
            self._problem = problem
            self._changed.notify_all()
