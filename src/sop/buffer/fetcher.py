"""From a plan to a batch: payloads are fetched and cut, here or in a worker process, in the background.

BatchLoader                 plans what the sampler draws, asks a fetcher
a follower of many ranks    is told its part of a plan, asks a fetcher
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from sop.buffer.cache import Payloads
from sop.buffer.jobs import BatchPlan, allocate_fresh, assemble
from sop.buffer.workers import DecodePool
from sop.core.errors import NotFound, StoreUnavailable
from sop.core.experience import Batch, batch_hash


class BatchFetcher:
    """Makes batches of plans. Results do not depend on threads or processes.

    Args:
        cache: payloads by key.
        decode_workers: processes that decode; 0 decodes in a thread of this process. The batches are the same.

    Raises:
        ValueError: worker processes and a cache without files.
    """

    def __init__(self, cache: Payloads, decode_workers: int = 0) -> None:
        if decode_workers and not cache.on_disk:
            raise ValueError("worker processes read files: use a cache on disk, or decode_workers=0")
        self._cache = cache
        self._pool = DecodePool(decode_workers) if decode_workers else None
        self._executor = ThreadPoolExecutor(max(1, decode_workers), thread_name_prefix="batch-loader")

    def load(self, plan: BatchPlan) -> Batch:
        """Make a batch now (blocking).

        Raises:
            InvalidRecord, NotFound, StoreUnavailable: a payload cannot be had; names the episode.
            RunError: worker processes die of it.
        """
        if self._pool is None:
            return assemble(plan, [self._cache.get(key) for key in plan.keys], allocate_fresh)
        try:
            return self._load_elsewhere(self._pool, plan)
        except (NotFound, StoreUnavailable):  # a worker looks once; `holding` waits for a store that is away
            return self._load_elsewhere(self._pool, plan)

    def submit(self, plan: BatchPlan) -> "Future[Batch]":
        """Make a batch in the background; the future raises like `load`."""
        return self._executor.submit(self.load, plan)

    def close(self) -> None:
        """Stop threads and processes; what is on its way is dropped. Batches stay valid. Idempotent."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()

    def _load_elsewhere(self, pool: DecodePool, plan: BatchPlan) -> Batch:
        with self._cache.holding(plan.keys) as paths:
            return pool.load(plan, paths)


def relabelled(batch: Batch, plan: BatchPlan) -> Batch:
    """A batch of the same windows with the labels of `plan`; the batch itself when it has them."""
    if _same_labels(batch, plan):
        return batch
    labelled = replace(
        batch,
        loss_weight=plan.loss_weight,
        advantage_indicator=plan.advantage_indicator,
        label_version=plan.label_version,
    )
    return replace(labelled, content_hash=batch_hash(labelled))


def _same_labels(batch: Batch, plan: BatchPlan) -> bool:
    one, other = batch.advantage_indicator, plan.advantage_indicator
    same = one is other if one is None or other is None else np.array_equal(one, other)
    return same and batch.label_version == plan.label_version and np.array_equal(batch.loss_weight, plan.loss_weight)
