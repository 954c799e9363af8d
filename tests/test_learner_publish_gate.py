"""The learner's gate: every check at its boundary, what is remembered, and when the run ends."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from sop.core.errors import RunError
from sop.core.policy import PolicySpec
from sop.learner.publish_gate import GOLDEN_OBSERVATIONS, PublishGate, PublishGateSettings
from sop.testing.episodes import TOY_BODY

SPEC = PolicySpec(kind="x", config={}, embodiment=TOY_BODY, action_horizon=4, execution_horizon=2)


def weights(value: float, **others: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    return {"w": np.full(100, value, np.float32), "steps": np.asarray([3]), **others}


def constant(value: float = 0.0) -> Callable[[object], npt.NDArray[np.float32]]:
    return lambda _: np.full((GOLDEN_OBSERVATIONS, 4, 2), value, np.float32)


def gate(infer: Callable[[Any], npt.NDArray[np.float32]] = constant(), **settings: Any) -> PublishGate:  # noqa: B008
    made = PublishGate(PublishGateSettings(**settings), SPEC, infer, now=lambda: 0.0)
    made.start_from(weights(0))
    return made


def test_a_good_version_passes_with_its_measures() -> None:
    verdict = gate().check(weights(0.1))
    assert verdict.ok
    assert verdict.measures["update_norm"] == pytest.approx(1.0)
    assert verdict.measures["action_change"] == 0
    assert "update_ratio" not in verdict.measures


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_single_weight_that_is_not_finite_is_refused_and_named(bad: float, dtype: Any) -> None:
    spoiled = np.zeros(1 << 19, dtype)
    spoiled[-1] = bad
    verdict = gate().check(weights(0.1, head=spoiled))
    assert verdict.reasons == ("head is not finite",)


def test_an_update_of_five_times_the_median_passes_and_a_larger_one_does_not() -> None:
    judged = gate()
    value = 0.0
    for step in (0.1, 0.1, 0.1, 0.3, 0.01):
        value += step
        assert judged.check(weights(value)).ok
    assert judged.check(weights(value + 0.499)).ok
    value += 0.499
    verdict = judged.check(weights(value + 0.51))
    assert verdict.reasons[0].startswith("the update is 5.1 times as large as usual")
    assert judged.check(weights(value + 0.1)).ok  # the refused one was never the last


def test_before_five_updates_their_size_is_not_judged() -> None:
    judged = gate()
    for value in (0.1, 0.2, 0.3, 0.4):
        assert judged.check(weights(value)).ok
    assert judged.check(weights(100)).ok


def test_tensors_that_do_not_travel_are_unchanged() -> None:
    seen = []
    judged = PublishGate(PublishGateSettings(), SPEC, lambda given: (seen.append(set(given)), constant()(given))[1])
    judged.start_from(weights(0, frozen=np.ones(3, np.float32)))
    verdict = judged.check({"w": weights(0.1)["w"]})
    assert verdict.measures["update_norm"] == pytest.approx(1.0)
    assert seen[-1] == {"w", "steps", "frozen"}


def test_actions_may_change_by_three_tenths_of_half_the_range_and_no_more() -> None:
    answers = iter([constant(value)(None) for value in (0.0, 0.299, 0.61)])
    judged = gate(lambda _: next(answers))
    assert judged.check(weights(0.1)).ok
    assert judged.check(weights(0.2)).reasons[0].startswith("actions change by 0.31 of half the range")


def test_actions_that_are_not_finite_or_far_outside_are_refused() -> None:
    wild = constant()(None)
    wild[7, 3, 1] = np.nan
    values = iter([constant()(None), wild])
    assert gate(lambda _: next(values)).check(weights(0.1)).reasons == (
        "its action is not finite on golden observation 7",
    )
    edge, over = constant()(None), constant()(None)
    edge.reshape(-1, 2)[:12, 0] = 9.0  # 12 of 256 are 4.7 %
    over.reshape(-1, 2)[:13, 0] = -9.0
    for actions, good in ((edge, True), (over, False)):
        values = iter([actions, actions])
        assert gate(lambda _, values=values: next(values)).check(weights(0.1)).ok is good


def test_inference_has_half_of_the_time_that_its_steps_take() -> None:
    for seconds, good in ((64 * 0.1, True), (64 * 0.101, False)):
        times = iter([0.0, seconds])
        judged = PublishGate(PublishGateSettings(), SPEC, constant(), now=lambda times=times: next(times))
        judged.start_from(weights(0))
        verdict = judged.check(weights(0.1))
        assert verdict.ok is good, verdict.reasons


def test_refusals_in_a_row_end_the_run_and_a_good_version_forgives() -> None:
    judged, bad = gate(max_refusals=3), weights(np.nan)
    assert not judged.check(bad).ok
    assert not judged.check(bad).ok
    assert judged.check(weights(0.1)).ok
    assert not judged.check(bad).ok
    assert not judged.check(bad).ok
    with pytest.raises(RunError, match=r"3 versions in a row were refused.*w is not finite.*earlier checkpoint"):
        judged.check(bad)


def test_the_state_goes_with_a_checkpoint() -> None:
    first, second = gate(max_refusals=2), gate(max_refusals=2)
    for value in (0.1, 0.2, 0.3, 0.4, 0.5):
        first.check(weights(value))
    first.check(weights(np.nan))
    second.load_state_dict(first.state_dict())
    second.start_from(weights(0.5))
    assert second.state_dict() == first.state_dict()
    with pytest.raises(RunError, match="2 versions in a row"):
        second.check(weights(9.0))
    for state in ({}, {"norms": ["x"], "refusals": 0}, {"norms": []}):
        with pytest.raises(ValueError, match="publish gate"):
            second.load_state_dict(state)


@pytest.mark.parametrize("name", ["update_factor", "action_change", "time_share", "window", "max_refusals"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"publish_gate.{name}"):
        PublishGateSettings(**{name: 0})
