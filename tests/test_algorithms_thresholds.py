"""Where an advantage begins to be positive: per task and buffer, exactly the part of the steps that is asked for."""

import json
from itertools import product

import numpy as np
import pytest

from sop.algorithms.thresholds import PositiveFraction, Threshold, threshold_for
from sop.core.experience import Source

ON, OFF = Source.ONLINE, Source.OFFLINE


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def fractions(**changes: float) -> PositiveFraction:
    return PositiveFraction({OFF: 0.3, ON: 0.4}, **{"window": 100, "least": 1, **changes})


@pytest.mark.parametrize(("count", "fraction"), list(product((1, 2, 5, 10, 101), (0.1, 0.3, 0.4, 0.5, 0.9))))
def test_the_fraction_is_hit_exactly_when_all_values_differ(count: int, fraction: float) -> None:
    numbers = np.random.default_rng(count).permutation(np.arange(count)).astype(np.float32)
    found = threshold_for(numbers, fraction)
    assert int((numbers > np.float32(found.value)).sum()) == int(fraction * count + 0.5)


def test_a_threshold_by_hand() -> None:
    found = threshold_for(values(0.5, -1.0, 0.25, 2.0, 0.0), 0.4)
    assert found.value == 0.25  # 0.5 and 2.0 are above: two of five
    assert found.spread == pytest.approx(np.std([0.5, -1.0, 0.25, 2.0, 0.0]))


def test_equal_values_are_not_above_their_threshold() -> None:
    found = threshold_for(values(1, 1, 1, 1), 0.5)
    assert found == Threshold(1.0, 1e-6)
    assert threshold_for(values(1, 1, 1, 2), 0.5).value == 1.0  # one of four instead of two


def test_no_values_have_no_threshold() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        threshold_for(values(), 0.4)


def test_every_task_and_buffer_has_a_threshold_of_its_own() -> None:
    thresholds = fractions()
    thresholds.add("easy", ON, np.arange(10, dtype=np.float32))
    thresholds.add("hard", ON, np.arange(10, dtype=np.float32) - 100)
    thresholds.add("easy", OFF, np.arange(10, dtype=np.float32) + 50)
    assert thresholds.get("easy", ON) is None  # nothing before `apply`
    assert thresholds.apply()
    found = {key: thresholds.get(*key) for key in [("easy", ON), ("hard", ON), ("easy", OFF), ("hard", OFF)]}
    assert {key: one and one.value for key, one in found.items()} == {
        ("easy", ON): 5.0, ("hard", ON): -95.0, ("easy", OFF): 56.0, ("hard", OFF): None,
    }  # fmt: skip
    assert thresholds.metrics("rule") == {
        "rule/threshold/easy": 5.0, "rule/positive_share/easy": 0.4,
        "rule/threshold/hard": -95.0, "rule/positive_share/hard": 0.4,
        "rule/offline_threshold/easy": 56.0, "rule/offline_positive_share/easy": 0.3,
    }  # fmt: skip


def test_steps_without_an_advantage_do_not_count() -> None:
    thresholds = fractions(least=2)
    thresholds.add("push", ON, values(np.nan, 3.0, np.nan))
    assert not thresholds.apply()  # one value, two are needed
    thresholds.add("push", ON, values(np.nan))
    thresholds.add("push", ON, values(1.0))
    assert thresholds.apply()
    assert thresholds.get("push", ON) == Threshold(1.0, 1.0)


def test_the_window_forgets_the_oldest_values() -> None:
    thresholds = fractions(window=4)
    thresholds.add("push", ON, values(9, 9, 9))
    thresholds.add("push", ON, values(0, 1, 2))
    assert thresholds.apply()
    assert thresholds.get("push", ON) == threshold_for(values(9, 0, 1, 2), 0.4)
    thresholds.add("push", ON, np.arange(100, dtype=np.float32))  # more than the window at once
    assert thresholds.apply()
    assert thresholds.get("push", ON) == threshold_for(values(96, 97, 98, 99), 0.4)


def test_a_threshold_moves_only_by_more_than_the_tolerance() -> None:
    thresholds = fractions(tolerance=0.5)
    thresholds.add("push", ON, np.arange(10, dtype=np.float32))
    assert thresholds.apply()
    assert thresholds.generation == 1
    assert not thresholds.apply()  # nothing new
    thresholds.add("push", ON, values(4.5))
    assert not thresholds.apply()  # 5.0 -> 4.5 (4 of 11 above 5), the spread is about 3
    assert thresholds.get("push", ON) == threshold_for(np.arange(10, dtype=np.float32), 0.4)
    thresholds.add("push", ON, np.full(20, 30.0, np.float32))
    assert thresholds.apply()
    assert thresholds.generation == 2
    moved = thresholds.get("push", ON)
    assert moved is not None
    assert moved.value == 30.0


def test_a_new_task_is_a_new_generation_and_leaves_the_others_alone() -> None:
    thresholds = fractions()
    thresholds.add("push", ON, np.arange(10, dtype=np.float32))
    thresholds.apply()
    before = thresholds.get("push", ON)
    thresholds.add("pull", ON, values(7.0))
    assert thresholds.apply()
    assert (thresholds.generation, thresholds.get("push", ON)) == (2, before)


@pytest.mark.parametrize("source", [ON, OFF])
def test_after_a_restart_a_threshold_is_made_from_enough_new_values_or_unknown(source: Source) -> None:
    thresholds = fractions(least=2)
    for task in ("push", "pull"):
        thresholds.add(task, source, np.arange(10, dtype=np.float32))
    thresholds.apply()
    old = thresholds.get("pull", source)
    thresholds.restart()
    thresholds.add("push", source, values(-3.0, -3.0))
    thresholds.add("pull", source, values(-3.0))  # two are needed
    assert thresholds.get("pull", source) == old is not None  # nothing before `apply`
    restored = fractions(least=2)
    restored.load_state_dict(thresholds.state_dict())
    for each in (thresholds, restored):
        assert each.apply()
        assert (each.generation, each.get("push", source)) == (2, Threshold(-3.0, 1e-6))
        assert each.get("pull", source) is None
        assert not each.apply()
        each.add("pull", source, values(-5.0))
        assert each.apply()
        assert each.get("pull", source) == threshold_for(values(-3.0, -5.0), 0.4)
    assert json.dumps(restored.state_dict()["thresholds"]) == json.dumps(thresholds.state_dict()["thresholds"])


def test_a_restart_alone_leaves_nothing_known() -> None:
    thresholds = fractions()
    thresholds.add("push", ON, np.arange(10, dtype=np.float32))
    thresholds.apply()
    thresholds.restart()
    assert thresholds.apply()
    assert (thresholds.generation, thresholds.get("push", ON), thresholds.metrics("rule")) == (2, None, {})


def test_a_restored_state_goes_on_like_the_original() -> None:
    thresholds = fractions(window=6, tolerance=0.0)
    thresholds.add("push", ON, np.arange(9, dtype=np.float32))
    thresholds.apply()
    thresholds.add("push", ON, values(0.125, 0.25))  # not applied yet
    thresholds.add("pull", OFF, values(1.0))
    state = thresholds.state_dict()
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    assert sorted(arrays) == ["threshold/0000", "threshold/0001"]
    assert arrays["threshold/0001"].tolist() == [5, 6, 7, 8, 0.125, 0.25]  # oldest first
    rest = json.loads(json.dumps({name: value for name, value in state.items() if name not in arrays}))
    restored = fractions(window=6, tolerance=0.0)
    restored.load_state_dict({**rest, **arrays})
    assert restored.get("push", ON) == thresholds.get("push", ON)
    assert restored.get("pull", OFF) is None
    for both in (thresholds, restored):
        both.add("push", ON, values(5.5))
        assert both.apply()
    assert restored.metrics("x") == thresholds.metrics("x")
    assert restored.generation == thresholds.generation == 2
    assert json.dumps(restored.state_dict()["thresholds"]) == json.dumps(thresholds.state_dict()["thresholds"])
