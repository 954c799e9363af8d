"""Learning rates of their own for parameters that match an expression; for all others nothing changes."""

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sop.config import LearnerConfig
from sop.learner.optimization import Optimization, constant_after_warmup
from sop.presets import make_config

SETTINGS = replace(
    make_config("debug").learner, lr=0.01, weight_decay=0.1, grad_clip=1e9, ema=0.5, lr_multipliers={}, freeze=""
)


class Module(torch.nn.Module):
    """Two layers and a table whose name matches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(3, 4)
        self.indicator = torch.nn.Linear(3, 4)
        self.block = torch.nn.ModuleDict({"indicator": torch.nn.Embedding(3, 4)})
        self.last = torch.nn.Linear(4, 1)

    def forward(self, seen: Tensor) -> Tensor:
        rows = torch.arange(len(seen)) % 3
        hidden = self.first(seen) + self.indicator(seen) + self.block["indicator"](rows)
        out: Tensor = self.last(hidden.tanh()).squeeze(1)
        return out.square()


def seen(step: int) -> Tensor:
    return torch.randn((6, 3), generator=torch.Generator().manual_seed(step))


def optimization(config: LearnerConfig, module: Module | None = None) -> tuple[Module, Optimization]:
    module = Module() if module is None else module
    return module, Optimization(module, config, constant_after_warmup(4))


def trained(multipliers: Mapping[str, float], steps: int = 3, lr_factor: float = 1.0) -> dict[str, Tensor]:
    module, learning = optimization(replace(SETTINGS, lr_multipliers=multipliers))
    for step in range(steps):
        learning.step(module(seen(step)), lr_factor)
    return {name: tensor.clone() for name, tensor in learning.tensors().items()}


def by_hand(factors: Mapping[str, float], steps: int = 3, lr_factor: float = 1.0) -> dict[str, Tensor]:
    """One `AdamW` per parameter: what matches has its factor and no weight decay, all have schedule and factor."""
    module = Module()
    optimizers = []
    for name, parameter in module.named_parameters():
        own = factors.get(name)
        decay = SETTINGS.weight_decay if own is None else 0.0
        optimizers.append((torch.optim.AdamW([parameter], weight_decay=decay, fused=True), 1.0 if own is None else own))
    for step in range(steps):
        module.zero_grad()
        module(seen(step)).mean().backward()
        for optimizer, factor in optimizers:
            optimizer.param_groups[0]["lr"] = SETTINGS.lr * (step + 1) / 4 * lr_factor * factor
            optimizer.step()
    return {f"module/{name}": parameter.detach() for name, parameter in module.named_parameters()}


def test_matched_parameters_have_their_factor_and_no_weight_decay() -> None:
    after = trained({r"\.indicator": 10.0}, lr_factor=0.5)
    expected = by_hand({"block.indicator.weight": 10.0}, lr_factor=0.5)
    assert "module/indicator.weight" in expected  # has no dot before it: not matched
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)


def test_the_first_expression_that_matches_counts() -> None:
    after = trained({r"^first\.bias": 0.0, r"^first|\.indicator": 3.0, "first": 100.0})
    factors = {"first.bias": 0.0, "first.weight": 3.0, "block.indicator.weight": 3.0}
    for name, value in by_hand(factors).items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)
    assert torch.equal(after["module/first.bias"], Module().first.bias)


def test_expressions_that_match_nothing_change_no_bit() -> None:
    plain = trained({})
    for multipliers in ({"nothing": 10.0}, {r"\.indicators": 0.0, "^last$": 2.0}):
        other = trained(multipliers)
        assert list(other) == list(plain)
        assert all(torch.equal(other[name], plain[name]) for name in plain)


def test_parameters_that_match_nothing_move_as_ever_at_the_first_step() -> None:
    """All in one group or not: the same bits. Later steps differ because the gradient does."""
    plain, other = trained({}, steps=1), trained({r"\.indicator": 10.0}, steps=1)
    changed = {name for name in plain if not torch.equal(plain[name], other[name])}
    assert changed == {"module/block.indicator.weight", "average/block.indicator.weight"}


def test_everything_may_match() -> None:
    after = trained({"": 2.0})
    for name, value in by_hand({name: 2.0 for name, _ in Module().named_parameters()}).items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_that_match_are_not_trained() -> None:
    module = Module()
    module.block["indicator"].requires_grad_(False)
    before = module.block["indicator"].weight.clone()
    module, learning = optimization(replace(SETTINGS, lr_multipliers={r"\.indicator": 10.0}), module)
    learning.step(module(seen(0)))
    assert torch.equal(module.block["indicator"].weight, before)
    assert not any(name.startswith("optimizer/") and "block" in name for name in learning.tensors())


def test_a_restored_state_goes_on_to_the_bit() -> None:
    config = replace(SETTINGS, lr_multipliers={r"\.indicator": 10.0, "last": 0.1})
    module, learning = optimization(config)
    for step in range(3):
        learning.step(module(seen(step)))
    tensors = {name: tensor.clone() for name, tensor in learning.tensors().items()}
    other, restored = optimization(config)
    restored.load_state(tensors, learning.state_dict())
    for step in range(3, 6):
        learning.step(module(seen(step)), 0.5)
        restored.step(other(seen(step)), 0.5)
    ours, theirs = learning.tensors(), restored.tensors()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ({"ok": 1.0, "(": 2.0}, "lr_multipliers: '(' is not a regular expression"),
        ({"last": -1.0}, "lr_multipliers: the factor of 'last' must be 0 or more, got -1.0"),
        ({"last": float("nan")}, "lr_multipliers: the factor of 'last' must be 0 or more, got nan"),
    ],
)
def test_a_multiplier_that_cannot_be_meant_is_named(multipliers: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        optimization(replace(SETTINGS, lr_multipliers=multipliers))
