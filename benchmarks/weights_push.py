"""One policy to N robots of the same machine, every way: ours, the floors, a safetensors file, lerobot's gRPC push.

    ours          publish() -> directory store, SQLite bus -> N subscribers (processes) -> staged: every byte verified
    floor         N processes copy the bytes of a file that was just written to fresh memory
    warm_floor    the same into memory that was used before, as a second copy that is kept
    raw_read      the same into a small window of warm memory: what reading costs without making memory
    copy          the file copied once: reads and writes through the page cache, with and without fsync
    safetensors   the library's save_file -> N processes load_file; nothing verified
    lerobot       its learner -> its gRPC stream -> its actor: a state dict, ready to load

Every measurement is the time until the last process is done, by the clock that all processes share, and leaves
neither memory nor files behind.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from peers import lerobot_python
from weights_artifact import change_every_tensor, facts, shapes, total_bytes
from workers import Worker, ask_all

from sop.broadcast import Publisher
from sop.transport import SqliteBus
from sop.transport.directory import DirectoryStore

HERE = Path(__file__).parent
ROBOTS = (1, 4, 8)
Phases = dict[str, list[float]]


class Machine:
    """A publisher and up to eight robot processes on one machine. A context manager.

    Args:
        folder: for the store and files; must not exist, removed at the end.
        weights: what is published; changed in place.
    """

    def __init__(self, folder: Path, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._weights = weights
        self._source = folder / "source.bin"
        self._copy = folder / "copy.bin"
        self._stack = ExitStack()
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        self._turn = 0
        self.phases: dict[int, Phases] = {count: {} for count in ROBOTS}
        """Number of robots -> where the time of `publish` went, a list of seconds per phase."""
        self._bus = SqliteBus(folder / "bus.sqlite", owner=True)
        self._stack.callback(self._bus.close)
        self._publisher = Publisher(
            DirectoryStore(folder / "store"), self._bus, keep_policies=2, clock_ns=time.monotonic_ns
        )
        self._stack.callback(self._publisher.close)
        self._publish_and_wait()
        worker: list[str | Path] = [sys.executable, HERE / "weights_worker.py"]
        self._robots = [self._stack.enter_context(Worker(worker)) for _ in range(max(ROBOTS))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def measurements(self) -> dict[str, Callable[[], float]]:
        """Name -> one measurement in seconds."""
        found: dict[str, Callable[[], float]] = {}
        for count in ROBOTS:
            found[f"ours.{count}"] = partial(self.ours, count)
            found[f"floor.{count}"] = partial(self.floor, count, "read")
            found[f"warm_floor.{count}"] = partial(self.floor, count, "read_again")
            found[f"raw_read.{count}"] = partial(self.floor, count, "touch")
            found[f"safetensors.{count}"] = partial(self.safetensors, count)
        found["copy"] = partial(self.copy, fsync=False)
        found["copy_fsync"] = partial(self.copy, fsync=True)
        return found

    def ours(self, count: int) -> float:
        """From the call of `publish` until the last of `count` robots has the policy staged."""
        robots = self._robots[:count]
        where = {"store": str(self._folder / "store"), "bus": str(self._folder / "bus.sqlite")}
        ask_all(robots, do="subscribe", **where)
        self._next()
        version = (self._publisher.last_published or 0) + 1
        for robot in robots:
            robot.send(do="staged", version=version)
        start_ns = time.monotonic_ns()
        self._publisher.publish(self._weights, facts(self._turn))
        returned_ns = time.monotonic_ns()
        answers = [robot.receive() for robot in robots]
        ask_all(robots, do="leave")
        last_ns = max(answer["at_ns"] for answer in answers)
        published_ns = answers[0]["published_ns"]
        phases = {
            "call": (returned_ns - start_ns) / 1e9,
            "published": (published_ns - start_ns) / 1e9,
            "staged": (last_ns - published_ns) / 1e9,
            **{f"{part}": max(answer[f"{part}_s"] for answer in answers) for part in ("fetch", "decode", "verify")},
        }
        for phase, seconds in phases.items():
            self.phases[count].setdefault(phase, []).append(seconds)
        return float(last_ns - start_ns) / 1e9

    def floor(self, count: int, action: str) -> float:
        """`count` processes `read` a fresh file to memory once (`read_again`: to warm memory), or `touch` its bytes."""
        self._write_source()
        if action == "read_again":
            ask_all(self._robots[:count], do="warm_up", num_bytes=self._source.stat().st_size)
        return self._timed(self._robots[:count], action, self._source)

    def safetensors(self, count: int) -> float:
        """Save with the library, load with the library in `count` processes."""
        self._next()
        start_ns = time.monotonic_ns()
        safetensors.numpy.save_file(dict(self._weights), self._copy)
        saved_s = (time.monotonic_ns() - start_ns) / 1e9
        return saved_s + self._timed(self._robots[:count], "load", self._copy)

    def copy(self, *, fsync: bool) -> float:
        """The file once more on the same disk."""
        self._write_source()
        start = time.monotonic()
        with self._source.open("rb") as source, self._copy.open("wb", buffering=0) as target:
            done, size = 0, self._source.stat().st_size
            while done < size:
                done += os.sendfile(target.fileno(), source.fileno(), done, 1 << 30)
            if fsync:
                os.fsync(target.fileno())
        seconds = time.monotonic() - start
        self._copy.unlink()
        self._source.unlink()
        return seconds

    def _timed(self, robots: list[Worker], action: str, path: Path) -> float:
        start_ns = time.monotonic_ns()
        answers = ask_all(robots, do=action, path=str(path))
        path.unlink()
        ask_all(robots, do="forget")
        return float(max(answer["at_ns"] for answer in answers) - start_ns) / 1e9

    def _write_source(self) -> None:
        with self._source.open("wb", buffering=0) as file:
            for array in self._weights.values():
                file.write(array.reshape(-1).view(np.uint8).data)

    def _next(self) -> None:
        self._turn += 1
        change_every_tensor(self._weights, self._turn)

    def _publish_and_wait(self) -> None:
        self._next()
        self._publisher.publish_now(self._weights, facts(self._turn))


class Lerobot:
    """lerobot's push between processes: its learner, and one or more of its actors. A context manager.

    Args:
        megabytes: size of the artifact; the same shapes as ours.
        actors: how many are connected.
    """

    def __init__(self, megabytes: float, actors: int = 1) -> None:
        python = lerobot_python()
        self.name = "lerobot" if python else "wire_shape"
        """`wire_shape`: lerobot is not there; the same messages are sent by code written for this benchmark."""
        script = HERE / ("peer_lerobot_push.py" if python else "peer_wire_shape.py")
        program = python or Path(sys.executable)
        self._stack = ExitStack()
        self._learner = self._stack.enter_context(Worker([program, script, "learner"]))
        port = str(self._learner.ask(do="port")["port"])
        self._actors = [
            self._stack.enter_context(Worker([program, script, "actor", "--port", port])) for _ in range(actors)
        ]
        self.num_bytes = self._learner.ask(do="hold", shapes=[list(s) for s in shapes(megabytes).values()])["num_bytes"]
        self.serialise_s: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def push(self) -> float:
        """Seconds from the push until the one actor has a state dict."""
        (actor,) = self._actors
        actor.send(do="wait", timeout_s=120)
        pushed = self._learner.ask(do="push")
        answer = actor.receive()
        actor.ask(do="free")
        self.serialise_s.append((pushed["serialised_ns"] - pushed["start_ns"]) / 1e9)
        return float(answer["at_ns"] - pushed["start_ns"]) / 1e9

    def reached(self, timeout_s: float) -> int:
        """How many of the actors one push reaches within so many seconds."""
        for actor in self._actors:
            actor.send(do="wait", timeout_s=timeout_s)
        self._learner.ask(do="push")
        answers = [actor.receive() for actor in self._actors]
        ask_all(self._actors, do="free")
        return sum(answer["at_ns"] is not None for answer in answers)


def describe(weights: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Any]:
    """Size of the artifact."""
    return {"mb": total_bytes(weights) / 1e6, "tensors": len(weights), "dtype": "bfloat16"}
