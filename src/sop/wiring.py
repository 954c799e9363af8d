"""What a learner's loop runs on: every constructor of the learner's side, called in one place.

The roles that use it are in `sop.system`.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from sop.algorithms import Algorithm
from sop.broadcast import Publisher
from sop.buffer import (
    AdaptiveSampler,
    BatchLoader,
    EpisodeIndex,
    IndexSegments,
    Ingest,
    Payloads,
    labels_id,
    open_payloads,
)
from sop.buffer.fetcher import BatchFetcher
from sop.buffer.jobs import BatchPlan, part_of
from sop.buffer.library import IndexLibrary
from sop.buffer.loader import Annotate
from sop.buffer.screening import limits_for
from sop.config import LearnerConfig
from sop.core.codec import content_hash
from sop.core.errors import StoreUnavailable
from sop.core.events import TOPIC_LEARNER, LearnerReported, encode_event
from sop.learner import Bookkeeping, CheckpointStore, Optimization
from sop.learner.crew import Alone, Crew
from sop.learner.follower import FollowerParts
from sop.learner.learner import LearnerParts
from sop.learner.lease import LearnerLease
from sop.learner.optimization import constant_after_warmup
from sop.learner.owner import learner_owner
from sop.learner.ranks import OneRank, num_ranks, part_size
from sop.learner.sidecars import SidecarWriter
from sop.metrics import JsonlSink
from sop.policies import TrainablePolicy, freeze, shard_blocks
from sop.processes import say_at_work
from sop.provenance import code_version
from sop.runs import Run, own_signer
from sop.transport import EventBus, ObjectStore

if TYPE_CHECKING:
    from sop.learner.process_group import ManyRanks

_log = logging.getLogger(__name__)


@contextmanager
def learner_parts(
    run: Run,
    policy: TrainablePolicy,
    algorithm: Algorithm,
    config: LearnerConfig,
    *,
    schedule: Callable[[int], float] | None = None,
    algorithm_name: str | None = None,
    ranks: "OneRank | ManyRanks | None" = None,
) -> Iterator[LearnerParts]:
    """Everything that a learner's loop runs on; closed at the end. Ingest is not started.

    Args:
        run: where episodes come from and policies go.
        policy: is trained in place.
        algorithm: the learning rule.
        config: numbers of the loop.
        schedule: factor of the learning rate per optimizer step; None is constant after a warm-up.
        algorithm_name: goes into manifests; None takes the run's.
        ranks: the processes that learn together, of which this one is rank 0; None learns alone.
    """
    with ExitStack() as stack:
        lease = stack.enter_context(_lease(run))
        bus = stack.enter_context(run.bus(owner=True))
        payloads = stack.enter_context(closing(_payload_cache(run, config, rank=0)))
        ingest = Ingest(run.store, bus, run.manifest, screening=limits_for(run.manifest.simulated))
        stack.enter_context(closing(ingest))
        publisher = Publisher(
            run.store,
            bus,
            keep_policies=config.keep_policies,
            signer=own_signer(),
            run=run.manifest.name,
            fence=lease.check,
            encoding=config.publish_encoding,
        )
        places = Places(
            store=run.store,
            payloads=payloads,
            ingest=ingest,
            publisher=publisher,
            metrics=run.folder / "metrics" / "learner.jsonl",
            labels=labels_id(run.config.algorithm, run.config.algorithm_settings, policy.spec.action_horizon),
            report=_reporter(bus),
            fence=lease.check,
        )
        name = algorithm_name or run.config.algorithm
        parts = assemble(
            stack, run, places, policy, algorithm, config=config, name=name, schedule=schedule, ranks=ranks
        )
        yield parts
        parts.lead.finish()


@contextmanager
def follower_parts(
    run: Run, policy: TrainablePolicy, algorithm: Algorithm, config: LearnerConfig, ranks: "ManyRanks"
) -> Iterator[FollowerParts]:
    """Everything that a rank but the first runs on; closed at the end. Arguments as in `learner_parts`."""
    part_size(config.batch_size, ranks.size)
    with ExitStack() as stack:
        payloads = stack.enter_context(closing(_payload_cache(run, config, rank=ranks.rank)))
        fetcher = stack.enter_context(closing(BatchFetcher(payloads, config.decode_workers)))
        optimization = _optimization(policy, config, constant_after_warmup(config.warmup_steps), ranks)
        yield FollowerParts(policy=policy, algorithm=algorithm, optimization=optimization, fetcher=fetcher)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a learner's episodes come from and where everything that it leaves goes."""

    store: ObjectStore
    """Gets checkpoints and sidecars."""
    payloads: Payloads
    ingest: Ingest
    publisher: Publisher
    """Closed with the parts."""
    metrics: Path
    labels: str
    """`labels_id` of the rows of the index."""
    report: Callable[[LearnerReported], None]
    fence: Callable[[], object] | None = None
    """Raises when another learner has taken over; None where there can be no other."""


def assemble(
    stack: ExitStack,
    run: Run,
    places: Places,
    policy: TrainablePolicy,
    algorithm: Algorithm,
    *,
    config: LearnerConfig,
    name: str,
    schedule: Callable[[int], float] | None,
    ranks: "OneRank | ManyRanks | None" = None,
) -> LearnerParts:
    """Put a learner together; `stack` closes what it opens, the loader first.

    Args:
        stack: owns what is opened here.
        run: its tasks, sampler and seed.
        places: where from and where to.
        policy, algorithm, config, schedule, ranks: as in `learner_parts`.
        name: of the algorithm, in manifests and folders.
    """
    ranks = ranks or OneRank()
    optimization = _optimization(policy, config, schedule or constant_after_warmup(config.warmup_steps), ranks)
    index, payloads, horizon = EpisodeIndex(run.config.robot.all_tasks), places.payloads, policy.spec.action_horizon
    sampler = AdaptiveSampler(index, run.config.sampler, seed=run.config.seed)
    metrics = stack.enter_context(closing(JsonlSink(places.metrics)))
    sidecars = stack.enter_context(closing(SidecarWriter(places.store, name)))
    part = part_size(config.batch_size, ranks.size)
    mine = None if ranks.size == 1 else partial(part_of, begin=0, end=part)
    loader = _loader(config, index, sampler, payloads, annotate=algorithm.annotate, horizon=horizon, mine=mine)
    checkpoints = CheckpointStore(places.store, IndexSegments(places.store, places.labels), fence=places.fence)
    for closed in (places.publisher, checkpoints, loader):
        stack.enter_context(closing(closed))
    books = Bookkeeping(
        index, payloads, algorithm, sampler, horizon=horizon, metrics=metrics, report=places.report, sidecars=sidecars
    )
    return LearnerParts(
        policy=policy,
        algorithm=algorithm,
        algorithm_name=name,
        optimization=optimization,
        index=index,
        payloads=payloads,
        library=IndexLibrary(index, payloads, places.ingest.flagged),
        ingest=places.ingest,
        sampler=sampler,
        loader=loader,
        lead=Alone(loader) if isinstance(ranks, OneRank) else Crew(loader, ranks, part),
        books=books,
        publisher=places.publisher,
        checkpoints=checkpoints,
        generator=torch.Generator().manual_seed(run.config.seed),
        config_hash=content_hash(msgspec.json.encode(run.manifest.config)),
        code_version=code_version(),
    )


@contextmanager
def _lease(run: Run) -> Iterator[LearnerLease]:
    """The right to be the learner of a run, until the end.

    Raises:
        RunError: another learner is alive, of this folder or elsewhere.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with learner_owner(run.folder) as owner, LearnerLease(run.store, owner=owner) as lease:
        yield lease


def _optimization(
    policy: TrainablePolicy,
    config: LearnerConfig,
    schedule: Callable[[int], float],
    ranks: "OneRank | ManyRanks",
) -> Optimization:
    """Put the policy where it is trained, in parts if the run says so, and make what trains it."""
    policy.module.to(choose_device(config.device))
    freeze(policy.module, config.freeze)
    if config.parallel == "shard":
        ranks.shard(policy.module, shard_blocks(policy))
    return Optimization(policy.module, config, schedule, ranks)


def _payload_cache(run: Run, config: LearnerConfig, rank: int) -> Payloads:
    """Where batches get episodes from: the store itself when it is a directory here, else a cache of this rank."""
    memory_bytes, disk_bytes = (int(gb * 1e9) for gb in (config.cache_gb, config.disk_cache_gb))
    folder = run.folder / (f"cache-{rank}" if rank else "cache")
    return open_payloads(run.store, folder, memory_bytes=memory_bytes, disk_bytes=disk_bytes)


def _loader(
    config: LearnerConfig,
    index: EpisodeIndex,
    sampler: AdaptiveSampler,
    cache: Payloads,
    *,
    annotate: Annotate,
    horizon: int,
    mine: Callable[[BatchPlan], BatchPlan] | None,
) -> BatchLoader:
    size, depth, workers = config.batch_size, config.prefetch, config.decode_workers
    draw = partial(sampler.draw, size)
    return BatchLoader(
        index,
        cache,
        annotate,
        draw,
        horizon=horizon,
        depth=depth,
        decode_workers=workers,
        part=mine,
        label_bytes=round(config.label_cache_mb * 2**20),
    )


def _reporter(bus: EventBus) -> Callable[[LearnerReported], None]:
    """Publishes the learner's signs of life; one that cannot be published is dropped. Who trains is at work."""

    def report(event: LearnerReported) -> None:
        if event.state == "training":
            say_at_work()
        try:
            bus.publish(TOPIC_LEARNER, encode_event(event), event_id=f"{os.getpid()}/{event.utc_ns}")
        except StoreUnavailable as error:
            _log.warning("a report was dropped: %s", error)

    return report


def choose_device(name: str) -> torch.device:
    """The device that `learner.device` names; with several ranks `auto` and `cuda` are a device of each one's own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and num_ranks() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(name)
