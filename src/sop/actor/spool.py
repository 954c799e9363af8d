"""The spool: episodes on the robot's own disk, from their end until the store has them.

    <folder>/00000017-00123-<hash>.arrow     waits for upload; appears whole (fsync, rename) or not at all;
                                             its modification time says since when it is durable
    <folder>/running-00000018                 steps of an episode that is not committed yet (`sop.actor.journal`)
    <folder>/journal                          one line per recorded episode: its key; never shrinks

The journal remembers the last sequence number when everything is uploaded, and is what an auditor compares
with the index: recorded = indexed, each once.
"""

import errno
import fcntl
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from sop.core.codec import content_hash, encode
from sop.core.episode import Episode
from sop.core.errors import InvalidRecord, RunError, SopError
from sop.core.layout import EpisodeKey
from sop.transport.durable import write_durably

_log = logging.getLogger(__name__)


class SpoolFull(SopError):
    """The robot's disk has no room for another episode; recording stops until there is."""


class EpisodeSpool:
    """A folder of encoded episodes of one actor. Thread-safe for one writer and one uploader.

    Raises:
        RunError: another process uses the folder, or it holds episodes of another actor or store folder.

    Args:
        folder: belongs to this actor alone; made when missing.
        store_folder: the store's folder that episodes go to (`episodes` or `demonstrations`).
        actor_id: whose episodes they are.
        max_bytes: refuse to grow beyond this.
    """

    def __init__(self, folder: Path, store_folder: str, actor_id: str, *, max_bytes: int = 20 << 30) -> None:
        self._folder = folder
        self._store_folder = store_folder
        self._actor_id = actor_id
        self._max_bytes = max_bytes
        self._journal = folder / "journal"
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._hold_alone()
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()
        self._recover_journal()
        strangers = [key for key in self.recorded() if not key.startswith(f"{store_folder}/{actor_id}/")]
        if strangers:
            raise RunError(f"{folder} holds {strangers[0]}: take another actor id for {store_folder}")

    def recorded(self) -> list[str]:
        """Keys of all episodes that were ever recorded here, in order."""
        if not self._journal.exists():
            return []
        return [line for line in self._journal.read_text().split("\n") if line]

    def next_sequence(self) -> int:
        """The sequence number after the last recorded one."""
        recorded = self.recorded()
        return EpisodeKey.parse(recorded[-1]).sequence + 1 if recorded else 0

    def commit(self, episode: Episode) -> EpisodeKey:
        """Make an episode durable (blocks for encoding and fsync). When this returns it survives a power loss.

        Raises:
            SpoolFull: no room; nothing was written.
        """
        data = encode(episode)
        key = EpisodeKey(self._store_folder, self._actor_id, episode.sequence, episode.num_steps, content_hash(data))
        with self._lock:
            waiting_bytes = sum(path.stat().st_size for path in self._folder.glob("*.arrow"))
        if waiting_bytes + len(data) > self._max_bytes:
            raise SpoolFull(
                f"{self._folder} holds {self._max_bytes} bytes that wait for upload: check the store's link"
            )
        path = self._path(str(key))
        try:
            with self._lock:  # an episode is not sent before the journal knows it
                write_durably(path, data)
                os.utime(path)  # durable since now: `spooled_utc_ns`
                self._append_journal(str(key))
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SpoolFull(f"the disk of {self._folder} is full: free some room") from error
            raise
        self.running(episode.sequence).unlink(missing_ok=True)
        return key

    @property
    def actor_id(self) -> str:
        """Whose episodes they are."""
        return self._actor_id

    def running(self, sequence: int) -> Path:
        """Where the steps of an episode are until it is committed."""
        return self._folder / f"running-{sequence:08d}"

    def interrupted(self) -> list[Path]:
        """Files of steps whose episodes were never committed, oldest first; those of committed ones are removed."""
        known = {EpisodeKey.parse(key).sequence for key in self.recorded()}
        left = []
        for path in sorted(self._folder.glob("running-" + "[0-9]" * 8)):
            if int(path.name.removeprefix("running-")) in known:
                path.unlink()
            else:
                left.append(path)
        return left

    def pending(self) -> list[str]:
        """Keys of episodes that wait for upload, oldest first."""
        with self._lock:
            names = sorted(path.name for path in self._folder.glob("*.arrow"))
        return [f"{self._store_folder}/{self._actor_id}/{name}" for name in names]

    def spooled_utc_ns(self, key: str) -> int | None:
        """When a waiting episode was durable on this disk, UTC nanoseconds, exact to some milliseconds; known after a
        restart too (of an episode that a crash kept out of the journal: when it was written). None when it is gone."""
        try:
            return self._path(key).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def read(self, key: str) -> bytes:
        """Bytes of a waiting episode.

        Raises:
            InvalidRecord: the disk gives back other bytes than were written.
        """
        data = self._path(key).read_bytes()
        if content_hash(data) != EpisodeKey.parse(key).episode_id:
            raise InvalidRecord("episode", f"{self._path(key)} does not hash to its name: the disk damaged it")
        return data

    def mark_uploaded(self, key: str) -> None:
        """Forget the local copy; the store has the episode. Idempotent."""
        with self._lock:
            self._path(key).unlink(missing_ok=True)

    def set_aside(self, key: str) -> None:
        """Keep an episode that can never be uploaded out of the way, as `<name>.refused`; nothing is deleted."""
        with self._lock:
            path = self._path(key)
            path.replace(path.with_name(path.name + ".refused"))

    def _path(self, key: str) -> Path:
        return self._folder / key.rsplit("/", 1)[1]

    def _hold_alone(self) -> None:
        """Lock the spool for this process until it ends: two would give the same numbers to their episodes."""
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)  # open until the end
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"another process uses {self._folder}: is actor {self._actor_id!r} running already? Choose another id"
            ) from error

    def _append_journal(self, key: str) -> None:
        with self._journal.open("a") as journal:
            whole = journal.tell()
            try:
                journal.write(key + "\n")
                journal.flush()
                os.fsync(journal.fileno())
            except OSError:
                os.truncate(self._journal, whole)  # a full disk may have taken half of the line
                raise

    def _recover_journal(self) -> None:
        """Cut a line that a crash left half, and enter episodes that were written but not yet entered."""
        text = self._journal.read_text() if self._journal.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_durably(self._journal, whole.encode())
        known = set(whole.split("\n"))
        for key in self.pending():
            if key not in known:
                self._append_journal(key)


class SpoolWriter:
    """Encodes and commits finished episodes in a thread, so that the control loop does not.

    Args:
        spool: where they go.
        on_commit: told the key of every committed episode (wakes the uploader).
        max_waiting: episodes that may wait for the disk; `submit` blocks beyond that (between episodes).
    """

    def __init__(self, spool: EpisodeSpool, on_commit: Callable[[EpisodeKey], None], *, max_waiting: int = 4) -> None:
        self._spool = spool
        self._on_commit = on_commit
        self._queue: queue.Queue[Episode | None] = queue.Queue(max_waiting)
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="spool-writer", daemon=True)
        self._thread.start()
        self.full = ""
        """Why nothing can be recorded now; empty while there is room."""

    def submit(self, episode: Episode) -> None:
        """Hand over an episode; it counts as recorded once it is committed.

        Raises:
            Exception: whatever ended the thread.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(episode)

    def close(self) -> None:
        """Commit what waits, then stop; raises what ended the thread. Idempotent."""
        if self._thread.is_alive():
            self._closing.set()
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        try:
            while (episode := self._queue.get()) is not None:
                self._commit(episode)
        except Exception as error:  # noqa: BLE001 - handed to the owner, who raises it in submit() or close()
            self._error = error
            while self._queue.get() is not None:
                pass

    def _commit(self, episode: Episode) -> None:
        """Keep trying while the disk is full: an episode is never dropped."""
        while True:
            try:
                key = self._spool.commit(episode)
            except SpoolFull as error:
                if not self.full:
                    _log.error("recording stops: %s", error)
                self.full = str(error)
                if self._closing.wait(1.0):
                    raise
            else:
                self.full = ""
                self._on_commit(key)
                return
