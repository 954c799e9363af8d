"""The contract of `sop.policies.base.TrainablePolicy`, one function per rule.

A policy that only has the mean loss of a batch keeps `POLICY_RULES` and breaks `PER_WINDOW_RULES`. One that was made
with an advantage indicator keeps `CONDITIONED_RULES` beside them, one that was made without `UNCONDITIONED_RULES`.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sop.core.embodiment import Observation
from sop.core.errors import PolicyRefused
from sop.core.experience import Batch, Windows, rows_of
from sop.core.policy import Conditioning, PolicySpec
from sop.policies.base import ConditionedPolicy, TrainablePolicy
from sop.testing.contracts import require, require_equal, require_raises

MakePolicy = Callable[[], TrainablePolicy]
"""Makes the policy under test: fresh, and equal at every call."""

INSTRUCTIONS = ("open the drawer", "close the door")

_UNCONDITIONAL = Conditioning()


def sample_batch(spec: PolicySpec, count: int = 4, seed: int = 0) -> Batch:
    """Random windows that fit a spec; window i has its last `i mod H` steps masked."""
    rng = np.random.default_rng(seed)
    robot, horizon = spec.embodiment, spec.action_horizon
    lengths = horizon - np.arange(count) % horizon
    return Batch(
        windows=Windows(
            np.arange(count), np.zeros(count, np.int32), np.zeros(count, np.int32), np.zeros(count, np.uint8)
        ),
        images={camera: rng.integers(0, 256, (count, *size, 3), np.uint8) for camera, size in robot.cameras.items()},
        state=rng.standard_normal((count, robot.num_states), np.float32),
        action=rng.uniform(robot.action_low, robot.action_high, (count, horizon, robot.num_actions)).astype(np.float32),
        loss_weight=(np.arange(horizon) < lengths[:, None]).astype(np.float32),
        instruction=tuple(INSTRUCTIONS[index % 2] for index in range(count)),
        policy_version=np.zeros(count, np.int64),
    )


def with_indicator(batch: Batch) -> Batch:
    """The same windows, in turn positive, negative and unknown."""
    indicator = np.resize(np.array((1, -1, 0), np.int8), len(batch))
    return dataclasses.replace(batch, advantage_indicator=indicator)


def sample_observations(spec: PolicySpec, count: int, seed: int = 0) -> list[Observation]:
    """Random observations that fit a spec."""
    batch = sample_batch(spec, count, seed)
    return [
        Observation({camera: images[row] for camera, images in batch.images.items()}, batch.state[row])
        for row in range(count)
    ]


def a_loss_is_one_finite_value_per_window(make_policy: MakePolicy) -> None:
    """[B], float32, differentiable with respect to the weights, 0 for a window without weight."""
    policy = make_policy()
    batch = sample_batch(policy.spec)
    losses = policy.loss(batch, torch.Generator().manual_seed(0))
    require_equal((tuple(losses.shape), losses.dtype), ((len(batch),), torch.float32), "shape and dtype of the loss")
    require(bool(torch.isfinite(losses).all()), f"a loss is not finite: {losses}")
    losses.mean().backward()  # type: ignore[no-untyped-call]
    moved = [p.grad for p in policy.module.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    require(bool(moved), "no parameter has a gradient")


def equal_generators_give_equal_losses(make_policy: MakePolicy) -> None:
    """All randomness comes from the generator; a generator that goes on gives other draws."""
    policy = make_policy()
    batch, generator = sample_batch(policy.spec), torch.Generator().manual_seed(3)
    first = policy.loss(batch, generator)
    second = policy.loss(batch, generator)
    torch.rand(7)  # whoever uses the global generator in between changes nothing
    again = policy.loss(batch, torch.Generator().manual_seed(3))
    require(torch.equal(first, again), f"equal generators gave {first} and {again}")
    require(not torch.equal(first, second), "the second call repeated the draws of the first")


def a_batch_is_not_changed(make_policy: MakePolicy) -> None:
    """Arrays of a batch may be read-only, and are the same afterwards."""
    policy = make_policy()
    batch = sample_batch(policy.spec)
    arrays: list[npt.NDArray[Any]] = [*batch.images.values(), batch.state, batch.action, batch.loss_weight]
    before = copy.deepcopy(arrays)
    for array in arrays:
        array.flags.writeable = False
    policy.loss(batch, torch.Generator().manual_seed(0))
    for old, new in zip(before, arrays, strict=True):
        np.testing.assert_array_equal(new, old)


def nothing_is_learned_from_steps_without_weight(make_policy: MakePolicy) -> None:
    """Actions at steps with weight 0 change neither losses nor gradients; actions with weight do."""
    policy = make_policy()
    batch = sample_batch(policy.spec)
    masked = batch.loss_weight == 0
    noise = np.random.default_rng(1).standard_normal(batch.action.shape, np.float32)
    original = _losses_and_gradient(policy, batch)
    hidden = _losses_and_gradient(policy, dataclasses.replace(batch, action=batch.action + noise * masked[..., None]))
    for old, new in zip(original, hidden, strict=True):
        np.testing.assert_array_equal(new, old, "an action without weight had an influence")
    seen = _losses_and_gradient(policy, dataclasses.replace(batch, action=batch.action + noise * ~masked[..., None]))
    require(bool((seen[0] != original[0]).all()), f"actions with weight had no influence: {seen[0]}, {original[0]}")


def a_window_has_its_own_loss(make_policy: MakePolicy) -> None:
    """Another observation or action in window i changes the loss of window i and of no other."""
    policy = make_policy()
    batch = sample_batch(policy.spec)
    original = _losses_and_gradient(policy, batch)[0]
    other = sample_batch(policy.spec, seed=9)
    for row in range(len(batch)):
        replaced = copy.deepcopy(batch)
        replaced.action[row] = other.action[row]
        replaced.state[row] = other.state[row]
        for camera, images in other.images.items():
            replaced.images[camera][row] = images[row]
        changed = np.flatnonzero(_losses_and_gradient(policy, replaced)[0] != original).tolist()
        require_equal(changed, [row], "windows whose loss changed")


def parts_of_a_batch_have_the_losses_of_the_whole(make_policy: MakePolicy) -> None:
    """Whoever computes a window draws the same for it (`Batch.share`), and leaves the generator in the same state."""
    policy, generators = make_policy(), [torch.Generator().manual_seed(3) for _ in range(3)]
    batch = sample_batch(policy.spec)
    whole = policy.loss(batch, generators[0]).detach()
    parts = [
        policy.loss(rows_of(batch, *rows), one) for rows, one in zip(((0, 1), (1, 4)), generators[1:], strict=True)
    ]
    np.testing.assert_allclose(torch.cat(parts).detach().numpy(), whole.numpy(), rtol=0.05, atol=0.01)
    states = [one.get_state() for one in generators]
    require(all(torch.equal(one, states[0]) for one in states), "a part leaves the generator in another state")


def a_chunk_is_a_finite_plan(make_policy: MakePolicy) -> None:
    """[H, A] float32."""
    policy = make_policy()
    spec = policy.spec
    chunk = policy.infer(sample_observations(spec, 1)[0], INSTRUCTIONS[0], Conditioning())
    expected = ((spec.action_horizon, spec.embodiment.num_actions), np.dtype(np.float32))
    require_equal((chunk.shape, chunk.dtype), expected, "shape and dtype of a chunk")
    require(bool(np.isfinite(chunk).all()), f"a chunk is not finite: {chunk}")


def a_seed_repeats_an_episode(make_policy: MakePolicy) -> None:
    """After `reset` with an equal seed the same observations give the same chunks, whatever came before."""
    policy = make_policy()
    observations = sample_observations(policy.spec, 3)
    policy.reset(11)
    first = [policy.infer(seen, INSTRUCTIONS[0], Conditioning()) for seen in observations]
    policy.infer(observations[0], INSTRUCTIONS[1], Conditioning())
    policy.reset(11)
    for seen, chunk in zip(observations, first, strict=True):
        np.testing.assert_array_equal(policy.infer(seen, INSTRUCTIONS[0], Conditioning()), chunk)


def an_episode_does_not_depend_on_its_neighbours(make_policy: MakePolicy) -> None:
    """A row of `infer_many` is bit-equal whatever the other rows hold, and is the row's `infer` up to rounding."""
    policy = make_policy()
    ours, others = sample_observations(policy.spec, 3), sample_observations(policy.spec, 3, seed=5)
    alone = _plan(policy, [ours[1]], [1])
    together = _plan(policy, ours, [0, 1, 2])
    elsewhere = _plan(policy, [others[0], ours[1], others[2]], [7, 1, 9])
    np.testing.assert_array_equal(together[1], elsewhere[1])
    np.testing.assert_allclose(together[1], alone[0], rtol=0, atol=1e-4)
    policy.reset(1)
    np.testing.assert_array_equal(policy.infer(ours[1], INSTRUCTIONS[0], Conditioning()), alone[0])


def exported_weights_bring_the_behaviour_along(make_policy: MakePolicy) -> None:
    """Export, load elsewhere: bit-equal chunks, and the given version."""
    policy, copied = make_policy(), make_policy()
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = _plan(copied, sample_observations(policy.spec, 2), [0, 1])
    copied.load(policy.export(), 42)
    require_equal(copied.version, 42, "version after load")
    expected = _plan(policy, sample_observations(policy.spec, 2), [0, 1])
    loaded = _plan(copied, sample_observations(policy.spec, 2), [0, 1])
    np.testing.assert_array_equal(loaded, expected)
    require(not np.array_equal(loaded, before), "loading other weights changed nothing")


def weights_are_copied_in_both_directions(make_policy: MakePolicy) -> None:
    """Loaded arrays may be read-only and are not kept; exported ones are the receiver's own and contiguous."""
    policy = make_policy()
    weights = policy.export()
    for name, array in weights.items():
        require(array.dtype == np.float32 and array.flags.c_contiguous, f"{name} is not plain float32")
        array.flags.writeable = False
    policy.load(weights, 1)
    for array in weights.values():
        array.flags.writeable = True
        array[...] = 0
    require(any(np.any(array) for array in policy.export().values()), "the policy kept the caller's arrays")


def wrong_weights_are_refused_and_the_old_ones_stay(make_policy: MakePolicy) -> None:
    """A missing, unknown, misshapen, mistyped or non-finite tensor: `PolicyRefused`, nothing changed."""
    policy = make_policy()
    policy.load(policy.export(), 5)
    kept = policy.export()
    last = list(kept)[-1]
    changed = {name: array + 1 for name, array in kept.items()}
    poisoned = changed[last].copy()
    poisoned.flat[0] = np.nan
    cases: dict[str, dict[str, npt.NDArray[Any]]] = {
        "missing": {name: array for name, array in changed.items() if name != last},
        "unknown": changed | {"surplus": np.zeros(1, np.float32)},
        "misshapen": changed | {last: np.zeros((*kept[last].shape, 2), np.float32)},
        "mistyped": changed | {last: changed[last].astype(np.float64)},
        "not finite": changed | {last: poisoned},
    }
    for case, weights in cases.items():
        require_raises(PolicyRefused, f"a tensor is {case}", policy.load, weights, 6)
        require_equal(policy.version, 5, f"version after a tensor was {case}")
        for name, array in policy.export().items():
            np.testing.assert_array_equal(array, kept[name], f"{name} changed although a tensor was {case}")


def every_indicator_can_be_learned_and_asked_for(make_policy: MakePolicy) -> None:
    """Positive, negative and unknown windows in one batch have finite losses; every guidance gives a finite plan."""
    policy = make_policy()
    batch = with_indicator(sample_batch(policy.spec))
    losses = policy.loss(batch, torch.Generator().manual_seed(0))
    require_equal(tuple(losses.shape), (len(batch),), "shape of the loss")
    require(bool(torch.isfinite(losses).all()), f"a loss is not finite: {losses}")
    for indicator in (True, False, None):
        for guidance in (0.0, 1.0, 2.0):
            asked = Conditioning(advantage_indicator=indicator, guidance=guidance)
            planned = _plan(policy, sample_observations(policy.spec, 2), [0, 1], asked)
            require(bool(np.isfinite(planned).all()), f"{asked} gave a plan that is not finite")


def guidance_0_is_the_null_branch(make_policy: MakePolicy) -> None:
    """To the bit, for both indicators; and the indicator is heard at guidance 1."""
    policy = make_policy()
    _move(policy)
    seen = sample_observations(policy.spec, 2)
    null = _plan(policy, seen, [0, 1])
    for indicator in (True, False):
        asked = Conditioning(advantage_indicator=indicator, guidance=0.0)
        np.testing.assert_array_equal(_plan(policy, seen, [0, 1], asked), null)
        heard = _plan(policy, seen, [0, 1], Conditioning(advantage_indicator=indicator))
        require(not np.array_equal(heard, null), f"an indicator of {indicator} changed nothing")


def branches_are_compared_at_equal_draws(make_policy: MakePolicy) -> None:
    """[B, H, A] float32, 0 at steps without weight, repeatable, whatever indicator the batch has."""
    policy = make_policy()
    _move(policy)
    if not isinstance(policy, ConditionedPolicy):
        raise AssertionError("the policy has no `branch_velocities`")  # noqa: TRY004
    batch = sample_batch(policy.spec)
    first = policy.branch_velocities(batch, torch.Generator().manual_seed(2))
    again = policy.branch_velocities(with_indicator(batch), torch.Generator().manual_seed(2))
    for name, velocity, repeated in zip(first._fields, first, again, strict=True):
        require_equal((velocity.shape, velocity.dtype), (batch.action.shape, np.dtype(np.float32)), f"the {name} one")
        require(bool((velocity[batch.loss_weight == 0] == 0).all()), f"{name}: a step without weight is not 0")
        np.testing.assert_array_equal(velocity, repeated)
    require(not np.array_equal(first.null, first.positive), "the positive branch is the null branch")
    require(not np.array_equal(first.negative, first.positive), "the positive branch is the negative branch")


def an_indicator_it_was_made_without_is_refused(make_policy: MakePolicy) -> None:
    """By the loss and by inference: `ValueError`, never a plan without it."""
    policy = make_policy()
    batch = with_indicator(sample_batch(policy.spec))
    require_raises(ValueError, "a batch has an indicator", policy.loss, batch, torch.Generator())
    seen = sample_observations(policy.spec, 1)[0]
    for indicator in (True, False):
        asked = Conditioning(advantage_indicator=indicator, guidance=0.0)
        require_raises(ValueError, "an indicator is asked for", policy.infer, seen, INSTRUCTIONS[0], asked)


def _move(policy: TrainablePolicy) -> None:
    """Take the weights away from where they began: no branch is silent by accident."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))


def _losses_and_gradient(
    policy: TrainablePolicy, batch: Batch
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    policy.module.zero_grad()
    losses = policy.loss(batch, torch.Generator().manual_seed(0))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in policy.module.parameters() if p.grad is not None]
    return losses.detach().numpy(), torch.cat(gradients).numpy()


def _plan(
    policy: TrainablePolicy,
    observations: list[Observation],
    seeds: list[int],
    conditioning: Conditioning = _UNCONDITIONAL,
) -> npt.NDArray[np.float32]:
    generators = [np.random.default_rng(seed) for seed in seeds]
    return policy.infer_many(observations, [INSTRUCTIONS[0]] * len(observations), conditioning, generators)


POLICY_RULES = (
    a_loss_is_one_finite_value_per_window,
    equal_generators_give_equal_losses,
    a_batch_is_not_changed,
    nothing_is_learned_from_steps_without_weight,
    a_chunk_is_a_finite_plan,
    a_seed_repeats_an_episode,
    an_episode_does_not_depend_on_its_neighbours,
    exported_weights_bring_the_behaviour_along,
    weights_are_copied_in_both_directions,
    wrong_weights_are_refused_and_the_old_ones_stay,
)
"""What every trainable policy keeps."""

PER_WINDOW_RULES = (a_window_has_its_own_loss, parts_of_a_batch_have_the_losses_of_the_whole)
"""What a policy with a loss of its own per window keeps."""

CONDITIONED_RULES = (
    every_indicator_can_be_learned_and_asked_for,
    guidance_0_is_the_null_branch,
    branches_are_compared_at_equal_draws,
)
"""What a policy with an advantage indicator keeps beside the others."""

UNCONDITIONED_RULES = (an_indicator_it_was_made_without_is_refused,)
"""What a policy without an advantage indicator keeps beside the others."""
