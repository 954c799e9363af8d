"""Who a learner is, across restarts: one name per run folder, and at most one process that bears it.

    <folder>/learner.owner    a random name, made once; locked (flock) by the process that lives

The kernel gives the lock back when the process dies, however it dies: a restarted learner is recognised at once and
need not wait until its own lease is silent, while a second one on the same folder is refused at once.
"""

import contextlib
import fcntl
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from sop.core.errors import RunError

FILE = "learner.owner"
_NAME = re.compile(r"[0-9a-f]{32}")


@contextlib.contextmanager
def learner_owner(folder: Path) -> Iterator[str]:
    """The name under which the learner of this run folder asks for its lease; the folder is locked until the end.

    Args:
        folder: of this machine's own files of the run; exists.

    Raises:
        RunError: another process is the learner of this folder.
    """
    descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"a learner runs in {folder} already: stop it first, or give this one its own folder"
            ) from error
        name = os.pread(descriptor, 32, 0).decode("ascii", "replace")
        if not _NAME.fullmatch(name):
            name = uuid.uuid4().hex
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, name.encode(), 0)
            os.fsync(descriptor)
        yield name
    finally:
        os.close(descriptor)
