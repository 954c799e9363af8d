"""A person far away: frames through any message channel, and what the robot does when they stop.

    operator  -- LinkFrame, at least 20 a second, also when nothing moves -->  robot
              <-- LinkStatus, 20 a second: a beacon, who drives, the pose ---

    FREE --engaged frame--> DRIVING --200 ms without one--> LOST: hold --5 s--> LOST: safe pose, the lease is free
     ^                        |  ^                            |
     `-- the driver lets go --'  `--- a fresh frame: the driver's, or after 5 s anybody's ---'

Never back to the policy by itself: only a fresh frame of whoever holds the lease, with `engaged` false, gives control
back. One operator drives at a time; the others are told who. Clocks are not compared between machines: a frame repeats
the beacon of the last status that its sender saw, and is as old as that beacon; repeated, overtaken and old frames
are dropped, and so is everything that comes faster than the robot reads.

Before taking over, the device goes to the pose in the status. Whatever it sends then, an absolute target moves at
most `reach` away from the measured pose in one step.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np

from sop.core.clock import Clock
from sop.core.embodiment import Embodiment, Observation
from sop.core.errors import InvalidRecord
from sop.operators.base import Action

LOST_S = 0.2
"""Without a fresh frame for this long the robot holds."""
SAFE_S = 5.0
"""Without one for this long it goes to its safe pose, and another operator may take over."""
BEACON_S = 0.05
"""A status is sent this often: 20 Hz."""
MAX_FRAME_BYTES = 4096
MAX_FRAMES = 64
"""Frames that are looked at per control step; a flood beyond that is dropped unread."""
MAX_OPERATORS = 64
"""Names that are remembered while the robot works."""
TELEOP = "teleop"
"""Reason of a takeover."""
LINK_LOST = "teleop, link lost"
"""Reason of a takeover during which the link was lost."""


class LinkFrame(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator's console sends, as JSON."""

    operator: str
    """Who; the channel has made sure that it is so."""
    sequence: int
    """Grows with every frame of this operator."""
    beacon: int
    """Of the newest status that the console has seen."""
    engaged: bool
    """Whether the operator wants to drive."""
    action: tuple[float, ...] = ()
    """[A]; looked at while engaged."""


class LinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the robot sends, as JSON."""

    beacon: int
    """The robot's monotonic time, nanoseconds; means nothing elsewhere and is sent back."""
    driver: str
    """Who holds the lease; empty when nobody does."""
    lost: bool
    """The driver's link is lost: the robot holds."""
    state: tuple[float, ...]
    """[S] measured pose: where the device has to be before it takes over."""
    dropped: int
    """Frames that did not count, of anybody, since the start."""


class LinkChannel(Protocol):
    """Messages to and from the consoles of one robot; authenticated and encrypted by whoever makes it."""

    def receive(self) -> bytes | None:
        """The next message, None when there is none; never blocks."""
        ...

    def send(self, message: bytes) -> None:
        """To all consoles of this robot; never blocks, may lose it."""
        ...


def encode_frame(message: LinkFrame | LinkStatus) -> bytes:
    """JSON bytes."""
    return msgspec.json.encode(message)


def decode_status(data: bytes) -> LinkStatus:
    """Read a status.

    Raises:
        InvalidRecord: it is none.
    """
    try:
        return msgspec.json.decode(data, type=LinkStatus)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRecord("status", str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkBody:
    """How this robot holds, where it is safe, and how far one step of an absolute target may go."""

    embodiment: Embodiment
    measured_by: Mapping[str, str] = field(default_factory=dict)
    """Action element that is an absolute target -> the state element that measures it; all others displace."""
    reach: float = 0.1
    """Largest distance of an absolute target from the measured pose, state units."""
    safe_pose: Mapping[str, float] = field(default_factory=dict)
    """Absolute targets of the safe pose; elements that are not named hold. Empty: the safe pose is to hold."""

    def hold(self, observation: Observation, last: Action | None) -> Action:
        """The action [A] that keeps the robot where it is; elements that neither displace nor are measured keep
        their last value."""
        body = self.embodiment
        action = np.zeros(body.num_actions, np.float32) if last is None else last.copy()
        for index, (name, value) in enumerate(zip(body.action_names, body.hold_action, strict=True)):
            if name in self.measured_by:
                action[index] = observation.state[body.state_names.index(self.measured_by[name])]
            elif value is not None:
                action[index] = value
        return action

    def safe(self, observation: Observation, last: Action | None) -> Action:
        """The action [A] that leads to the safe pose."""
        action = self.hold(observation, last)
        for name, target in self.safe_pose.items():
            action[self.embodiment.action_names.index(name)] = target
        return self.near(observation, action)

    def near(self, observation: Observation, action: Action) -> Action:
        """The action [A] with absolute targets within reach of the measured pose."""
        near = action.copy()
        for name, state in self.measured_by.items():
            measured = observation.state[self.embodiment.state_names.index(state)]
            index = self.embodiment.action_names.index(name)
            near[index] = np.clip(near[index], measured - self.reach, measured + self.reach)
        return near


class LinkedOperator:
    """Implements `Operator` over a channel. Used by the control loop alone.

    Args:
        channel: to the consoles.
        body: how the robot holds.
        clock: ages of frames; monotonic.
        allowed: who may drive; None lets in whomever the channel lets in.
    """

    def __init__(
        self, channel: LinkChannel, body: LinkBody, clock: Clock, *, allowed: Collection[str] | None = None
    ) -> None:
        self._channel, self._body, self._clock, self._allowed = channel, body, clock, allowed
        self._sequences: dict[str, int] = {}
        self._frame: LinkFrame | None = None
        self._heard_ns = 0
        self._sent_ns: int | None = None
        self._last: Action | None = None
        self._driver = ""
        self._reason = ""
        self.dropped = 0
        """Frames that did not count."""

    @property
    def name(self) -> str:
        """Who drives, or drove last."""
        return self._driver or "nobody"

    @property
    def reason(self) -> str:
        """`TELEOP`, or `LINK_LOST` from the first loss on to the end of the takeover; empty while the policy drives."""
        return self._reason

    def reset(self, task: str, seed: int) -> None:  # noqa: ARG002
        """An episode begins. Who drives goes on driving; a lost link stays lost."""
        self._reason = LINK_LOST if self._lost_s() > LOST_S else TELEOP if self._driver else ""

    def correct(self, observation: Observation, proposed: Action | None) -> Action | None:  # noqa: ARG002
        """Read the frames, answer with a status, and say what the person, or the loss of the link, does now."""
        now_ns = self._clock.monotonic_ns()
        for _ in range(MAX_FRAMES):
            data = self._channel.receive()
            if data is None:
                break
            self._take(data, now_ns)
        else:
            self._drop_rest()
        self._tell(observation, now_ns)
        if self._frame is None:
            self._last = None
            return None
        self._last = self._act(self._frame, observation)
        return self._last

    def _act(self, frame: LinkFrame, observation: Observation) -> Action:
        lost_s = self._lost_s()
        if lost_s <= LOST_S:
            return self._body.near(observation, np.asarray(frame.action, np.float32))
        self._reason = LINK_LOST
        return (self._body.safe if lost_s > SAFE_S else self._body.hold)(observation, self._last)

    def _lost_s(self) -> float:
        return 0.0 if self._frame is None else (self._clock.monotonic_ns() - self._heard_ns) / 1e9

    def _take(self, data: bytes, now_ns: int) -> None:
        try:
            frame = self._checked(data, now_ns)
        except InvalidRecord:
            self.dropped += 1
            return
        self._sequences[frame.operator] = frame.sequence
        if self._driver and frame.operator != self._driver and self._lost_s() <= SAFE_S:
            return  # somebody else drives; the status says who
        if frame.engaged:
            if frame.operator != self._driver:
                self._reason = LINK_LOST if self._driver else TELEOP
            self._frame, self._driver, self._heard_ns = frame, frame.operator, frame.beacon
        elif frame.operator == self._driver:
            self._frame, self._driver, self._reason = None, "", ""

    def _checked(self, data: bytes, now_ns: int) -> LinkFrame:
        if len(data) > MAX_FRAME_BYTES:
            raise InvalidRecord("frame", f"{len(data)} bytes")
        try:
            frame = msgspec.json.decode(data, type=LinkFrame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRecord("frame", str(error)) from error
        if not frame.operator or (self._allowed is not None and frame.operator not in self._allowed):
            raise InvalidRecord("operator", f"{frame.operator!r} may not drive this robot")
        if frame.operator not in self._sequences and len(self._sequences) >= MAX_OPERATORS:
            raise InvalidRecord("operator", f"more than {MAX_OPERATORS} have sent frames")
        if frame.sequence <= self._sequences.get(frame.operator, -1):
            raise InvalidRecord("sequence", "repeated or overtaken")
        if not 0 <= now_ns - frame.beacon <= LOST_S * 1e9:
            raise InvalidRecord("beacon", f"{(now_ns - frame.beacon) / 1e6:.0f} ms old")
        if frame.engaged:
            with np.errstate(over="ignore"):
                values = np.asarray(frame.action, np.float64).astype(np.float32)
            if len(values) != self._body.embodiment.num_actions or not np.isfinite(values).all():
                raise InvalidRecord("action", f"needs {self._body.embodiment.num_actions} finite values")
        return frame

    def _drop_rest(self) -> None:
        """More than anybody sends in good faith: what waits is thrown away, a bounded part of it per step."""
        for _ in range(16 * MAX_FRAMES):
            if self._channel.receive() is None:
                return
            self.dropped += 1

    def _tell(self, observation: Observation, now_ns: int) -> None:
        if self._sent_ns is not None and now_ns - self._sent_ns < BEACON_S * 1e9:
            return
        self._sent_ns = now_ns
        status = LinkStatus(
            beacon=now_ns,
            driver=self._driver,
            lost=self._lost_s() > LOST_S,
            state=tuple(float(value) for value in observation.state),
            dropped=self.dropped,
        )
        self._channel.send(encode_frame(status))
