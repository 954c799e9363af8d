"""The built-in policy: masks reach the gradient, it can learn, it refuses what it cannot do."""

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from sop.core.embodiment import Observation
from sop.core.policy import Conditioning, PolicySpec
from sop.policies import TrainablePolicy, make_policy, make_spec
from sop.policies.flow_vla import FlowNetwork, FlowVLA, Inputs
from sop.policies.sentences import HashEncoder, SentenceEncoder
from sop.policies.settings import Settings
from sop.policies.vision import pooling_matrix, position_matrix, random_shift, spatial_softmax
from sop.testing.contracts.policy import INSTRUCTIONS, sample_batch, sample_observations
from test_policies_contract import TINY, tiny_policy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def warmed_up_policy(**settings: object) -> TrainablePolicy:
    """Weights away from their zero initialisation, so that nothing is invisible by accident."""
    policy = tiny_policy(**settings)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(4)))
    return policy


def network_inputs(policy: TrainablePolicy, count: int) -> Inputs:
    rng = np.random.default_rng(2)
    cameras = policy.spec.embodiment.cameras.values()
    return Inputs(
        images=tuple(torch.from_numpy(rng.integers(0, 256, (count, *size, 3), np.uint8)) for size in cameras),
        state=torch.from_numpy(rng.standard_normal((count, 3), np.float32)),
        text=torch.from_numpy(HashEncoder().encode(INSTRUCTIONS[:1] * count)),
    )


def test_the_gradient_is_zero_at_masked_steps_and_not_zero_at_all_others() -> None:
    policy = warmed_up_policy(precision="float32")
    valid = torch.tensor([[True, True, True, True], [True, True, False, False], [False, True, False, True]])
    action = torch.randn((3, 4, 2), generator=generator(5)).requires_grad_()
    noise = torch.randn((3, 2, 4, 2), generator=generator(6))
    time = torch.rand((3, 2), generator=generator(7))
    error = policy.module(network_inputs(policy, 3), action, noise, time, valid)
    (error.mean(dim=1) * valid).sum().backward()
    assert (action.grad[~valid] == 0).all()
    assert (action.grad[valid] != 0).all()


def test_unmasked_steps_see_each_other() -> None:
    policy = warmed_up_policy(precision="float32")
    action = torch.randn((1, 4, 2), generator=generator(5)).requires_grad_()
    noise = torch.randn((1, 1, 4, 2), generator=generator(6))
    error = policy.module(network_inputs(policy, 1), action, noise, torch.full((1, 1), 0.5), None)
    error[0, 0, 0].backward()
    assert (action.grad[0] != 0).all()


def test_the_velocity_that_is_learned_points_from_noise_to_action() -> None:
    """With a network that always predicts c the error is the mean square of c - (action - noise)."""
    policy = tiny_policy(precision="float32")
    network: FlowNetwork = policy.module
    torch.nn.init.zeros_(network.expert.action_out.weight)
    torch.nn.init.constant_(network.expert.action_out.bias, 0.7)
    action, noise = torch.randn((2, 4, 2), generator=generator(1)), torch.randn((2, 3, 4, 2), generator=generator(2))
    error = network(network_inputs(policy, 2), action, noise, torch.rand((2, 3), generator=generator(3)), None)
    torch.testing.assert_close(error, ((0.7 - (action[:, None] - noise)) ** 2).mean(dim=-1))


def test_flow_time_0_is_noise_and_1_is_the_action() -> None:
    """At time 1 the network cannot tell noises apart, at time 0 it cannot tell actions apart."""
    policy = warmed_up_policy(precision="float32")
    seen = []
    policy.module.expert.action_in.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    action, noise = torch.randn((1, 4, 2), generator=generator(1)), torch.randn((1, 2, 4, 2), generator=generator(2))
    policy.module(network_inputs(policy, 1), action, noise, torch.tensor([[0.0, 1.0]]), None)
    torch.testing.assert_close(seen[0][0], noise[0, 0])
    torch.testing.assert_close(seen[0][1], action[0])


def test_flow_times_of_training_favour_the_noisy_end() -> None:
    """1 - Beta(1.5, 1) has mean 0.4 and density 1.5 sqrt(1 - t)."""
    policy = tiny_policy(noise_draws=64)
    times = []
    expert = policy.module.expert
    original = expert.modulations

    def listen(time: torch.Tensor, indicator: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        times.append(time)
        return original(time, indicator)

    expert.modulations = listen
    policy.loss(sample_batch(policy.spec, 64), generator())
    drawn = torch.cat(times)
    assert len(drawn) == 64 * 64
    assert abs(drawn.mean() - 0.4) < 0.02
    assert abs((drawn < 0.25).float().mean() - (1 - 0.75**1.5)) < 0.02
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_weights_below_one_scale_the_loss_of_their_steps() -> None:
    policy = tiny_policy(precision="float32")
    batch = sample_batch(policy.spec)
    full = policy.loss(batch, generator())
    half = policy.loss(dataclasses.replace(batch, loss_weight=batch.loss_weight * np.float32(0.5)), generator())
    torch.testing.assert_close(half, full * 0.5)


def test_a_window_without_weight_has_loss_zero() -> None:
    policy = tiny_policy()
    batch = sample_batch(policy.spec)
    batch.loss_weight[2] = 0
    losses = policy.loss(batch, generator())
    losses.sum().backward()
    assert losses[2] == 0
    assert (losses[[0, 1, 3]] > 0).all()
    assert all(torch.isfinite(p.grad).all() for p in policy.module.parameters())


def test_the_loss_falls_when_one_batch_is_learned_by_heart_and_the_actions_come_out() -> None:
    policy = tiny_policy(width=32, random_shift=0, noise_draws=8, euler_steps=8, precision="float32")
    batch = sample_batch(policy.spec, 4)
    batch.loss_weight[:] = 1
    optimizer = torch.optim.Adam(policy.module.parameters(), lr=5e-3)
    draws, losses = generator(), []
    for _ in range(200):
        loss = policy.loss(batch, draws).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.15 * np.mean(losses[:20])
    observations = [
        Observation({camera: images[row] for camera, images in batch.images.items()}, batch.state[row])
        for row in range(4)
    ]
    planned = policy.infer_many(
        observations, batch.instruction, Conditioning(), [np.random.default_rng(row) for row in range(4)]
    )
    assert np.abs(planned - batch.action).mean() < 0.15


def test_the_instruction_decides_what_is_planned() -> None:
    policy = warmed_up_policy()
    seen = sample_observations(policy.spec, 1)[0]
    chunks = []
    for instruction in INSTRUCTIONS:
        policy.reset(0)
        chunks.append(policy.infer(seen, instruction, Conditioning()))
    assert not np.allclose(chunks[0], chunks[1], atol=1e-3)


def test_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, second = tiny_policy().export(), tiny_policy().export()
    assert torch.equal(torch.rand(3), expected)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    other = make_policy(tiny_policy().spec, seed=2).export()
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_infer_takes_its_noise_from_reset_and_infer_many_leaves_it_alone() -> None:
    policy = warmed_up_policy()
    seen = sample_observations(policy.spec, 1)
    policy.reset(1)
    first = policy.infer(seen[0], INSTRUCTIONS[0], Conditioning())
    second = policy.infer(seen[0], INSTRUCTIONS[0], Conditioning())
    policy.reset(1)
    policy.infer_many(seen, INSTRUCTIONS[:1], Conditioning(), [np.random.default_rng(8)])
    assert np.array_equal(policy.infer(seen[0], INSTRUCTIONS[0], Conditioning()), first)
    assert not np.array_equal(first, second)


def test_plans_stay_within_the_limits_of_the_robot() -> None:
    policy = tiny_policy()
    weights = policy.export()
    weights["expert.action_out.bias"] += np.array([50.0, -50.0], np.float32)
    policy.load(weights, 1)
    chunk = policy.infer(sample_observations(policy.spec, 1)[0], INSTRUCTIONS[0], Conditioning())
    assert np.array_equal(chunk, np.tile(np.array([1.0, -1.0], np.float32), (4, 1)))


def test_an_indicator_is_refused() -> None:
    policy = tiny_policy()
    seen = sample_observations(policy.spec, 1)[0]
    with pytest.raises(ValueError, match="made without an advantage indicator"):
        policy.infer(seen, INSTRUCTIONS[0], Conditioning(advantage_indicator=True))
    batch = dataclasses.replace(sample_batch(policy.spec), advantage_indicator=np.ones(4, np.int8))
    with pytest.raises(ValueError, match="made without an advantage indicator"):
        policy.loss(batch, generator())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"front": np.zeros((16, 24, 3), np.uint8)}, "camera 'wrist.left' is missing"),
        ({"front": np.zeros((24, 16, 3), np.uint8), "wrist.left": np.zeros((17, 16, 3), np.uint8)}, "front must be"),
        ({"front": np.zeros((16, 24, 3), np.float32), "wrist.left": np.zeros((17, 16, 3), np.uint8)}, "float32"),
    ],
)
def test_an_observation_of_another_robot_is_refused(images: dict[str, npt.NDArray[np.generic]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_policy().infer(Observation(images, np.zeros(3, np.float32)), INSTRUCTIONS[0], Conditioning())


def test_a_state_of_another_robot_is_refused() -> None:
    seen = sample_observations(tiny_policy().spec, 1)[0]
    with pytest.raises(ValueError, match=r"state must be float32 \(3,\), got float32 \(4,\)"):
        tiny_policy().infer(Observation(seen.images, np.zeros(4, np.float32)), INSTRUCTIONS[0], Conditioning())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actoin_horizon": 4}, "Did you mean 'action_horizon'"),
        ({"width": "wide"}, "width"),
        ({"width": 15}, "multiple of heads"),
        ({"euler_steps": 0}, "euler_steps must be at least 1, got 0"),
        ({"text_encoder": "clip"}, "clip"),
        ({"grid": 5}, "grid 5 needs images of 20 pixels per side"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_policy(**settings)


def test_an_unknown_policy_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="Did you mean 'flow_vla'"):
        make_spec("flowvla", {}, tiny_policy().spec.embodiment, 1, {})


def test_a_spec_writes_every_setting_down_as_json() -> None:
    spec = tiny_policy().spec
    assert set(spec.config) == {field.name for field in dataclasses.fields(Settings)}
    assert spec.config["channels"] == TINY["channels"]
    assert spec.action_horizon == 4


def test_a_policy_made_from_a_spec_that_travelled_as_json_is_the_same_policy() -> None:
    policy = warmed_up_policy()
    travelled = msgspec.json.decode(msgspec.json.encode(policy.spec), type=PolicySpec)
    copied = make_policy(travelled, seed=99)
    copied.load(policy.export(), 1)
    seen = sample_observations(policy.spec, 1)[0]
    policy.reset(3)
    copied.reset(3)
    assert np.array_equal(
        copied.infer(seen, INSTRUCTIONS[0], Conditioning()), policy.infer(seen, INSTRUCTIONS[0], Conditioning())
    )


def test_a_new_instruction_just_works_and_is_encoded_once(tmp_path: Path) -> None:
    asked = []

    def embed(sentences: list[str]) -> npt.NDArray[np.float64]:
        asked.extend(sentences)
        return np.stack([np.random.default_rng(len(s)).standard_normal(384) for s in sentences])

    spec = make_spec(
        "flow_vla",
        TINY | {"text_encoder": "minilm"},
        tiny_policy().spec.embodiment,
        1,
        tiny_policy().spec.normalization,
    )
    policy = FlowVLA(spec, 0, SentenceEncoder(tmp_path, lambda: embed))
    seen = sample_observations(spec, 1)[0]
    for instruction in ("open the drawer", "water the plants", "open the drawer", "water the plants"):
        assert np.isfinite(policy.infer(seen, instruction, Conditioning())).all()
    assert asked == ["open the drawer", "water the plants"]


def test_as_many_instructions_and_generators_as_observations_are_needed() -> None:
    policy = tiny_policy()
    seen = sample_observations(policy.spec, 2)
    with pytest.raises(ValueError, match="got 2 observations, 1 instructions, 2 generators"):
        policy.infer_many(seen, INSTRUCTIONS[:1], Conditioning(), [np.random.default_rng(0)] * 2)


def test_cameras_whose_names_collide_as_parameters_are_refused() -> None:
    spec = tiny_policy().spec
    cameras = {"left.eye": (16, 16), "left-eye": (16, 16)}
    collided = dataclasses.replace(spec, embodiment=dataclasses.replace(spec.embodiment, cameras=cameras))
    with pytest.raises(ValueError, match="differ only in punctuation"):
        make_policy(collided)


def test_a_shifted_image_is_a_crop_of_the_padded_one_and_all_shifts_occur() -> None:
    image = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(1, 6, 5, 3)
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    crops = {
        padded[0, top : top + 6, left : left + 5].tobytes(): (top - 2, left - 2)
        for top in range(5)
        for left in range(5)
    }
    shifted = random_shift(np.repeat(image, 400, axis=0), 2, generator())
    assert {crops[one.tobytes()] for one in shifted} == set(crops.values())


def test_spatial_softmax_finds_the_one_bright_pixel() -> None:
    heatmaps = torch.zeros((1, 3 * 5, 1))
    heatmaps[0, 1 * 5 + 4] = 100.0  # row 1 of 3, column 4 of 5
    torch.testing.assert_close(spatial_softmax(heatmaps, position_matrix(3, 5)), torch.tensor([[1.0, 0.0]]))


def test_the_pooling_matrix_is_adaptive_average_pooling() -> None:
    pixels = torch.rand((1, 7, 9, 6), generator=generator())
    expected = torch.nn.functional.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2), 4).flatten(2)
    actual = (pooling_matrix(7, 9, 4) @ pixels.flatten(1, 2)).transpose(1, 2)
    torch.testing.assert_close(actual, expected)
