"""Limits, gate, latch and watchdog: what a command may become, and when nothing moves any more."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sop.actor.latch import SafetyLatch
from sop.actor.limits import FROM_MEASURED, ElementLimits, RobotLimits, load_limits
from sop.actor.safety import SafetyGate, Verdict
from sop.actor.watchdog import Watchdog
from sop.core.embodiment import Embodiment
from sop.core.errors import InvalidRecord, RunError
from sop.testing.clock import FakeClock
from sop.testing.episodes import TOY_BODY

BODY = Embodiment(
    name="bench-arm",
    cameras={"front": (16, 16)},
    state_names=("q", "x"),
    action_names=("joint", "dx", "grip"),
    action_low=(-3.0, -1.0, -50.0),
    action_high=(3.0, 1.0, 50.0),
    hold_action=(None, 0.0, None),
    max_action_change=(None, None, None),
    control_hz=20.0,
)
HZ = BODY.control_hz


def limits(**changes: dict[str, Any]) -> RobotLimits:
    """A joint with a target, a displacement of 1 cm per unit, a gripper force; elements changed as asked."""
    elements: dict[str, dict[str, Any]] = {
        "joint": {"kind": "position", "state": "q"},
        "dx": {"kind": "displacement", "state": "x", "scale": 0.01},
        "grip": {"kind": "force"},
    }
    made = {name: ElementLimits(**(values | changes.get(name, {}))) for name, values in elements.items()}
    return RobotLimits(robot="bench-arm", elements=made)


def at(q: float = 0.0, x: float = 0.0) -> np.ndarray:
    return np.asarray([q, x], np.float32)


def command(joint: float = 0.0, dx: float = 0.0, grip: float = 0.0) -> np.ndarray:
    return np.asarray([joint, dx, grip], np.float32)


def test_an_absolute_target_stays_near_the_measured_pose_by_default() -> None:
    gate = SafetyGate(BODY, limits())
    gated = gate.check(command(joint=2.0), at(q=0.5))
    assert gated.action[0] == pytest.approx(0.5 + FROM_MEASURED / HZ)
    assert (gated.reason, gated.verdict) == ("far from the measured pose", Verdict.CLAMPED)
    assert pytest.approx(0.1) == FROM_MEASURED * 0.033


def test_an_arm_that_does_not_follow_is_not_pulled_further() -> None:
    gate = SafetyGate(BODY, limits())
    targets = [gate.check(command(joint=0.1 * step), at(q=0.0)).action[0] for step in range(1, 3)]
    assert targets == pytest.approx([0.1, FROM_MEASURED / HZ])


def test_bounds_force_and_workspace_are_kept() -> None:
    gate = SafetyGate(BODY, limits(grip={"low": -20.0, "high": 20.0}, dx={"workspace": (-0.1, 0.1)}))
    gated = gate.check(command(dx=0.8, grip=35.0), at(x=0.095))
    assert gated.action.tolist() == pytest.approx([0.0, 0.5, 20.0])
    assert gated.reason == "out of bounds: clipped, out of the workspace"


def test_outside_of_the_workspace_nothing_moves_by_itself_and_only_inward_motion_is_left() -> None:
    gate = SafetyGate(BODY, limits(dx={"workspace": (-0.1, 0.1)}))
    assert gate.check(command(dx=0.0), at(x=0.2)).action[1] == 0.0
    assert gate.check(command(dx=0.3), at(x=0.2)).action[1] == 0.0
    assert gate.check(command(dx=-0.3), at(x=0.2)).action[1] == pytest.approx(-0.3)


def test_outside_of_its_bounds_a_joint_comes_back_no_faster_than_the_pose_allows() -> None:
    gate = SafetyGate(BODY, limits(joint={"high": 1.0}))
    assert gate.check(command(joint=0.9), at(q=2.0)).action[0] == pytest.approx(2.0 - FROM_MEASURED / HZ)


def test_velocity_acceleration_and_jerk_are_limited_for_both_kinds() -> None:
    """Commanded speeds: a target moves by v / hz per step, a displacement of 1 is 0.01 m * 20 Hz = 0.2 m/s."""
    for name, index, scale in (("joint", 0, 1.0), ("dx", 1, 0.01)):
        for change, expected in (
            ({"velocity": 0.1}, [0.1, 0.1]),
            ({"acceleration": 0.4}, [0.02, 0.04]),
            ({"jerk": 4.0}, [0.01, 0.03]),
        ):
            gate = SafetyGate(BODY, limits(**{name: change}))
            speeds, last = [], 0.0
            for _ in range(2):
                action = float(
                    gate.check(command(**{name: 1.0 if name == "dx" else last + 0.1}), at(q=last)).action[index]
                )
                speeds.append((action - (last if name == "joint" else 0.0)) * scale * HZ)
                last = action
            assert speeds == pytest.approx(expected, rel=1e-4), (name, change)


def test_speed_leaves_room_to_brake_before_the_edge() -> None:
    """With 0.1 m/s^2 the arm has to slow down before 0.1 m, and its edge is never passed."""
    gate = SafetyGate(BODY, limits(dx={"workspace": (-0.1, 0.1), "acceleration": 0.1}))
    x, speeds = 0.0, []
    for _ in range(200):
        gate._clamped_at.clear()  # this test is about where it may go, not about how often it may be clamped
        action = gate.check(command(dx=1.0), at(x=x)).action[1]
        speeds.append(action * 0.01 * HZ)
        x += action * 0.01
    assert 0.09 < x <= 0.1 + 1e-6
    assert np.abs(np.diff(speeds)).max() <= 0.1 / HZ + 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_makes_the_robot_decelerate_and_hold_and_is_never_replaced_by_motion(bad: float) -> None:
    gate = SafetyGate(BODY, limits(dx={"acceleration": 2.0}))
    for step in range(1, 3):
        gate.check(command(joint=0.05 * step, dx=0.5 * step, grip=7.0), at())
    values = [gate.check(command(dx=bad), at()) for _ in range(4)]
    assert [gated.action[1] for gated in values] == pytest.approx([0.5, 0.0, 0.0, 0.0])
    assert {gated.verdict for gated in values} == {Verdict.NONFINITE}
    assert values[-1].action.tolist() == pytest.approx([0.1, 0.0, 7.0]), "the target and the grip stay"
    assert gate.at_rest


def test_a_state_that_is_not_finite_holds() -> None:
    gated = SafetyGate(BODY, limits()).check(command(dx=0.1), at(q=np.nan))
    assert (gated.verdict, gated.action[1]) == (Verdict.NONFINITE, 0.0)


def test_three_clamped_steps_in_a_second_stop_the_robot_until_a_person_clears_it() -> None:
    gate = SafetyGate(BODY, limits(dx={"velocity": 0.1, "acceleration": 1.0}), SafetyLatch(FakeClock()))
    gate.check(command(dx=0.25), at())
    verdicts = [gate.check(command(dx=0.6), at()).verdict for _ in range(3)]
    assert verdicts == [Verdict.CLAMPED, Verdict.CLAMPED, Verdict.STOPPED]
    after = [gate.check(command(dx=0.1), at()) for _ in range(4)]
    assert {gated.verdict for gated in after} == {Verdict.CLOSED}
    assert after[-1].action[1] == 0.0
    gate.reset()
    assert gate.check(command(dx=0.1), at()).verdict is Verdict.CLOSED, "a new episode does not open it"
    gate.latch.clear("anna")
    assert gate.check(command(dx=0.1), at()).verdict is Verdict.PASSED


def test_clamps_that_are_rarer_than_three_in_a_second_do_not_stop() -> None:
    gate = SafetyGate(BODY, limits(dx={"velocity": 0.1}))
    for step in range(100):
        fast = step % 10 == 0
        assert gate.check(command(dx=0.8 if fast else 0.1), at()).verdict is (
            Verdict.CLAMPED if fast else Verdict.PASSED
        )


def test_taking_up_speed_after_a_hold_is_no_reason_to_stop_but_only_for_a_second() -> None:
    gate = SafetyGate(BODY, limits(dx={"velocity": 0.1, "acceleration": 0.2}), SafetyLatch(FakeClock()))
    verdicts = [gate.check(command(dx=0.5), at()).verdict for _ in range(12)]
    assert verdicts == [Verdict.CLAMPED] * 9 + [Verdict.PASSED] * 3
    while not gate.at_rest:
        gate.brake("no fresh action", at())
    assert gate.check(command(dx=0.5), at()).verdict is Verdict.CLAMPED
    fast = [gate.check(command(dx=0.9), at()).verdict for _ in range(3)]
    assert fast[-1] is Verdict.STOPPED, "too fast a command counts all the same"
    gate.latch.clear("anna")
    gate.reset()
    swings = [gate.check(command(dx=0.4 * (-1) ** (step // 5)), at()).verdict for step in range(30)]
    assert swings.index(Verdict.STOPPED) == 22, "a command that is never reached"


def test_without_limits_clamping_never_stops() -> None:
    gate = SafetyGate(TOY_BODY)
    for _ in range(50):
        assert gate.check(np.asarray([5.0, 0.0], np.float32)).verdict is Verdict.CLAMPED
    assert gate.closed == ""


@given(st.lists(st.floats(-2, 2, width=32) | st.just(float("nan")), min_size=5, max_size=60), st.booleans())
@settings(max_examples=40, deadline=None)
def test_whatever_is_commanded_no_limit_is_passed_and_the_end_is_rest(commands: list[float], jerk: bool) -> None:
    change = {"velocity": 0.15, "acceleration": 1.0} | ({"jerk": 40.0} if jerk else {})
    gate = SafetyGate(BODY, limits(dx=change, joint={"velocity": 1.0, "acceleration": 8.0}), SafetyLatch(FakeClock()))
    actions = [gate.check(command(joint=value, dx=value), at()).action for value in commands]
    actions += [gate.brake("over", at()).action for _ in range(40)]
    assert gate.at_rest
    speeds = np.asarray([action[1] for action in actions]) * 0.01 * HZ
    accelerations = np.diff(speeds, prepend=0.0) * HZ
    assert np.abs(speeds).max() <= 0.15 + 1e-4
    assert np.abs(accelerations).max() <= 1.0 + 1e-3
    if jerk:
        assert np.abs(np.diff(accelerations, prepend=0.0) * HZ).max() <= 40.0 + 0.1


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"robot": "other", "elements": {}}', "limits.robot"),
        ('{"robot": "bench-arm", "elements": {"dx": {"kind": "force"}}}', "limits.elements"),
        ("{", "limits"),
        ('{"robot": "bench-arm", "elements": {}, "typo": 1}', "limits"),
    ],
)
def test_a_limits_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "limits.json"
    path.write_text(text)
    with pytest.raises(InvalidRecord) as refusal:
        load_limits(path, BODY)
    assert refusal.value.field == field
    with pytest.raises(RunError, match="no limits in"):
        load_limits(tmp_path / "missing.json", BODY)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dx": {"velocity": -1.0}}, "limits.dx.velocity"),
        ({"dx": {"scale": 0.0}}, "limits.dx.scale"),
        ({"dx": {"workspace": (1.0, -1.0)}}, "limits.dx.workspace"),
        ({"dx": {"low": 1.0, "high": 0.0}}, "limits.dx.low"),
        ({"dx": {"low": 0.1}}, "limits.dx.low"),
        ({"dx": {"high": -0.1}}, "limits.dx.low"),
        ({"dx": {"state": "y"}}, "limits.dx.state"),
        ({"dx": {"workspace": (0.0, 1.0), "state": None}}, "limits.dx.state"),
        ({"joint": {"state": None}}, "limits.joint.state"),
        ({"grip": {"velocity": 1.0}}, "limits.grip.velocity"),
        ({"dx": {"from_measured": 1.0}}, "limits.dx.from_measured"),
    ],
)
def test_a_limit_that_means_nothing_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRecord) as refusal:
        limits(**change).check(BODY)
    assert refusal.value.field == field


def test_the_latch_survives_a_restart_and_remembers_who_cleared_it(tmp_path: Path) -> None:
    path = tmp_path / "robot" / "latch"
    latch = SafetyLatch(FakeClock(), path)
    latch.close("too fast")
    latch.close("another reason")
    again = SafetyLatch(FakeClock(), path)
    assert again.reason == "too fast"
    with pytest.raises(ValueError, match="name the person"):
        again.clear(" ")
    again.clear("anna")
    latch.refresh()
    assert latch.reason == ""
    assert [(entry.reason, entry.operator) for entry in latch.entries] == [("too fast", ""), ("", "anna")]
    again.clear("ben")
    assert len(SafetyLatch(FakeClock(), path).entries) == 2, "an open latch is not cleared"


def test_a_latch_that_cannot_be_read_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "latch"
    path.write_bytes(b'\n{"utc_ns": 1, "opera')
    latch = SafetyLatch(FakeClock(), path)
    assert "cannot be read" in latch.reason
    latch.clear("anna")
    assert SafetyLatch(FakeClock(), path).reason == ""
    assert json.loads(path.read_bytes().split(b"\n")[-2])["operator"] == "anna"


def test_the_watchdog_names_what_is_missing_and_forgives_when_it_is_back() -> None:
    clock = FakeClock()
    dog = Watchdog(clock, 30.0, ("state", "front"))
    assert dog.problem() == "state was never seen"
    dog.saw("state", clock.now_ns)
    dog.saw("front", clock.now_ns)
    assert dog.problem() == "no action yet"
    dog.acted(clock.now_ns)
    assert dog.problem() == ""
    clock.advance(0.1)
    assert dog.problem() == ""
    clock.advance(0.001)
    assert dog.problem() == "no fresh action for 101 ms"
    dog.acted(clock.now_ns)
    clock.advance(0.1)
    dog.acted(clock.now_ns)
    dog.saw("state", clock.now_ns)
    assert dog.problem() == "front is 201 ms old"
    dog.saw("front", clock.now_ns)
    assert dog.problem() == ""
