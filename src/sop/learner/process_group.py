"""`Ranks` over torch.distributed. Imported only when there are several: it costs a second.

Of torch.distributed's collectives only those on tensors are used: those on objects pickle.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from sop.core.errors import RunError
from sop.learner.ranks import SILENCE_S, STEP_S

MAX_MESSAGE_BYTES = 64 << 20
BUCKET_BYTES = 32 << 20
"""Gradients are exchanged in pieces of about this size: one by one, small ones would cost a round trip each."""
_LAST_WORDS = "ended"
"""In the rendezvous store: why the first rank ended that did not end well."""
_LAST_WORDS_S = 2.0
"""How long the others wait for that reason."""


class ManyRanks:
    """See `sop.learner.ranks.Ranks`; made in every process that torchrun started. Blocks until all are there.

    Args:
        device: where this rank computes; gradients travel by nccl from a CUDA device, else by gloo.

    Raises:
        RunError: the others did not come.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.sharded = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), False
        self._device = device
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "nccl"
        with self._together("meet"):
            self._store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=timedelta(seconds=STEP_S)))
            dist.init_process_group(
                "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=SILENCE_S),
            )
            self._data: dist.ProcessGroup = dist.new_group(backend=backend, timeout=timedelta(seconds=STEP_S))

    def send(self, rank: int, message: bytes) -> None:
        """Send a message to one rank; blocks until it is taken."""
        with self._together(f"send to rank {rank}"):
            dist.send(torch.tensor([len(message)]), rank)
            dist.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), rank)

    def receive(self, rank: int) -> bytes:
        """Wait for the next message of a rank, at most `SILENCE_S`.

        Raises:
            RunError: the rank has ended, or its message has an impossible length.
        """
        with self._together(f"hear from rank {rank}"):
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, rank)
            size = int(length)
            if not 0 < size <= MAX_MESSAGE_BYTES:
                raise RunError(f"rank {rank} announced a message of {size} bytes, at most {MAX_MESSAGE_BYTES} are read")
            message = torch.empty(size, dtype=torch.uint8)
            dist.recv(message, rank)
        return message.numpy().tobytes()

    def shard(self, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """See `Ranks.shard`: FSDP2, a group of parameters per block and one for the rest."""
        # Outputs that are views must not be changed in place: FSDP2 says so once per block. Policies do not.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = DeviceMesh.from_group(self._data, self._device.type)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        self.sharded = True

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """See `Ranks.average_gradients`. Sharded gradients are averaged already. A parameter that had no part in the
        loss of any rank keeps no gradient."""
        if self.sharded:
            return
        with self._together("average gradients"):
            used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
            used = used.to(self._device)
            dist.all_reduce(used, dist.ReduceOp.MAX, group=self._data)
            gradients = []
            for parameter, there in zip(parameters, used.tolist(), strict=True):
                if there and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if parameter.grad is not None:
                    gradients.append(parameter.grad)
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat, group=self._data)
                flat /= self.size
                for gradient, mean in zip(bucket, torch.split(flat, [one.numel() for one in bucket]), strict=True):
                    gradient.copy_(mean.view_as(gradient))

    def mean(self, value: Tensor) -> Tensor:
        """See `Ranks.mean`."""
        total = value.detach().clone()
        with self._together("average the loss"):
            dist.all_reduce(total, group=self._data)
        return total / self.size

    def whole(self, tensor: Tensor) -> Tensor:
        """See `Ranks.whole`."""
        if not isinstance(tensor, DTensor):
            return tensor
        with self._together("gather a tensor"):
            return tensor.full_tensor()

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """See `Ranks.collect`: what was gathered lies in processor memory, so that a device holds one at a time."""
        if not self.sharded:
            return dict(tensors)
        kept = {}
        for name, tensor in tensors:
            found = self.whole(tensor.detach())
            if not self.rank:
                kept[name] = found.cpu()
        return kept

    def distribute(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Ranks.distribute`; one tensor at a time. Names are rank 0's, which are to be those of `like`."""
        described = self._say(tensors)
        found = {}
        for name, (dtype, shape) in described.items():
            if name not in like:
                raise RunError(f"rank 0 has a tensor {name}, rank {self.rank} has none: start all with the same code")
            whole = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
            if not self.rank:
                whole.copy_(tensors[name])
            with self._together(f"broadcast {name}"):
                dist.broadcast(whole, 0, group=self._data)
            model = like[name]
            found[name] = whole
            if isinstance(model, DTensor) and shape:
                found[name] = distribute_tensor(whole, model.device_mesh, model.placements, src_data_rank=None)
        return found

    def _say(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Names, types and shapes of rank 0's tensors."""
        if self.rank:
            return msgspec.msgpack.decode(self.receive(0), type=dict[str, tuple[str, tuple[int, ...]]])
        described = {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()
        }
        for rank in range(1, self.size):
            self.send(rank, msgspec.msgpack.encode(described))
        return described

    def fail(self, reason: str) -> None:
        """Leave the reason why this rank ends, for the others to read; the first one counts. Does not wait for them:
        their connections to this process break when it ends."""
        with suppress(RuntimeError):  # whoever kept the store is gone: nobody can be told
            self._store.compare_set(_LAST_WORDS, "", f"rank {self.rank}: {reason}")

    def close(self) -> None:
        """Part in peace; every rank has to."""
        with self._together("part"):
            dist.barrier()
            dist.destroy_process_group()

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Say in words that another rank has ended, and why if it left word."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            first_line = str(error).partition("\n")[0]
            why = self._last_words() or f"another rank is dead or does not answer ({first_line})"
            raise RunError(f"rank {self.rank} could not {what}: {why}") from error

    def _last_words(self) -> str:
        try:
            self._store.wait([_LAST_WORDS], timedelta(seconds=_LAST_WORDS_S))
            return f"another rank has ended ({self._store.get(_LAST_WORDS).decode(errors='replace')})"
        except (AttributeError, RuntimeError):
            return ""  # it was killed, or whoever kept the store was


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type in a row, in pieces of at least one tensor and about `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(one.nbytes for one in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
