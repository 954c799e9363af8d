"""Files of a fleet's folder: whole or not there, and for their owner alone.

write   temp name (0600) -> write -> fsync -> chmod -> rename -> fsync of the folder
"""

import contextlib
import fcntl
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from sop.core.errors import RunError
from sop.transport.durable import sync_path

SECRET = 0o600
PUBLIC = 0o644
MAX_FILE_BYTES = 16 << 20
"""A register of 10,000 robots has 4 MB; what is larger is none of ours."""
_LOCK = ".lock"


def write_file(path: Path, data: bytes, mode: int = SECRET) -> None:
    """Replace a file: a reader sees the old one or the new one, whole. Durable when it returns.

    Raises:
        RunError: it cannot be written; says why.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.touch(SECRET, exist_ok=False)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        part.replace(path)
        sync_path(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_file(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        RunError: missing, not readable, or larger than `MAX_FILE_BYTES`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise RunError(f"{path} has more than {MAX_FILE_BYTES} bytes: it is not a file of a fleet")
    return data


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can enter; parents are made as usual.

    Raises:
        RunError: it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        sync_path(folder.parent)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error}") from error


def check_private(path: Path) -> None:
    """Make sure that a folder or file of secrets is ours and nobody else can read or enter it.

    Raises:
        RunError: it is missing, or others can; says what to do.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if stat.S_IMODE(found.st_mode) & 0o077:
        right = "700" if stat.S_ISDIR(found.st_mode) else "600"
        raise RunError(f"{path} holds the secrets of a fleet and can be read by others: chmod {right} {path}")
    if found.st_uid != os.geteuid():
        raise RunError(f"{path} holds the secrets of a fleet and belongs to another user: work as that user")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; does not wait.

    Raises:
        RunError: another process holds it.
    """
    descriptor = os.open(folder / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, SECRET)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise RunError(f"another `sop fleet` works in {folder}: try again when it is done") from error
    finally:
        os.close(descriptor)
