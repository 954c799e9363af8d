"""The latch: once the robot was stopped for safety, it stands until a person says otherwise.

    open --close(reason)--> closed --clear(operator)--> open          each move is a line of `record`, for ever

The record survives restarts: a process that dies behind a closed latch finds it closed. Whoever clears it may do so
from another process (`sop clear`, a console): the waiting process looks again with `refresh`.
"""

import logging
import os
import threading
from pathlib import Path

import msgspec

from sop.core.clock import Clock
from sop.core.errors import RunError

_log = logging.getLogger(__name__)


class LatchEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the record: closed for a reason, or cleared by a person."""

    utc_ns: int
    reason: str = ""
    """Why it closed; empty when it was cleared."""
    operator: str = ""
    """Who cleared it; empty when it closed."""


class SafetyLatch:
    """Closed or open, with the reason. Moves at once: the entry survives the death of the process immediately, a
    power failure some milliseconds later (fsync in a thread, so that a braking control loop does not wait for it).

    Args:
        clock: stamps the entries.
        record: JSON lines that only grow; None keeps the entries in memory (simulation).
    """

    def __init__(self, clock: Clock, record: Path | None = None) -> None:
        self._clock = clock
        self._record = record
        self.entries: list[LatchEntry] = []
        """Everything that happened, oldest first."""
        self._unwritten: LatchEntry | None = None
        self.refresh()

    @property
    def reason(self) -> str:
        """Why it is closed; empty when it is open."""
        return self.entries[-1].reason if self.entries else ""

    def close(self, reason: str) -> None:
        """Close it. A closed latch keeps its first reason. A record that cannot be written is tried again at every
        `refresh`: until then it is closed as long as this process lives."""
        if not reason:
            raise ValueError("a latch closes for a reason")
        if not self.reason:
            self._append(LatchEntry(utc_ns=self._clock.utc_ns(), reason=reason))

    def clear(self, operator: str) -> None:
        """Open it in the name of a person, who has looked at the robot. Nothing happens to an open one.

        Raises:
            ValueError: nobody is named.
            RunError: the record cannot be written; it stays closed.
        """
        if not operator.strip():
            raise ValueError("name the person who clears the latch")
        self.refresh()
        if self.reason and self._unwritten is None:
            self._append(LatchEntry(utc_ns=self._clock.utc_ns(), operator=operator))
        if self._unwritten is not None:
            if self._unwritten is self.entries[-1] and not self.reason:
                self.entries.pop()
                self._unwritten = None
            raise RunError(f"{self._record} cannot be written, the latch stays closed: free some room")

    def refresh(self) -> None:
        """Read the record again: another process may have cleared it. A line that cannot be read counts as closed."""
        if self._unwritten is not None:
            self._write(self._unwritten)
        if self._unwritten is None and self._record is not None and self._record.exists():
            self.entries = [self._read(line) for line in self._record.read_bytes().split(b"\n") if line]

    def _read(self, line: bytes) -> LatchEntry:
        try:
            return msgspec.json.decode(line, type=LatchEntry)
        except msgspec.DecodeError:
            return LatchEntry(utc_ns=0, reason=f"an entry of {self._record} cannot be read: look at the robot")

    def _append(self, entry: LatchEntry) -> None:
        self.entries.append(entry)
        self._write(entry)

    def _write(self, entry: LatchEntry) -> None:
        """Raises nothing: the control loop that brakes has to go on."""
        if self._record is None:
            return
        data = b"\n" + msgspec.json.encode(entry) + b"\n"  # what was cut off stays on a line of its own
        try:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._record, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, data)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            if self._unwritten is None:
                _log.error("the latch's record %s cannot be written: %s", self._record, error)
            self._unwritten = entry
            return
        self._unwritten = None
        threading.Thread(target=_sync, args=(descriptor,), name="latch", daemon=True).start()


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
    os.close(descriptor)
