"""The robot's side: a thread finds the newest policy, verifies every byte of it, and has it ready to swap in."""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sop.broadcast.fetch import PolicyReader, ReadCost, ReadPolicy, fetch_manifest, published_versions
from sop.broadcast.manifest import MAX_VERSION, PolicyManifest
from sop.broadcast.weights import check_encoding
from sop.core import layout
from sop.core.embodiment import Embodiment
from sop.core.errors import InvalidRecord, NotFound, PolicyRefused, RunError, SopError, StoreUnavailable
from sop.core.events import TOPIC_POLICIES, PolicyPublished, decode_event
from sop.core.policy import Policy, PolicySpec, Weights
from sop.transport.base import Cursor, EventBus, ObjectStore
from sop.transport.retry import Backoff

_log = logging.getLogger(__name__)
MAX_REASON = 1000
"""Characters of a refusal that are kept: names in it come from outside, and it travels in an event."""

Prepare = Callable[[PolicyManifest, Weights, Policy | None], Policy]
"""Puts verified weights into a policy: into the spare one that nobody acts with if it fits, else into a new one.
Raises PolicyRefused or ValueError when it cannot be; the spare is then as it was."""


def prepare_with(make_policy: Callable[[PolicySpec], Policy]) -> Prepare:
    """The usual `Prepare`: a policy is made when there is no spare one or its spec is another."""

    def prepare(manifest: PolicyManifest, weights: Weights, spare: Policy | None) -> Policy:
        fits = spare is not None and spare.spec == manifest.spec
        policy = spare if fits and spare is not None else make_policy(manifest.spec)
        policy.load(weights, manifest.version)
        return policy

    return prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPolicy:
    """A policy that passed every check and waits in memory for the end of the episode."""

    manifest: PolicyManifest
    weights: Weights
    """Read-only arrays."""
    policy: Policy | None
    """With the weights loaded; None when the subscriber was not told how to prepare one."""
    published_utc_ns: int
    """By the learner's clock: when the manifest was in the store; when the event was lost, the earlier moment
    at which the learner handed the snapshot over."""
    staged_utc_ns: int
    """By this robot's clock."""
    cost: ReadCost
    """Bytes and seconds to here, preparing excluded."""
    prepare_s: float
    """Seconds in which the weights were put into the policy."""

    @property
    def version(self) -> int:
        """The policy's version."""
        return self.manifest.version


def _accept_all(_manifest: PolicyManifest) -> str | None:
    return None


class Subscriber:
    """Keeps the newest acceptable policy ready. The actor's use of it:

        policy = subscriber.wait_first(timeout_s=60).policy   # or take() again and again until there is one
        while acting:
            ...                                               # one episode
            if (staged := subscriber.take(policy)) is not None:   # never blocks: two pointers are exchanged
                policy = staged.policy

    Events are a hint: the store is listed at the start and every `list_every_s`. Only the newest version is
    fetched, those between are skipped; versions never go back. A version that fails a check is refused once
    and for all, said once in the log, and the next older one that is still newer than ours gets its chance;
    until then the robot keeps what it has. An unavailable store or bus is tried again for ever, with pauses.

    With `prepare` there are two policies: one acts, the other is loaded on the thread and staged. The one that
    acted comes back with `take` and is loaded next. When a newer version arrives before the staged one was
    taken, that one is withdrawn while its policy is loaded again: for that moment there is nothing to take.

    Args:
        store: where policies are; read only.
        bus: where they are announced.
        embodiment: this robot; policies for another one are refused.
        accepts: further check of the owner: None, or in words why this robot cannot run the policy. Called on
            the thread, before the tensors are fetched.
        prepare: puts the weights into a policy, on the thread; a version that it refuses is refused. None stages
            the weights alone.
        reader: fetches and verifies; None makes one for the store.
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
        prepare: Prepare | None = None,
        reader: PolicyReader | None = None,
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
        self._prepare = prepare
        self._reader = reader or PolicyReader(store)
        self._list_every_s = list_every_s
        self._poll_s = poll_s
        self._clock_ns = clock_ns
        self._monotonic = monotonic
        self._timer = time.perf_counter
        self._backoff = Backoff(rng or random.Random())
        self._list_due_s = monotonic()
        self._cursor: Cursor | None = None
        self._candidates: dict[int, int | None] = {}  # version -> published_utc_ns; None when found by listing
        self._current = newer_than  # newest version that was ever staged
        self._newest = newer_than
        self._staged: StagedPolicy | None = None
        self._spare: Policy | None = None  # nobody acts with it, and it is not staged
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

    def take(self, instead_of: Policy | None = None) -> StagedPolicy | None:
        """The staged policy, once; None when there is nothing new. Never blocks.

        Args:
            instead_of: the policy that acted until now. When there is a staged one it is the subscriber's from
                then on, to be loaded with the next version; else it stays the caller's.

        Raises:
            Exception: the thread died of it; no further policy will come.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            staged, self._staged = self._staged, None
            if staged is not None and instead_of is not None:
                self._spare = instead_of
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
            read = self._reader.read(manifest)
            self._stage(read, published_utc_ns)
        except NotFound as error:
            _log.info("policy %d is announced, but not (or no longer) in the store: %s", version, error)
            return
        except PolicyRefused as error:
            self._refuse(version, str(error))
            return
        except InvalidRecord as error:
            self._refuse(version, f"policy {version}: the manifest is not valid: {error}")
            return
        except MemoryError:
            self._refuse(version, f"policy {version}: its tensors do not fit the memory of this robot")
            return

    def _stage(self, read: ReadPolicy, published_utc_ns: int | None) -> None:
        manifest = read.manifest
        started_s = self._timer()
        policy = self._prepared(read)
        staged = StagedPolicy(
            manifest=manifest,
            weights=read.weights,
            policy=policy,
            published_utc_ns=manifest.created_utc_ns if published_utc_ns is None else published_utc_ns,
            staged_utc_ns=self._clock_ns(),
            cost=read.cost,
            prepare_s=self._timer() - started_s,
        )
        with self._changed:
            self._staged = staged
            self._current = manifest.version
            self._changed.notify_all()

    def _prepared(self, read: ReadPolicy) -> Policy | None:
        """A policy with these weights: the spare one, the one that is staged and not taken, or a new one."""
        if self._prepare is None:
            return None
        withdrawn = None
        with self._changed:
            spare, self._spare = self._spare, None
            if spare is None:
                withdrawn, self._staged = self._staged, None
                spare = None if withdrawn is None else withdrawn.policy
        try:
            return self._prepare(read.manifest, read.weights, spare)
        except (SopError, ValueError) as error:
            with self._changed:  # what was there before is there again
                if withdrawn is None:
                    self._spare = spare
                else:
                    self._staged = withdrawn
            raise PolicyRefused(f"policy {read.manifest.version}: it cannot be run here: {error}") from error

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
            self._refusals[version] = reason[:MAX_REASON]
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
