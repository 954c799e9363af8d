"""The gate around the stand-in, step by step, on scripted oracles; and the other operators."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

import sop.testing.contracts.operator as contract
from sop.config import OperatorConfig
from sop.core.embodiment import Observation
from sop.operators import OPERATORS, Demonstrator, Nobody, Operator, Oracle, StandIn, make_operator
from sop.robots import DEPLOYMENT
from sop.robots.toy import ToyRobot

SEEN = Observation({}, np.zeros(0, np.float32))
EXPERT = np.array([0.5, 0.0, 0.0, 1.0], np.float32)
GOOD = EXPERT.copy()
BAD = np.array([-0.5, 0.0, 0.0, 1.0], np.float32)  # 1.0 away


class Script:
    """An oracle whose expert never changes its mind and whose progress follows a script, one entry per step."""

    num_displacements = 3

    def __init__(self, progress: Callable[[int], float]) -> None:
        self.step = 0
        self._progress = progress

    def expert_action(self) -> np.ndarray:
        return EXPERT

    def progress(self) -> float:
        return self._progress(self.step)


def always_better(step: int) -> float:
    return 0.001 * step


def drive(
    config: OperatorConfig,
    proposals: Callable[[int], np.ndarray | None],
    progress: Callable[[int], float] = always_better,
    steps: int = 300,
) -> list[tuple[int, int, str]]:
    """Maximal runs `(start, stop, reason)` of steps that the stand-in controls."""
    script = Script(progress)
    operator = StandIn(config, script)
    operator.reset("task", 0)
    runs: list[tuple[int, int, str]] = []
    for step in range(steps):
        script.step = step
        action = operator.correct(SEEN, proposals(step))
        if action is None:
            continue
        assert action is EXPERT
        if runs and runs[-1][1] == step:
            assert operator.reason == runs[-1][2], "the reason of a correction changes while it lasts"
            runs[-1] = (runs[-1][0], step + 1, runs[-1][2])
        else:
            runs.append((step, step + 1, operator.reason))
    return runs


def during(*spans: tuple[int, int]) -> Callable[[int], np.ndarray]:
    """Bad proposals in the spans `[start, stop)`, good ones elsewhere."""
    return lambda step: BAD if any(start <= step < stop for start, stop in spans) else GOOD


CONFIG = OperatorConfig()


def test_a_good_policy_that_gets_on_is_left_alone() -> None:
    assert drive(CONFIG, during()) == []


def test_the_eighth_deviating_step_in_a_row_takes_over() -> None:
    assert drive(CONFIG, during((10, 17))) == []
    assert drive(CONFIG, during((10, 18)))[0][0] == 17
    assert drive(CONFIG, during((10, 17), (18, 25))) == [], "one good step in between starts the count again"


def test_a_correction_without_recovery_lasts_max_steps() -> None:
    assert drive(CONFIG, during((10, 18))) == [(17, 77, "deviation")]


def test_a_correction_that_recovers_early_lasts_min_steps() -> None:
    assert drive(CONFIG, during((10, 18)), lambda step: always_better(step) + (step > 20)) == [(17, 41, "deviation")]


def test_a_correction_ends_with_the_step_that_completes_the_recovery() -> None:
    for recovered_at, stop in ((40, 41), (41, 41), (42, 42), (50, 50), (76, 76), (77, 77), (99, 77)):
        runs = drive(CONFIG, during((10, 18)), lambda step, at=recovered_at: always_better(step) + (step >= at))
        assert runs == [(17, stop, "deviation")], f"recovered at step {recovered_at}"


def test_recovery_counts_from_the_takeover_not_from_the_best() -> None:
    def fell_behind(step: int) -> float:
        return 5.0 if step < 10 else 1.0 if step < 30 else 1.3 + 0.001 * (step - 30)

    assert drive(CONFIG, during((10, 18)), fell_behind, steps=60) == [(17, 41, "deviation")]
    assert drive(replace(CONFIG, recovery=0.4), during((10, 18)), fell_behind, steps=60) == [(17, 60, "deviation")]


def test_no_new_best_for_forty_steps_takes_over() -> None:
    def gets_stuck(step: int) -> float:
        return float(min(step, 15))

    assert drive(CONFIG, during(), gets_stuck, steps=90)[0] == (55, 90, "stall")
    # A new best at step 55 is just in time (and has to be beaten until 95), one at step 56 comes too late.
    assert drive(CONFIG, during(), lambda step: float(min(step, 15) + (step >= 55)), steps=95) == []
    assert drive(CONFIG, during(), lambda step: float(min(step, 15) + (step >= 55)), steps=96) == [(95, 96, "stall")]
    assert drive(CONFIG, during(), lambda step: float(min(step, 15) + (step >= 56)), steps=57) == [(55, 57, "stall")]


def test_standing_still_from_the_first_step_is_a_stall_after_forty() -> None:
    assert drive(CONFIG, during(), lambda step: 0.0, steps=60) == [(40, 60, "stall")]


def test_a_reward_below_the_best_is_no_progress() -> None:
    assert drive(CONFIG, during(), lambda step: 3.0 if step == 0 else 0.01 * step, steps=60) == [(40, 60, "stall")]


def test_deviation_is_named_before_stall_when_both_alarm() -> None:
    assert drive(CONFIG, during((33, 60)), lambda step: 0.0, steps=60) == [(40, 60, "deviation")]


def test_both_counters_start_again_after_a_hand_back() -> None:
    bad_for_ever = during((10, 999))
    runs = drive(CONFIG, bad_for_ever, steps=260)
    # Handed back at 77: that step drives the policy and does not count; 8 deviating steps follow, 78 to 85.
    assert runs[:2] == [(17, 77, "deviation"), (85, 145, "deviation")]
    stuck = drive(CONFIG, during(), lambda step: 0.0, steps=245)
    assert stuck[:2] == [(40, 100, "stall"), (140, 200, "stall")]


def test_after_two_hand_backs_the_operator_finishes() -> None:
    runs = drive(CONFIG, during((10, 999)), steps=400)
    assert runs == [(17, 77, "deviation"), (85, 145, "deviation"), (153, 400, "deviation")]
    assert drive(replace(CONFIG, max_hand_backs=0), during((10, 18)), steps=400) == [(17, 400, "deviation")]
    assert drive(replace(CONFIG, max_hand_backs=1), during((10, 999)), steps=400)[1] == (85, 400, "deviation")


def test_a_finishing_operator_stays_however_well_it_goes() -> None:
    config = replace(CONFIG, max_hand_backs=0)
    assert drive(config, during((0, 8)), float, steps=200) == [(7, 200, "deviation")]


@pytest.mark.parametrize(
    ("difference", "alarms"),
    [
        ((0.8, 0.0, 0.0, 0.0), False),  # the limit itself is no alarm
        ((0.82, 0.0, 0.0, 0.0), True),
        ((0.5, 0.5, 0.5, 0.0), True),  # Euclidean: 0.866
        ((0.45, 0.45, 0.45, 0.0), False),  # 0.779
        ((0.0, 0.0, 0.0, -1.6), False),  # half of the gripper: 0.8
        ((0.0, 0.0, 0.0, -1.7), True),
        ((0.5, 0.0, 0.0, -0.7), True),  # 0.5 + 0.35
        ((0.5, 0.0, 0.0, -0.5), False),
    ],
)
def test_the_distance_is_the_norm_of_the_displacement_plus_half_of_the_gripper(
    difference: Sequence[float], alarms: bool
) -> None:
    expert = np.zeros(4)

    class AtZero(Script):
        def expert_action(self) -> np.ndarray:
            return expert

    operator = StandIn(replace(CONFIG, reaction_steps=1), AtZero(always_better))
    assert (operator.correct(SEEN, np.array(difference)) is not None) is alarms


def test_a_robot_without_a_gripper_has_displacements_only() -> None:
    class NoGripper(Script):
        num_displacements = 2

        def expert_action(self) -> np.ndarray:
            return np.zeros(2, np.float32)

    for offset, alarms in ((0.56, False), (0.57, True)):
        operator = StandIn(replace(CONFIG, reaction_steps=1), NoGripper(always_better))
        assert (operator.correct(SEEN, np.full(2, offset, np.float32)) is not None) is alarms


def test_a_proposal_that_is_not_finite_deviates() -> None:
    broken = np.array([np.nan, 0, 0, 1], np.float32)
    assert drive(CONFIG, lambda step: broken, steps=20) == [(7, 20, "deviation")]


def test_a_policy_without_a_proposal_does_not_deviate_but_stalls() -> None:
    assert drive(CONFIG, lambda step: None, steps=60) == []
    assert drive(CONFIG, lambda step: None, lambda step: 0.0, steps=60) == [(40, 60, "stall")]


def test_a_reset_in_the_middle_of_a_correction_watches_again_with_all_hand_backs() -> None:
    script = Script(always_better)
    operator = StandIn(replace(CONFIG, max_hand_backs=0), script)
    for _ in range(8):
        action = operator.correct(SEEN, BAD)
    assert action is EXPERT
    operator.reset("task", 1)
    assert operator.reason == ""
    assert [operator.correct(SEEN, BAD) is None for _ in range(8)] == [True] * 7 + [False]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("reaction_steps", 0),
        ("stall_steps", 0),
        ("min_steps", 0),
        ("max_steps", 23),
        ("max_hand_backs", -1),
        ("deviation", 0.0),
        ("deviation", float("nan")),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"operator.{setting}"):
        StandIn(replace(CONFIG, **{setting: value}), Script(always_better))


MAKE: dict[str, Callable[[Oracle], Operator]] = {
    "stand_in": lambda oracle: make_operator(CONFIG, oracle),
    "none": lambda oracle: make_operator(replace(CONFIG, kind="none"), oracle),
    "demonstrator": Demonstrator,
}


@pytest.mark.parametrize("kind", sorted(MAKE))
@pytest.mark.parametrize("rule", contract.OPERATOR_RULES, ids=lambda rule: rule.__name__)
def test_every_operator_keeps_the_contract(kind: str, rule: Callable[..., None]) -> None:
    rule(MAKE[kind])


def test_every_registered_operator_is_under_the_contract() -> None:
    assert set(OPERATORS) <= set(MAKE)


def test_nobody_never_takes_over_and_the_demonstrator_always_drives() -> None:
    script = Script(lambda step: 0.0)
    nobody, demonstrator = make_operator(replace(CONFIG, kind="none"), script), Demonstrator(script)
    assert isinstance(nobody, Nobody)
    assert [nobody.correct(SEEN, BAD) for _ in range(100)] == [None] * 100
    assert all(demonstrator.correct(SEEN, proposed) is EXPERT for proposed in (GOOD, BAD, None))
    assert demonstrator.reason == "demonstration"


@pytest.mark.parametrize(
    ("kind", "message"), [("standin", "Did you mean 'stand_in'"), ("xyz", r"operator\. Known are: none, stand_in")]
)
def test_make_operator_suggests_what_was_meant(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_operator(replace(CONFIG, kind=kind), Script(always_better))


def test_a_stand_in_rescues_a_toy_robot_whose_policy_does_the_opposite() -> None:
    robot = ToyRobot()
    config = replace(CONFIG, reaction_steps=2, min_steps=4, max_steps=12)
    operator = make_operator(config, robot)
    rescued = 0
    for seed in range(20):
        operator.reset("touch-red", seed)
        observation, _ = robot.reset(seed=seed, options={"task": "touch-red", "scene": DEPLOYMENT, "time_factor": 1.6})
        terminated = truncated = False
        while not (terminated or truncated):
            proposed = -robot.expert_action()
            action = operator.correct(Observation(**observation), proposed)
            observation, _, terminated, truncated, _ = robot.step(proposed if action is None else action)
        rescued += terminated
    assert rescued >= 18
