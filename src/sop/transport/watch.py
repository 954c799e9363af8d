"""The one thread of a bus object that looks into its file, so that a thousand waiting polls cost what one does.

    poll -> wait(topic, after) ........ sleeps ........ woken with its events in hand
                   |                        ^
              _waiters[topic]               | fetched once for all who wait
                   v                        |
    watcher, every 3 ms: has the file changed? -> newest row of each topic -> rows that somebody lacks
    publish: nudge(topic) -> the same, at once

What is kept per topic is a state (its newest row), not a signal, so no wake-up is lost: who begins to wait after the
watcher has seen an event finds that the newest row is beyond what it has. While nobody waits the thread sleeps.
"""

import sqlite3
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sop.transport.base import MAX_EVENTS_PER_POLL

UNKNOWN = -1
"""Newest row of a topic that has not been looked at."""
Row = tuple[int, bytes]
"""Number of a row, its event."""
_PAUSE_S = 0.1
"""Pause after a look that failed, before the polls look themselves."""


class _Waiter:
    """A poll that sleeps. Its gate is opened once; what is found by then is what it gets."""

    __slots__ = ("after", "found", "gate")

    def __init__(self, after: int) -> None:
        self.after = after
        self.found: Sequence[Row] | None = None
        self.gate = threading.Lock()
        self.gate.acquire()

    def wake(self, found: Sequence[Row]) -> None:
        self.found = found
        self.gate.release()


@dataclass(slots=True)
class _Topic:
    newest: int = UNKNOWN
    waiters: set[_Waiter] = field(default_factory=set)


class Watch:
    """Wakes the polls of one bus object in one process. Its thread starts with the first wait and ends with `close`.

    Args:
        connect: opens a connection of its own to the file; it is used and closed by the thread.
        every_s: how often the thread looks while somebody waits.
        name: of the thread.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection], every_s: float, *, name: str) -> None:
        self._connect = connect
        self._every_s = every_s
        self._name = name
        self._lock = threading.Lock()
        self._topics: dict[str, _Topic] = {}
        self._waiting = 0
        self._nudged = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._connection: sqlite3.Connection | None = None

    def newest(self, topic: str) -> int:
        """Highest row of the topic that is known, UNKNOWN before the first look. Never blocks for long."""
        known = self._topics.get(topic)
        return UNKNOWN if known is None else known.newest

    def nudge(self, topic: str) -> None:
        """This process has published on the topic: look now if somebody waits for it. Never blocks."""
        known = self._topics.get(topic)
        if known is not None and known.waiters:
            self._nudged.set()

    def wait(self, topic: str, after: int, timeout_s: float) -> Sequence[Row] | None:
        """Block until the topic has rows above `after`.

        Returns:
            At most MAX_EVENTS_PER_POLL of them from the first one on; [] when there may be some and the caller has to
            look for itself; None after `timeout_s` and when the watch is closed.
        """
        waiter = _Waiter(after)
        with self._lock:
            if self._closed:
                return None
            known = self._topics.setdefault(topic, _Topic())
            if known.newest > after:
                return []
            known.waiters.add(waiter)
            self._waiting += 1
            if self._thread is None or self._waiting == 1:
                self._wake_thread()
        if not waiter.gate.acquire(timeout=timeout_s):
            with self._lock:
                if waiter in known.waiters:  # else it is woken at this moment
                    known.waiters.remove(waiter)
                    self._waiting -= 1
        return None if self._closed else waiter.found

    def close(self) -> None:
        """Wake everybody and end the thread (blocks for one look). Idempotent."""
        with self._lock:
            self._closed = True
            self._wake_all()
            thread = self._thread
        self._nudged.set()
        if thread is not None:
            thread.join()

    def _wake_thread(self) -> None:
        self._nudged.set()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        try:
            self._connection = self._connect()
            try:
                self._look_again_and_again(self._connection)
            finally:
                self._connection.close()
        except sqlite3.Error:  # the polls look themselves, and say what is wrong with the file
            self._nudged.clear()
            self._nudged.wait(_PAUSE_S)
            with self._lock:
                self._thread = None  # the next wait starts another
                self._wake_all()

    def _look_again_and_again(self, connection: sqlite3.Connection) -> None:
        version = None
        while not self._closed:
            self._nudged.wait(self._every_s if self._waiting else None)
            self._nudged.clear()  # before the look: what comes from now on nudges again
            (found,) = connection.execute("PRAGMA data_version").fetchone()  # before the rows: nothing slips between
            for topic, known in list(self._topics.items()):
                if found != version or known.newest == UNKNOWN:
                    self._look(connection, topic, known)
            version = found

    def _look(self, connection: sqlite3.Connection, topic: str, known: _Topic) -> None:
        """Note the topic's newest row, and give those who wait what they lack."""
        (newest,) = connection.execute("SELECT max(row) FROM events WHERE topic = ?", (topic,)).fetchone()
        if newest is None or newest <= known.newest:
            known.newest = max(known.newest, 0)
            return
        with self._lock:
            first = min((waiter.after for waiter in known.waiters), default=newest)
        rows = connection.execute(
            "SELECT row, event FROM events WHERE topic = ? AND row > ? ORDER BY row LIMIT ?",
            (topic, first, MAX_EVENTS_PER_POLL),
        ).fetchall()
        with self._lock:
            known.newest = newest
            for waiter in [waiter for waiter in known.waiters if waiter.after < newest]:
                known.waiters.remove(waiter)
                self._waiting -= 1
                complete = waiter.after >= first  # one that came meanwhile with an older row looks itself
                waiter.wake(rows[bisect_right(rows, waiter.after, key=_number) :] if complete else [])

    def _wake_all(self) -> None:
        """Have everybody look for himself."""
        for known in self._topics.values():
            known.newest = UNKNOWN
            while known.waiters:
                known.waiters.pop().wake([])
                self._waiting -= 1


def _number(row: Row) -> int:
    return row[0]
