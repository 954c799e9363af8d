"""A bus in one SQLite file: one machine, no server. Writers append, subscribers are woken within milliseconds.

The file is in WAL mode: readers never wait for writers. Writers never move the log into the database; only
the owner does (`maintain`), because SQLite before 3.51.3 can lose a log reset that races with another one.
When the file is deleted or replaced, everybody goes over to the new one at his next call: its events begin anew.
Put the file on a local disk: WAL needs shared memory, network file systems have none.
"""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from sop.core.errors import StoreUnavailable
from sop.transport.base import MAX_EVENTS_PER_POLL, Cursor, check_event, check_topic, row_of
from sop.transport.sqlite_file import POLL_EVERY_S, BusClosed, BusFile

_log = logging.getLogger(__name__)
_LONG_S = 10 * POLL_EVERY_S
"""A poll that may wait this long leaves the first look to the watcher when the watcher knows of nothing new."""
MAINTAIN_EVERY_S = 20.0
"""How often the owner trims topics and moves the log into the database."""
SETTLE_S = 0.1
"""How long a file that has gone is not made again: its log is being deleted, too, and must not meet the new file."""
_INHERITED: list[BusFile] = []
"""Files of a parent process: a forked child must neither use nor close them."""


class SqliteBus:
    """`EventBus` in a file. Usable from several threads, and after fork or spawn from several processes.

    Args:
        path: the file; created when it does not exist.
        owner: the one process that maintains the file; its publish and poll do it when it is due.
        keep_s: topic -> seconds after which the owner forgets its events, for topics that repeat themselves
            (signs of life). A forgotten id could be published again. Topics not named are kept for ever.
        clock: seconds since the epoch, stamped on events for `keep_s`.
        monotonic: seconds, for when maintenance is due.

    Raises:
        StoreUnavailable: the file cannot be made, or is not a bus; says what to do.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        owner: bool = False,
        keep_s: Mapping[str, float] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path).absolute()
        self.owner = owner
        self._keep_s = dict(keep_s or {})
        for topic in self._keep_s:
            check_topic(topic)
        self._clock = clock
        self._monotonic = monotonic
        self._maintained_s = monotonic()
        self._closed = threading.Event()
        self._replacing = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"bus {self.path}: {error}; its folder must be writable for this user") from error
        self._file = BusFile(self.path)

    def publish(self, topic: str, event: bytes, event_id: str) -> None:
        """See `EventBus.publish`. One transaction: survives kill -9 of any process, and a power cut of the
        machine up to the last fsync of the log."""
        check_topic(topic)
        check_event(event, event_id)
        with self._session() as connection:
            added = connection.execute(
                "INSERT INTO events (topic, event_id, event, utc_s) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (topic, event_id) DO NOTHING",
                (topic, event_id, event, self._clock()),
            )
            is_new = added.rowcount == 1
        if is_new:
            self._file.watch.nudge(topic)
        self._maintain_when_due()

    def poll(self, topic: str, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
        """See `EventBus.poll`."""
        check_topic(topic)
        self._maintain_when_due()
        file = self._in_place()
        row, watch = row_of(after, file.history), file.watch
        deadline_s = time.monotonic() + timeout_s
        known = watch.newest(topic)  # before the look, which therefore sees all rows up to it
        try:
            found = [] if 0 <= known <= row and timeout_s >= _LONG_S else _look(file, topic, row)
            while not found:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or (rows := watch.wait(topic, max(row, known), left_s)) is None:
                    return []
                known = watch.newest(topic)
                found = _with_cursors(file, rows) if rows else _look(file, topic, row)
        except BusClosed:
            return []
        return found

    def trim(self, topic: str, keep_s: float) -> int:
        """Forget events of a topic that are older than `keep_s` seconds; returns how many. For the owner only."""
        self._require_owner()
        check_topic(topic)
        with self._session() as connection:
            cursor = connection.execute(
                "DELETE FROM events WHERE topic = ? AND utc_s < ?", (topic, self._clock() - keep_s)
            )
            return cursor.rowcount

    def maintain(self) -> None:
        """Trim what `keep_s` names and move the log into the database, so that it stops growing. For the owner only.

        Never waits for readers: what one of them still needs is moved next time.
        """
        self._require_owner()
        self._maintained_s = self._monotonic()
        for topic, keep_s in self._keep_s.items():
            self.trim(topic, keep_s)
        with self._session() as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """See `EventBus.close`."""
        self._closed.set()
        if self._file.process == os.getpid():
            with self._replacing:
                self._file.close()

    def _require_owner(self) -> None:
        if not self.owner:
            raise ValueError(f"only the owner maintains {self.path}: open it with owner=True in one process")

    def _maintain_when_due(self) -> None:
        if self.owner and self._monotonic() - self._maintained_s >= MAINTAIN_EVERY_S:
            self.maintain()

    @contextlib.contextmanager
    def _session(self) -> Iterator[sqlite3.Connection]:
        """The connection for one statement, to the file that is in place."""
        with contextlib.ExitStack() as stack:
            while True:
                file = self._in_place()
                try:
                    connection = stack.enter_context(file.session())
                    break
                except BusClosed:  # another thread has just replaced it
                    continue
            yield connection

    def _in_place(self) -> BusFile:
        """The file that the path names now. Opened again in a forked child, and when somebody deleted or replaced it.

        Raises:
            BusClosed: after `close`.
            StoreUnavailable: there is none, and none can be made.
        """
        if self._closed.is_set():
            raise BusClosed(f"the bus {self.path} is closed")
        file = self._file
        if file.process != os.getpid():
            _INHERITED.append(file)
            self._replacing = threading.Lock()
            self._file = file = BusFile(self.path)
        return file if file.in_place() else self._replace(file)

    def _replace(self, gone: BusFile) -> BusFile:
        with self._replacing:
            if self._closed.is_set():
                raise BusClosed(f"the bus {self.path} is closed")
            if self._file is gone:
                time.sleep(SETTLE_S)
                self._file = BusFile(self.path)
                _log.warning("the bus %s was deleted or replaced: opened again, its events begin anew", self.path)
                gone.close()
            return self._file


def _look(file: BusFile, topic: str, row: int) -> list[tuple[Cursor, bytes]]:
    with file.session() as connection:
        found = connection.execute(
            "SELECT row, event FROM events WHERE topic = ? AND row > ? ORDER BY row LIMIT ?",
            (topic, row, MAX_EVENTS_PER_POLL),
        ).fetchall()
    return _with_cursors(file, found)


def _with_cursors(file: BusFile, rows: Iterable[tuple[int, bytes]]) -> list[tuple[Cursor, bytes]]:
    return [(f"{file.history}:{number}", event) for number, event in rows]
