"""Between the actor and the gate's process: commands through a socket, what was seen through shared memory.

    command   "SOPC" | kind u16 | A u16 | sequence u64 | monotonic_ns u64 | A x float32 | crc32 u32      one datagram
    report    two slots in a block of memory that both map; the gate's process fills one while the other is read

A command counts when it is whole, newer than the last one and not old; who sends too many moves nothing at all.
Nothing is pickled, nothing grows: a wrong datagram is dropped and counted, and the gate never waits for a reader.
"""

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment
from sop.core.errors import InvalidRecord

_HEAD = struct.Struct("<4sHHQQ")
_CRC = struct.Struct("<I")
_MAGIC = b"SOPC"
MAX_COMMAND_BYTES = 4096
"""Longer datagrams are cut by the kernel, and then refused by their length."""
FLOOD = 8
"""More datagrams than this within one control period are a flood: none of them moves the robot."""
TEXT_BYTES = 200
"""Longer texts are cut in a report."""


class CommandKind(IntEnum):
    """What the actor wants."""

    ACT = 1
    RESET = 2
    """An episode begins: come to rest and forget the last action. The values are not looked at."""
    HOLD = 3
    """Decelerate and hold: nobody commands anything. The values are not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One action on its way to the gate."""

    sequence: int
    """1, 2, 3, ...: a repeated or overtaken one is dropped."""
    monotonic_ns: int
    """When it was decided, CLOCK_MONOTONIC of this machine."""
    action: npt.NDArray[np.float32]
    """[A], finite or not: the gate decides."""
    kind: CommandKind = CommandKind.ACT


def encode_command(command: Command) -> bytes:
    """One datagram."""
    values = np.ascontiguousarray(command.action, "<f4").tobytes()
    head = _HEAD.pack(_MAGIC, command.kind, command.action.size, command.sequence, command.monotonic_ns)
    return head + values + _CRC.pack(zlib.crc32(head + values))


def decode_command(data: bytes, num_actions: int) -> Command:
    """Read a datagram.

    Raises:
        InvalidRecord: not a whole command for this robot.
    """
    expected = _HEAD.size + 4 * num_actions + _CRC.size
    if len(data) != expected:
        raise InvalidRecord("command", f"{len(data)} bytes, expected {expected}")
    magic, kind, count, sequence, monotonic_ns = _HEAD.unpack_from(data)
    if magic != _MAGIC or count != num_actions or kind not in tuple(CommandKind):
        raise InvalidRecord("command", f"begins with {data[:8]!r}: not a command for {num_actions} elements")
    if _CRC.unpack_from(data, len(data) - 4)[0] != zlib.crc32(data[:-4]):
        raise InvalidRecord("command", "the check sum is wrong")
    action = np.frombuffer(data, "<f4", num_actions, _HEAD.size).astype(np.float32)
    return Command(sequence=sequence, monotonic_ns=monotonic_ns, action=action, kind=CommandKind(kind))


class CommandFilter:
    """Lets through, per control period, the newest command that is whole, in order and fresh.

    Args:
        num_actions: A.
        max_age_ns: older commands are dropped; as far in the future, too.
    """

    def __init__(self, num_actions: int, max_age_ns: int) -> None:
        self._num_actions = num_actions
        self._max_age_ns = max_age_ns
        self.newest = 0
        """Sequence of the last command that was let through."""
        self.dropped = 0
        """Datagrams that were not."""
        self.problem = ""
        """Why the last one was dropped; empty when the last period dropped none."""

    def choose(self, datagrams: list[bytes], now_ns: int) -> Command | None:
        """The command of this period, None when there is none or too many came."""
        self.problem = ""
        if len(datagrams) > FLOOD:
            self.dropped += len(datagrams)
            self.problem = f"a flood of commands: {len(datagrams)} or more in one period"
            return None
        chosen = None
        for data in datagrams:
            try:
                command = decode_command(data, self._num_actions)
                self._check(command, now_ns)
            except InvalidRecord as error:
                self.dropped += 1
                self.problem = f"a command was dropped: {error}"
            else:
                chosen, self.newest = command, command.sequence
        return chosen

    def _check(self, command: Command, now_ns: int) -> None:
        if command.sequence <= self.newest:
            raise InvalidRecord("sequence", f"{command.sequence} is not after {self.newest}")
        if abs(now_ns - command.monotonic_ns) > self._max_age_ns:
            raise InvalidRecord("monotonic_ns", f"{(now_ns - command.monotonic_ns) / 1e6:.0f} ms old")


class ReportBlock:
    """Reports in shared memory: one writer, readers that never make it wait.

    Fields of a report (numpy record): tick (0 = being written), command (newest sequence that was let through),
    at_rest, clamped, nonfinite, stops, dropped (all since the process began), closed, problem, priority (texts),
    state [S], state_ns, executed [A], and per camera `image.<camera>` and `ns.<camera>`.

    Args:
        descriptor: of the memory; grown to the needed size when it is smaller.
        embodiment: decides the layout.
    """

    def __init__(self, descriptor: int, embodiment: Embodiment) -> None:
        text = f"S{TEXT_BYTES}"
        fields: list[Any] = [("tick", "<u8"), ("command", "<u8"), ("dropped", "<u8"), ("at_rest", "?")]
        fields += [("clamped", "<u8"), ("nonfinite", "<u8"), ("stops", "<u8")]
        fields += [("closed", text), ("problem", text), ("priority", text)]
        fields += [("state_ns", "<i8"), ("state", "<f4", (embodiment.num_states,))]
        fields += [("executed", "<f4", (embodiment.num_actions,))]
        for camera, (height, width) in embodiment.cameras.items():
            fields += [(f"ns.{camera}", "<i8"), (f"image.{camera}", "u1", (height, width, 3))]
        dtype = np.dtype(fields, align=True)
        size = 64 + 2 * dtype.itemsize
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        self._newest = np.frombuffer(memory, "<u8", 1)
        self._slots = np.frombuffer(memory, dtype, 2, 64)

    def write(self, **fields: Any) -> int:
        """Publish a report; fields that are not named keep what the slot held. Returns its tick."""
        tick = int(self._newest[0]) + 1
        slot = self._slots[tick % 2]
        slot["tick"] = 0
        for name, value in fields.items():
            slot[name] = value.encode()[:TEXT_BYTES] if isinstance(value, str) else value
        slot["tick"] = tick
        self._newest[0] = tick
        return tick

    def read(self) -> Any:
        """A copy of the newest report; None before the first, or when the writer was faster three times in a row."""
        for _ in range(3):
            tick = int(self._newest[0])
            copy = self._slots[tick % 2].copy()
            if tick and copy["tick"] == tick == self._slots[tick % 2]["tick"]:
                return copy
        return None
