"""The processes of the load generator: started and ended by id, spoken to in lines, watched once a second."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sop.core.events import TOPIC_LEARNER, LearnerReported, decode_event
from sop.processes import child_environment
from sop.runs import Run
from sop.transport import Cursor, open_bus


@dataclass
class Process:
    """A child, the lines that it says, and what it uses."""

    name: str
    popen: "subprocess.Popen[str]"
    log: Path
    lines: "queue.SimpleQueue[str]" = field(default_factory=queue.SimpleQueue)

    def tell(self, line: str) -> None:
        """Send a line to the child."""
        if self.popen.stdin is not None:
            self.popen.stdin.write(line + "\n")
            self.popen.stdin.flush()

    def expect(self, word: str, timeout_s: float) -> dict[str, Any]:
        """Wait for the line that says `word`.

        Raises:
            RuntimeError: the child said something else, ended, or took too long; shows the end of its log.
        """
        try:
            line = self.lines.get(timeout=timeout_s)
        except queue.Empty:
            line = ""
        said: dict[str, Any] = json.loads(line) if line else {"is": "nothing"}
        if said["is"] != word:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(
                f"{self.name} was to say {word!r} within {timeout_s:.0f} s, said {said['is']!r}:\n{tail}"
            )
        return said


@dataclass
class Processes:
    """All children of this benchmark; each in a session of its own, ended by id."""

    folder: Path
    children: list[Process] = field(default_factory=list)

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> Process:
        """Start a Python process; its standard error goes to `<name>.log`."""
        log = self.folder / f"{name}.log"
        with log.open("w") as errors:
            popen = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=child_environment(environment),
                start_new_session=True,
            )
        process = Process(name, popen, log)
        threading.Thread(target=_read_lines, args=(process,), daemon=True).start()
        self.children.append(process)
        return process

    def stop(self, process: Process, timeout_s: float) -> None:
        """Ask a process to end and wait; it is killed when it does not."""
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGTERM)
        try:
            process.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()
            print(f"{process.name} did not end within {timeout_s:.0f} s and was killed", file=sys.stderr)

    def stop_all(self) -> None:
        """End whatever still runs."""
        for process in self.children:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in self.children:
            self.stop(process, 5.0)


def _read_lines(process: Process) -> None:
    for line in process.popen.stdout or ():
        process.lines.put(line)
    process.lines.put("")


@dataclass
class Watch:
    """Memory and processor time of groups of processes, once a second."""

    groups: dict[str, list[psutil.Process]]
    minutes: list[float] = field(default_factory=list)
    rss_mb: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    wall_s: float = 0.0

    def follow(self, seconds: float, check: Callable[[], None]) -> None:
        """Sample for this long (blocking); `check` is called every second and may raise."""
        started_s = time.monotonic()
        first = {name: self._cpu_s(name) for name in self.groups}
        while (passed_s := time.monotonic() - started_s) < seconds:
            check()
            self.minutes.append(passed_s / 60)
            for name, members in self.groups.items():
                megabytes = sum(member.memory_info().rss for member in _with_children(members)) / 1e6
                self.rss_mb.setdefault(name, []).append(megabytes)
            time.sleep(max(0.0, min(1.0, seconds - passed_s)))
        self.wall_s = time.monotonic() - started_s
        self.cpu_s = {name: (first[name], self._cpu_s(name)) for name in self.groups}

    def slope_mb_per_min(self, name: str) -> float:
        """Least squares over the second half of the samples."""
        half = len(self.minutes) // 2
        return float(np.polyfit(self.minutes[half:], self.rss_mb[name][half:], 1)[0])

    def cores(self, name: str) -> float:
        """Processor seconds per second."""
        before_s, after_s = self.cpu_s[name]
        return (after_s - before_s) / self.wall_s

    def _cpu_s(self, name: str) -> float:
        times = [member.cpu_times() for member in _with_children(self.groups[name])]
        return float(sum(time.user + time.system for time in times))


class LearnerReports:
    """The learner's signs of life, over one connection. `close` it."""

    def __init__(self, run: Run) -> None:
        self._bus = open_bus(run.bus_url)
        self._cursor: Cursor | None = None
        self._newest: LearnerReported | None = None

    def newest(self) -> LearnerReported | None:
        """The last one until now; None: it has said nothing yet."""
        while found := self._bus.poll(TOPIC_LEARNER, self._cursor, 0.0):
            self._cursor = found[-1][0]
            self._newest = decode_event(found[-1][1], LearnerReported)
        return self._newest

    def last(self) -> LearnerReported:
        """The last one until now; there has been one."""
        newest = self.newest()
        if newest is None:
            raise RuntimeError("the learner has given no sign of life")
        return newest

    def close(self) -> None:
        """Close the connection."""
        self._bus.close()


def _with_children(members: list[psutil.Process]) -> list[psutil.Process]:
    """Processes and what they started themselves (the learner's decoders)."""
    return [found for member in members for found in (member, *member.children())]
