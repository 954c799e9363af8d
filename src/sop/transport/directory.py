"""A directory as an object store: one machine, no server.

    put   .tmp/<unique> -> write -> fsync -> link(2) to the final name -> fsync of its folder -> unlink the temp name
          (without the two fsyncs when it need not be durable)

link(2) is atomic and fails when the name is taken, which is what create-only means; rename(2) would replace.
A writer that dies leaves at most a file in `.tmp`, which no listing shows and the next opening collects.
"""

import contextlib
import errno
import mmap
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from sop.core.errors import AlreadyExists, NotFound, StoreUnavailable
from sop.transport.base import Data, check_folder, check_key, check_prefix, parts_of, resolve_span
from sop.transport.durable import sync_path

TEMP_FOLDER = ".tmp"
"""Begins with a dot, so it can never be part of a key."""
TEMP_MAX_AGE_S = 3600.0
"""Older left-overs belong to dead writers; a living one touches its file while it writes."""
_READ_BYTES = 1 << 30
"""Linux reads at most 2 GiB - 4 KiB in one call."""
_ADVICE = {
    errno.ENOSPC: "the disk is full: free room, then try again",
    errno.EDQUOT: "the disk quota is used up: free room, then try again",
    errno.EROFS: "the file system is read-only: mount it writable",
    errno.EACCES: "permission denied: give this user write access to the store",
    errno.EPERM: "not permitted: the store needs a file system with hard links and write access for this user",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
}


class DirectoryStore:
    """`ObjectStore` and `MapsObjects` in a directory of a local disk. Any number of threads and processes may open it.

    Symbolic links inside the directory are never followed.

    Args:
        path: the root; created when it does not exist.
        clock: seconds since the epoch, to tell the age of left-over temporary files.

    Raises:
        StoreUnavailable: the directory cannot be made or written; says why and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self.root = Path(path).absolute()
        with _store_errors("open the store", self.root):
            (self.root / TEMP_FOLDER).mkdir(parents=True, exist_ok=True)
            self.root = self.root.resolve()
            sync_path(self.root)
            sync_path(self.root.parent)
            _collect_left_overs(self.root / TEMP_FOLDER, clock() - TEMP_MAX_AGE_S)
        self._durable_folders = {self.root}

    def put(self, key: str, data: Data, *, durable: bool = True) -> None:
        """See `ObjectStore.put`. Durable by two fsyncs; parts are written one by one, never joined."""
        check_key(key)
        parts = parts_of(data)
        path = self.root / key
        temp = self.root / TEMP_FOLDER / f"{os.getpid()}-{uuid.uuid4().hex}"
        with _store_errors("write", path):
            self._make_folder(path.parent, key, durable=durable)
            try:
                with temp.open("xb", buffering=0) as file:
                    for part in parts:
                        _write_all(file.fileno(), part)
                    if durable:
                        os.fsync(file.fileno())
                _link(temp, path, key)
                if durable:
                    sync_path(path.parent)
            finally:
                temp.unlink(missing_ok=True)

    def get(self, key: str, span: slice | None = None) -> bytes:
        """See `ObjectStore.get`. Reads with pread: no mapping, no read-ahead beyond the span."""
        start, stop = resolve_span(span)
        with self._open(key) as (descriptor, size):
            end = size if stop is None else min(stop, size)
            if end == size:
                return _read_to_end(descriptor, start)
            return _read_range(descriptor, start, end)

    def map(self, key: str) -> memoryview:
        """See `MapsObjects.map`. The file's pages are those of the file cache, shared with every other reader.

        Whoever can change the file in place, against the contract, changes what is seen, and cutting it short
        kills its readers: the folder is trusted like the account that owns it.
        """
        with self._open(key) as (descriptor, size):
            if size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))

    def keys(self, prefix: str, after: str | None = None) -> Iterator[str]:
        """See `ObjectStore.keys`. Lists only the folders that can hold a key of the answer."""
        check_prefix(prefix)
        slash = prefix.rfind("/") + 1
        self.require_root()
        return self._walk(prefix[:slash], prefix, after or "")

    def folders(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.folders`."""
        check_folder(prefix)
        self.require_root()
        found: list[str] = []
        with _store_errors("list", self.root / prefix), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._check_links(self.root / prefix)
            with os.scandir(self.root / prefix) as entries:
                found += [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return iter(sorted(name for name in found if not name.startswith(".")))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`. The folder stays, even when it is empty."""
        check_key(key)
        path = self.root / key
        with _store_errors("delete", path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._check_links(path.parent)
            if not path.is_dir():
                path.unlink()

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[int, int]]:
        """(descriptor, size) of an object, open for reading."""
        check_key(key)
        path = self.root / key
        try:
            self._check_links(path.parent)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                self.require_root()
                raise NotFound(f"no object {key!r} in {self.root}") from error
            raise _unavailable("read", path, error) from error
        try:
            with _store_errors("read", path):
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode):
                    raise NotFound(f"no object {key!r} in {self.root}")
                yield descriptor, facts.st_size
        finally:
            os.close(descriptor)

    def require_root(self) -> None:
        """A store that is gone (unmounted, moved) is unavailable; taking it for empty would lose its history.

        Raises:
            StoreUnavailable: its folder is not there.
        """
        if not self.root.is_dir():
            raise StoreUnavailable(f"the store {self.root} is not there: is its disk mounted?")

    def _walk(self, folder: str, prefix: str, after: str) -> Iterator[str]:
        """Keys below `folder` ("" or ending in "/") in order.

        A folder sorts as its name plus "/", so that `a-b` comes before `a/b`. All keys of a folder are after
        `after` when its name is, and none is when its name is before `after` and not the beginning of it.
        """
        found = []
        with _store_errors("list", self.root / folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._check_links(self.root / folder)
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.name.startswith(".") or not name.startswith(prefix):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        name += "/"
                        if name > after or after.startswith(name):
                            found.append(name)
                    elif name > after and entry.is_file(follow_symlinks=False):
                        found.append(name)
        for name in sorted(found):
            if name.endswith("/"):
                yield from self._walk(name, prefix, after)
            else:
                yield name

    def _make_folder(self, folder: Path, key: str, *, durable: bool) -> None:
        """Make a folder and its parents, and make them durable if asked to. Each is synced once per process."""
        if folder in self._durable_folders:
            return
        self._make_folder(folder.parent, key, durable=durable)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        mode = folder.lstat().st_mode
        if stat.S_ISREG(mode):
            raise ValueError(f"key {key!r} is below {str(folder.relative_to(self.root))!r}, which is an object")
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, "a folder of the key is a symbolic link or a special file")
        if durable:
            sync_path(folder.parent)
            self._durable_folders.add(folder)

    def _check_links(self, folder: Path) -> None:
        """Raise NotADirectoryError when the way to a folder leads over a symbolic link."""
        if os.path.realpath(folder) != str(folder):
            raise NotADirectoryError(errno.ENOTDIR, "a symbolic link is in the way", str(folder))


def _link(temp: Path, path: Path, key: str) -> None:
    try:
        os.link(temp, path, follow_symlinks=False)
    except FileExistsError as error:
        if path.is_dir():
            raise ValueError(f"key {key!r} is a folder of other objects") from error
        raise AlreadyExists(f"{path} exists already and is never replaced") from error


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_to_end(descriptor: int, start: int) -> bytes:
    """One allocation whatever the size, and the interpreter lock is free while the kernel copies."""
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(start)
        return file.readall()


def _read_range(descriptor: int, start: int, end: int) -> bytes:
    parts = []
    while start < end:
        part = os.pread(descriptor, min(end - start, _READ_BYTES), start)
        if not part:
            raise OSError(errno.EIO, "the file ends before its size")
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _collect_left_overs(folder: Path, before_s: float) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process collects too
            if path.lstat().st_mtime < before_s:
                path.unlink()


@contextlib.contextmanager
def _store_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unavailable(action, path, error) from error


def _unavailable(action: str, path: Path, error: OSError) -> StoreUnavailable:
    advice = _ADVICE.get(error.errno or 0, f"{error.strerror or error}: check the disk, then try again")
    return StoreUnavailable(f"cannot {action} {path}: {advice}")
