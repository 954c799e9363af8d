"""The processes of the demonstration over TLS: the run, the robots that are revoked, the robots that join."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from demo_fleet import AUDITOR, JOINED, REVOKED, DemoFleet

from sop.core import layout
from sop.core.errors import Forbidden, NotFound, StoreError
from sop.core.run import RunManifest
from sop.processes import child_environment
from sop.testing.servers.proxy import CuttingProxy
from sop.transport import ObjectStore, open_store

__all__ = ["JOINED", "Joined", "Revocations", "RunProcess", "robot_pids"]
LOOK_EVERY_S = 0.2
RUN = "demo"


class RunProcess:
    """`sop run` in a session of its own; ended at the end of its `with` block.

    Args:
        folder: gets `run.log` and `runs/demo`.
        fleet: whose learner it is.
        arguments: of `sop run`: a preset and what is changed in it.
    """

    def __init__(self, folder: Path, fleet: DemoFleet, arguments: Sequence[str]) -> None:
        self.place = folder / "runs" / RUN
        self.log = folder / "run.log"
        self._store = open_store(fleet.store_url(), fleet.identity(AUDITOR))
        where = ["--runs", str(folder / "runs"), "--name", RUN, "--fleet", str(fleet.folder)]
        self._process = _start(["run", *arguments, *where], self.log, {}, Path.cwd())

    @property
    def pid(self) -> int:
        """Of `sop run`."""
        return self._process.pid

    def wait_for_episodes(self, share: float, timeout_s: float, watch: Callable[[], None] = lambda: None) -> int:
        """Block until the store has this share of the episodes that the fleet is to collect; returns that number.

        Raises:
            RuntimeError: the run ended before, or it took too long.
        """
        total: list[int] = []

        def enough() -> bool:
            with contextlib.suppress(NotFound):
                if not total:
                    config = RunManifest.from_json(self._store.get(layout.RUN)).config
                    total.append(config["fleet"]["episodes"])
                return sum(1 for _ in self._store.keys(f"{layout.EPISODES}/")) >= share * total[0]
            return False

        self.wait(enough, timeout_s, watch)
        return total[0]

    def wait(self, until: Callable[[], bool], timeout_s: float, watch: Callable[[], None] = lambda: None) -> None:
        """Block until it is so, looking several times a second.

        Raises:
            RuntimeError: the run ended before, or it took too long.
        """
        end_s = time.monotonic() + timeout_s
        while not until():
            if self._process.poll() is not None:
                raise RuntimeError(f"the run ended with code {self._process.returncode} too early:\n{self._tail()}")
            if time.monotonic() > end_s:
                raise RuntimeError(f"nothing happened for {timeout_s:.0f} s:\n{self._tail()}")
            watch()
            time.sleep(LOOK_EVERY_S)

    def wait_for_end(self, timeout_s: float, watch: Callable[[], None]) -> None:
        """Block until the run has ended well.

        Raises:
            RuntimeError: it failed, or it took too long.
        """
        self.wait(lambda: self._process.poll() == 0, timeout_s, watch)

    def restarts(self, names: Sequence[str]) -> int:
        """How often the run had to start one of these processes again."""
        text = self.log.read_text(errors="replace")
        return sum(text.count(f"{name} died (code") for name in names)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _end(self._process, 60.0)

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def robot_pids(run_pid: int) -> dict[str, int]:
    """Actor id -> process of the robots that a run has started."""
    found = {}
    for child in psutil.Process(run_pid).children(recursive=True):
        words = child.cmdline()
        if "actor" in words and "--id" in words:
            found[words[words.index("--id") + 1]] = child.pid
    return found


class _Revoked:
    """What is seen of one robot since it was revoked."""

    def __init__(self, fleet: DemoFleet, name: str, pid: int) -> None:
        self.name = name
        self._process = psutil.Process(pid)
        self._auditor = open_store(fleet.store_url(), fleet.identity(AUDITOR))
        self._own = open_store(fleet.store_url(), fleet.identity(name))
        self._bus_port = fleet.bus_port
        self._connections = self._to_bus()
        self._keys = self._stored()
        self.to_last_write_s = 0.0
        self.to_refused_s: float | None = None
        self.to_bus_dropped_s: float | None = None
        self.alive = True
        if not self._connections:
            raise RuntimeError(f"{name} has no connection to the bus")

    def look(self, age_s: float) -> None:
        """Note what is different from the last look, `age_s` after the revocation."""
        keys = self._stored()
        if keys != self._keys:
            self._keys, self.to_last_write_s = keys, age_s
        if self.to_refused_s is None and _refused(self._own, f"{layout.EPISODES}/{self.name}/"):
            self.to_refused_s = age_s
        if self.to_bus_dropped_s is None and not self._connections & self._to_bus():
            self.to_bus_dropped_s = age_s

    def is_alive(self) -> bool:
        """Whether the process of then runs on."""
        return bool(self._process.is_running()) and self._process.status() != psutil.STATUS_ZOMBIE

    def _stored(self) -> set[str]:
        return set(self._auditor.keys(f"{layout.EPISODES}/{self.name}/"))

    def _to_bus(self) -> set[int]:
        """Our ends of the connections to the bus that are up."""
        try:
            connections = self._process.net_connections("tcp")
        except psutil.NoSuchProcess:
            return set()
        ours = (one for one in connections if one.raddr and one.raddr.port == self._bus_port)
        return {one.laddr.port for one in ours if one.status == psutil.CONN_ESTABLISHED}


class Revocations:
    """Two robots that are revoked while they work; `look` several times a second afterwards.

    Args:
        fleet: where they belong.
        pids: actor id -> process.
    """

    def __init__(self, fleet: DemoFleet, pids: Mapping[str, int]) -> None:
        self._fleet = fleet
        self._robots = [_Revoked(fleet, name, pids[name]) for name in REVOKED]
        self._began_s = time.monotonic()

    def strike(self) -> None:
        """Revoke them now (blocking until the servers were told).

        Raises:
            RuntimeError: a server could not be told.
        """
        self._began_s = time.monotonic()
        for robot in self._robots:
            todo = self._fleet.revoke(robot.name)
            if todo:
                raise RuntimeError(f"revoking {robot.name} left something to do: {todo}")

    def look(self) -> None:
        """Note what has changed."""
        for robot in self._robots:
            robot.look(self.age_s())

    def age_s(self) -> float:
        """Since `strike`."""
        return time.monotonic() - self._began_s

    def settled(self) -> bool:
        """Whether store and bus are known to refuse all of them; looks first."""
        self.look()
        return all(robot.to_refused_s is not None and robot.to_bus_dropped_s is not None for robot in self._robots)

    def note_alive(self) -> None:
        """Their processes are seen for the last time."""
        for robot in self._robots:
            robot.alive = robot.is_alive()

    def result(self) -> dict[str, dict[str, Any]]:
        """Robot -> seconds from the revocation, None for what has not happened."""
        return {
            robot.name: {
                "to_last_write_s": robot.to_last_write_s,
                "to_refused_s": robot.to_refused_s,
                "to_bus_dropped_s": robot.to_bus_dropped_s,
                "alive": robot.alive,
            }
            for robot in self._robots
        }


class Joined:
    """`sop actor URL` with an identity, behind two relays, as on a machine of its own; ended with its `with` block.

    Args:
        folder: where it works: `runs/<run>` in it is this robot's folder of the run.
        fleet: where it is enrolled.
        name: of the robot.
    """

    def __init__(self, folder: Path, fleet: DemoFleet, name: str) -> None:
        self.name = name
        with ExitStack() as stack:
            self._store = stack.enter_context(CuttingProxy("127.0.0.1", fleet.store_port))
            self._bus = stack.enter_context(CuttingProxy("127.0.0.1", fleet.bus_port))
            urls = [fleet.store_url(self._store.port), "--bus", fleet.bus_url(self._bus.port)]
            log = folder / f"{name}.log"
            self._process = _start(["actor", *urls, "--id", name], log, fleet.environment(name), folder)
            self._relays = stack.pop_all()
        self._began_s = time.monotonic()
        self._hours = 0.0
        self._moved: dict[str, int] = {}

    def ask_to_go_home(self) -> None:
        """Have it finish and send what it has. Never blocks.

        Raises:
            RuntimeError: it had ended before.
        """
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} ended with code {self._process.returncode} by itself: see its log")
        self._hours = (time.monotonic() - self._began_s) / 3600
        self._process.send_signal(signal.SIGTERM)

    def wait_until_home(self) -> None:
        """Block until it has ended, killing it after a minute."""
        _end(self._process, 60.0)
        self._moved = {
            "store_up": self._store.sent_bytes,
            "store_down": self._store.received_bytes,
            "bus_up": self._bus.sent_bytes,
            "bus_down": self._bus.received_bytes,
        }

    def result(self) -> dict[str, Any]:
        """How long it was there, and the bytes that went over its links."""
        moved = self._moved
        return {
            "hours": self._hours,
            "wire": moved,
            "wire_up": moved["store_up"] + moved["bus_up"],
            "wire_down": moved["store_down"] + moved["bus_down"],
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _end(self._process, 10.0)
        self._relays.close()


def _refused(store: ObjectStore, prefix: str) -> bool:
    try:
        list(store.keys(prefix))
    except Forbidden:
        return True
    except StoreError:
        return False
    return False


def _start(arguments: Sequence[str], log: Path, environment: dict[str, str], cwd: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "sop", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=child_environment(environment),
            cwd=cwd,
            start_new_session=True,
        )


def _end(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Ask it to finish, then make it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
