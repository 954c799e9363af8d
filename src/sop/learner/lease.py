"""The lease: one learner per run, on a store that can only create, list and delete.

    leases/learner/00000007.json            token 7 was taken, by whom and when: created once, never replaced
    leases/learner/00000007-00000042.json   its 42nd sign of life; the one before is deleted

    newcomer                                             holder
    newest token T, its newest beat                      every beat_s: put the next beat, delete the last one
      nobody, released, or mine of old -> put T + 1      check(): is there a token above mine?
      a new beat within patience_s     -> RunError         yes -> LeaseLost, for ever
      none for patience_s              -> put T + 1      no beat written for patience_s -> StoreUnavailable

The store decides: of all who put token T + 1 exactly one succeeds. No clock is compared with another machine's: a
newcomer waits by its own monotonic clock, from the moment at which it saw the beat.

A holder that was asleep does not know that it lost the lease, so the token is also a *fence*: what is published carries
the token that `check` gave, and a reader refuses a token below the newest that it has seen.
"""

import contextlib
import logging
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Annotated, Self

import msgspec

from sop.core import layout
from sop.core.errors import AlreadyExists, Forbidden, NotFound, RunError, StoreUnavailable
from sop.transport import ObjectStore
from sop.transport.retry import Backoff, put_retrying

_log = logging.getLogger(__name__)
PATIENCE_S = 30.0
"""Silence after which a holder is taken for dead, seconds."""
BEATS_PER_PATIENCE = 6
"""Signs of life within that time: five may fail in a row."""
_LOOKS_PER_PATIENCE = 12
"""How often a newcomer looks for a new beat while it waits."""
_ATTEMPTS = 4
_MAX_BYTES = 4096
"""A record is small; no more of it is read."""
_NAME = re.compile(r"(?P<token>[0-9]{8})(?:-(?P<beat>[0-9]{8}))?\.json")


class LeaseLost(RunError):
    """Another process has taken the lease: this one must publish nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Content of a token: who took it."""

    owner: str
    """Stays the same when the owner restarts; see `sop.learner.owner.learner_owner`."""
    host: str
    pid: int
    since_utc_ns: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    """By the holder's clock; for people."""
    nonce: str
    """Another one for every attempt, so that no two records are alike."""

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since_utc_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} (owner {self.owner}) since {since}"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the store says about the newest token."""

    token: int
    beat: int
    released: bool
    holder: Holder | None


class LearnerLease:
    """The right to be the learner (or another role of which a run has one). The use of it:

        with LearnerLease(store, owner=owner) as lease:        # RunError: somebody else is alive
            publisher = Publisher(..., fence=lease.check)      # before every publish; LeaseLost: stop

    `check` may be called from any thread; everything else belongs to one.

    Args:
        store: of the run.
        owner: who asks; the same again after a restart, so that a restarted learner does not wait for itself.
        role: a folder below `leases/`.
        patience_s: silence after which a holder is taken for dead; the same for everybody who asks for this role.
        clock: monotonic seconds.
        utc_ns: nanoseconds since the epoch; shown to people, never compared.
        pause: waits for so many seconds; None waits on an event that `close` sets.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        owner: str,
        role: str = "learner",
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        utc_ns: Callable[[], int] = time.time_ns,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        if patience_s <= 0:
            raise ValueError(f"patience_s must be positive, got {patience_s}")
        self._store = store
        self._owner = owner
        self._folder = f"{layout.LEASES}/{role}/"
        self._role = role
        self._patience_s = patience_s
        self._clock = clock
        self._utc_ns = utc_ns
        self._closed = threading.Event()
        self._pause = pause or self._closed.wait
        self._token = 0
        self._beat = 0
        self._alive_at = 0.0
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._loop, name=f"lease-{role}", daemon=True)

    @property
    def token(self) -> int:
        """The fence: 1, 2, 3, ... per role; 0 before `acquire`."""
        return self._token

    def __enter__(self) -> Self:
        """`acquire`, and give signs of life in the background."""
        self.acquire()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """`close`."""
        self.close()

    def acquire(self) -> int:
        """Take the lease; returns its token. Blocks up to `patience_s` when the last holder may be dead.

        Raises:
            RunError: somebody is alive, or was quicker; names who it is, since when, and what to do.
            StoreUnavailable: the store does not answer; nothing was taken.
        """
        seen = self._newest()
        if seen is not None and not self._is_free(seen):
            self._wait_for_silence(seen)
        token = 1 if seen is None else seen.token + 1
        me = Holder(
            owner=self._owner,
            host=socket.gethostname(),
            pid=os.getpid(),
            since_utc_ns=self._utc_ns(),
            nonce=uuid.uuid4().hex,
        )
        asked_at = self._clock()
        try:
            backoff = Backoff(random.Random())
            put_retrying(
                self._store, self._key(token), msgspec.json.encode(me), attempts=_ATTEMPTS, backoff=backoff,
                pause=self._pause,
            )  # fmt: skip
        except AlreadyExists as error:
            raise self._refusal(self._newest()) from error
        self._token, self._alive_at = token, asked_at
        with contextlib.suppress(StoreUnavailable):  # the token is ours; the next beat comes soon
            self.beat()
            self._forget_beats_below(token)
        _log.info("lease %s: token %d", self._role, token)
        return token

    def beat(self) -> None:
        """Give one sign of life (blocking); the thread does it every `patience_s / BEATS_PER_PATIENCE`.

        Raises:
            StoreUnavailable: it could not be written.
        """
        asked_at, number = self._clock(), self._beat + 1
        with contextlib.suppress(AlreadyExists):  # an earlier attempt whose answer was lost
            self._store.put(self._key(self._token, number), b"{}", durable=False)
        self._beat, self._alive_at = number, asked_at
        if number > 1:
            self._store.delete(self._key(self._token, number - 1))

    def check(self) -> int:
        """The token, if it is still the newest; call it right before what only the holder may do. Blocks for a listing.

        Raises:
            LeaseLost: somebody took the lease; every later call says so, too.
            StoreUnavailable: no sign of life could be written for `patience_s`, or the store does not answer: somebody
                may have taken the lease, or will. It holds again when a sign of life comes through and nobody has.
        """
        if self._lost is not None:
            raise self._lost
        for key in self._store.keys(self._folder, after=self._key(self._token)):
            if _parse(key) is not None:
                self._lost = LeaseLost(
                    f"the lease of the {self._role} was taken from this process (token {self._token}) by "
                    f"{_name(self._newest())}: this process publishes nothing more; stop it"
                )
                raise self._lost
        silent_s = self._clock() - self._alive_at
        if silent_s > self._patience_s:
            raise StoreUnavailable(
                f"no sign of life of the {self._role} could be written for {silent_s:.0f} s: nothing is published "
                "until the store takes one, because another process may take over"
            )
        return self._token

    def close(self) -> None:
        """Release the lease, so that the next one need not wait. Idempotent; a store that is away is left alone."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._token and self._lost is None:
            try:
                self._store.put(self._key(self._token, self._beat + 1), b'{"released":true}')
                self._store.delete(self._key(self._token, self._beat))
            except (AlreadyExists, Forbidden, StoreUnavailable) as error:
                _log.warning("the lease of the %s is not released, the next one has to wait: %s", self._role, error)

    def _loop(self) -> None:
        while not self._closed.wait(self._patience_s / BEATS_PER_PATIENCE):
            try:
                self.beat()
                self.check()
            except (StoreUnavailable, Forbidden) as error:  # permission may come back, too
                _log.warning("lease %s: %s", self._role, error)
            except LeaseLost as error:
                _log.error("%s", error)
                return

    def _is_free(self, seen: _Seen) -> bool:
        return seen.released or (seen.holder is not None and seen.holder.owner == self._owner)

    def _wait_for_silence(self, seen: _Seen) -> None:
        """Return when the holder gave no sign of life for `patience_s`.

        Raises:
            RunError: it did.
        """
        quiet_since = self._clock()
        while self._clock() - quiet_since < self._patience_s:
            self._pause(self._patience_s / _LOOKS_PER_PATIENCE)
            now = self._newest()
            if now is None or (now.token, now.beat) != (seen.token, seen.beat):
                raise self._refusal(now)

    def _refusal(self, seen: _Seen | None) -> RunError:
        return RunError(
            f"the run has a {self._role} already: {_name(seen)}. Stop it, or wait until it has been silent for "
            f"{self._patience_s:.0f} s, then start this one again"
        )

    def _newest(self) -> _Seen | None:
        """The newest token, its newest beat, and what they say; None when nobody ever took the lease."""
        found = [place for place in map(_parse, self._store.keys(self._folder)) if place is not None]
        if not found:
            return None
        token, beat = max(found)
        return _Seen(token, beat, self._is_released(token, beat), self._holder(token))

    def _is_released(self, token: int, beat: int) -> bool:
        try:
            return beat > 0 and b"released" in self._store.get(self._key(token, beat), slice(0, _MAX_BYTES))
        except NotFound:  # followed by another one meanwhile
            return False

    def _holder(self, token: int) -> Holder | None:
        try:
            return msgspec.json.decode(self._store.get(self._key(token), slice(0, _MAX_BYTES)), type=Holder)
        except (NotFound, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _forget_beats_below(self, token: int) -> None:
        """Delete the signs of life of those before; the tokens stay: they are the history."""
        for key in list(self._store.keys(self._folder)):
            place = _parse(key)
            if place is not None and place[0] < token and place[1]:
                self._store.delete(key)

    def _key(self, token: int, beat: int = 0) -> str:
        return f"{self._folder}{token:08d}-{beat:08d}.json" if beat else f"{self._folder}{token:08d}.json"


def _parse(key: str) -> tuple[int, int] | None:
    """(token, beat) of a key, beat 0 for the token itself; None for what is neither."""
    match = _NAME.fullmatch(key.rpartition("/")[2])
    return None if match is None else (int(match["token"]), int(match["beat"] or 0))


def _name(seen: _Seen | None) -> str:
    return "a process that left no name" if seen is None or seen.holder is None else str(seen.holder)
