"""What the learner needs of a policy beside what an actor needs, and how parameters are frozen and exchanged."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sop.core.embodiment import Observation
from sop.core.errors import PolicyRefused
from sop.core.experience import Batch
from sop.core.policy import Conditioning, Policy, Weights
from sop.policies.noise import NoiseSource

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EXPORT_DTYPES = ("float32", "bfloat16")
_PIECE = 1 << 18


class TrainablePolicy(Policy, Protocol):
    """A policy that can be trained. The learner's use of it:

    frozen = freeze(policy.module, config.freeze)
    optimizer = AdamW(p for p in policy.module.parameters() if p.requires_grad)
    loss = policy.loss(batch, generator)            # [B], called by the algorithm
    loss.mean().backward(); optimizer.step()
    publish(policy.export(moving_average))          # names and shapes that `load` takes
    """

    module: nn.Module
    """All weights: its `state_dict` is what is trained, checkpointed, published and loaded, nothing else is."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """One differentiable float32 loss per window, [B].

        Per window it is the mean over action elements and over the steps with a positive
        `batch.loss_weight`, each step times its weight; a window without such a step has loss 0. A foreign
        policy that only has the batch's mean returns it expanded to [B]: the sampler then sees no difference
        between tasks.

        Args:
            batch: not changed, not kept.
            generator: the only source of randomness (noise, flow time, augmentation); equal states give equal losses.
                With `batch.share` the windows are a part of a batch, of which other ranks have the rest: draw with
                `sop.policies.draws.draw_rows`, and they get what one rank would give them.

        Raises:
            ValueError: the batch has an advantage indicator and the policy was not made for one. (The other way
                round, a batch without one teaches a policy that has one its null branch.)
        """
        ...

    def infer_many(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        conditioning: Conditioning,
        generators: Sequence[NoiseSource],
    ) -> npt.NDArray[np.float32]:
        """Plan for N robots at once: [N, H, A]. Blocks for one inference; does not touch what `reset` seeded.

        Row i takes its noise from `generators[i]` alone, so an episode does not depend on who else is in the
        batch (up to the rounding of matrix products of another size). A generator made with
        `np.random.default_rng(seed)` gives what `reset(seed)` and `infer` give.
        """
        ...

    def export(
        self,
        weights: Mapping[str, Tensor] | None = None,
        *,
        dtype: str = "float32",
        names: Collection[str] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Copies as arrays, with the names and shapes that `load` takes.

        Args:
            weights: tensors named like the module's, e.g. a moving average; None for the module's own.
            dtype: "float32", or "bfloat16" for half the bytes: rounded to the nearest, `ml_dtypes.bfloat16`.
                Tensors of integers stay float32.
            names: only these, e.g. the trained ones; None for all.

        Raises:
            ValueError: the names are not the module's, or an unknown dtype.
        """
        ...


class BranchVelocities(NamedTuple):
    """Velocities of the flow, float32 [B, H, A] each, normalised; 0 at steps whose `loss_weight` is 0."""

    null: npt.NDArray[np.float32]
    negative: npt.NDArray[np.float32]
    positive: npt.NDArray[np.float32]


@runtime_checkable
class ConditionedPolicy(Protocol):
    """A policy with an advantage indicator, as far as its branches are measured: do they differ, and by how much?

    null, negative, positive = policy.branch_velocities(batch, generator)
    separation = ((positive - null) ** 2).mean() / (null**2).mean()

    To be an instance says that the method is there, not that this policy was made with an indicator.
    """

    def branch_velocities(self, batch: Batch, generator: torch.Generator) -> BranchVelocities:
        """Predict the velocity of every branch at the same noise and flow time. Blocks for three predictions.

        One draw per window, flow time distributed as in training; no gradient, no augmentation, no dropout. The
        batch's own indicator is not read. Equal batches and generators give equal arrays.

        Args:
            batch: B windows, not changed.
            generator: of flow time and noise.

        Raises:
            ValueError: the policy was made without an indicator.
        """
        ...


def freeze(module: nn.Module, pattern: str) -> tuple[str, ...]:
    """Exclude parameters from training: those whose name contains a match of the regular expression.

    Args:
        module: `requires_grad` of its parameters is changed; what does not match becomes trainable.
        pattern: as for `re.search`; empty freezes nothing.

    Returns:
        The names of the frozen parameters.

    Raises:
        ValueError: not a regular expression, or it matches no parameter, or it leaves none to train.
    """
    names = [name for name, _ in module.named_parameters()]
    try:
        frozen = tuple(name for name in names if pattern and re.search(pattern, name))
    except re.error as error:
        raise ValueError(f"freeze: {pattern!r} is not a regular expression ({error})") from error
    if pattern and not frozen:
        parts = sorted({".".join(name.split(".")[:2]) for name in names})
        raise ValueError(f"freeze: no parameter matches {pattern!r}; names begin with {', '.join(parts)}")
    if len(frozen) == len(names):
        raise ValueError(f"freeze: {pattern!r} matches all {len(names)} parameters, nothing is left to train")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def export_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor] | None = None,
    *,
    dtype: str = "float32",
    names: Collection[str] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Copies of a module's weights, or of tensors with the same names; see `TrainablePolicy.export`."""
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"export: dtype must be one of {list(EXPORT_DTYPES)}, got {dtype!r}")
    own = module.state_dict()
    chosen = own if weights is None else weights
    wanted = set(own) if names is None else set(names)
    got = set(chosen) | (wanted ^ set(own))  # what is not wanted may be missing, what is unknown may not be wanted
    if got != set(own):
        raise ValueError(f"export: {_name_difference(got, set(own))}")
    return {name: _array(chosen[name].detach(), dtype) for name in own if name in wanted}


def _array(tensor: Tensor, dtype: str) -> npt.NDArray[Any]:
    """A copy in memory of its own, rounded on the way there."""
    if dtype == "bfloat16" and tensor.is_floating_point():
        rounded = np.empty(tensor.shape, BFLOAT16)
        torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16).copy_(tensor)
        return rounded
    copied = np.empty(tensor.shape, np.float32)
    torch.from_numpy(copied).copy_(tensor)
    return copied


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Copy named arrays into a module: all of them or, when one is wrong, none. The arrays are not kept.

    Float32 or bfloat16; the latter become float32 exactly.

    Raises:
        PolicyRefused: a name is missing or unknown, a shape or dtype differs, a value is not finite.
    """
    own = module.state_dict()
    if weights.keys() != own.keys():
        raise PolicyRefused(f"weights refused: {_name_difference(set(weights), set(own))}")
    for problem in _problems(weights, own):
        raise PolicyRefused(f"weights refused: {problem}")
    with torch.no_grad():
        for name, tensor in own.items():
            _copy(tensor, weights[name])


def _copy(tensor: Tensor, array: npt.NDArray[Any]) -> None:
    """Fill a tensor without an array of its size in between where both are in the processor's memory."""
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        target = tensor.numpy()
        if array.dtype == BFLOAT16:  # float32 with 16 more bits of mantissa, all zero
            np.left_shift(array.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(target, array)
    elif array.dtype == BFLOAT16:
        tensor.copy_(torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16))
    else:
        tensor.copy_(torch.from_numpy(np.array(array)))


def _problems(weights: Weights, own: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in own.items():
        array = weights[name]
        if array.dtype not in (np.float32, BFLOAT16):
            yield f"{name} is {array.dtype.name}, float32 or bfloat16 is expected"
        elif array.shape != tuple(tensor.shape):
            yield f"{name} has shape {array.shape}, this policy has {tuple(tensor.shape)}"
        elif not _finite(array):
            yield f"{name} holds values that are not finite"


def _finite(array: npt.NDArray[Any]) -> bool:
    """Piece by piece: no large array in between."""
    flat = array.reshape(-1)
    return not any(_special(flat[start : start + _PIECE]).any() for start in range(0, flat.size, _PIECE))


def _special(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where values are infinite or NaN."""
    if values.dtype == BFLOAT16:
        return np.asarray((values.view(np.uint16) & 0x7F80) == 0x7F80)  # all ones in the exponent
    return np.asarray(~np.isfinite(values))


def _name_difference(got: set[str], expected: set[str]) -> str:
    parts = []
    if missing := sorted(expected - got):
        parts.append(f"{len(missing)} tensors are missing, e.g. {missing[0]}")
    if unknown := sorted(got - expected):
        parts.append(f"{len(unknown)} tensors are unknown, e.g. {unknown[0]}")
    return " and ".join(parts)
