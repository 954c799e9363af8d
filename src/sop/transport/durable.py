"""Files that survive a power cut: whole or not there. Written once here, used by whoever keeps something on a disk."""

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write, fsync, rename, fsync the folder: the file has its new bytes or its old ones, power cut or not. Blocks.

    Raises:
        OSError: no room, no permission; the old bytes stay.
    """
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Make the names in a folder, or the bytes of a file, survive a power cut. Blocks.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
