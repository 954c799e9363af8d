"""A bus in one SQLite file: one machine, no server. Writers append, subscribers are woken within milliseconds.

The file is in WAL mode: readers never wait for writers. Writers never move the log into the database; only
the owner does (`maintain`), because SQLite before 3.51.3 can lose a log reset that races with another one.
Put the file on a local disk: WAL needs shared memory, network file systems have none.
"""

import contextlib
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from sop.core.errors import StoreUnavailable
from sop.transport.base import MAX_EVENTS_PER_POLL, Cursor, check_event, check_topic, row_of
from sop.transport.watch import Watch

POLL_EVERY_S = 0.003
"""How often one thread looks for all waiting polls (`Watch`): half of it is the mean delay of an event; a look costs
some 10 us."""
_LONG_S = 10 * POLL_EVERY_S
"""A poll that may wait this long leaves the first look to the watcher when the watcher knows of nothing new."""
MAINTAIN_EVERY_S = 20.0
"""How often the owner trims topics and moves the log into the database."""
BUSY_TIMEOUT_S = 10.0
"""How long a writer waits for other writers before the bus counts as unavailable."""
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE events (
    row INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice, even after a trim
    topic TEXT NOT NULL,
    event_id TEXT NOT NULL,
    event BLOB NOT NULL,
    utc_s REAL NOT NULL,
    UNIQUE (topic, event_id)
);
CREATE INDEX events_in_order ON events (topic, row);
CREATE TABLE bus (history TEXT NOT NULL)
"""
_INHERITED: list[object] = []
"""Connections and watches of a parent process: a forked child must neither use nor close them."""


class _BusClosed(ValueError):
    """A call came after `close`."""


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
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._watch = self._new_watch()
        with self._bus_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _connect(self.path)
            _create_schema(self._connection, self.path)
            (self._history,) = self._connection.execute("SELECT history FROM bus").fetchone()

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
            self._watch.nudge(topic)
        self._maintain_when_due()

    def poll(self, topic: str, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
        """See `EventBus.poll`."""
        check_topic(topic)
        row = row_of(after, self._history)
        self._maintain_when_due()
        self._require_open()
        self._require_process()
        deadline_s = time.monotonic() + timeout_s
        known = self._watch.newest(topic)  # before the look, which therefore sees all rows up to it
        try:
            found = [] if 0 <= known <= row and timeout_s >= _LONG_S else self._look(topic, row)
            while not found:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or (rows := self._watch.wait(topic, max(row, known), left_s)) is None:
                    return []
                known = self._watch.newest(topic)
                found = self._with_cursors(rows) if rows else self._look(topic, row)
        except _BusClosed:
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
        if self._closed.is_set():
            return
        self._closed.set()
        if self._process == os.getpid():
            self._watch.close()
        with self._lock:
            if self._process == os.getpid():
                self._connection.close()

    def _look(self, topic: str, row: int) -> list[tuple[Cursor, bytes]]:
        with self._session() as connection:
            found = connection.execute(
                "SELECT row, event FROM events WHERE topic = ? AND row > ? ORDER BY row LIMIT ?",
                (topic, row, MAX_EVENTS_PER_POLL),
            ).fetchall()
        return self._with_cursors(found)

    def _with_cursors(self, rows: Iterable[tuple[int, bytes]]) -> list[tuple[Cursor, bytes]]:
        return [(f"{self._history}:{number}", event) for number, event in rows]

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise _BusClosed(f"the bus {self.path} is closed")

    def _require_owner(self) -> None:
        if not self.owner:
            raise ValueError(f"only the owner maintains {self.path}: open it with owner=True in one process")

    def _maintain_when_due(self) -> None:
        if self.owner and self._monotonic() - self._maintained_s >= MAINTAIN_EVERY_S:
            self.maintain()

    @contextlib.contextmanager
    def _session(self) -> Iterator[sqlite3.Connection]:
        """The connection for one statement: one thread at a time, a fresh one after fork."""
        self._require_process()
        with self._lock, self._bus_errors():
            self._require_open()
            yield self._connection

    def _require_process(self) -> None:
        """After a fork: a connection, a lock and a watch of this process's own."""
        if self._process == os.getpid():
            return
        _INHERITED.extend((self._connection, self._watch))
        with self._bus_errors():
            self._connection = _connect(self.path)
        self._lock = threading.Lock()
        self._watch = self._new_watch()
        self._process = os.getpid()

    def _new_watch(self) -> Watch:
        return Watch(lambda: _connect(self.path), POLL_EVERY_S, name="bus-watch")

    @contextlib.contextmanager
    def _bus_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(f"bus {self.path}: {_advice(error)}") from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA synchronous = NORMAL")
        _enter_wal_mode(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _enter_wal_mode(connection: sqlite3.Connection) -> None:
    """Switching needs the file for a moment, and SQLite does not wait for it: several processes may open at once."""
    deadline_s = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)


def _create_schema(connection: sqlite3.Connection, path: Path) -> None:
    if _schema_version(connection) == 0:
        connection.execute("BEGIN IMMEDIATE")
        try:
            if _schema_version(connection) == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute("INSERT INTO bus VALUES (?)", (uuid.uuid4().hex[:12],))
                connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        except BaseException:
            if connection.in_transaction:  # some errors have SQLite take everything back by itself
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
    version = _schema_version(connection)
    if version != _SCHEMA_VERSION:
        raise StoreUnavailable(
            f"bus {path}: has schema {version}, this program knows {_SCHEMA_VERSION}: use a new file"
        )


def _schema_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _advice(error: sqlite3.Error | OSError) -> str:
    code = getattr(error, "sqlite_errorcode", None)
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return f"{error}; stop the run and delete the file: the bus is a hint, everything is found again in the store"
    if code == sqlite3.SQLITE_FULL:
        return "the disk is full: free room, then try again"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"{error}: the file and its folder must be writable for this user"
    return f"{error}: try again"
