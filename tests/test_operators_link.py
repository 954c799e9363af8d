"""The operator's link: who drives, what happens when frames stop, and what does not count as a frame."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actor_examples import Bench, CountingRobot, policy
from recovery_times import Recovery, seconds_of
from sop.core.embodiment import Embodiment, Observation
from sop.core.episode import Intervention
from sop.operators.link import (
    LINK_LOST,
    MAX_FRAMES,
    TELEOP,
    LinkBody,
    LinkedOperator,
    LinkFrame,
    LinkStatus,
    decode_status,
    encode_frame,
)
from sop.testing.clock import FakeClock
from sop.testing.episodes import TOY_BODY

ARM = Embodiment(
    name="arm",
    cameras={"front": (16, 16)},
    state_names=("q",),
    action_names=("joint", "dx", "grip"),
    action_low=(-3.0, -1.0, -1.0),
    action_high=(3.0, 1.0, 1.0),
    hold_action=(None, 0.0, None),
    max_action_change=(None, None, None),
    control_hz=20.0,
)
BODY = LinkBody(embodiment=ARM, measured_by={"joint": "q"}, reach=0.15, safe_pose={"joint": 0.0})


class Wire:
    """A channel in memory."""

    def __init__(self) -> None:
        self.inbox: list[bytes] = []
        self.sent: list[bytes] = []

    def receive(self) -> bytes | None:
        return self.inbox.pop(0) if self.inbox else None

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def status(self) -> LinkStatus:
        return decode_status(self.sent[-1])


class Console:
    """An operator's side: answers the newest beacon."""

    def __init__(self, wire: Wire, name: str) -> None:
        self.wire, self.name, self.sequence = wire, name, 0

    def send(self, *action: float, engaged: bool = True, beacon: int | None = None) -> None:
        self.sequence += 1
        beacon = self.wire.status().beacon if beacon is None else beacon
        self.wire.inbox.append(
            encode_frame(
                LinkFrame(operator=self.name, sequence=self.sequence, beacon=beacon, engaged=engaged, action=action)
            )
        )


class Site:
    """A robot's operator with a clock and consoles."""

    def __init__(self, body: LinkBody = BODY) -> None:
        self.clock, self.wire = FakeClock(), Wire()
        self.operator = LinkedOperator(self.wire, body, self.clock, allowed=("anna", "ben"))
        self.anna, self.ben = Console(self.wire, "anna"), Console(self.wire, "ben")
        self.operator.reset("t", 0)
        self.step()

    def step(self, q: float = 1.0, seconds: float = 0.05) -> list[float] | None:
        """Time passes, then one control step."""
        self.clock.advance(seconds)
        action = self.operator.correct(Observation({}, np.asarray([q], np.float32)), None)
        return None if action is None else [round(float(value), 4) for value in action]


def test_a_person_takes_over_and_hands_back_and_says_so() -> None:
    site = Site()
    assert (site.step(), site.operator.reason) == (None, "")
    site.anna.send(1.05, 0.5, -0.2)
    assert site.step() == [1.05, 0.5, -0.2]
    assert (site.operator.name, site.operator.reason) == ("anna", TELEOP)
    site.anna.send(engaged=False)
    assert (site.step(), site.operator.reason, site.operator.name) == (None, "", "nobody")


def test_the_first_command_of_a_person_is_near_the_measured_pose() -> None:
    """Fault 45: a device that was not aligned pulls the arm by its reach, step by step, and not at once."""
    site = Site()
    site.anna.send(-2.0, 0.0, 0.0)
    assert site.step(q=1.0) == [0.85, 0.0, 0.0]
    site.anna.send(-2.0, 0.0, 0.0)
    assert site.step(q=0.85) == [0.7, 0.0, 0.0]
    assert site.wire.status().state == pytest.approx((0.85,)), "the status tells the device where the arm is"


def test_a_link_lost_during_a_takeover_holds_then_goes_to_the_safe_pose_and_never_back_to_the_policy(
    recovery: Recovery,
) -> None:
    """Fault 43."""
    site = Site()
    site.anna.send(1.1, 0.5, -0.2)
    assert site.step(q=1.0) == [1.1, 0.5, -0.2]
    assert site.step(q=1.05) == [1.1, 0.5, -0.2]
    held = [site.step(q=1.07) for _ in range(8)]
    assert held[-1] == [1.07, 0.0, -0.2], "the joint where it is, no displacement, the grip as it was"
    assert (site.operator.reason, site.wire.status().lost) == (LINK_LOST, True)
    site.clock.advance(5.0)
    assert site.step(q=1.07) == [0.92, 0.0, -0.2], "towards the safe pose, within reach"
    site.operator.reset("t", 1)
    assert site.operator.reason == LINK_LOST
    assert [site.step(q=0.0) for _ in range(100)][-1] == [0.0, 0.0, -0.2], "for ever"
    recovery.fault_is_over(seconds_of(site.clock))
    site.anna.send(0.1, 0.3, 0.0)
    assert site.step(q=0.0) == [0.1, 0.3, 0.0]
    recovery.whole("the robot follows her again")


def test_a_link_that_comes_back_gives_control_to_the_same_person_and_the_mark_stays() -> None:
    site = Site()
    site.anna.send(1.0, 0.5, 0.0)
    site.step()
    for _ in range(10):
        site.step()
    site.anna.send(1.0, 0.3, 0.0)
    assert site.step() == [1.0, 0.3, 0.0]
    assert site.operator.reason == LINK_LOST
    site.anna.send(engaged=False)
    assert site.step() is None, "she says it herself"


def test_one_operator_drives_and_the_other_sees_who(recovery: Recovery) -> None:
    """Fault 44."""
    site = Site()
    site.anna.send(1.0, 0.5, 0.0)
    site.ben.send(1.0, -0.5, 0.0)
    assert site.step() == [1.0, 0.5, 0.0]
    site.ben.send(engaged=False)
    site.step()
    assert site.wire.status().driver == "anna"
    assert site.operator.name == "anna", "nobody else can hand back for her"
    for _ in range(20):
        site.step()
    site.ben.send(1.0, -0.5, 0.0)
    assert site.step() == [1.0, 0.0, 0.0], "lost for a second: still hers, and held"
    site.clock.advance(5.0)
    site.step()
    site.ben.send(1.0, -0.5, 0.0)
    assert site.step() == [1.0, -0.5, 0.0]
    assert (site.operator.name, site.operator.reason) == ("ben", LINK_LOST)
    recovery.fault_is_over(seconds_of(site.clock))
    site.ben.send(engaged=False)
    site.anna.send(1.0, 0.5, 0.0)
    assert site.step() == [1.0, 0.5, 0.0]
    recovery.whole("the robot follows the other")


def test_replays_overtaken_old_and_foreign_frames_and_floods_do_not_count(recovery: Recovery) -> None:
    """Fault 38."""
    site = Site()
    beacon = site.wire.status().beacon
    site.anna.send(1.0, 0.1, 0.0)
    first = site.wire.inbox[0]
    site.step()
    site.wire.inbox += [first]
    site.anna.send(1.0, 0.9, 0.0, beacon=beacon - 200_000_000)
    site.anna.send(1.0, 0.9, 0.0, beacon=beacon + 10**9)
    Console(site.wire, "eve").send(1.0, 0.9, 0.0)
    site.anna.send(1.0, 0.9)
    site.anna.send(1.0, float("inf"), 0.0)
    site.anna.send(1.0, 1e300, 0.0)
    site.wire.inbox += [b"\x80\x04pickle", b"[" * 4000, b"x" * 10_000, b"{}"]
    assert site.step() == [1.0, 0.1, 0.0], "the last good one, still fresh"
    assert site.operator.dropped == 11
    site.wire.inbox += [first] * 10 * MAX_FRAMES
    site.step()
    assert site.wire.inbox == []
    assert [site.step() for _ in range(5)][-1] == [1.0, 0.0, 0.0], "and then the robot holds"
    recovery.fault_is_over(seconds_of(site.clock))
    site.anna.send(1.0, 0.2, 0.0)
    assert site.step() == [1.0, 0.2, 0.0]
    recovery.whole("the robot follows again")


def test_a_status_goes_out_twenty_times_a_second_at_any_control_rate() -> None:
    site = Site()
    before = len(site.wire.sent)
    for _ in range(200):
        site.step(seconds=0.01)
    assert 38 <= len(site.wire.sent) - before <= 40


@given(st.lists(st.binary(max_size=200), max_size=20))
@settings(max_examples=50, deadline=None)
def test_whatever_comes_over_the_wire_the_policy_drives_on(messages: list[bytes]) -> None:
    site = Site()
    site.wire.inbox += messages
    assert site.step() is None


def test_an_episode_with_a_lost_link_is_marked_and_the_chunk_was_dropped(tmp_path: Path) -> None:
    """Faults 43 and 45, with a real actor: steps are 100 ms apart, the beacon of the only frame is one step old."""
    wire = Wire()
    anna = Console(wire, "anna")

    def on_step(step: int) -> None:
        if step == 2:
            anna.send(-0.25, 0.5)

    plans = policy()
    robot = CountingRobot(steps=8, on_step=on_step)
    body = LinkBody(embodiment=TOY_BODY)
    bench = Bench(tmp_path, robot, None, policy=plans)  # type: ignore[arg-type]
    bench.actor._operator = LinkedOperator(wire, body, bench.clock)
    episode = bench.run()[0]
    assert episode.interventions == (Intervention(2, 8, "anna", LINK_LOST),)
    assert episode.action[:, 0].tolist() == pytest.approx([0, 0.01, -0.25, 0, 0, 0, 0, 0], abs=1e-6)
    assert episode.action[2:, 1].tolist() == [0.5] * 6
    np.testing.assert_allclose(episode.policy_action[:4, 0], [0, 0.01, 0.02, 1], atol=1e-6)
