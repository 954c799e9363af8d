"""The advantage indicator: nothing changes until it is trained, then every branch is exactly what it says."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sop.core.policy import Conditioning
from sop.policies import TrainablePolicy, conditioned
from sop.policies.flow_vla import FlowVLA
from sop.policies.indicator import NEGATIVE, NULL, POSITIVE, drop_out, indicator_rows, sentences
from sop.policies.network import Inputs
from sop.policies.sentences import HashEncoder
from sop.policies.vision import random_shift
from sop.testing.contracts.policy import INSTRUCTIONS, sample_batch, sample_observations
from test_policies_contract import tiny_policy

TEMPLATE = "{instruction}\nAdvantage: {advantage}"
TABLES = {
    "expert.indicator.weight": (3, 32),
    "expert.layers.0.indicator.weight": (3, 96),
    "expert.layers.1.indicator.weight": (3, 96),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def base_policy(**settings: object) -> TrainablePolicy:
    """Without an indicator and away from its initial weights, as after pretraining."""
    policy = tiny_policy(**settings)
    draws = generator(4)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    policy.load(policy.export(), 7)
    return policy


def with_tables_set(policy: TrainablePolicy) -> TrainablePolicy:
    draws = generator(5)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if ".indicator" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return policy


def asked(indicator: bool | None, guidance: float = 1.0) -> Conditioning:
    return Conditioning(advantage_indicator=indicator, guidance=guidance)


def plan(policy: TrainablePolicy, conditioning: Conditioning, count: int = 3) -> npt.NDArray[np.float32]:
    generators = [np.random.default_rng(seed) for seed in range(count)]
    instructions = [INSTRUCTIONS[row % 2] for row in range(count)]
    return policy.infer_many(sample_observations(policy.spec, count), instructions, conditioning, generators)


def losses(policy: TrainablePolicy, indicator: Sequence[int] | None, seed: int = 0) -> torch.Tensor:
    batch = sample_batch(policy.spec)
    values = None if indicator is None else np.array(indicator, np.int8)
    return policy.loss(dataclasses.replace(batch, advantage_indicator=values), generator(seed))


def test_a_policy_without_an_indicator_has_the_tensors_losses_and_random_numbers_it_always_had() -> None:
    """Numbers of the version before there was an indicator; the last digits of a loss are the processor's."""
    policy = tiny_policy(precision="float32")
    weights = policy.export()
    assert len(weights) == 98
    assert not any("indicator" in name for name in weights)
    assert sum(float(array.sum(dtype=np.float64)) for array in weights.values()) == pytest.approx(75.8941263043, 1e-9)
    draws = generator(11)
    loss = policy.loss(sample_batch(policy.spec), draws).detach()
    assert float(torch.rand(1, generator=draws)) == 0.017945408821105957
    assert loss.tolist() == pytest.approx([1.54885697, 1.65616095, 2.28515673, 2.83099222], rel=1e-5)
    planned = plan(policy, asked(None), 2)[:, 0]
    expected = [[0.24412125, -0.92775571], [0.54233521, -0.94510961]]
    np.testing.assert_allclose(planned, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("indicator", ["embed", "text"])
def test_equal_seeds_give_equal_weights_with_and_without_an_indicator(indicator: str) -> None:
    plain, made = tiny_policy().export(), tiny_policy(indicator=indicator).export()
    tables = {name: made.pop(name) for name in set(made) - set(plain)}
    assert {name: array.shape for name, array in tables.items()} == (TABLES if indicator == "embed" else {})
    assert all(re.search(r"\.indicator", name) and not array.any() for name, array in tables.items())
    assert list(made) == list(plain)
    assert all(np.array_equal(made[name], plain[name]) for name in plain)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_with_new_tables_every_branch_is_the_base_to_the_bit(precision: str) -> None:
    base = base_policy(precision=precision)
    policy = conditioned(base, {"indicator": "embed"}, seed=99)
    expected = plan(base, asked(None))
    for conditioning in (asked(None), asked(True), asked(False), asked(True, 0.0), asked(False, 0.0)):
        assert np.array_equal(plan(policy, conditioning), expected)
    for indicator in ([1, 1, 1, 1], [-1, -1, -1, -1], [0, 0, 0, 0], [1, -1, 0, 1], None):
        assert torch.equal(losses(policy, indicator), losses(base, None))
    null, negative, positive = policy.branch_velocities(sample_batch(policy.spec), generator())
    assert np.array_equal(null, negative)
    assert np.array_equal(null, positive)
    assert np.abs(null).max() > 0.1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_with_new_tables_guidance_changes_nothing(count: int) -> None:
    """Up to the rounding of matrix products with twice the rows."""
    base = base_policy()
    policy = conditioned(base, {"indicator": "embed"}, seed=0)
    for guidance in (0.5, 2.0, -1.0):
        planned = plan(policy, asked(True, guidance), count)
        np.testing.assert_allclose(planned, plan(base, asked(None), count), rtol=0, atol=1e-5)


@pytest.mark.parametrize("indicator", ["embed", "text"])
def test_guidance_0_is_the_null_branch_and_1_the_conditional_one(indicator: str) -> None:
    policy = with_tables_set(conditioned(base_policy(), {"indicator": indicator}, seed=0))
    null, positive, negative = (plan(policy, asked(which)) for which in (None, True, False))
    assert np.array_equal(plan(policy, asked(True, 0.0)), null)
    assert np.array_equal(plan(policy, asked(False, 0.0)), null)
    assert np.array_equal(plan(policy, asked(None, 2.0)), null)
    for one, other in ((null, positive), (null, negative), (positive, negative)):
        assert not np.allclose(one, other, atol=1e-3)
    for limit, branch in ((1e-6, null), (1 - 1e-6, positive)):
        np.testing.assert_allclose(plan(policy, asked(True, limit)), branch, rtol=0, atol=1e-4)


def euler(policy: FlowVLA, wanted: bool, guidance: float, count: int = 3) -> npt.NDArray[np.float64]:
    """The integration written out, one branch at a time, in normalised actions."""
    observations = sample_observations(policy.spec, count)
    settings, network = policy.settings, policy.module
    row = POSITIVE if wanted else NEGATIVE
    word = "positive" if wanted else "negative"
    instructions = [INSTRUCTIONS[index % 2] for index in range(count)]
    said = [f"{instruction}\nAdvantage: {word}" for instruction in instructions]
    mean, std = (np.array(policy.spec.normalization[name], np.float32) for name in ("state_mean", "state_std"))

    def velocity(actions: torch.Tensor, time: float, row: int, text: list[str]) -> torch.Tensor:
        inputs = Inputs(
            images=tuple(
                torch.from_numpy(np.stack([seen.images[camera] for seen in observations]))
                for camera in policy.spec.embodiment.cameras
            ),
            state=torch.from_numpy((np.stack([seen.state for seen in observations]) - mean) / std),
            text=torch.from_numpy(HashEncoder().encode(text)),
        )
        modulations = network.expert.modulations(torch.full((count,), time), torch.full((count,), row))
        return network.expert(actions, modulations, network.read(inputs))

    noise = [np.random.default_rng(seed).standard_normal((4, 2), np.float32) for seed in range(count)]
    actions = torch.from_numpy(np.stack(noise))
    with torch.no_grad():
        for step in range(settings.euler_steps):
            time = step / settings.euler_steps
            null = velocity(actions, time, NULL, instructions)
            other = velocity(actions, time, row, said if settings.indicator == "text" else instructions)
            actions = actions + ((1 - guidance) * null + guidance * other) / settings.euler_steps
    return actions.numpy().astype(np.float64)


@pytest.mark.parametrize("indicator", ["embed", "text"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("wanted", "guidance"), [(True, 2.0), (False, 2.0), (True, 1.0), (True, 0.5)])
def test_guidance_is_applied_to_the_velocity_at_every_step(
    indicator: str, steps: int, wanted: bool, guidance: float
) -> None:
    """At one step and beta 2 the plan is noise + 2 v(indicator) - v(null)."""
    base = base_policy(euler_steps=steps)
    policy = with_tables_set(conditioned(base, {"indicator": indicator}, seed=0))
    assert isinstance(policy, FlowVLA)
    mean, std = (np.array(policy.spec.normalization[name]) for name in ("action_mean", "action_std"))
    expected = (euler(policy, wanted, guidance) * std + mean).clip(-1, 1)
    assert (np.abs(expected) < 1).sum() > 8, "the limits hide the comparison"
    np.testing.assert_allclose(plan(policy, asked(wanted, guidance)), expected, rtol=0, atol=2e-5)


def test_branches_are_the_velocities_that_the_loss_compares_with_the_truth() -> None:
    policy = with_tables_set(tiny_policy(indicator="embed", precision="float32", noise_draws=1, random_shift=0))
    batch = sample_batch(policy.spec)
    draws = generator(3)
    for images in batch.images.values():
        random_shift(images, 0, draws)  # the loss draws its shifts before flow time and noise
    found = policy.branch_velocities(batch, draws.clone_state())
    torch.rand((4, 1), generator=draws)
    noise = torch.randn((4, 1, 4, 2), generator=draws).numpy()[:, 0]
    mean, std = (np.array(policy.spec.normalization[name], np.float32) for name in ("action_mean", "action_std"))
    target = (batch.action - mean) / std - noise
    weight = batch.loss_weight
    for velocity, indicator in zip(found, (0, -1, 1), strict=True):
        by_hand = (((velocity - target) ** 2).mean(axis=2) * weight).sum(axis=1) / weight.sum(axis=1)
        labelled = dataclasses.replace(batch, advantage_indicator=np.full(4, indicator, np.int8))
        undropped = conditioned(policy, {"indicator_dropout": 0.0}, seed=0)
        drawn = undropped.loss(labelled, generator(3)).detach().numpy()
        np.testing.assert_allclose(drawn, by_hand, rtol=1e-5)


def test_a_policy_without_an_indicator_has_no_branches() -> None:
    with pytest.raises(ValueError, match="made without an advantage indicator"):
        tiny_policy().branch_velocities(sample_batch(tiny_policy().spec), generator())


@pytest.mark.parametrize("indicator", [[1, 1, 1, 1], [-1, -1, -1, -1], [0, 0, 0, 0], [1, -1, -1, 1], [0, 1, 0, 1]])
def test_the_gradient_reaches_exactly_the_rows_of_the_branches_in_the_batch(indicator: list[int]) -> None:
    policy = base_policy(indicator="embed", indicator_dropout=0.0, precision="float32")
    losses(policy, indicator).sum().backward()
    expected = sorted({{0: NULL, -1: NEGATIVE, 1: POSITIVE}[value] for value in indicator})
    for name in TABLES:
        gradient = dict(policy.module.named_parameters())[name].grad
        assert gradient is not None
        assert gradient.abs().sum(dim=1).nonzero().flatten().tolist() == expected


def test_a_window_learns_its_own_branch_and_one_without_an_indicator_the_null_branch() -> None:
    policy = with_tables_set(tiny_policy(indicator="embed", indicator_dropout=0.0))
    null, negative, positive = (losses(policy, [value] * 4) for value in (0, -1, 1))
    assert torch.equal(losses(policy, None), null)
    mixed = losses(policy, [1, -1, 0, 1])
    for row, expected in enumerate((positive, negative, null, positive)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-6)
        assert len({float(branch[row].detach()) for branch in (null, negative, positive)}) == 3


def test_the_indicator_is_dropped_at_its_rate_and_only_after_all_other_draws() -> None:
    """2 * 4000 windows: 0.3 within four standard deviations (0.02); the numbers of noise and flow time stay."""
    policy = tiny_policy(indicator="embed", noise_draws=1, random_shift=1)
    batch = sample_batch(policy.spec, 400)
    seen: list[torch.Tensor] = []
    times: list[torch.Tensor] = []
    expert, original = policy.module.expert, policy.module.expert.modulations

    def listen(time: torch.Tensor, indicator: torch.Tensor) -> tuple[torch.Tensor, ...]:
        times.append(time)
        seen.append(indicator)
        return original(time, indicator)

    expert.modulations = listen
    for value, row in ((1, POSITIVE), (-1, NEGATIVE)):
        labelled = dataclasses.replace(batch, advantage_indicator=np.full(400, value, np.int8))
        draws, unlabelled = generator(value + 5), generator(value + 5)
        seen.clear()
        with torch.no_grad():
            for _ in range(10):
                policy.loss(labelled, draws)
        rows = torch.cat(seen)
        assert set(rows.tolist()) == {NULL, row}
        assert abs(float((rows == NULL).float().mean()) - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
        with torch.no_grad():
            policy.loss(batch, unlabelled)
        assert torch.equal(times[-1], times[-11])
        assert set(seen[-1].tolist()) == {NULL}


def test_no_indicator_is_dropped_at_rate_0_and_an_unknown_one_stays_unknown() -> None:
    rows = torch.tensor([NULL, NEGATIVE, POSITIVE]).repeat(1000)
    assert torch.equal(drop_out(rows, 0.0, generator()), rows)
    dropped = drop_out(rows, 0.9, generator())
    assert ((dropped == rows) | (dropped == NULL)).all()
    assert (dropped[rows == NULL] == NULL).all()
    assert 0 < (dropped[rows != NULL] != NULL).sum() < 300


@pytest.mark.parametrize(
    ("values", "message"),
    [([1, 2, 0, 0], r"must be -1, 0 or 1, got \[0, 1, 2\]"), ([1, -1], r"one value per window \(4\), got \(2,\)")],
)
def test_an_indicator_that_is_none_is_refused(values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        indicator_rows(np.array(values, np.int8), 4)


class Listener(HashEncoder):
    """Keeps what it is asked to encode."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        self.asked.append(list(sentences))
        return super().encode(sentences)


def test_text_is_exactly_the_template_and_every_sentence_is_encoded_once() -> None:
    spec = tiny_policy(indicator="text", indicator_dropout=0.0).spec
    listener = Listener()
    policy = FlowVLA(spec, 0, listener)
    losses(policy, [1, -1, 0, -1])
    open_it, close_it = INSTRUCTIONS
    assert listener.asked.pop() == [
        f"{open_it}\nAdvantage: positive",
        f"{close_it}\nAdvantage: negative",
        open_it,
    ]
    losses(policy, None)
    assert listener.asked.pop() == [open_it, close_it]
    plan(policy, asked(False))
    assert listener.asked.pop() == [f"{open_it}\nAdvantage: negative", f"{close_it}\nAdvantage: negative"]
    plan(policy, asked(None, 3.0))
    assert listener.asked == [[open_it, close_it]]
    plan(policy, asked(True, 3.0))
    assert listener.asked[1:] == [
        [f"{open_it}\nAdvantage: positive", f"{close_it}\nAdvantage: positive"],
        [open_it, close_it],
    ]


def test_nothing_but_the_two_placeholders_is_interpreted() -> None:
    template = "{{advantage}} {0} {instruction.x} {instruction}|{advantage}"
    said = sentences(template, ["put {advantage} in {instruction}", "stop"], [POSITIVE, NULL])
    assert said == ["{positive} {0} {instruction.x} put {advantage} in {instruction}|positive", "stop"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"indicator": "embedding"}, "embedding"),
        ({"indicator_dropout": 1.0}, r"indicator_dropout must be in \[0, 1\), got 1.0"),
        ({"indicator_dropout": -0.1}, "indicator_dropout must be"),
        ({"indicator_text": "{instruction} well"}, r"must contain \{advantage\}"),
        ({"indicator_text": "Advantage: {advantage}"}, r"must contain \{instruction\}"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_policy(**settings)
