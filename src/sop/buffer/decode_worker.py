"""A process that loads batches for the learner: `python -m sop.buffer.decode_worker <descriptor>`.

    stdin: LoadJob -> open files, decode into shared memory -> stdout: Loaded or Failed

It opens episodes by path, keeps the last ones mapped, and holds nothing that cannot be made again: it may be
killed at any moment. It ends when its stdin closes, which the kernel does when the learner dies, however it dies.
No torch, no network, no store.

Args on the command line: the descriptor of the shared memory (`memfd`), inherited from the learner.
"""

import mmap
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sop.buffer.cache import OpenFiles
from sop.buffer.jobs import (
    ArrayPlace,
    Failed,
    Loaded,
    LoadJob,
    Reply,
    Shapes,
    arrange,
    assemble,
    read_message,
    to_plan,
    write_message,
)
from sop.core.errors import InvalidRecord, NotFound, StoreUnavailable


class Rooms:
    """The rooms in shared memory that this worker has written to, kept mapped.

    Args:
        descriptor: of the shared memory; the learner sizes it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._mapped: dict[int, mmap.mmap] = {}

    def allocator(
        self, offset: int, note: Callable[[Shapes, dict[str, int], int], None]
    ) -> Callable[[Shapes], dict[str, npt.NDArray[Any]]]:
        """An `Allocate` for the room at `offset`; `note` is told shapes, places and size."""

        def allocate(shapes: Shapes) -> dict[str, npt.NDArray[Any]]:
            places, num_bytes = arrange(shapes)
            room = self._map(offset, num_bytes)
            note(shapes, places, num_bytes)
            return {
                name: np.ndarray(shape, dtype, buffer=room, offset=places[name])
                for name, (shape, dtype) in shapes.items()
            }

        return allocate

    def _map(self, offset: int, num_bytes: int) -> mmap.mmap:
        mapped = self._mapped.get(offset)
        if mapped is None or len(mapped) < num_bytes:
            size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            mapped = self._mapped[offset] = mmap.mmap(self._descriptor, size, offset=offset)
        return mapped


def load(job: LoadJob, rooms: Rooms, files: OpenFiles) -> Reply:
    """Do one job; whatever goes wrong with its payload is the answer."""
    arrays: list[ArrayPlace] = []
    total = 0

    def note(shapes: Shapes, places: dict[str, int], num_bytes: int) -> None:
        nonlocal total
        total = num_bytes
        arrays.extend(ArrayPlace(name, shape, dtype, places[name]) for name, (shape, dtype) in shapes.items())

    try:
        episodes = [files.get(Path(file.path)) for file in job.files]
        batch = assemble(to_plan(job), episodes, rooms.allocator(job.offset, note))
    except InvalidRecord as error:
        return Failed(kind="invalid", field=error.field, problem=str(error).partition(": ")[2], step=error.step)
    except NotFound as error:
        return Failed(kind="missing", field="", problem=str(error))
    except StoreUnavailable as error:
        return Failed(kind="unavailable", field="", problem=str(error))
    return Loaded(
        num_bytes=total,
        arrays=tuple(arrays),
        instruction=batch.instruction,
        policy_version=tuple(batch.policy_version.tolist()),
        content_hash=batch.content_hash,
    )


def main() -> None:
    """Answer jobs until stdin closes."""
    rooms, files = Rooms(int(sys.argv[1])), OpenFiles()
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not land between two answers
    while (data := read_message(0)) is not None:
        try:
            reply = load(msgspec.msgpack.decode(data, type=LoadJob), rooms, files)
        except Exception:  # noqa: BLE001 - the top of the process: the learner is told and decides
            reply = Failed(kind="error", field="", problem=traceback.format_exc())
        try:
            write_message(answers, reply)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
