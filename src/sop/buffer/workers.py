"""Worker processes that load batches, and the memory that they share with the learner.

    learner's thread -- LoadJob --> stdin   worker   stdout -- Loaded, Failed --> learner's thread
                                              |
                    one memfd, sparse:  | room 0 | room 1 | room 2 | ...    4 GiB of addresses each

A batch's arrays are views of its room: nothing is copied, and no fresh memory is touched per batch. The room is
used again when the last view of it is gone, however long somebody keeps the batch. The memory has no name: it
goes when the last process that has it open goes, however that one dies.

A worker that dies is started again and its job is done again. Results do not depend on which worker did what.
"""

import itertools
import logging
import mmap
import os
import queue
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sop.buffer.jobs import (
    MAX_BATCH_BYTES,
    BatchPlan,
    Failed,
    Loaded,
    LoadJob,
    Reply,
    read_message,
    to_job,
    write_message,
)
from sop.core.errors import InvalidRecord, NotFound, RunError, SopError, StoreUnavailable
from sop.core.experience import Batch

_log = logging.getLogger(__name__)
MAX_DEATHS = 3
"""Workers that one job may kill; after that its windows are to blame."""
STOP_S = 5.0
"""A worker whose stdin was closed ends within a batch; one that hangs longer is killed."""
_COMMAND = (sys.executable, "-m", "sop.buffer.decode_worker")
_IMAGES = "images."


class DecodePool:
    """Some worker processes. Thread-safe: as many threads may call `load` as there are workers.

    Args:
        num_workers: processes, at least 1; they start now and are ready in about 0.3 s.
        command: starts a worker; the shared memory's descriptor is appended.
    """

    def __init__(self, num_workers: int, command: Sequence[str] = _COMMAND) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self._rooms = _Rooms()
        self._workers = [_Worker(command, self._rooms.descriptor) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers, as they are now."""
        return tuple(worker.pid for worker in self._workers)

    def load(self, plan: BatchPlan, paths: Sequence[Path]) -> Batch:
        """Load a batch in a worker (blocking). Its arrays may be written to and stay valid as long as they are kept.

        Args:
            plan: what to load.
            paths: files of `plan.keys`; they have to stay until this returns.

        Raises:
            InvalidRecord, NotFound, StoreUnavailable: as if it had been loaded here.
            RunError: the job killed three workers, or a worker failed for no reason of the payload.
        """
        room = self._rooms.take()
        try:
            reply = self._ask(plan, to_job(plan, [str(path) for path in paths], room.offset))
        except BaseException:
            self._rooms.give_back(room)
            raise
        if isinstance(reply, Failed):
            self._rooms.give_back(room)
            raise _error(reply, plan)
        return _batch(plan, reply, self._rooms.view(room, reply.num_bytes))

    def close(self) -> None:
        """End the workers; batches stay valid. Idempotent. No `load` may be under way."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._rooms.close()

    def _ask(self, plan: BatchPlan, job: LoadJob) -> Reply:
        for _ in range(MAX_DEATHS):
            worker = self._idle.get()
            try:
                reply = worker.ask(job)
                if reply is not None:
                    return reply
                _log.warning("decode worker %d died (code %s) and is started again", worker.pid, worker.end())
                worker.start()
            finally:
                self._idle.put(worker)
        raise RunError(f"{MAX_DEATHS} decode workers died while they loaded the same windows: {plan.names()}")


class _Worker:
    """One process and its two pipes."""

    def __init__(self, command: Sequence[str], descriptor: int) -> None:
        self._command = (*command, str(descriptor))
        self._descriptor = descriptor
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """In a session of its own: Ctrl-C reaches the learner, and the learner decides."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(self._descriptor,),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def ask(self, job: LoadJob) -> Reply | None:
        """The answer, or None when the process died."""
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        try:
            write_message(self._process.stdin.fileno(), job)
            data = read_message(self._process.stdout.fileno())
            return None if data is None else msgspec.msgpack.decode(data, type=Reply)
        except (BrokenPipeError, ValueError, msgspec.DecodeError):
            return None  # dead, or it talks nonsense: as good as dead

    def hang_up(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def end(self) -> int:
        """Make sure that the process is gone; its exit code."""
        self.hang_up()
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code


class _Room:
    """A part of the shared memory for one batch."""

    def __init__(self, number: int) -> None:
        self.offset = number * MAX_BATCH_BYTES
        self.mapped: mmap.mmap | None = None


class _Rooms:
    """The shared memory: rooms that are free, and those that a batch lives in."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("sop-batches", os.MFD_CLOEXEC)
        self._free: deque[_Room] = deque()
        self._numbers = itertools.count()
        self._lock = Lock()

    def take(self) -> _Room:
        """The room that was freed last (its memory is warm), or a new one."""
        try:
            return self._free.pop()
        except IndexError:
            pass
        with self._lock:
            room = _Room(next(self._numbers))
            os.ftruncate(self.descriptor, room.offset + MAX_BATCH_BYTES)  # addresses only; pages come when written
            return room

    def give_back(self, room: _Room) -> None:
        """Called by the garbage collector in any thread: takes no lock."""
        self._free.append(room)

    def view(self, room: _Room, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The first bytes of a room; the room is free again when the array and all views of it are gone."""
        if room.mapped is None or len(room.mapped) < num_bytes:
            size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            room.mapped = mmap.mmap(self.descriptor, size, offset=room.offset)
        whole = np.frombuffer(room.mapped, np.uint8, num_bytes)
        weakref.finalize(whole, self.give_back, room).atexit = False
        return whole

    def close(self) -> None:
        """Let go of the memory; batches that are kept hold on to theirs. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _batch(plan: BatchPlan, reply: Loaded, room: npt.NDArray[np.uint8]) -> Batch:
    arrays: dict[str, npt.NDArray[Any]] = {
        place.name: np.ndarray(place.shape, place.dtype, buffer=room, offset=place.offset) for place in reply.arrays
    }
    return Batch(
        windows=plan.windows,
        images={name.removeprefix(_IMAGES): array for name, array in arrays.items() if name.startswith(_IMAGES)},
        state=arrays["state"],
        action=arrays["action"],
        loss_weight=plan.loss_weight,
        instruction=reply.instruction,
        policy_version=np.asarray(reply.policy_version, np.int64),
        advantage_indicator=plan.advantage_indicator,
        label_version=plan.label_version,
        content_hash=reply.content_hash,
    )


def _error(reply: Failed, plan: BatchPlan) -> SopError:
    match reply.kind:
        case "invalid":
            return InvalidRecord(reply.field, reply.problem, step=reply.step)
        case "missing":
            return NotFound(reply.problem)
        case "unavailable":
            return StoreUnavailable(reply.problem)
    return RunError(f"a decode worker failed on the windows {plan.names()}:\n{reply.problem}")
