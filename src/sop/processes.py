"""Processes of a run: started by name, watched, restarted when they die, ended by id.

Every child is `python -m sop ...` in a session of its own, so that Ctrl-C reaches the parent alone and the
parent decides who stops in which order. A child that loses its parent stops by itself (`stop_with_parent`).

A child that died is started again, by this rule:

    it had worked: it said so (`say_at_work`), or lived for ten minutes    at once; its deaths are counted anew
    the first death without work                                          at once
    the n-th in a row                                                     after 1, 2, 4, ... s, at most 30
    the eighth                                                            no more
    it says that it is useless: exit code WRONG_USAGE or REFUSED          no more

How long a start takes plays no part: a slow machine only makes the same deaths rarer. When a robot is given up, the
others go on without it; when the last of them is, or another process, the run ends with its log.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

from sop.core.errors import Forbidden, RunError, SopError, Untrusted

_log = logging.getLogger(__name__)
_PARENT = "SOP_PARENT_PID"
_AT_WORK = "sop: at work"
"""The line by which a child says in its output that it has done something useful."""
_LONG_LIFE_S = 600.0
"""Who lived so long has worked, whatever it said."""
_MAX_DEATHS = 8
"""Deaths in a row without any work after which a process is given up: a minute and a half of pauses."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
WRONG_USAGE = 2
"""Exit code of a process that was told something that cannot be done: no other of its kind can do it either."""
REFUSED = 3
"""Exit code of a process that others refuse (revoked, not signed): they would again, until somebody changes that."""
_MAX_REASON = 300
"""Characters of a log that are repeated in a note."""
_PR_SET_PDEATHSIG = 1


class Process(Protocol):
    """What is needed of a process, here or elsewhere: a part of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Process id on its machine."""
        ...

    def poll(self) -> int | None:
        """Exit code, None while it runs. Never blocks for long."""
        ...

    def terminate(self) -> None:
        """Ask it to finish."""
        ...

    def kill(self) -> None:
        """Make it finish."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Block until it has ended; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One process to start: `python -m sop <arguments>`."""

    name: str
    arguments: Sequence[str]
    output: Path
    """What it prints is appended here."""
    errors: Path | None = None
    """What it says on standard error; None for the same file."""
    nice: int = 0
    """How far it steps back for others, 0 to 19."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of this process alone."""


Spawn = Callable[[Job], Process]
"""Starts a job: `spawn_here`, or on another machine (`sop.cluster`)."""


def spawn_here(job: Job) -> "subprocess.Popen[bytes]":
    """Start a job as a child of this process, in a session of its own."""
    command = ["nice", "-n", str(job.nice)] if job.nice else []
    command += [sys.executable, "-m", "sop", *job.arguments]
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with job.output.open("ab") as output, (job.errors or job.output).open("ab") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=child_environment(job.environment),
            start_new_session=True,
        )


@dataclass(slots=True)
class Child:
    """One process and how to start it again."""

    job: Job
    restart: bool
    process: Process
    started: float
    """By the monotonic clock, as all times here."""
    said_from: int = 0
    """What it says begins at this byte of its output; before are those that died."""
    dispensable: bool = False
    deaths: int = 0
    """In a row, without having done anything useful."""
    due: float | None = None
    """When it is started again; None while it runs."""
    left_alone: bool = False
    """It was given up; the others go on without it."""

    @property
    def name(self) -> str:
        """Of its job."""
        return self.job.name


@dataclass(slots=True)
class Children:
    """The processes of a run.

    Args:
        log_folder: `<name>.log` of every child goes here, appended.
        on_restart: told in a sentence when one was started again, waits for it, or is left alone.
        spawn: starts them.
        clock: monotonic seconds.
    """

    log_folder: Path
    on_restart: Callable[[str], None] = lambda _: None
    spawn: Spawn = spawn_here
    clock: Callable[[], float] = time.monotonic
    _children: dict[str, Child] = field(default_factory=dict)

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        restart: bool = False,
        dispensable: bool = False,
        nice: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start `python -m sop <arguments>`.

        Args:
            name: for the log file and for `stop`.
            arguments: of the `sop` command.
            restart: start it again when it dies with an error.
            dispensable: one of several, such as a robot: the others go on without it when it is given up.
            nice: how far it steps back for others, 0 to 19.
            environment: variables of this child alone.
        """
        output = self.log_folder / f"{name}.log"
        job = Job(name=name, arguments=arguments, output=output, nice=nice, environment=environment or {})
        said_from = _size(output)
        self._children[name] = Child(job, restart, self.spawn(job), self.clock(), said_from, dispensable)

    def finished(self, name: str) -> bool:
        """Whether the process ended without an error or was stopped; one that died is not finished."""
        child = self._children.get(name)
        return child is None or child.process.poll() == 0

    def watch(self) -> None:
        """Restart what died and may be restarted, when it is due; call it often, it does not wait.

        Raises:
            RunError: a process that is not restarted failed, one that is needed (or the last of those that are
                dispensable) is given up, or one was started in a way that cannot work.
        """
        for child in list(self._children.values()):
            code = child.process.poll()
            if code in (None, 0) or child.left_alone:
                continue
            if child.due is None:
                self._died(child, code)
            if child.due is not None and self.clock() >= child.due:
                child.said_from, child.due = _size(child.job.output), None
                child.process, child.started = self.spawn(child.job), self.clock()

    def _died(self, child: Child, code: int) -> None:
        """Say when it is started again, or that it is not."""
        child.deaths = 1 if self._worked(child) else child.deaths + 1
        how, useless = f"ended with code {code}", code in (WRONG_USAGE, REFUSED)
        given_up = useless or child.deaths >= _MAX_DEATHS
        if useless:
            how += ", for good"
        elif child.deaths > 1:
            how += f", {child.deaths} times in a row without having done anything useful"
        if not child.restart or (given_up and (code == WRONG_USAGE or not self._goes_without(child))):
            raise RunError(f"{child.name} {how}; its log ends so:\n{self.log_tail(child.name)}")
        if given_up:
            child.left_alone = True
            why = (self.log_tail(child.name, 1) or "it said nothing")[:_MAX_REASON]
            self.on_restart(f"{child.name} {how}, and is left alone: {why}")
        elif child.deaths == 1:
            child.due = self.clock()
            self.on_restart(f"{child.name} died (code {code}) and was started again")
        else:
            pause_s = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2 ** (child.deaths - 2))
            child.due = self.clock() + pause_s
            self.on_restart(f"{child.name} {how}, and is started again in {pause_s:g} s")

    def _worked(self, child: Child) -> bool:
        """Whether this life of a child was of any use."""
        if self.clock() - child.started > _LONG_LIFE_S:
            return True
        if not child.job.output.exists():
            return False
        with child.job.output.open("rb") as output:
            output.seek(child.said_from)
            return any(line.rstrip() == _AT_WORK.encode() for line in output)

    def _goes_without(self, child: Child) -> bool:
        """Whether others of its kind are left when this one is left alone."""
        others = (other for other in self._children.values() if other is not child and other.dispensable)
        return child.dispensable and not all(other.left_alone for other in others)

    def pid(self, name: str) -> int:
        """Process id."""
        return self._children[name].process.pid

    def ask_to_finish(self, name: str) -> None:
        """Ask a process to finish, and go on watching it: should it fail at that, it is started again. Never blocks."""
        child = self._children.get(name)
        if child is not None and child.process.poll() is None:
            child.process.terminate()

    def stop(self, *names: str, timeout_s: float = 20.0) -> None:
        """Ask the named processes to finish, then make them (blocking); forget them. Idempotent; no name, nobody."""
        chosen = [self._children.pop(name) for name in names if name in self._children]
        for child in chosen:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + timeout_s
        for child in chosen:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("%s did not finish within %.0f s and is killed", child.name, timeout_s)
                child.process.kill()
                child.process.wait()

    def stop_all(self) -> None:
        """`stop` for every process."""
        self.stop(*self._children)

    def log_tail(self, name: str, lines: int = 15) -> str:
        """Last lines of a process's log."""
        path = self.log_folder / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@cache
def say_at_work() -> None:
    """Tell whoever started this process as a child that it has done something useful: an actor an episode that ended
    by itself, a learner a step, an evaluator an evaluation. Says it once, however often it is called."""
    if _PARENT in os.environ:
        print(_AT_WORK, flush=True)


def exit_code(error: SopError | ValueError) -> int:
    """What a process that fails with this error ends with: 1, unless starting it again would be useless."""
    if isinstance(error, (Forbidden, Untrusted)):
        return REFUSED
    return WRONG_USAGE if isinstance(error, ValueError) else 1


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Environment of a child process: the parent's, who the parent is, and one thread per numeric library.

    Several processes share few cores; a pool of threads in each (OpenMP, the software renderer) makes all slower.
    """
    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS",)}
    return {**os.environ, **threads, **extra, _PARENT: str(os.getpid())}


def stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set: the first asks to finish, a second SIGINT interrupts at once."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def stop_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the process that started it as a child dies (Linux)."""
    parent = os.environ.get(_PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)
