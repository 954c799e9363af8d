"""A policy with other settings around the same weights: how a base learns to hear an indicator."""

import dataclasses

import msgspec
import numpy as np
import pytest

from sop.core.errors import PolicyRefused
from sop.core.policy import PolicySpec
from sop.policies import conditioned, make_policy
from sop.testing.contracts.policy import sample_batch
from test_policies_contract import tiny_policy
from test_policies_indicator import TABLES, TEMPLATE, asked, base_policy, generator, losses, plan, with_tables_set


def test_a_base_that_never_saw_an_indicator_keeps_its_weights_and_version() -> None:
    base = base_policy()
    policy = conditioned(base, {"indicator": "embed", "indicator_dropout": 0.5}, seed=3)
    assert policy.version == base.version == 7
    assert policy.spec == dataclasses.replace(
        base.spec, config={**base.spec.config, "indicator": "embed", "indicator_dropout": 0.5}
    )
    before, after = base.export(), policy.export()
    assert set(after) - set(before) == set(TABLES)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    policy.load({name: array + 1 for name, array in after.items()}, 8)
    assert all(np.array_equal(array, before[name]) for name, array in base.export().items())


def test_a_base_that_was_tuned_with_an_indicator_keeps_its_tables() -> None:
    base = with_tables_set(base_policy(indicator="embed"))
    policy = conditioned(base, {"indicator": "embed"}, seed=3)
    assert policy is not base
    before, after = base.export(), policy.export()
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert np.array_equal(plan(policy, asked(True, 2.0)), plan(base, asked(True, 2.0)))


def test_an_indicator_can_be_taken_away_and_its_tables_stay_behind() -> None:
    base = base_policy()
    policy = with_tables_set(conditioned(base, {"indicator": "embed"}, seed=0))
    assert np.array_equal(
        plan(conditioned(policy, {"indicator": "none"}, seed=0), asked(None)), plan(base, asked(None))
    )


def test_the_null_branch_of_text_is_the_base_to_the_bit() -> None:
    base = base_policy()
    policy = conditioned(base, {"indicator": "text"}, seed=0)
    assert np.array_equal(plan(policy, asked(None)), plan(base, asked(None)))
    assert np.array_equal(losses(policy, [0, 0, 0, 0]).detach(), losses(base, None).detach())


def test_without_changes_it_is_the_policy_itself() -> None:
    policy = tiny_policy()
    assert conditioned(policy, {}, seed=0) is policy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indicatr": "embed"}, "policy flow_vla: no setting is called 'indicatr'. Did you mean 'indicator'"),
        ({"indicator": "words"}, "policy flow_vla: .*words"),
        ({"width": 32}, r"with \{'width': 32\} .* would have shape .* keep the shapes"),
        ({"action_horizon": 5}, "action_horizon is 5 in the settings and 4 in the spec"),
    ],
)
def test_changes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditioned(tiny_policy(), changes, seed=0)


def test_tables_travel_as_named_arrays_and_the_template_with_the_spec() -> None:
    policy = with_tables_set(base_policy(indicator="embed"))
    assert policy.spec.config["indicator_text"] == TEMPLATE
    travelled = msgspec.json.decode(msgspec.json.encode(policy.spec), type=PolicySpec)
    copied = make_policy(travelled, seed=5)
    copied.load(policy.export(), 8)
    for conditioning in (asked(None), asked(True), asked(False), asked(True, 2.0)):
        assert np.array_equal(plan(copied, conditioning), plan(policy, conditioning))
    ours = policy.branch_velocities(sample_batch(policy.spec), generator())
    theirs = copied.branch_velocities(sample_batch(policy.spec), generator())
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    with pytest.raises(PolicyRefused, match="3 tensors are unknown"):
        tiny_policy().load(policy.export(), 8)
    with pytest.raises(PolicyRefused, match="3 tensors are missing"):
        copied.load(tiny_policy().export(), 9)


def test_a_spec_from_before_there_was_an_indicator_makes_a_policy_without_one() -> None:
    spec = tiny_policy().spec
    config = {name: value for name, value in spec.config.items() if not name.startswith("indicator")}
    assert len(config) == len(spec.config) - 3
    old = make_policy(dataclasses.replace(spec, config=config), seed=1)
    assert all(np.array_equal(array, old.export()[name]) for name, array in tiny_policy().export().items())
    heard = conditioned(old, {"indicator": "embed"}, seed=1)
    assert set(heard.spec.config) == set(spec.config)
