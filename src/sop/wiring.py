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
from sop.buffer.library import IndexLibrary
from sop.buffer.loader import Annotate
from sop.config import LearnerConfig
from sop.core.codec import content_hash
from sop.core.errors import StoreUnavailable
from sop.core.events import TOPIC_LEARNER, LearnerReported, encode_event
from sop.learner import Bookkeeping, CheckpointStore, Optimization
from sop.learner.learner import LearnerParts
from sop.learner.optimization import constant_after_warmup
from sop.learner.sidecars import SidecarWriter
from sop.metrics import JsonlSink
from sop.policies import TrainablePolicy, freeze
from sop.provenance import code_version
from sop.runs import Run
from sop.transport import EventBus, ObjectStore

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
) -> Iterator[LearnerParts]:
    """Everything that a learner's loop runs on; closed at the end. Ingest is not started.

    Args:
        run: where episodes come from and policies go.
        policy: is trained in place.
        algorithm: the learning rule.
        config: numbers of the loop.
        schedule: factor of the learning rate per optimizer step; None is constant after a warm-up.
        algorithm_name: goes into manifests; None takes the run's.
    """
    with ExitStack() as stack:
        bus = stack.enter_context(run.bus(owner=True))
        payloads = stack.enter_context(closing(_payload_cache(run, config)))
        ingest = stack.enter_context(closing(Ingest(run.store, bus, run.manifest)))
        publisher = Publisher(run.store, bus, keep_policies=config.keep_policies, encoding=config.publish_encoding)
        places = Places(
            store=run.store,
            payloads=payloads,
            ingest=ingest,
            publisher=publisher,
            metrics=run.folder / "metrics" / "learner.jsonl",
            labels=labels_id(run.config.algorithm, run.config.algorithm_settings, policy.spec.action_horizon),
            report=_reporter(bus),
        )
        name = algorithm_name or run.config.algorithm
        yield assemble(stack, run, places, policy, algorithm, config=config, name=name, schedule=schedule)


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
) -> LearnerParts:
    """Put a learner together; `stack` closes what it opens, the loader first.

    Args:
        stack: owns what is opened here.
        run: its tasks, sampler and seed.
        places: where from and where to.
        policy, algorithm, config, schedule: as in `learner_parts`.
        name: of the algorithm, in manifests and folders.
    """
    policy.module.to(choose_device(config.device))
    freeze(policy.module, config.freeze)
    index, payloads, horizon = EpisodeIndex(run.config.robot.all_tasks), places.payloads, policy.spec.action_horizon
    sampler = AdaptiveSampler(index, run.config.sampler, seed=run.config.seed)
    metrics = stack.enter_context(closing(JsonlSink(places.metrics)))
    sidecars = stack.enter_context(closing(SidecarWriter(places.store, name)))
    loader = _loader(config, index, sampler, payloads, annotate=algorithm.annotate, horizon=horizon)
    checkpoints = CheckpointStore(places.store, IndexSegments(places.store, places.labels))
    for part in (places.publisher, checkpoints, loader):
        stack.enter_context(closing(part))
    books = Bookkeeping(
        index, payloads, algorithm, sampler, horizon=horizon, metrics=metrics, report=places.report, sidecars=sidecars
    )
    return LearnerParts(
        policy=policy,
        algorithm=algorithm,
        algorithm_name=name,
        optimization=Optimization(policy.module, config, schedule or constant_after_warmup(config.warmup_steps)),
        index=index,
        payloads=payloads,
        library=IndexLibrary(index, payloads),
        ingest=places.ingest,
        sampler=sampler,
        loader=loader,
        books=books,
        publisher=places.publisher,
        checkpoints=checkpoints,
        generator=torch.Generator().manual_seed(run.config.seed),
        config_hash=content_hash(msgspec.json.encode(run.manifest.config)),
        code_version=code_version(),
    )


def _payload_cache(run: Run, config: LearnerConfig) -> Payloads:
    """Where batches get episodes from: the store itself when it is a directory here, else a cache of this machine."""
    memory_bytes, disk_bytes = (int(gb * 1e9) for gb in (config.cache_gb, config.disk_cache_gb))
    return open_payloads(run.store, run.folder / "cache", memory_bytes=memory_bytes, disk_bytes=disk_bytes)


def _loader(
    config: LearnerConfig,
    index: EpisodeIndex,
    sampler: AdaptiveSampler,
    cache: Payloads,
    *,
    annotate: Annotate,
    horizon: int,
) -> BatchLoader:
    size, depth, workers = config.batch_size, config.prefetch, config.decode_workers
    draw = partial(sampler.draw, size)
    return BatchLoader(index, cache, annotate, draw, horizon=horizon, depth=depth, decode_workers=workers)


def _reporter(bus: EventBus) -> Callable[[LearnerReported], None]:
    """Publishes the learner's signs of life; one that cannot be published is dropped."""

    def report(event: LearnerReported) -> None:
        try:
            bus.publish(TOPIC_LEARNER, encode_event(event), event_id=f"{os.getpid()}/{event.utc_ns}")
        except StoreUnavailable as error:
            _log.warning("a report was dropped: %s", error)

    return report


def choose_device(name: str) -> torch.device:
    """The device that `learner.device` names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
