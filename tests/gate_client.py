"""A child that drives the simulated arm through the gate's process until it is killed: `python gate_client.py FOLDER`.

It prints `moving` once the arm is at full speed. With `attack` it leaves the protocol then and floods the gate.
"""

import sys
import time
from pathlib import Path

import numpy as np

from sop.actor.gate_wire import Command, encode_command
from sop.actor.gated_robot import GatedRobot
from sop.testing.driver import ARM, write_limits


def main(folder: Path, attack: str) -> None:
    robot = GatedRobot(
        ARM,
        "sop.testing.driver:make",
        {"path": str(folder / "arm")},
        limits=write_limits(folder / "limits.json"),
        latch=folder / "latch",
    )
    (folder / "gate.pid").write_text(str(robot.process.pid))
    robot.reset(options={})
    for step in range(10**6):
        speed = min(0.1 * step, 0.8)
        robot.step(np.asarray([speed, 0.0], np.float32))
        if step == 15:
            print("moving", flush=True)
            if attack:
                break
    fast = encode_command(Command(sequence=0, monotonic_ns=0, action=np.asarray([0.8, 0.0], np.float32)))
    robot._channel.setblocking(True)
    sequence = robot._sequence
    while True:
        if attack == "garbage":
            for data in (b"\x00garbage" * 5, fast, b"x" * 5000):  # none of them, an old one, and a long one
                robot._channel.send(data)
            time.sleep(0.02)
        else:  # as fast as the socket takes them: newer and newer, all valid
            sequence += 1
            action = np.asarray([0.8, 0.0], np.float32)
            robot._channel.send(
                encode_command(Command(sequence=sequence, monotonic_ns=time.monotonic_ns(), action=action))
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
