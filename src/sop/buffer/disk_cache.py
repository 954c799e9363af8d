"""A bounded folder of objects named by the hash of their bytes; what goes first is what was not used for longest.

    <folder>/<32 hexadecimal digits>.arrow          whole, or not there: written as .part, then renamed
    <folder>/<id>.<process>-<number>.part           being written; collected at the next opening if its writer died

Nothing is synced: after a restart every file is hashed before its first use, and one that was torn by a power
cut or damaged by a disk is deleted and fetched again. The time of last use is the file's modification time, so
the order survives a restart.
"""

import itertools
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

import blake3

from sop.core.errors import StoreUnavailable

_NAME = re.compile(r"(?P<id>[0-9a-f]{32})\.arrow")
_PART = re.compile(r"[0-9a-f]{32}\.(?P<pid>\d+)-\d+\.part")


class DiskCache:
    """Objects by content id. Thread-safe; a second process on the same folder costs repeated fetches, nothing else.

    Args:
        folder: made when it is not there. Files with other names are left alone.
        max_bytes: bound of all files; exceeded only by what is held, and by a single larger object.

    Raises:
        StoreUnavailable: the folder cannot be made or listed.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self.folder = folder
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._unchecked: set[str] = set()
        """Files that an earlier process left: hashed before their first use."""
        self._held: Counter[str] = Counter()
        self._lock = Lock()
        self._numbers = itertools.count()
        with _disk_errors("open the cache", folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._scan()
        self.num_bytes = sum(self._sizes.values())
        """Bytes of all files now."""
        with self._lock:
            self._shrink()

    def __contains__(self, object_id: str) -> bool:
        return object_id in self._sizes

    def path(self, object_id: str) -> Path | None:
        """The object's file, or None when it has to be fetched. Marks it as used.

        The first use after a restart reads and hashes it (blocking); a damaged one is deleted.

        Raises:
            StoreUnavailable: the disk fails.
        """
        with self._lock:
            if object_id not in self._sizes:
                return None
            self._sizes.move_to_end(object_id)
        path = self._file(object_id)
        try:
            with _disk_errors("read", path):
                if object_id in self._unchecked and _hash(path) != object_id:
                    self._forget(object_id)
                    return None
                os.utime(path)
        except FileNotFoundError:  # somebody cleared the folder
            self._forget(object_id)
            return None
        self._unchecked.discard(object_id)
        return path

    def put(self, object_id: str, data: bytes | memoryview) -> Path:
        """Keep an object; the caller knows that its bytes have this id. Idempotent; returns its file.

        Raises:
            StoreUnavailable: the disk is full or fails; nothing is left behind.
        """
        path = self._file(object_id)
        part = self.folder / f"{object_id}.{os.getpid()}-{next(self._numbers)}.part"
        try:
            with _disk_errors("write", path):
                self.folder.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
                part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        with self._lock:
            self.num_bytes += len(data) - self._sizes.get(object_id, 0)
            self._sizes[object_id] = len(data)
            self._sizes.move_to_end(object_id)
            self._unchecked.discard(object_id)
            self._shrink()
        return path

    @contextmanager
    def holding(self, object_ids: Sequence[str]) -> Iterator[None]:
        """Inside the `with` none of these is removed to make room, whether it is there already or comes now."""
        with self._lock:
            self._held.update(object_ids)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(object_ids)
                self._held += Counter()  # forgets those that nobody holds
                self._shrink()

    def _file(self, object_id: str) -> Path:
        return self.folder / f"{object_id}.arrow"

    def _scan(self) -> None:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                part, whole = _PART.fullmatch(entry.name), _NAME.fullmatch(entry.name)
                if part is not None and not _is_alive(int(part["pid"])):
                    Path(entry.path).unlink(missing_ok=True)
                elif whole is not None and entry.is_file(follow_symlinks=False):
                    facts = entry.stat(follow_symlinks=False)
                    found.append((facts.st_mtime_ns, whole["id"], facts.st_size))
        self._sizes.update((object_id, size) for _, object_id, size in sorted(found))
        self._unchecked.update(self._sizes)

    def _shrink(self) -> None:
        """Remove what was not used for longest until the bound is kept. The lock is held."""
        while self.num_bytes > self._max_bytes and len(self._sizes) > 1:
            oldest = next((object_id for object_id in self._sizes if object_id not in self._held), None)
            if oldest is None:
                return
            self._remove(oldest)

    def _forget(self, object_id: str) -> None:
        with self._lock:
            if object_id in self._sizes:
                self._remove(object_id)

    def _remove(self, object_id: str) -> None:
        self.num_bytes -= self._sizes.pop(object_id)
        self._unchecked.discard(object_id)
        with _disk_errors("delete", self._file(object_id)):
            self._file(object_id).unlink(missing_ok=True)


def _hash(path: Path) -> str:
    """As `sop.core.codec.content_hash` of the file's bytes; the interpreter lock is free meanwhile."""
    return str(blake3.blake3().update_mmap(path).hexdigest(length=16))


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process has not written yet: the number was another's before
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True


@contextmanager
def _disk_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"cannot {action} {path}: {error.strerror or error}") from error
