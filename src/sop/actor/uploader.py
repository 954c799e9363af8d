"""The uploader: spool -> store -> bus, oldest first, until the store has everything.

    for key in spool.pending():
        store.put(key, data)           # create-only; there already with the same hash = done
        bus.publish(EpisodeCommitted)  # a hint: a repeat is dropped by its id, a loss is healed by a listing
        spool.mark_uploaded(key)       # only now

Killed anywhere, it starts again at the same episode, and nothing is lost or doubled.
"""

import logging
import random
import threading
import time

from sop.actor.spool import EpisodeSpool
from sop.core.clock import Clock
from sop.core.codec import EncodedEpisode, content_hash
from sop.core.errors import AlreadyExists, Forbidden, InvalidRecord, StoreUnavailable
from sop.core.events import TOPIC_EPISODES, EpisodeCommitted, encode_event
from sop.core.layout import EpisodeKey
from sop.transport import EventBus, ObjectStore
from sop.transport.retry import Backoff, retrying

_log = logging.getLogger(__name__)


class Uploader:
    """Empties the spool in the background; retries for ever, with growing, jittered pauses while the store is away and
    long ones while it refuses us. What cannot go out stays in the spool.

    Args:
        spool: episodes to send.
        store: where they go.
        bus: where they are announced.
        clock: stamps the announcement.
        seed: of the jitter.
    """

    def __init__(self, spool: EpisodeSpool, store: ObjectStore, bus: EventBus, clock: Clock, *, seed: int = 0) -> None:
        self._spool = spool
        self._store = store
        self._bus = bus
        self._clock = clock
        self._backoff = Backoff(random.Random(seed), max_s=30.0)
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._loop, name="uploader", daemon=True)
        self.problem = ""
        """Why nothing goes out at the moment; empty when all is well."""
        self.refused = ""
        """The last episode that can never go out, and why; empty when there is none."""

    def start(self) -> None:
        """Begin to work in the background."""
        self._wake.set()
        self._thread.start()

    def wake(self) -> None:
        """There is something new in the spool. Never blocks."""
        self._wake.set()

    def close(self, timeout_s: float = 10.0) -> int:
        """Send what waits for at most `timeout_s`, then stop; returns how many episodes still wait on disk."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return len(self._spool.pending())

    def upload_pending(self) -> int:
        """Send everything that waits (blocking); returns how many episodes went out.

        Raises:
            StoreUnavailable: the store did not answer; the rest still waits.
            Forbidden: the store refuses us; the rest still waits.
        """
        sent = 0
        for key in self._spool.pending():
            try:
                self._upload(key)
            except InvalidRecord as error:  # one bad file must not hold up the others
                self.refused = f"{key} was set aside: {error}"
                _log.error(self.refused)
                self._spool.set_aside(key)
            else:
                sent += 1
        return sent

    def _loop(self) -> None:
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                try:
                    self.upload_pending()
                    self.problem = ""
                    self._backoff.reset()
                except (StoreUnavailable, Forbidden) as error:
                    self.problem = str(error)
                    pause_s = self._backoff.after(error)
                    _log.warning("upload waits %.1f s: %s", pause_s, error)
                    self._wake.set()
                    if self._stop.wait(pause_s):
                        return
                    continue
                if self._stop.is_set() and not self._spool.pending():
                    return
        except Exception as error:  # noqa: BLE001 - handed to the owner, who raises it in close()
            self._error = error
            self.problem = f"uploader stopped: {error}"
            _log.exception("uploader stopped")

    def _upload(self, key: str) -> None:
        data, spooled_utc_ns = self._spool.read(key), self._spool.spooled_utc_ns(key)
        try:
            self._store.put(key, data)
        except AlreadyExists:
            self._require_same(key)
        header = EncodedEpisode(data).header
        event = EpisodeCommitted(
            key=key,
            outcome=header.outcome,
            ended_utc_ns=header.end_utc_ns,
            spooled_utc_ns=spooled_utc_ns,
            committed_utc_ns=self._clock.utc_ns(),
        )
        try:
            self._bus.publish(TOPIC_EPISODES, encode_event(event), event_id=key)
        except (StoreUnavailable, Forbidden) as error:
            _log.warning("%s is stored, but was not announced; a listing will find it: %s", key, error)
        self._spool.mark_uploaded(key)

    def _require_same(self, key: str) -> None:
        """Our own earlier put, whose answer was lost. Only bytes that are read back count: a store that refuses to
        show them keeps the episode on this disk."""
        if content_hash(self._store.get(key)) != EpisodeKey.parse(key).episode_id:
            raise InvalidRecord("episode", f"the store holds other bytes under {key}; kept on disk")


def next_stored_sequence(store: ObjectStore, folder: str, actor_id: str) -> int:
    """The sequence number after the last one that the store has of an actor: for a robot with a new disk. Blocks.

    Raises:
        StoreUnavailable: the store stayed away for some ten seconds.
    """

    def last_key() -> str | None:
        last = None
        for last in store.keys(f"{folder}/{actor_id}/"):  # noqa: B007 - the last one counts
            pass
        return last

    last = retrying(last_key, attempts=8, backoff=Backoff(random.Random()), pause=time.sleep)
    return 0 if last is None else EpisodeKey.parse(last).sequence + 1
