"""An episode that is broken off leaves no robot in motion, and none begins before it is known where the robot is."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actor_examples import Bench, CountingRobot, ScriptedOperator, policy
from sop.actor.limits import ElementLimits, RobotLimits
from sop.actor.safety import NOWHERE, SafetyGate, Verdict
from sop.core.embodiment import Embodiment
from sop.core.episode import Episode, Outcome
from sop.testing.episodes import TOY_BODY

FORCE = ElementLimits(kind="force")
BRAKING = ElementLimits(kind="displacement", acceleration=20.0)
"""A command of 1 per step of 0.1 s is a speed of 10: braking from there takes five steps."""
TARGET = Embodiment(
    name="one-joint",
    cameras={"front": (16, 16)},
    state_names=("q",),
    action_names=("joint",),
    action_low=(-3.0,),
    action_high=(3.0,),
    hold_action=(None,),
    max_action_change=(None,),
    control_hz=10.0,
)


class Steady(ScriptedOperator):
    """Drives with the same command all the time, until something happens."""

    def correct(self, observation: Any, proposed: Any) -> np.ndarray:
        self.count += 1
        return np.asarray([min(1.0, 0.2 * self.count), 0.0], np.float32)


class Leaving:
    """A source whose policy must be left for a while."""

    def __init__(self, bench: Bench) -> None:
        self._inner = bench.subscriber
        self.must_leave = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def broken_off(folder: Path, why: str) -> Episode:
    """An episode that is broken off after step 8, at full speed; whoever wanted it has changed his mind by step 10."""
    stop = threading.Event()

    def on_step(step: int) -> None:
        if why == "stop" and step == 8:
            stop.set()
        if why == "leave":
            source.must_leave = "banned" if step in (8, 9) else ""
        if step == 12:
            stop.set()

    bench = Bench(folder, CountingRobot(steps=30, on_step=on_step), Steady(), policy=policy())
    source = Leaving(bench)
    bench.actor._subscriber = source
    bench.actor._hold = lambda *_: stop.set()  # type: ignore[method-assign]
    bench.actor._gate = SafetyGate(
        TOY_BODY, RobotLimits(robot=TOY_BODY.name, elements={"dx": BRAKING, "gripper": FORCE})
    )
    bench.actor.run(stop)
    return bench.finish()[0]


@pytest.mark.parametrize("why", ["leave", "stop"])
def test_a_robot_that_must_stop_brakes_within_its_limits_until_it_stands(tmp_path: Path, why: str) -> None:
    episode = broken_off(tmp_path, why)
    speeds = episode.action[:, 0]
    assert episode.outcome is Outcome.ABORTED
    assert speeds[7] == 1.0
    assert speeds[8:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-5)


def test_a_robot_that_does_not_come_to_rest_is_not_waited_for_without_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Restless(SafetyGate):
        at_rest = False

    stop = threading.Event()
    robot = CountingRobot(steps=1000, on_step=lambda step: stop.set() if step == 4 else None)
    bench = Bench(tmp_path, robot, ScriptedOperator(), policy=policy())
    bench.actor._gate = Restless(TOY_BODY)
    bench.actor.run(stop)
    assert bench.finish()[0].num_steps == 4 + 10 * TOY_BODY.control_hz
    assert "robot-0 did not come to rest within 10 s: look at it" in caplog.text


def test_a_hold_value_that_single_precision_rounds_is_rest() -> None:
    body = Embodiment(
        name="b", cameras={"front": (16, 16)}, state_names=("q",), action_names=("v",), action_low=(-1.0,),
        action_high=(1.0,), hold_action=(0.1,), max_action_change=(None,), control_hz=10.0,
    )  # fmt: skip
    gate = SafetyGate(body)
    gate.check(np.ones(1, np.float32))
    assert not gate.at_rest
    gate.brake()
    assert gate.at_rest


@pytest.mark.parametrize("state", [None, [np.nan], [1.0, 2.0]])
def test_before_the_first_measured_pose_nothing_is_let_through_and_then_it_begins_from_there(state: Any) -> None:
    limits = RobotLimits(robot="one-joint", elements={"joint": ElementLimits(kind="position", state="q", velocity=1.0)})
    gate = SafetyGate(TARGET, limits)
    seen = None if state is None else np.asarray(state, np.float32)
    for gated in (gate.check(np.asarray([2.0], np.float32), seen), gate.brake("hold", seen)):
        assert (gated.reason, gated.verdict) == (NOWHERE, Verdict.NONFINITE)
    assert [gate.located] == [False]
    assert gate.check(np.asarray([2.0], np.float32), np.asarray([1.5], np.float32)).action == pytest.approx(1.6)
    assert gate.located
    gate.reset(np.asarray([-1.0], np.float32))
    assert gate.located
    assert gate.brake("hold").action == pytest.approx(-1.0)


def test_an_actor_moves_nothing_before_its_robot_says_where_it_is(tmp_path: Path) -> None:
    class Blind(CountingRobot):
        def _seen(self) -> dict[str, Any]:
            seen = super()._seen()
            seen["state"] = np.asarray([np.nan if len(self.resets) < 3 else 0.5, 0], np.float32)
            return seen

    robot = Blind()
    bench = Bench(tmp_path, robot, ScriptedOperator(), policy=policy())
    position = ElementLimits(kind="position", state=TOY_BODY.state_names[0], velocity=1.0)
    bench.actor._gate = SafetyGate(
        TOY_BODY, RobotLimits(robot=TOY_BODY.name, elements={"dx": position, "gripper": FORCE})
    )
    problems: list[str] = []
    hold = bench.actor._hold

    def note(problem: str, stop: threading.Event) -> None:
        problems.append(problem)
        hold(problem, stop)

    bench.actor._hold = note  # type: ignore[method-assign]
    robot.on_step = lambda _: stop.set()
    stop = threading.Event()
    bench.actor.run(stop)
    bench.finish()
    assert problems == ["the robot does not say where it is, so that no target means standing still"] * 2
    assert [len(actions) > 0 for actions in robot.actions] == [False, False, True]
    assert abs(robot.actions[2][0][0] - 0.5) <= 0.1 + 1e-6, "from where it was measured"
