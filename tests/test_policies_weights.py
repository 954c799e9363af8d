"""Freezing, normalisation, precision and export."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sop.policies import compute_normalization, freeze, make_policy
from sop.policies.precision import cpu_computes_bfloat16, training_dtype
from sop.testing.contracts.policy import sample_batch
from test_policies_contract import tiny_policy


def test_frozen_parameters_are_exactly_those_that_match_and_do_not_move() -> None:
    policy = tiny_policy()
    names = [name for name, _ in policy.module.named_parameters()]
    frozen = freeze(policy.module, r"^backbone\.")
    assert frozen == tuple(name for name in names if name.startswith("backbone."))
    before = policy.export()
    trained = [parameter for parameter in policy.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        policy.loss(sample_batch(policy.spec), torch.Generator().manual_seed(0)).mean().backward()
        optimizer.step()
    after = policy.export()
    assert {name for name in names if np.array_equal(before[name], after[name])} == set(frozen)


def test_freezing_again_replaces_the_first_choice_and_nothing_is_frozen_by_an_empty_pattern() -> None:
    module = tiny_policy().module
    freeze(module, "expert")
    assert all(name.startswith("vision.camera_wrist_left.") for name in freeze(module, "wrist"))
    assert freeze(module, "") == ()
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("lm_head", "no parameter matches 'lm_head'"), (".", "nothing is left"), ("(", "not a regular expression")],
)
def test_a_pattern_that_cannot_be_meant_is_refused_and_changes_nothing(pattern: str, message: str) -> None:
    module = tiny_policy().module
    with pytest.raises(ValueError, match=message):
        freeze(module, pattern)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_moving_average_can_be_exported_and_other_names_cannot() -> None:
    policy = tiny_policy()
    average = {name: tensor + 1 for name, tensor in policy.module.state_dict().items()}
    exported = policy.export(average)
    assert all(np.array_equal(exported[name], average[name].numpy()) for name in average)
    with pytest.raises(ValueError, match=r"1 tensors are unknown, e\.g\. surplus"):
        policy.export(average | {"surplus": torch.zeros(1)})


def test_statistics_are_those_of_all_steps_and_constant_elements_keep_their_unit() -> None:
    states = [np.array([[0.0, 7.0], [2.0, 7.0]], np.float32), np.array([[4.0, 7.0]], np.float32)]
    actions = [np.array([[1.0], [1.0]], np.float32), np.array([[-2.0]], np.float32)]
    statistics = compute_normalization(states, actions)
    assert statistics["state_mean"] == (2.0, 7.0)
    assert statistics["state_std"] == pytest.approx((np.sqrt(8 / 3), 1.0))
    assert statistics["action_mean"] == (0.0,)
    assert statistics["action_std"] == pytest.approx((np.sqrt(2.0),))


def test_statistics_of_nothing_or_of_what_is_not_finite_are_refused() -> None:
    good = [np.zeros((2, 1), np.float32)]
    with pytest.raises(ValueError, match="there are no actions"):
        compute_normalization(good, [])
    with pytest.raises(ValueError, match="the states hold values that are not finite"):
        compute_normalization([np.full((2, 1), np.nan, np.float32)], good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_mean": (0.0, 0.0)}, "state_mean needs 3 values for tiny, got 2"),
        ({"action_std": (1.0, 0.0)}, "action_std must be finite and, for std, positive"),
        ({"action_mean": None}, "action_mean is missing"),
    ],
)
def test_statistics_that_do_not_fit_the_robot_are_refused(
    change: dict[str, tuple[float, ...] | None], message: str
) -> None:
    spec = tiny_policy().spec
    normalization = {k: v for k, v in (dict(spec.normalization) | change).items() if v is not None}
    object.__setattr__(spec, "normalization", normalization)
    with pytest.raises(ValueError, match=message):
        make_policy(spec)


def test_bfloat16_is_taken_only_where_the_processor_says_so(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    fast.write_text("processor : 0\nflags : fpu avx2 avx512_bf16 aes\n")
    slow.write_text("processor : 0\nflags : fpu avx2 avx512f aes\nbugs : bf16\n")
    assert cpu_computes_bfloat16(fast)
    assert not cpu_computes_bfloat16(slow)
    assert not cpu_computes_bfloat16(tmp_path / "absent")
    cpu = torch.device("cpu")
    assert training_dtype("bfloat16", cpu) == torch.bfloat16
    assert training_dtype("float32", cpu) == torch.float32
    assert training_dtype("auto", cpu) == (torch.bfloat16 if cpu_computes_bfloat16() else torch.float32)
