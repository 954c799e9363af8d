"""The gate in a process of its own: between whatever commands and the machine, alive when the rest is not.

    actor ---- commands (datagrams) ---> gate process ---- write(action, deadline) ---> machine
          <--- reports (shared memory) --   |  ^ read()                                    |
                                            watchdog: decelerate and hold                  own deadline: stops

    actor killed, paused, slow, floods, sends garbage   -> decelerate and hold within the limits
    actor gone for good (the socket says so)            -> the same, then `driver.stop()` and the end
    3 clamped commands in 1 s                           -> controlled stop, latch closed until a person clears it
    this process killed or stuck                        -> the machine's deadline passes: it stops by itself

It asks for real-time priority and says when it may not have it. Everything it needs is allocated before the first
step; the loop itself neither waits for a disk nor for the actor.
"""

import argparse
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sop.actor.gate_wire import MAX_COMMAND_BYTES, CommandFilter, CommandKind, ReportBlock
from sop.actor.latch import SafetyLatch
from sop.actor.limits import load_limits
from sop.actor.safety import NOWHERE, GatedAction, SafetyGate, SafetyTally
from sop.actor.watchdog import ACTION_PERIODS, Watchdog
from sop.core.clock import Clock, SystemClock

if TYPE_CHECKING:
    from sop.robots.driver import Reading, RobotDriver

_MAX_DRAINED = 256
"""Datagrams taken from the socket per step: a flood costs a bounded time, and is over soon after it ends."""
_LATCH_EVERY_S = 0.2
"""How often a closed latch is looked at again."""
_REST_S = 5.0
"""Longest time that a robot without an actor is given to come to rest before the machine is told to stop."""


class GateLoop:
    """One step per control period: look, choose, gate, write, report.

    Args:
        driver: the machine.
        gate: with the robot's limits and its latch.
        block: where reports go.
        channel: non-blocking datagram socket to the actor.
        clock: the monotonic clock of the stamps.
        priority: what the system said about real time; goes into the reports.
    """

    def __init__(
        self,
        driver: "RobotDriver",
        gate: SafetyGate,
        block: ReportBlock,
        channel: socket.socket,
        clock: Clock,
        *,
        priority: str = "",
    ) -> None:
        body = driver.embodiment
        self._driver, self._gate, self._block, self._channel, self._clock = driver, gate, block, channel, clock
        self._priority = priority
        self.period_ns = int(1e9 / body.control_hz)
        self._patience_ns = ACTION_PERIODS * self.period_ns
        self._filter = CommandFilter(body.num_actions, self._patience_ns)
        self._watchdog = Watchdog(clock, body.control_hz, ("state", *body.cameras))
        self._tally = SafetyTally()
        self._wanted: npt.NDArray[np.float32] | None = None
        self._orphan_since_ns: int | None = None
        self._looked_ns = 0

    def step(self) -> bool:
        """One control period without its waiting; False when the actor is gone and the robot at rest.

        Raises:
            OSError: the machine does not answer.
        """
        now_ns = self._clock.monotonic_ns()
        reading = self._driver.read()
        self._watchdog.saw("state", reading.state_ns)
        for camera, taken_ns in reading.images_ns.items():
            self._watchdog.saw(camera, taken_ns)
        self._take(self._receive(now_ns), now_ns)
        self._look_at_latch(now_ns)
        problem = "the actor is gone" if self._orphan_since_ns is not None else self._watchdog.problem()
        gated = self._decide(reading.state, problem)
        if self._gate.located:
            self._driver.write(gated.action, now_ns + self._patience_ns)
        else:  # no target means standing still: the machine's own deadline does
            problem = problem or NOWHERE
        self._report(reading, gated, problem or self._filter.problem)
        return self._orphan_since_ns is None or not (
            self._gate.at_rest or now_ns - self._orphan_since_ns > _REST_S * 1e9
        )

    def _receive(self, now_ns: int) -> list[bytes]:
        datagrams: list[bytes] = []
        with suppress(BlockingIOError):
            while len(datagrams) < _MAX_DRAINED:
                try:
                    data = self._channel.recv(MAX_COMMAND_BYTES)
                except ConnectionError:
                    data = b""
                if not data:  # the other end is closed (an empty datagram is no command either)
                    self._orphan_since_ns = self._orphan_since_ns or now_ns
                    break
                datagrams.append(data)
        return datagrams

    def _take(self, datagrams: list[bytes], now_ns: int) -> None:
        command = self._filter.choose(datagrams, now_ns)
        if command is None:
            return
        self._watchdog.acted(command.monotonic_ns)
        self._wanted = command.action if command.kind is CommandKind.ACT else None
        if command.kind is CommandKind.RESET and self._gate.at_rest:
            self._gate.reset()

    def _decide(self, state: npt.NDArray[np.float32], problem: str) -> GatedAction:
        if problem or self._wanted is None:
            self._wanted = None  # what was wanted before a hold is not taken up again
            return self._gate.brake(problem or "holding", state)
        gated = self._gate.check(self._wanted, state)
        self._tally.add(gated.verdict)
        if not np.isfinite(self._wanted).all():
            self._wanted = None  # counted once, and held until another command comes
        return gated

    def _look_at_latch(self, now_ns: int) -> None:
        if self._gate.latch.reason and now_ns - self._looked_ns > _LATCH_EVERY_S * 1e9:
            self._looked_ns = now_ns
            self._gate.latch.refresh()

    def _report(self, reading: "Reading", gated: GatedAction, problem: str) -> None:
        images: dict[str, Any] = {f"image.{camera}": image for camera, image in reading.images.items()}
        stamps = {f"ns.{camera}": taken_ns for camera, taken_ns in reading.images_ns.items()}
        tally = self._tally
        tick = self._block.write(
            command=self._filter.newest,
            dropped=self._filter.dropped,
            at_rest=self._gate.at_rest,
            clamped=tally.clamped,
            nonfinite=tally.nonfinite,
            stops=tally.stops,
            closed=self._gate.latch.reason,
            problem=problem,
            priority=self._priority,
            state=reading.state,
            state_ns=reading.state_ns,
            executed=gated.action,
            **images,
            **stamps,
        )
        with suppress(BlockingIOError, ConnectionError):  # a paused actor is not waited for
            self._channel.send(tick.to_bytes(8, "little"))


def take_priority() -> str:
    """Ask for real-time scheduling, or at least to be nicer to ourselves; says in words what came of it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(20))
    except OSError as error:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, -15)
        except OSError:
            return f"no real-time priority, no nice: {error.strerror}"
        return f"no real-time priority, nice -15: {error.strerror}"
    return "SCHED_FIFO 20"


def make_driver(name: str, settings: str) -> Any:
    """The driver that `module:function` makes from JSON settings.

    Raises:
        ValueError: no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        maker = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--driver: {name!r} names no driver (module:function): {error}") from error
    return maker(json.loads(settings))


def run(loop: GateLoop, clock: Clock, ended: list[int]) -> None:
    """Steps at the control rate until the actor is gone or a signal came, at rest then. A late step is not made up."""
    due_ns = clock.monotonic_ns()
    while loop.step() and not ended:
        due_ns = max(due_ns + loop.period_ns, clock.monotonic_ns())
        clock.sleep_until(due_ns)


def main(arguments: Sequence[str]) -> int:
    """The process. It ends with its actor; a terminal's Ctrl-C is the actor's business."""
    parser = argparse.ArgumentParser(prog="sop.actor.gate_process")
    for name in ("--driver", "--settings", "--channel", "--memory"):
        parser.add_argument(name, required=True)
    parser.add_argument("--limits", type=Path)
    parser.add_argument("--latch", type=Path)
    options = parser.parse_args(arguments)
    ended: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    clock = SystemClock()
    with (
        closing(make_driver(options.driver, options.settings)) as driver,
        socket.socket(fileno=int(options.channel)) as channel,
    ):
        channel.setblocking(False)
        body = driver.embodiment
        limits = None if options.limits is None else load_limits(options.limits, body)
        gate = SafetyGate(body, limits, SafetyLatch(clock, options.latch))
        block = ReportBlock(int(options.memory), body)
        try:
            run(GateLoop(driver, gate, block, channel, clock, priority=take_priority()), clock, ended)
        finally:
            driver.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
