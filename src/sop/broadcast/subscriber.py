"""The robot's side: a thread finds the policy to run, verifies every byte of it, and has it ready to swap in."""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping

from sop.broadcast.admission import Admission
from sop.broadcast.fetch import PolicyReader
from sop.broadcast.last_good import LastGood
from sop.broadcast.manifest import MAX_VERSION, PolicyManifest
from sop.broadcast.own import OwnPolicies
from sop.broadcast.selection import ChannelStates, NewestPublished, Selection
from sop.broadcast.stager import Prepare, StagedPolicy, Stager
from sop.broadcast.vetting import NotNow, PolicyVetting
from sop.core import layout
from sop.core.channel import PROD, PolicyRef, PolicyStatement
from sop.core.embodiment import Embodiment
from sop.core.errors import Forbidden, InvalidRecord, NotFound, PolicyRefused, RunError, StoreUnavailable, Untrusted
from sop.core.events import TOPIC_POLICIES, ChannelChanged, PolicyPublished, decode_event
from sop.core.policy import Policy
from sop.transport.base import Cursor, EventBus, ObjectStore
from sop.transport.retry import Backoff

_log = logging.getLogger(__name__)
MAX_REASON = 1000
"""Characters of a refusal that are kept: names in it come from outside, and it travels in an event."""
_CHANNEL_CHANGED = b'{"event":"ChannelChanged"'
"""How the other kind of event on this topic begins."""


def _accept_all(_manifest: PolicyManifest) -> str | None:
    return None


class Subscriber:
    """Keeps the best acceptable policy ready. The actor's use of it:

        policy = subscriber.wait_first(timeout_s=60).policy   # or take() again and again until there is one
        while acting:
            ...                                               # one episode; held at once while subscriber.must_leave
            if (staged := subscriber.take(policy)) is not None:   # never blocks: two pointers are exchanged
                policy = staged.policy

    The best is the newest, or what the robot's channel names. Events are a hint: the store is listed at the start and
    every `list_every_s`. A version that fails a check is refused once and for all (for want of trust: until a newer
    order arrives), said once in the log, and the next older one that is still newer than ours gets its chance; until
    then the robot keeps what it has. An unavailable store or bus is tried again for ever, with pauses; after a
    refusal with long ones.

    With `prepare` there are two policies: one acts, the other is loaded on the thread and staged (`Stager`). When a
    better version arrives before the staged one was taken, that one is withdrawn while its policy is loaded again.

    Args:
        store: where policies are; read only.
        bus: where they are announced.
        embodiment: this robot; policies for another one are refused.
        vetting: whom this robot believes; None runs whatever the store has. Used on the thread.
        last_good: the robot's own copies: staged at the start before any network is asked, and kept up to date by a
            thread of its own. None keeps none.
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
        vetting: PolicyVetting | None = None,
        last_good: LastGood | None = None,
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
        self._vetting = vetting
        self._reader = reader or PolicyReader(store)
        self._admission = Admission(
            store=store, reader=self._reader, embodiment=embodiment, vetting=vetting, accepts=accepts
        )
        self._list_every_s = list_every_s
        self._poll_s = poll_s
        self._monotonic = monotonic
        self._backoff = Backoff(rng or random.Random())
        self._list_due_s = monotonic()
        self._cursor: Cursor | None = None
        self._selection: Selection = NewestPublished(vetting)
        if vetting is not None and vetting.channel == PROD:
            self._selection = ChannelStates(vetting)
        self._stager = Stager(prepare, None if newer_than is None else PolicyRef(newer_than, ""), clock_ns)
        self._own = None
        if last_good is not None:
            self._own = OwnPolicies(last_good, self._stager, vetting, self._admission.check)
        self._newest = newer_than
        self._refusals: dict[int, str] = {}
        self._distrusted: set[int] = set()  # refused for want of trust
        self._problem = ""  # of store and bus
        self._distrust = ""  # why nothing new is believed
        self._asked_at: int | None = None  # the channel's state when the actor last asked in vain
        self._failure: BaseException | None = None
        self._changed = self._stager.changed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="subscriber", daemon=True)
        self._thread.start()

    @property
    def newest_version(self) -> int | None:
        """Newest version that this robot could be asked to run: on `prod` what the channel names; elsewhere what is
        known to be published (and vouched for, where that is asked), refused ones included. None: there is none yet."""
        with self._changed:
            return self._newest

    @property
    def refusals(self) -> Mapping[int, str]:
        """Version -> why it was refused, in a sentence. A copy."""
        with self._changed:
            return dict(self._refusals)

    @property
    def problem(self) -> str:
        """Why nothing new can be had at the moment (no answer, nothing fresh, nobody to believe), or why the disk
        does not keep policies; empty when all is well."""
        with self._changed:
            return self._problem or self._distrust or ("" if self._own is None else self._own.problem)

    @property
    def must_leave(self) -> str:
        """Why the policy that acts must be left now, with the robot held until `take` gives another; else empty.

        Of an order that is `immediate`: at once. Of a ban that is not: when the episode has ended (`take` was called)
        and there was nothing to take instead.
        """
        with self._changed:
            acting = self._stager.acting
            if self._vetting is None or acting is None:
                return ""
            at_once = self._vetting.immediate
            ended = self._asked_at == self._vetting.sequence
            return self._vetting.objection(acting) if at_once else self._vetting.banned(acting) if ended else ""

    def take(self, instead_of: Policy | None = None) -> StagedPolicy | None:
        """The staged policy, once; None when there is nothing new. Never blocks. Call it between two episodes.

        Args:
            instead_of: the policy that acted until now. When there is a staged one it is the subscriber's from
                then on, to be loaded with the next version; else it stays the caller's.

        Raises:
            Exception: the thread died of it; no further policy will come.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            staged = self._stager.take(instead_of)
            self._asked_at = self._vetting.sequence if self._vetting is not None and staged is None else None
            return staged

    def wait_first(self, timeout_s: float) -> StagedPolicy:
        """Like `take`, but blocks until there is a policy.

        Raises:
            RunError: none within `timeout_s`; says why as far as it is known.
            Exception: the thread died of it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stager.staged is not None or self._failure is not None, timeout_s)
            refusal = self._refusals[max(self._refusals)] if self._refusals else ""
            nothing = "none is published: is the learner running on this store?"
            reason = self._problem or self._distrust or refusal or nothing
        staged = self.take()
        if staged is None:
            raise RunError(f"no policy to start with after {timeout_s} s: {reason}")
        return staged

    def close(self) -> None:
        """Stop the threads. Blocks until they have noticed: `poll_s`, or the end of a transfer. Idempotent."""
        self._stop.set()
        self._thread.join()
        if self._own is not None:
            self._own.close()

    def _run(self) -> None:
        try:
            self._boot()
            while not self._stop.is_set():
                try:
                    if self._own is not None:
                        self._own.obey()
                    self._look_when_due()
                    self._stage_best()
                    self._listen()
                except (StoreUnavailable, Forbidden) as error:
                    self._say(str(error), self._distrust)
                    self._stop.wait(self._backoff.after(error))
                else:
                    self._say("", self._distrust)
                    self._backoff.reset()
        except BaseException as error:  # noqa: BLE001  the thread hands what went wrong to its owner
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _boot(self) -> None:
        """Have something to act with before anybody is asked."""
        if self._vetting is not None:
            self._reconsider(self._vetting)
        read = self._own.boot() if self._own is not None and self._stager.have is None else None
        if read is not None:
            self._reader.hold(read)
            self._know(read.manifest.version)

    def _look_when_due(self) -> None:
        if self._monotonic() < self._list_due_s:
            return
        if self._vetting is not None:
            if self._vetting.refresh(self._store):
                self._reconsider(self._vetting)
            self._say(self._problem, self._vetting.problem)
        found = self._selection.look(self._store, self._stager.have)
        if found is not None and self._vetting is None:
            self._know(found)
        self._list_due_s = self._monotonic() + self._list_every_s

    def _reconsider(self, vetting: PolicyVetting) -> None:
        """After a newer order: what was refused may be right now, what is at hand may not be any more."""
        with self._changed:
            for version in self._distrusted:
                self._refusals.pop(version, None)
            self._distrusted.clear()
            self._newest = self._newest if vetting.wanted is None else vetting.wanted.version
            have = self._stager.have
            if have is None or not (objection := vetting.objection(have)):
                return
            self._stager.withdraw(vetting.objection)
            left = self._stager.have is None
        _log.warning("policy %d has to go: %s", have.version, objection)
        if left and self._own is not None:
            self._own.instead()

    def _listen(self) -> None:
        """Wait for events and note what they announce; what is not one of ours is ignored."""
        wait_s = min(self._poll_s, max(0.0, self._list_due_s - self._monotonic()))
        for cursor, data in self._bus.poll(TOPIC_POLICIES, self._cursor, wait_s):
            self._cursor = cursor
            try:
                self._hear(data)
            except InvalidRecord as error:
                _log.warning("ignored an event on topic %s: %s", TOPIC_POLICIES, error)

    def _hear(self, data: bytes) -> None:
        if data.startswith(_CHANNEL_CHANGED):
            changed, vetting = decode_event(data, ChannelChanged), self._vetting
            if vetting is not None and changed.channel == vetting.channel and changed.sequence > vetting.sequence:
                self._list_due_s = self._monotonic()
            return
        event = decode_event(data, PolicyPublished)
        if 0 <= event.version <= MAX_VERSION and event.manifest == layout.policy_manifest(event.version):
            self._selection.announced(event.version, event.published_utc_ns)

    def _stage_best(self) -> None:
        """Try candidates from the best down until one is staged."""
        while not self._stop.is_set() and (version := self._selection.best(self._stager.have)) is not None:
            held_back = self._own is not None and self._own.holds_back(version)
            if version not in self._refusals and not held_back:
                self._try(version)
            self._selection.settle(version)

    def _try(self, version: int) -> None:
        try:
            wanted = None if self._vetting is None else self._vetting.wanted
            if wanted is not None and self._own is not None and self._own.staged(wanted):
                return
            found, statement = self._admission.fetch(version)
            self._know(version)
            if self._own is not None and self._own.holds_back(version):  # ordered during the transfer
                return
            published_utc_ns = self._selection.published_utc_ns(version)
            self._stager.stage(found.read, found.policy, published_utc_ns, lambda: self._accept(statement))
            if self._own is not None:
                self._own.keep(found)
        except NotNow as error:
            self._say(self._problem, str(error))
            self._selection.give_up()
        except NotFound as error:
            _log.info("policy %d is announced, but not (or no longer) in the store: %s", version, error)
        except PolicyRefused as error:
            self._refuse(version, str(error), distrusted=isinstance(error, Untrusted))
        except InvalidRecord as error:
            self._refuse(version, f"policy {version}: the manifest is not valid: {error}")
        except MemoryError:
            self._refuse(version, f"policy {version}: its tensors do not fit the memory of this robot")

    def _accept(self, statement: PolicyStatement | None) -> None:
        if self._vetting is not None and statement is not None:
            self._vetting.accepted(statement)
            self._say(self._problem, self._vetting.problem)

    def _refuse(self, version: int, reason: str, *, distrusted: bool = False) -> None:
        with self._changed:
            self._refusals[version] = reason[:MAX_REASON]
            if distrusted:
                self._distrusted.add(version)
            else:
                self._know(version)
            self._changed.notify_all()
        kept = "no policy" if self._current is None else f"policy {self._current}"
        _log.warning("refused %s; this robot keeps %s", reason, kept)

    @property
    def _current(self) -> int | None:
        have = self._stager.have
        return None if have is None else have.version

    def _know(self, version: int) -> None:
        with self._changed:
            if self._vetting is None or self._vetting.wanted is None:
                self._newest = version if self._newest is None else max(self._newest, version)

    def _say(self, problem: str, distrust: str) -> None:
        with self._changed:
            if problem and not self._problem:
                _log.warning("policies cannot be fetched, trying again: %s", problem)
            if distrust and distrust != self._distrust:
                _log.warning("trust: %s", distrust)
            self._problem, self._distrust = problem, distrust
            self._changed.notify_all()
