"""A rank that follows: it learns from its part of each batch, and knows nothing of the run but what rank 0 says."""

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sop.algorithms import Algorithm
from sop.buffer.fetcher import BatchFetcher, relabelled
from sop.buffer.jobs import BatchPlan
from sop.core.experience import Batch
from sop.learner.crew import shared
from sop.learner.messages import Collect, Finish, Learn, Learned, Restore, Waiting, decode, encode
from sop.learner.optimization import Optimization
from sop.policies import TrainablePolicy

if TYPE_CHECKING:
    from sop.learner.process_group import ManyRanks


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowerParts:
    """What a follower runs on; made in `sop.wiring`."""

    policy: TrainablePolicy
    algorithm: Algorithm
    optimization: Optimization
    fetcher: BatchFetcher


class PartLoader:
    """Fetches parts ahead of time. Results do not depend on what was expected.

    Args:
        fetcher: makes batches of plans.
    """

    def __init__(self, fetcher: BatchFetcher) -> None:
        self._fetcher = fetcher
        self._coming: dict[tuple[object, ...], Future[Batch]] = {}

    def expect(self, plans: Iterable[BatchPlan]) -> None:
        """Begin with what is new among these; forget what is no longer expected."""
        before, self._coming = self._coming, {}
        for plan in plans:
            name = _name(plan)
            if name not in self._coming:
                self._coming[name] = before.pop(name) if name in before else self._fetcher.submit(plan)
        for future in before.values():
            future.cancel()

    def take(self, plan: BatchPlan) -> Batch:
        """The batch of a plan, with its labels; blocks until it is there. Raises like `BatchFetcher.load`."""
        coming = self._coming.pop(_name(plan), None)
        return self._fetcher.load(plan) if coming is None else relabelled(coming.result(), plan)


def follow(parts: FollowerParts, ranks: "ManyRanks", stop: threading.Event) -> None:
    """Do what rank 0 says until it says that it is over (blocking).

    Args:
        parts: what to work with.
        ranks: this rank is not 0.
        stop: is told to rank 0, which then ends all; until then this rank goes on.

    Raises:
        RunError: another rank has ended.
        InvalidRecord, NotFound, StoreUnavailable: a payload cannot be had.
    """
    loader = PartLoader(parts.fetcher)
    while True:
        match decode(ranks.receive(0)):
            case Learn() as order:
                ranks.send(0, encode(_learn(parts, loader, order, stop)))
            case Restore() as order:
                parts.optimization.load_state({}, order.state)
            case Collect(averaged=True) as order:
                parts.optimization.averaged(order.names)
            case Collect():
                parts.optimization.tensors()
            case Waiting():
                pass
            case Finish():
                return


def _learn(parts: FollowerParts, loader: PartLoader, order: Learn, stop: threading.Event) -> Learned:
    plan = order.part.plan()
    loader.expect([plan, *(part.plan() for part in order.ahead)])
    batch = shared(loader.take(plan), order.first, order.total)
    generator = torch.Generator()
    generator.set_state(torch.frombuffer(bytearray(order.generator), dtype=torch.uint8))
    losses = parts.algorithm.loss(parts.policy, batch, generator)
    parts.optimization.step(losses, order.lr_factor)
    return Learned.of(batch, losses.detach().float().cpu().numpy(), stop=stop.is_set())


def _name(plan: BatchPlan) -> tuple[object, ...]:
    """What decides the payload of a plan; labels do not."""
    return plan.keys, *(array.tobytes() for array in (plan.row, plan.windows.start, plan.length))
