"""How rank 0 leads: it says what to learn, gathers what came of it, and says when it is over.

Alone    one process: nobody to lead
Crew     rank 0 of several; the others run `sop.learner.follower.follow`
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sop.buffer import BatchLoader
from sop.buffer.jobs import BatchPlan, part_of
from sop.core.experience import Batch, Share, shared_hash
from sop.learner.draws import LearnedBatch
from sop.learner.messages import Collect, Finish, Learn, Message, Part, Restore, Waiting, decode_learned, encode

if TYPE_CHECKING:
    from sop.learner.process_group import ManyRanks

Losses = npt.NDArray[np.float32]
ALIVE_S = 5.0
"""Seconds between two signs of life while there is nothing to learn."""


class Lead(Protocol):
    """Rank 0's use of it:

    batch = lead.next_batch(generator, lr_factor)     # the part of this rank; the others get theirs
    losses = algorithm.loss(policy, batch, generator)
    optimization.step(losses, lr_factor)              # every rank
    whole, losses = lead.learned(batch, losses)       # what all ranks learned from, in the order of the draw
    """

    @property
    def whole_weights(self) -> bool:
        """Whether this rank has all weights, so that the policy can be read and used here."""
        ...

    @property
    def stop_asked(self) -> bool:
        """Whether another rank was asked to end; then all do."""
        ...

    def next_batch(self, generator: torch.Generator, lr_factor: float) -> Batch:
        """What this rank learns from next; blocks for its payload and raises like `BatchLoader.next`."""
        ...

    def learned(self, batch: Batch, losses: Tensor) -> tuple[Batch | LearnedBatch, Losses]:
        """The whole batch and its losses [B], float32; blocks for the others."""
        ...

    @property
    def followers(self) -> int:
        """Other ranks."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Before `Optimization.load_state`: the others call it too."""
        ...

    def collect(self, *, averaged: bool, names: Collection[str] | None = None) -> None:
        """Before `Optimization.averaged` or `tensors`: the others call it too, where it takes all of them."""
        ...

    def waiting(self) -> None:
        """There is nothing to learn; call it as often as you like."""
        ...

    def finish(self) -> None:
        """The learner ends well."""
        ...


class Alone:
    """`Lead` of a process that learns alone.

    Args:
        loader: gives the batches.
    """

    stop_asked = False
    whole_weights = True
    followers = 0

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader

    def next_batch(self, generator: torch.Generator, lr_factor: float) -> Batch:  # noqa: ARG002
        """The next batch."""
        return self._loader.next()

    def learned(self, batch: Batch, losses: Tensor) -> tuple[Batch, Losses]:
        """The same, as an array."""
        return batch, losses.detach().float().cpu().numpy()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nobody to tell."""

    def collect(self, *, averaged: bool, names: Collection[str] | None = None) -> None:
        """Nobody to tell."""

    def waiting(self) -> None:
        """Nobody to tell."""

    def finish(self) -> None:
        """Nobody to tell."""


class Crew:
    """`Lead` of several ranks.

    Args:
        loader: draws whole batches and fetches the first of `ranks.size` parts.
        ranks: this rank is 0.
        part: windows of a batch per rank.
        clock: monotonic seconds.
    """

    def __init__(
        self, loader: BatchLoader, ranks: "ManyRanks", part: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._loader = loader
        self._ranks = ranks
        self._part = part
        self._clock = clock
        self._spoke_at = clock()
        self._plan: BatchPlan | None = None
        self.followers = ranks.size - 1
        self.stop_asked = False

    @property
    def whole_weights(self) -> bool:
        """See `Lead.whole_weights`."""
        return not self._ranks.sharded

    def next_batch(self, generator: torch.Generator, lr_factor: float) -> Batch:
        """See `Lead.next_batch`: tells every follower its part of this batch and of those that come next."""
        due, ahead = self._loader.due(), self._loader.ahead()
        self._plan = due.plan
        if due.plan is None:
            return due.batch()  # raises why there is no plan
        total, state = len(due.plan.windows), generator.get_state().numpy().tobytes()
        for rank in self._followers():
            first = rank * self._part
            learn = Learn(
                part=self._part_of(due.plan, rank),
                ahead=tuple(self._part_of(plan, rank) for plan in ahead),
                first=first,
                total=total,
                generator=state,
                lr_factor=lr_factor,
            )
            self._ranks.send(rank, encode(learn))
        self._spoke_at = self._clock()
        return shared(due.batch(), 0, total)

    def learned(self, batch: Batch, losses: Tensor) -> tuple[LearnedBatch, Losses]:
        """See `Lead.learned`."""
        plan = self._plan
        assert plan is not None  # noqa: S101 - `next_batch` gave the batch
        found = [losses.detach().float().cpu().numpy()]
        versions, hashes = [batch.policy_version], [batch.content_hash]
        for rank in self._followers():
            answer, its_losses, its_versions = decode_learned(self._ranks.receive(rank), rank, self._part)
            self.stop_asked |= answer.stop
            found.append(its_losses)
            versions.append(its_versions)
            hashes.append(answer.content_hash)
        whole = LearnedBatch(
            windows=plan.windows,
            loss_weight=plan.loss_weight,
            advantage_indicator=plan.advantage_indicator,
            label_version=plan.label_version,
            policy_version=np.concatenate(versions),
            content_hash=shared_hash(hashes),
        )
        return whole, np.concatenate(found)

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Lead.restore`."""
        self._tell(Restore(state=state))

    def collect(self, *, averaged: bool, names: Collection[str] | None = None) -> None:
        """See `Lead.collect`: every rank has all weights unless they are sharded."""
        if self._ranks.sharded:
            self._tell(Collect(averaged=averaged, names=None if names is None else tuple(names)))

    def waiting(self) -> None:
        """See `Lead.waiting`: a sign of life every `ALIVE_S`."""
        if self._clock() - self._spoke_at >= ALIVE_S:
            self._tell(Waiting())

    def finish(self) -> None:
        """See `Lead.finish`."""
        self._tell(Finish())

    def _tell(self, message: Message) -> None:
        data = encode(message)
        for rank in self._followers():
            self._ranks.send(rank, data)
        self._spoke_at = self._clock()

    def _followers(self) -> range:
        return range(1, self._ranks.size)

    def _part_of(self, plan: BatchPlan, rank: int) -> Part:
        return Part.of(part_of(plan, rank * self._part, (rank + 1) * self._part))


def shared(batch: Batch, first: int, total: int) -> Batch:
    """A batch that is a part of a larger one."""
    return replace(batch, share=Share(first, total))
