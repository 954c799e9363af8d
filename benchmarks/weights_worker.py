"""One robot of weights.py: a process that stages policies with the real subscriber, or reads files for the floors.

Questions (see workers.py), each answered with the moment at which it was done:

    subscribe store, bus     start a subscriber, wait for the newest policy there is, hold it as an actor does
    staged version           wait until that version is staged: fetched, verified, ready to swap in
    leave                    close the subscriber, forget the policies
    read path                copy the file's bytes to fresh memory
    touch path               read the file's bytes into the same megabyte again and again
    load path                load a safetensors file with the library
    forget                   give the memory back
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from weights_artifact import ROBOT
from workers import serve

from sop.broadcast import StagedPolicy, Subscriber
from sop.transport import SqliteBus
from sop.transport.directory import DirectoryStore

Reply = Mapping[str, Any]
TIMEOUT_S = 120.0
POLL_S = 0.1
WINDOW_BYTES = 1 << 20


class Robot:
    """What the process holds between two questions."""

    def __init__(self) -> None:
        self._listening: tuple[SqliteBus, Subscriber] | None = None
        self._acting: StagedPolicy | None = None
        self._memory: object = None
        self._window = np.ones(WINDOW_BYTES, np.uint8)

    def subscribe(self, store: str, bus: str) -> Reply:
        """Start to listen; the robot then has the newest policy."""
        opened = SqliteBus(bus)
        subscriber = Subscriber(DirectoryStore(store), opened, ROBOT, poll_s=POLL_S, clock_ns=time.monotonic_ns)
        self._listening = opened, subscriber
        self._acting = subscriber.wait_first(TIMEOUT_S)
        return {"version": self._acting.version}

    def staged(self, version: int) -> Reply:
        """Wait for a version; the one that the robot acts with stays in memory meanwhile."""
        _, subscriber = self._require_listening()
        while (staged := subscriber.wait_first(TIMEOUT_S)).version < version:
            pass
        self._acting = staged
        return {
            "at_ns": staged.staged_utc_ns,
            "published_ns": staged.published_utc_ns,
            "fetch_s": staged.cost.fetch_s,
            "decode_s": staged.cost.decode_s,
            "verify_s": staged.cost.verify_s,
        }

    def leave(self) -> Reply:
        """Stop listening."""
        bus, subscriber = self._require_listening()
        subscriber.close()
        bus.close()
        self._listening = self._acting = None
        return {}

    def _require_listening(self) -> tuple[SqliteBus, Subscriber]:
        if self._listening is None:
            raise RuntimeError("the robot does not listen: ask it to subscribe first")
        return self._listening

    def read(self, path: str) -> Reply:
        """The floor: every byte once from the page cache into memory that is not mapped yet."""
        target = np.empty(Path(path).stat().st_size, np.uint8)
        with Path(path).open("rb", buffering=0) as file:
            view, done = target.data, 0
            while count := file.readinto(view[done:]):
                done += count
        at_ns = time.monotonic_ns()
        self._memory = target
        return {"at_ns": at_ns, "num_bytes": done}

    def warm_up(self, num_bytes: int) -> Reply:
        """Touch memory of this size, for `read_again`."""
        self._memory = np.ones(num_bytes, np.uint8)
        return {}

    def read_again(self, path: str) -> Reply:
        """Every byte once from the page cache into the memory of `warm_up`."""
        view, done = memoryview(self._memory), 0  # type: ignore[arg-type]
        with Path(path).open("rb", buffering=0) as file:
            while count := file.readinto(view[done:]):
                done += count
        return {"at_ns": time.monotonic_ns(), "num_bytes": done}

    def touch(self, path: str) -> Reply:
        """Every byte once from the page cache into the same few MB again and again: no fresh memory."""
        with Path(path).open("rb", buffering=0) as file:
            while file.readinto(self._window.data):
                pass
        return {"at_ns": time.monotonic_ns()}

    def load(self, path: str) -> Reply:
        """The way without us: a file that is loaded whole."""
        tensors = safetensors.numpy.load_file(path)
        at_ns = time.monotonic_ns()
        self._memory = tensors
        return {"at_ns": at_ns, "tensors": len(tensors)}

    def forget(self) -> Reply:
        """Give the memory of the last `read` or `load` back."""
        self._memory = None
        return {}


if __name__ == "__main__":
    robot = Robot()
    serve(
        {
            "subscribe": robot.subscribe,
            "staged": robot.staged,
            "leave": robot.leave,
            "read": robot.read,
            "warm_up": robot.warm_up,
            "read_again": robot.read_again,
            "touch": robot.touch,
            "load": robot.load,
            "forget": robot.forget,
        }
    )
