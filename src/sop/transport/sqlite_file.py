"""A bus's SQLite file as one process has it open, and how it is opened."""

import contextlib
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from sop.core.errors import StoreUnavailable
from sop.transport.watch import Watch

POLL_EVERY_S = 0.003
"""How often one thread looks for all waiting polls (`Watch`): half of it is the mean delay of an event; a look costs
some 10 us."""
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


class BusClosed(ValueError):
    """A call came after `close`."""


class BusFile:
    """One connection, the thread that watches, and which file they belong to. For the process that opened it.

    Args:
        path: created when it does not exist; its folder must be there.

    Raises:
        StoreUnavailable: the file cannot be made, or is not a bus; says what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = os.getpid()
        """The process that may use it: a forked child must neither use nor close it."""
        self.closed = False
        self._lock = threading.Lock()
        with self._errors():
            self.connection, self._identity = _open(path)
            (self.history,) = self.connection.execute("SELECT history FROM bus").fetchone()
        self.watch = Watch(lambda: _connect(path), POLL_EVERY_S, name="bus-watch")

    def in_place(self) -> bool:
        """Whether the path still names this file: nobody has deleted or replaced it. Costs one `stat`."""
        return _identity(self.path) == self._identity

    @contextlib.contextmanager
    def session(self) -> Iterator[sqlite3.Connection]:
        """The connection for one statement: one thread at a time.

        Raises:
            BusClosed: after `close`.
            StoreUnavailable: the statement failed; says what to do.
        """
        with self._lock, self._errors():
            if self.closed:
                raise BusClosed(f"the bus {self.path} is closed")
            yield self.connection

    def close(self) -> None:
        """End the watching thread, wake who waits, close the connection (blocks for a statement). Idempotent."""
        self.watch.close()
        with self._lock:
            self.closed = True
            self.connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(f"bus {self.path}: {_advice(error)}") from error


def _open(path: Path) -> tuple[sqlite3.Connection, tuple[int, int]]:
    """A connection to a file that has the schema, and which file that is.

    The file is asked for before and after, for somebody may replace it meanwhile; never by opening it here, because
    closing it would take away the locks that SQLite has on it in this process.
    """
    while True:
        before = _identity(path)
        connection = _connect(path)
        try:
            _create_schema(connection, path)
            if before is not None and _identity(path) == before:
                return connection, before
        except BaseException:
            connection.close()
            raise
        connection.close()


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; None when there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
