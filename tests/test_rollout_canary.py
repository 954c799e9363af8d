"""The controller: stages, triggers at their boundaries, missing data, restarts in every state, two controllers."""

import pytest

from rollout_fakes import CANDIDATE, OTHER, STABLE, TASKS, Fleet
from sop.core.channel import ChannelState
from sop.core.episode import SafetyCounts
from sop.core.errors import InvalidRecord, PolicyRefused, RunError
from sop.rollout import Action, CanarySettings, Limits

QUICK = CanarySettings(min_pairs=3, limits=Limits(margin=0.25), beta=0.2)


def run_to_the_end(fleet: Fleet, *, restart: bool = False, rounds: int = 400) -> list[Action]:
    """Step after every round until nothing is on trial."""
    actions = []
    for _ in range(rounds):
        fleet.act(1)
        fleet.clock.advance(30)
        controller = fleet.controller() if restart else fleet.canary
        decision = controller.step()
        if decision is None:
            break
        actions.append(decision.action)
        if fleet.state.candidate is None:
            break
    return actions


def test_a_good_candidate_goes_from_one_robot_to_more_to_all() -> None:
    fleet = Fleet(QUICK)
    begun = fleet.begin()
    assert (len(begun.candidate_robots), len(begun.control_robots)) == (1, 1)  # 10 % of ten
    actions = run_to_the_end(fleet)
    changes = [action for action in actions if action is not Action.HOLD]
    assert changes == [Action.WIDEN, Action.PROMOTE]
    wider, promoted = fleet.channel.states[-2:]
    assert set(begun.candidate_robots) < set(wider.candidate_robots)
    assert len(wider.candidate_robots) == len(wider.control_robots) == 2  # 25 % of ten, rounded down
    assert (promoted.stable, promoted.candidate, promoted.candidate_robots) == (CANDIDATE, None, ())
    assert [state.sequence for state in fleet.channel.states] == [1, 2, 3, 4]
    assert promoted.policy_of("r05") == CANDIDATE


@pytest.mark.parametrize("robots", [2, 3, 5])
def test_a_small_fleet_has_one_canary_and_skips_the_stage_that_is_no_larger(robots: int) -> None:
    fleet = Fleet(QUICK, robots=[f"r{number}" for number in range(robots)])
    fleet.begin()
    assert [action for action in run_to_the_end(fleet) if action is not Action.HOLD] == [Action.PROMOTE]


def test_one_robot_is_no_fleet_to_try_anything_on() -> None:
    with pytest.raises(RunError, match="as many robots to compare with"):
        Fleet(robots=["r0"]).begin()


def test_the_offline_gate_keeps_a_candidate_from_every_robot() -> None:
    fleet = Fleet()
    with pytest.raises(PolicyRefused, match="stays in the lab: not finite at step 200"):
        fleet.canary.begin(CANDIDATE, lambda _: "not finite at step 200")
    assert len(fleet.channel.states) == 1


def rolled_back(fleet: Fleet, *, immediate: bool, why: str) -> ChannelState:
    decision = fleet.canary.step()
    assert decision is not None
    assert (decision.action, decision.immediate) == (Action.ROLL_BACK, immediate), decision.why
    assert why in decision.why
    state = fleet.state
    assert (state.stable, state.candidate, state.immediate) == (STABLE, None, immediate)
    assert why in state.banned[CANDIDATE.manifest_hash]
    with pytest.raises(PolicyRefused, match="banned"):
        fleet.canary.begin(CANDIDATE, lambda _: "")
    return state


def test_a_single_number_that_is_not_finite_ends_it_at_once_without_waiting_for_the_other_arm() -> None:
    fleet = Fleet()
    state = fleet.begin()
    fleet.episodes.add(state.candidate_robots[0], 7, safety=SafetyCounts(nonfinite=1))
    rolled_back(fleet, immediate=True, why="not finite")


def test_one_safety_stop_is_borne_and_the_second_ends_it_at_once() -> None:
    fleet = Fleet()
    canary = fleet.begin().candidate_robots[0]
    fleet.episodes.add(canary, 7, success=None, safety=SafetyCounts(stops=1))
    decision = fleet.canary.step()
    assert decision is not None
    assert decision.action is Action.HOLD
    fleet.episodes.add(canary, 7, success=None, safety=SafetyCounts(stops=1))
    rolled_back(fleet, immediate=True, why="2 safety stops")


def test_stops_of_the_stable_policy_and_of_episodes_before_the_swap_blame_nobody() -> None:
    fleet = Fleet()
    state = fleet.begin()
    fleet.episodes.add(state.candidate_robots[0], 3, safety=SafetyCounts(stops=5, nonfinite=1))
    fleet.episodes.add(state.control_robots[0], 3, safety=SafetyCounts(stops=5, nonfinite=1))
    decision = fleet.canary.step()
    assert decision is not None
    assert decision.action is Action.HOLD


@pytest.mark.parametrize(
    ("candidate", "control", "immediate", "why"),
    [
        ({"safety": SafetyCounts(clamped=16)}, {"safety": SafetyCounts(clamped=1)}, True, "clamped"),
        ({"safety": SafetyCounts(late=1)}, {}, False, "deadline"),
        ({"intervened": True}, {}, False, "took over"),
        ({"success": False}, {}, False, "worse"),
    ],
)
def test_what_is_clearly_over_a_limit_is_rolled_back(
    candidate: dict[str, object], control: dict[str, object], immediate: bool, why: str
) -> None:
    fleet = Fleet()
    fleet.begin()
    fleet.act(60, candidate=candidate, **control)
    rolled_back(fleet, immediate=immediate, why=why)


@pytest.mark.parametrize(
    ("candidate", "control"),
    [
        ({"safety": SafetyCounts(clamped=3)}, {"safety": SafetyCounts(clamped=1)}),  # three times as many, not more
        ({"intervened": True, "success": False}, {"intervened": True, "success": False}),
        ({"success": False}, {"success": False}),
        ({"safety": SafetyCounts(late=1), "steps": 500}, {}),  # 1 of 100 inferences
    ],
)
def test_what_is_exactly_at_a_limit_is_not_rolled_back(
    candidate: dict[str, object], control: dict[str, object]
) -> None:
    fleet = Fleet()
    fleet.begin()
    for _ in range(30):
        fleet.act(20, candidate=candidate, **control)
        decision = fleet.canary.step()
        assert decision is None or decision.action is not Action.ROLL_BACK


def test_nothing_is_judged_before_both_arms_have_sent_something() -> None:
    fleet = Fleet()
    state = fleet.begin()
    fleet.episodes.add(state.candidate_robots[0], 7, 200)
    for _ in range(3):
        decision = fleet.canary.step()
        assert decision is not None
        assert decision.action is Action.HOLD
    assert fleet.state == state


def test_a_silent_robot_blocks_and_then_ends_the_trial_without_a_ban() -> None:
    fleet = Fleet(QUICK)
    state = fleet.begin()
    fleet.clock.advance(QUICK.patience_s - 1)
    fleet.episodes.add(state.control_robots[0], 3, 100, end_utc_ns=fleet.clock.utc_ns())
    decision = fleet.canary.step()
    assert decision is not None
    assert decision.action is Action.HOLD
    fleet.clock.advance(2)
    decision = fleet.canary.step()
    assert decision is not None
    assert (decision.action, decision.missing) == (Action.WITHDRAW, state.candidate_robots)
    assert fleet.state.candidate is None
    assert not fleet.state.banned
    fleet.canary.begin(CANDIDATE, lambda _: "")  # it may be tried again


def test_episodes_without_safety_counts_are_no_data() -> None:
    fleet = Fleet(QUICK)
    state = fleet.begin()
    fleet.act(300, candidate={"safety": None})
    decision = fleet.canary.step()
    assert decision is not None
    assert (decision.action, decision.missing) == (Action.HOLD, state.candidate_robots)
    assert "do not say what the safety gate did" in decision.why


def test_a_task_that_nobody_works_on_blocks_the_promotion() -> None:
    fleet = Fleet(QUICK)
    fleet.begin()
    fleet.act(300, candidate={"task": TASKS[0]}, task=TASKS[0])
    decision = fleet.canary.step()
    assert decision is not None
    assert decision.action is Action.HOLD
    assert decision.why.startswith(f"{TASKS[1]}: 0 of 3 pairs")


def test_a_trial_without_a_verdict_ends_some_time() -> None:
    fleet = Fleet(CanarySettings(min_pairs=1, max_pairs=4, shares=(0.1,)))
    fleet.begin()
    fleet.act(8)
    decision = fleet.canary.step()
    assert decision is not None
    assert (decision.action, decision.why) == (Action.WITHDRAW, "undecided after 4 pairs per task")


def test_only_episodes_since_the_trial_began_are_compared() -> None:
    fleet = Fleet()
    for robot in fleet.robots:
        fleet.episodes.add(robot, 3, 50, success=False)
    fleet.begin()
    fleet.act(4)
    comparison = fleet.canary.comparison()
    assert comparison is not None
    assert (comparison.control.episodes, comparison.control.successes) == (4, 4)


def test_a_controller_that_starts_anew_before_every_step_does_the_same() -> None:
    whole, broken = Fleet(QUICK), Fleet(QUICK)
    for fleet in (whole, broken):
        fleet.begin()
    assert run_to_the_end(whole) == run_to_the_end(broken, restart=True)
    assert [state.sequence for state in whole.channel.states] == [state.sequence for state in broken.channel.states]
    assert whole.state.stable == broken.state.stable == CANDIDATE


def test_a_restart_between_a_wider_stage_and_its_record_keeps_what_was_shown() -> None:
    fleet = Fleet(QUICK)
    fleet.begin()
    while len(fleet.state.candidate_robots) == 1:
        fleet.act(1)
        fleet.canary.step()
    before = fleet.canary.comparison()
    assert before is not None
    fresh = fleet.controller().comparison()
    assert fresh is not None
    assert fresh.success.state_dict() == before.success.state_dict()
    assert sum(fresh.success.pairs.values()) >= 6
    assert fresh.stage_pairs("push") == 0


def test_of_two_controllers_one_publishes_and_the_other_looks_again() -> None:
    fleet = Fleet()
    state = fleet.begin()
    first, second = fleet.controller(), fleet.controller()
    fleet.episodes.add(state.candidate_robots[0], 7, safety=SafetyCounts(nonfinite=1))
    stale = fleet.channel.newest()
    first.step()
    newest, fleet.channel.newest = fleet.channel.newest, lambda: stale  # type: ignore[method-assign]
    decision = second.step()
    fleet.channel.newest = newest  # type: ignore[method-assign]
    assert decision is not None
    assert (decision.action, decision.why) == (Action.HOLD, "state 3 is taken")
    assert second.step() is None
    assert len(fleet.channel.states) == 3


def test_beginning_again_changes_nothing_and_another_candidate_has_to_wait() -> None:
    fleet = Fleet()
    state = fleet.begin()
    assert fleet.canary.begin(CANDIDATE, lambda _: "never asked") == state
    with pytest.raises(RunError, match="policy 7 is on trial"):
        fleet.canary.begin(OTHER, lambda _: "")
    with pytest.raises(PolicyRefused, match="run already"):
        Fleet().canary.begin(STABLE, lambda _: "")


def test_a_state_is_renewed_at_half_of_its_life_and_the_trial_goes_on() -> None:
    fleet = Fleet(CanarySettings(min_pairs=3, lifetime_s=7200, patience_s=36000))
    state = fleet.begin()
    fleet.act(5)
    fleet.canary.step()
    fleet.clock.advance(3599)
    fleet.canary.step()
    assert fleet.state == state
    fleet.clock.advance(2)
    fleet.canary.step()
    assert fleet.state.sequence == state.sequence + 1
    assert fleet.state.candidate_robots == state.candidate_robots
    assert fleet.state.expires_utc_ns > state.expires_utc_ns
    comparison = fleet.canary.comparison()
    assert comparison is not None
    assert comparison.candidate.episodes == 5


def test_a_damaged_record_is_named() -> None:
    fleet = Fleet()
    fleet.begin()
    fleet.store.tamper("channels/canary/00000002.json", b"{}")
    with pytest.raises(InvalidRecord, match="channels/canary/00000002"):
        fleet.controller().step()


def test_a_person_rolls_back_what_was_promoted_and_it_never_comes_back() -> None:
    fleet = Fleet()
    fleet.canary.promote(CANDIDATE, "because")
    state = fleet.canary.roll_back("drops cups", immediate=True)
    assert (state.stable, state.immediate) == (STABLE, True)
    assert state.banned == {CANDIDATE.manifest_hash: "drops cups"}
    with pytest.raises(PolicyRefused, match="drops cups"):
        fleet.canary.promote(CANDIDATE, "again")
    with pytest.raises(RunError, match="no policy before 3"):
        fleet.canary.roll_back("and again", immediate=False)


def test_a_person_ends_a_trial() -> None:
    fleet = Fleet()
    fleet.begin()
    state = fleet.canary.roll_back("looks odd", immediate=False)
    assert (state.stable, state.candidate) == (STABLE, None)
    assert list(state.banned) == [CANDIDATE.manifest_hash]


def test_a_ban_of_another_policy_leaves_a_trial_alone_and_is_idempotent() -> None:
    fleet = Fleet()
    begun = fleet.begin()
    state = fleet.canary.ban(OTHER, "trained on the wrong data")
    assert (state.candidate, state.candidate_robots) == (CANDIDATE, begun.candidate_robots)
    assert fleet.canary.ban(OTHER, "again") == state
    assert fleet.canary.ban(CANDIDATE, "this one, too").immediate
    assert fleet.state.candidate is None


def test_nothing_is_done_on_a_channel_without_a_state_or_a_trial() -> None:
    fleet = Fleet()
    assert fleet.canary.step() is None
    fleet.channel.states.clear()
    assert fleet.canary.step() is None
    for order in (lambda: fleet.canary.roll_back("x", immediate=False), lambda: fleet.canary.ban(OTHER, "x")):
        with pytest.raises(RunError, match="nothing is promoted yet"):
            order()
