"""What the learner needs of a policy beside what an actor needs, and how parameters are frozen and exchanged."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sop.core.embodiment import Observation
from sop.core.errors import PolicyRefused
from sop.core.experience import Batch
from sop.core.policy import Conditioning, Policy, Weights


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

        Raises:
            ValueError: the batch has an advantage indicator and the policy was not made for one.
        """
        ...

    def infer_many(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        conditioning: Conditioning,
        generators: Sequence[np.random.Generator],
    ) -> npt.NDArray[np.float32]:
        """Plan for N robots at once: [N, H, A]. Blocks for one inference; does not touch what `reset` seeded.

        Row i takes its noise from `generators[i]` alone, so an episode does not depend on who else is in the
        batch (up to the rounding of matrix products of another size). A generator made with
        `np.random.default_rng(seed)` gives what `reset(seed)` and `infer` give.
        """
        ...

    def export(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, npt.NDArray[np.float32]]:
        """Copies as float32 arrays, with the names and shapes that `load` takes.

        Args:
            weights: tensors named like the module's, e.g. a moving average; None for the module's own.

        Raises:
            ValueError: the names are not the module's.
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
    module: nn.Module, weights: Mapping[str, Tensor] | None = None
) -> dict[str, npt.NDArray[np.float32]]:
    """Float32 copies of a module's weights, or of tensors with the same names; see `TrainablePolicy.export`."""
    own = module.state_dict()
    chosen = own if weights is None else weights
    if chosen.keys() != own.keys():
        raise ValueError(f"export: {_name_difference(set(chosen), set(own))}")
    return {name: np.array(chosen[name].detach().float().cpu().numpy(), order="C") for name in own}


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Copy named arrays into a module: all of them or, when one is wrong, none. The arrays are not kept.

    Raises:
        PolicyRefused: a name is missing or unknown, a shape or dtype (float32) differs, a value is not finite.
    """
    own = module.state_dict()
    if weights.keys() != own.keys():
        raise PolicyRefused(f"weights refused: {_name_difference(set(weights), set(own))}")
    for problem in _problems(weights, own):
        raise PolicyRefused(f"weights refused: {problem}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(weights[name])))


def _problems(weights: Weights, own: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in own.items():
        array = weights[name]
        if array.dtype != np.float32:
            yield f"{name} is {array.dtype.name}, float32 is expected"
        elif array.shape != tuple(tensor.shape):
            yield f"{name} has shape {array.shape}, this policy has {tuple(tensor.shape)}"
        elif not np.isfinite(array).all():
            yield f"{name} holds values that are not finite"


def _name_difference(got: set[str], expected: set[str]) -> str:
    parts = []
    if missing := sorted(expected - got):
        parts.append(f"{len(missing)} tensors are missing, e.g. {missing[0]}")
    if unknown := sorted(got - expected):
        parts.append(f"{len(unknown)} tensors are unknown, e.g. {unknown[0]}")
    return " and ".join(parts)
