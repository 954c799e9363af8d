"""One process that learns, or many: how they are called, what they exchange, and how they end together.

    torchrun --nproc-per-node 4 -m sop learner URL

    rank 0        knows the run: ingest, index, sampler, labels, publisher, checkpoints
    every rank    has the policy and the optimizer, and learns from its part of each batch

    control   gloo, processor memory    messages: a length, then bytes (msgpack); nothing else, never pickle
    data      nccl with CUDA, else gloo gradients, norms, weights

Rank 0 may be silent for long (it fits a value function, it waits for a store): followers wait `SILENCE_S` for a
message. Within a step nobody may: `STEP_S`. A process that dies closes its connections, and the others end at once.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sop.core.errors import RunError

if TYPE_CHECKING:
    from sop.learner.process_group import ManyRanks

SILENCE_S = 1800.0
"""Longest time without a message from rank 0; it says something every few seconds while it waits for episodes."""
STEP_S = 300.0
"""Longest time that a rank waits for another within a step."""


class Ranks(Protocol):
    """What a learner needs of the processes that it is made of; `OneRank` is one, `ManyRanks` are several.

    All but `rank`, `size` and `sharded` block until every rank has called them, in the same order.
    """

    rank: int
    """0 leads."""
    size: int
    sharded: bool
    """Every rank keeps a part of the weights only."""

    def shard(self, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Let every rank keep its part of the weights; equal on all ranks before. Blocks are gathered one by one."""
        ...

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give all ranks the mean of their gradients."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a value over the ranks, the same bits on each."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that may be sharded, in one piece."""
        ...

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors in one piece on rank 0; may be live ones: copy to keep. Sharded: others get nothing, one by one."""
        ...

    def distribute(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What rank 0 has, on every rank, sharded as the tensor of that name in `like` is."""
        ...


class OneRank:
    """`Ranks` of a process that learns alone: every operation is the identity. Knows nothing of torch.distributed."""

    rank = 0
    size = 1
    sharded = False

    def shard(self, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Nothing: one part is the whole."""

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Nothing."""

    def mean(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors themselves."""
        return dict(tensors)

    def distribute(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """The tensors themselves."""
        return dict(tensors)


def part_size(batch_size: int, ranks: int) -> int:
    """Windows of a batch that each rank learns from.

    Raises:
        ValueError: the ranks would not have equal parts.
    """
    if batch_size % ranks:
        near = [size for size in (batch_size // ranks * ranks, -(-batch_size // ranks) * ranks) if size]
        raise ValueError(
            f"learner.batch_size is {batch_size}, which {ranks} ranks cannot share equally: "
            f"take {' or '.join(map(str, near))}, or another number of ranks"
        )
    return batch_size // ranks


def num_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun started; 1 without it.

    Raises:
        RunError: the variables of torchrun are there in part only.
    """
    size = environment.get("WORLD_SIZE", "1")
    if size == "1":
        return 1
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing or not size.isdigit():
        raise RunError(f"WORLD_SIZE={size} without {', '.join(missing) or 'being a number'}: start ranks with torchrun")
    return int(size)


def require_one_rank(command: str) -> None:
    """Refuse to do on several ranks what is made for one.

    Raises:
        ValueError: torchrun started several.
    """
    if num_ranks() > 1:
        raise ValueError(f"{command} is done by one process: start it without torchrun")


@contextmanager
def open_ranks(device: torch.device) -> "Iterator[OneRank | ManyRanks]":
    """The ranks of this learner, by the variables that torchrun sets. Blocks until all are there.

    An error inside is told to the other ranks before it goes on.

    Args:
        device: where this rank computes.

    Raises:
        RunError: the others did not come within `STEP_S`.
    """
    if num_ranks() == 1:
        yield OneRank()
        return
    from sop.learner.process_group import ManyRanks

    ranks = ManyRanks(device)
    try:
        yield ranks
    except BaseException as error:
        ranks.fail(str(error) or type(error).__name__)
        raise
    ranks.close()
