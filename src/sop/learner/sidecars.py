"""Sidecars go to the store beside the training: what a learning rule computed about an episode, for whoever looks.

    learner's thread   write(key, sidecar) -> encoded -> queue, at most 256
    sidecar thread     queue -> labels/<algorithm>/<version>/<episode hash>.arrow, created once

They are opinions that can be computed again, so nothing waits for them: what does not fit or cannot be stored is
dropped and counted.
"""

import logging
import random
import threading
from collections import deque
from collections.abc import Callable

from sop.core import layout
from sop.core.errors import AlreadyExists, StoreUnavailable
from sop.core.experience import Sidecar
from sop.core.layout import EpisodeKey
from sop.core.sidecar import encode_sidecar
from sop.transport import ObjectStore
from sop.transport.retry import Backoff, put_retrying

_log = logging.getLogger(__name__)
MAX_WAITING = 256
"""Sidecars that wait to be stored; of a long episode one is a few kilobytes."""
_ATTEMPTS = 4
"""How often a store is asked that does not answer: about a second."""


class SidecarWriter:
    """Stores sidecars in the background. One thread may call it.

        writer.write(key, sidecar)     # returns at once
        writer.close()                 # stores what waits

    Args:
        store: where they go.
        algorithm: name of the rule; a folder of the store.
        max_waiting: sidecars that wait; one more is dropped.
        pause: waits so many seconds between two attempts; None waits until then or until `close`.
    """

    def __init__(
        self,
        store: ObjectStore,
        algorithm: str,
        *,
        max_waiting: int = MAX_WAITING,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._store = store
        self._algorithm = algorithm
        self._max_waiting = max_waiting
        self._closing = threading.Event()
        self._pause = pause or self._closing.wait
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._changed = threading.Condition()
        self._lost = 0
        self._losing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sidecars", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Sidecars that were dropped."""
        with self._changed:
            return self._lost

    def write(self, key: EpisodeKey, sidecar: Sidecar) -> None:
        """Store the sidecar of an episode soon, unless the store has one of this version. Never blocks, idempotent.

        Raises:
            ValueError: it does not fit the episode, or the writer is closed.
            Exception: what ended the thread.
        """
        data = encode_sidecar(sidecar, key)
        place = layout.sidecar(self._algorithm, sidecar.version, key.episode_id)
        with self._changed:
            self._raise_failure()
            if self._closing.is_set():
                raise ValueError("the writer of sidecars is closed")
            if len(self._waiting) >= self._max_waiting:
                self._lose(1, f"{self._max_waiting} wait already")
                return
            self._waiting.append((place, data))
            self._changed.notify_all()

    def close(self) -> None:
        """Store what waits, then stop the thread; a store that does not answer gets one more chance. Idempotent.

        Raises:
            Exception: what ended the thread and was not raised yet.
        """
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self) -> None:
        try:
            while (next_one := self._take()) is not None:
                self._put(*next_one)
        except BaseException as error:  # noqa: BLE001 - handed to the owner, who raises it in write() or close()
            with self._changed:
                self._failure = error

    def _take(self) -> tuple[str, bytes] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            return self._waiting.popleft() if self._waiting else None

    def _put(self, place: str, data: bytes) -> None:
        backoff = Backoff(random.Random())
        try:
            put_retrying(
                self._store, place, data, attempts=_ATTEMPTS, backoff=backoff, pause=self._pause, durable=False
            )
        except AlreadyExists:
            pass  # of this version, by this learner or the one before
        except StoreUnavailable as error:
            with self._changed:
                rest = len(self._waiting) if self._closing.is_set() else 0
                if rest:
                    self._waiting.clear()
                self._lose(1 + rest, str(error))
            return
        with self._changed:
            self._losing = False

    def _lose(self, count: int, reason: str) -> None:
        """Count what is dropped; the first of a row is logged. The lock is held."""
        self._lost += count
        if not self._losing:
            _log.warning("sidecars of episodes are dropped, nothing else is lost: %s", reason)
        self._losing = True
