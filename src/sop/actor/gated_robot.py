"""A robot behind the gate's process, as the `gymnasium.Env` that an actor acts in.

    robot = GatedRobot(embodiment, "my_lab.driver:make", {"port": "/dev/ttyUSB0"}, limits=..., latch=...)
    Actor(settings, robot, embodiment, ..., gate=robot.gate)       # settings.speed = 0: the gate keeps the beat

A step takes one control period: the command goes out, and the report of the period in which it was executed comes
back: what was seen just before, what was executed, what the gate did. Rewards are zero; whether an attempt succeeded
is for people or a detector to say (`success`), and so is putting the scene back (`prepare`).
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from sop.actor.gate_wire import Command, CommandKind, ReportBlock, encode_command
from sop.actor.safety import GatedAction, Verdict
from sop.core.embodiment import Embodiment
from sop.core.episode import SafetyCounts
from sop.core.errors import RunError

_START_S = 30.0
"""Longest time for the gate's process to open the machine and report once."""
_ANSWER_S = 1.0
"""Longest time without a report; then the gate's process is taken for dead (the machine has stopped by then)."""
_TAKEN_S = 0.25
"""Longest time for a command to be taken; a later one is older than the gate accepts."""
_REST_S = 10.0
"""Longest time to come to rest before an episode."""
_COUNTS = ("clamped", "nonfinite", "stops")


class RemoteGate:
    """What an actor uses instead of a gate of its own (`Gate`): everything passes, the process decides."""

    def __init__(self, num_actions: int, look: Callable[[], Any]) -> None:
        self._look = look
        self._nothing = np.zeros(num_actions, np.float32)
        self.holding = False
        """The next step holds."""
        self.closed, self.at_rest = "", False
        self.located = True
        """What is not known the process does not write."""
        self.refresh()

    def refresh(self) -> None:
        """See `Gate`: the newest report says it."""
        report = self._look()
        if report is not None:
            self.closed, self.at_rest = str(report["closed"].decode()), bool(report["at_rest"])

    def reset(self, state: npt.NDArray[np.float32] | None = None) -> None:
        """Nothing: the robot's own `reset` tells the process."""

    def check(self, command: npt.NDArray[np.float32], state: npt.NDArray[np.float32] | None = None) -> GatedAction:  # noqa: ARG002
        """See `Gate`: unchanged, but for what is not finite: the process is asked to hold."""
        if not np.isfinite(command).all():
            return GatedAction(self.hold(), "not finite: holding", Verdict.NONFINITE)
        return GatedAction(command, "")

    def brake(self, reason: str = "", state: npt.NDArray[np.float32] | None = None) -> GatedAction:  # noqa: ARG002
        """See `Gate`: the process does it."""
        return GatedAction(self.hold(), reason)

    def hold(self) -> npt.NDArray[np.float32]:
        """The next command [A] asks the process to decelerate and hold, whatever the values are."""
        self.holding = True
        return self._nothing


class GatedRobot(gymnasium.Env[Any, Any]):
    """Starts the gate's process and talks to it. Used by one thread.

    Args:
        embodiment: of the machine; the driver has the same.
        driver: `module:function` that makes the `RobotDriver`, called in the gate's process.
        settings: JSON settings for it; no secrets (they show in the list of processes).
        limits: the robot's limits file; None gates by the embodiment alone.
        latch: record of the safety latch; None keeps it in memory of the gate's process.
        time_limit_s: robot seconds until an episode is truncated.
        success: whether the task is done, asked after every step.
        prepare: puts the scene back; called with the reset options while the robot holds.

    Raises:
        RunError: the gate's process does not start; its message is on stderr.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        driver: str,
        settings: Mapping[str, Any],
        *,
        limits: Path | None = None,
        latch: Path | None = None,
        time_limit_s: float = 60.0,
        success: Callable[[Mapping[str, Any]], bool] = lambda _: False,
        prepare: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self._embodiment, self._success, self._prepare = embodiment, success, prepare
        self._limit_steps = round(time_limit_s * embodiment.control_hz)
        self._sequence = self._steps = 0
        self._counted = dict.fromkeys(_COUNTS, 0)
        memory = os.memfd_create("sop-gate", os.MFD_CLOEXEC)
        self._block = ReportBlock(memory, embodiment)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        command = [sys.executable, "-m", "sop.actor.gate_process", "--driver", driver]
        command += ["--settings", json.dumps(dict(settings))]
        command += ["--channel", str(theirs.fileno()), "--memory", str(memory)]
        for name, path in (("--limits", limits), ("--latch", latch)):
            command += [] if path is None else [name, str(path)]
        self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(), memory), start_new_session=True)
        theirs.close()
        os.close(memory)
        try:
            self._report = self._wait(lambda report: bool(report["tick"]), _START_S)
        except RunError:
            self.close()
            raise
        self.gate = RemoteGate(embodiment.num_actions, self._block.read)

    @property
    def problem(self) -> str:
        """Why the gate holds at the moment; empty when it does not."""
        return str(self._report["closed"].decode() or self._report["problem"].decode())

    @property
    def priority(self) -> str:
        """With which priority the gate's process runs, or why without."""
        return str(self._report["priority"].decode())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Come to rest, have the scene put back, look. Blocks for both.

        Raises:
            RunError: the robot does not come to rest, or the gate's process is gone.
        """
        super().reset(seed=seed)
        self._ask(self.gate.hold(), CommandKind.RESET)
        self._wait(lambda report: bool(report["at_rest"]), _REST_S)
        self._prepare(options or {})
        self._report = self._ask(self.gate.hold(), CommandKind.RESET)
        self._steps, self.gate.holding = 0, False
        self._count()
        return self._seen(), {}

    def step(self, action: npt.NDArray[np.float32]) -> Any:
        """Have one action executed for one control period; blocks until the gate took it.

        Returns:
            Observation, 0.0, terminated, truncated, and info with `success`, `executed` [A] (what the gate let
            through) and `safety` (`SafetyCounts` since the last step).

        Raises:
            RunError: the gate's process is gone.
        """
        kind, self.gate.holding = CommandKind.HOLD if self.gate.holding else CommandKind.ACT, False
        self._report = self._ask(action, kind)
        self.gate.refresh()
        self._steps += 1
        seen = self._seen()
        success = bool(self._success(seen))
        truncated = not success and self._steps >= self._limit_steps
        info = {"success": success, "executed": self._report["executed"].copy(), "safety": self._count()}
        return seen, 0.0, success, truncated, info

    def close(self) -> None:
        """Let go: the gate's process brings the robot to rest and ends. Blocks for it. Idempotent."""
        self._channel.close()
        try:
            self.process.wait(_REST_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the machine's deadline stops the robot
            self.process.wait()

    def _ask(self, action: npt.NDArray[np.float32], kind: CommandKind) -> Any:
        """The report of the period in which the command was taken. One that came too late is answered by a hold."""
        self._send(action, kind)
        try:
            return self._wait(self._answers, _TAKEN_S)
        except RunError:
            if self.process.poll() is not None:
                raise
            self._send(action, CommandKind.HOLD)  # this process was paused: what it decided then is old now
            return self._wait(self._answers, _ANSWER_S)

    def _answers(self, report: Any) -> bool:
        return int(report["command"]) >= self._sequence

    def _seen(self) -> dict[str, Any]:
        cameras = self._embodiment.cameras
        images = {camera: self._report[f"image.{camera}"].copy() for camera in cameras}
        return {"images": images, "state": self._report["state"].copy()}

    def _count(self) -> SafetyCounts:
        now = {name: int(self._report[name]) for name in _COUNTS}
        counts = SafetyCounts(**{name: now[name] - self._counted[name] for name in _COUNTS})
        self._counted = now
        return counts

    def _send(self, action: npt.NDArray[np.float32], kind: CommandKind) -> None:
        self._sequence += 1
        command = Command(sequence=self._sequence, monotonic_ns=time.monotonic_ns(), action=action, kind=kind)
        try:
            self._channel.send(encode_command(command))
        except BlockingIOError:
            pass  # as good as lost: `_wait` says so
        except OSError as error:
            raise RunError(f"the gate's process is gone, the machine has stopped by itself: {error}") from error

    def _wait(self, arrived: Callable[[Any], bool], timeout_s: float) -> Any:
        """The first report for which `arrived` is true."""
        deadline = time.monotonic() + timeout_s
        while True:
            report = self._block.read()
            if report is not None and arrived(report):
                return report
            left_s = deadline - time.monotonic()
            if left_s <= 0 or self.process.poll() is not None:
                state = self.process.poll()
                how = f"does not answer for {timeout_s:g} s" if state is None else f"ended with {state}"
                raise RunError(f"the gate's process {how}: look at the machine, then start again")
            if select.select([self._channel], [], [], min(left_s, 0.1))[0]:
                self._drain()

    def _drain(self) -> None:
        try:
            while self._channel.recv(16):
                pass
        except BlockingIOError:
            return
        except OSError as error:
            raise RunError(f"the gate's process is gone: {error}") from error
