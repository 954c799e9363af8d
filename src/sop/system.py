"""THE FILE TO READ FIRST: how the parts make the loop.

     ROBOT - one actor process each                            CLOUD - one learner process
    +---------------------------------------------+          +---------------------------------------------+
    | robot -> policy -> operator? -> safety gate |          | ingest -> online buffer --+                 |
    |   ^                                 |       |          |                           +-> sampler       |
    |   +------------- step <-------------+       | episodes |           offline buffer -+    |   ^         |
    |                                             | -------> |                                v   | losses  |
    | record -> spool (fsync) -> uploader         |  STORE   |                          batch -> algorithm |
    |                                             |    +     |                                      |      |
    | swap at episode end <- stage <- subscriber  |   BUS    |                                      v      |
    |                                             | <------- | publisher <- every 25 steps <- optimizer    |
    +---------------------------------------------+ policies +---------------------------------------------+

The loops, each in one place:

    loop             where                  produces          waits for              unblocked by
    ---------------  ---------------------  ----------------  ---------------------  ----------------
    control, 20 Hz   actor.Actor._act       steps             the next beat          the clock
    episodes         actor.Actor.run        episodes          the first policy       Subscriber
    spool            actor.SpoolWriter      files on disk     a finished episode     the control loop
    upload           actor.Uploader         objects, events   a file in the spool    SpoolWriter
    subscribe        broadcast.Subscriber   staged policies   events, a listing      Publisher
    ingest           buffer.Ingest          checked episodes  events, a listing      Uploader
    learn            learner.Learner.train  gradient steps    a batch, new episodes  BatchLoader
    prepare batches  buffer.BatchLoader     batches           a draw                 Learner
    decode frames    buffer.decode_worker   frames            a job (own process)    BatchLoader
    publish          broadcast.Publisher    policies          a snapshot             Learner
    checkpoint       learner.checkpoint     saved states      a copy of the state    Learner
    watch the bus    transport.watch.Watch  wake-ups          the bus file           any process

The store is the truth, the bus is a hint: any process can die at any moment and find everything again.
This module wires the parts and calls every constructor; the parts do not know each other.
"""

import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Event

import msgspec
import torch

from sop.actor import Actor, ActorReporter, ActorSettings, EpisodeSpool, SpoolWriter, Uploader
from sop.actor.uploader import next_stored_sequence
from sop.algorithms import Algorithm, make_algorithm
from sop.broadcast import Publisher, Subscriber, fetch_policy, prepare_with, published_versions
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
from sop.buffer.loader import Annotate
from sop.config import LearnerConfig
from sop.core import layout
from sop.core.clock import SystemClock
from sop.core.codec import content_hash, decode
from sop.core.errors import RunError, StoreUnavailable
from sop.core.events import TOPIC_LEARNER, LearnerReported, encode_event
from sop.core.experience import Collection
from sop.learner import Bookkeeping, CheckpointStore, Learner, Optimization
from sop.learner.learner import LearnerParts
from sop.learner.optimization import constant_after_warmup
from sop.learner.pretrain import cosine_after_warmup, pretrain
from sop.metrics import JsonlSink
from sop.operators import Demonstrator, make_operator
from sop.policies import TrainablePolicy, compute_normalization, freeze, make_policy, make_spec
from sop.provenance import code_version
from sop.robots import DEPLOYMENT, LAB, make_robot
from sop.runs import Run
from sop.transport import EventBus

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorOptions:
    """How one actor of a run differs from the others."""

    actor_id: str
    """Unique in the run; with the same id and folder an actor goes on where it stopped."""
    demonstrate: bool = False
    """Let the expert drive in the lab instead of the policy; episodes go to the offline buffer."""
    speed: float | None = None
    """Robot seconds per second; None takes the run's."""
    end_sequence: int | None = None
    """Stop before the episode with this number."""


def run_actor(run: Run, options: ActorOptions, stop: Event) -> None:
    """One robot's process: act until `stop` is set (blocking).

    Everything recorded is in the store at the end, or waits in the spool for the next start.
    """
    torch.set_num_threads(1)
    config, clock, demonstrate = run.config, SystemClock(), options.demonstrate
    spool, next_sequence = _open_spool(run, options)
    with ExitStack() as stack:
        robot = stack.enter_context(closing(make_robot(config.robot)))
        bus = stack.enter_context(run.bus())
        subscriber = None
        if not demonstrate:
            prepare = prepare_with(make_policy)
            subscriber = stack.enter_context(closing(Subscriber(run.store, bus, robot.embodiment, prepare=prepare)))
        uploader = Uploader(spool, run.store, bus, clock)
        writer = SpoolWriter(spool, lambda _: uploader.wake())
        reporter = stack.enter_context(closing(ActorReporter(bus, clock)))
        stack.callback(_close_uploader, uploader, options.actor_id)
        stack.enter_context(closing(writer))
        actor = Actor(
            _actor_settings(run, options),
            robot,
            robot.embodiment,
            Demonstrator(robot) if demonstrate else make_operator(config.operator, robot),
            writer,
            next_sequence=next_sequence,
            clock=clock,
            subscriber=subscriber,
            on_swap=reporter.swapped,
        )
        uploader.start()
        reporter.start(actor, spool, uploader, subscriber)
        actor.run(stop)


def run_learner(run: Run, stop: Event) -> None:
    """The learner's process: train until the run's episodes are learned from or `stop` is set (blocking)."""
    config = run.config
    torch.set_num_threads(config.learner.threads)
    policy, algorithm = make_learner_policy(run)
    with learner_parts(run, policy, algorithm, config.learner) as parts:
        target = None if algorithm.collection is Collection.NOTHING else config.fleet.episodes
        learner = Learner(parts, config.learner, target_episodes=target)
        checkpoint = parts.checkpoints.newest()
        if checkpoint is None:
            parts.books.index(parts.ingest.take(_lab_episodes(run)))
            algorithm.prepare(decode(run.store.get(key)) for key in _lab_episodes(run))
        else:
            learner.restore(checkpoint)
        del checkpoint  # a copy of all weights and of the index
        parts.ingest.start()
        learner.run(stop)


def run_pretraining(run: Run, stop: Event) -> None:
    """Make the base policy from the demonstrations in the store and publish it as version 0 (blocking).

    Raises:
        RunError: there are no demonstrations, or it was stopped.
    """
    config, settings = run.config, run.config.pretrain
    torch.set_num_threads(os.cpu_count() or 1)
    with run.bus() as bus:
        episodes = Ingest(run.store, bus, run.manifest).take(_lab_episodes(run))
    if not episodes:
        raise RunError("there are no demonstrations to pretrain on: record some with `sop actor --demonstrate`")
    states, actions = ([getattr(episode.encoded, name) for episode in episodes] for name in ("state", "action"))
    spec = make_spec(
        config.policy.kind,
        config.policy.settings,
        run.manifest.embodiment,
        config.policy.execution_horizon,
        compute_normalization(states, actions),
    )
    policy = make_policy(spec, seed=config.seed)
    algorithm = make_algorithm("bc", {}, run.manifest.embodiment.control_hz)
    loop = replace(
        config.learner,
        lr=settings.lr,
        batch_size=settings.batch_size,
        offline_steps=settings.steps,
        publish_every=settings.steps + 1,
        checkpoint_every=settings.steps + 1,
    )
    if 0 not in published_versions(run.store):
        for key in list(run.store.keys(f"{layout.policy_folder(0)}/")):
            run.store.delete(key)  # of a pretraining that was killed: without a manifest nobody believes it
    schedule = cosine_after_warmup(settings.steps)
    with learner_parts(run, policy, algorithm, loop, schedule=schedule, algorithm_name="bc") as parts:
        parts.books.index(episodes)
        pretrain(Learner(parts, loop, target_episodes=None), stop)


def make_learner_policy(run: Run) -> tuple[TrainablePolicy, Algorithm]:
    """The base policy of a run, ready to be trained, and the run's algorithm.

    Raises:
        NotFound: no base policy is published yet.
    """
    manifest, weights = fetch_policy(run.store, 0)
    policy = make_policy(manifest.spec, seed=run.config.seed)
    policy.load(weights, 0)
    settings = run.config.algorithm_settings
    return policy, make_algorithm(run.config.algorithm, settings, run.manifest.embodiment.control_hz)


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
    policy.module.to(choose_device(config.device))
    freeze(policy.module, config.freeze)
    index = EpisodeIndex(run.config.robot.all_tasks)
    sampler = AdaptiveSampler(index, run.config.sampler, seed=run.config.seed)
    horizon = policy.spec.action_horizon
    with ExitStack() as stack:
        bus = stack.enter_context(run.bus(owner=True))
        metrics = stack.enter_context(closing(JsonlSink(run.folder / "metrics" / "learner.jsonl")))
        cache = stack.enter_context(closing(_payload_cache(run, config)))
        ingest = stack.enter_context(closing(Ingest(run.store, bus, run.manifest)))
        loader = _loader(config, index, sampler, cache, annotate=algorithm.annotate, horizon=horizon)
        publisher = Publisher(run.store, bus, keep_policies=config.keep_policies, encoding=config.publish_encoding)
        labels = labels_id(run.config.algorithm, run.config.algorithm_settings, horizon)
        checkpoints = CheckpointStore(run.store, IndexSegments(run.store, labels))
        for part in (publisher, checkpoints, loader):
            stack.enter_context(closing(part))
        yield LearnerParts(
            policy=policy,
            algorithm=algorithm,
            algorithm_name=algorithm_name or run.config.algorithm,
            optimization=Optimization(policy.module, config, schedule or constant_after_warmup(config.warmup_steps)),
            index=index,
            ingest=ingest,
            sampler=sampler,
            loader=loader,
            books=Bookkeeping(
                index, cache, algorithm, sampler, horizon=horizon, metrics=metrics, report=_reporter(bus)
            ),
            publisher=publisher,
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


def _lab_episodes(run: Run) -> list[str]:
    return sorted(run.store.keys(f"{layout.DEMONSTRATIONS}/{layout.LAB_ACTOR}"))


def _open_spool(run: Run, options: ActorOptions) -> tuple[EpisodeSpool, int]:
    """The actor's spool and its next sequence number; the store knows it too, should the disk be new."""
    folder = layout.DEMONSTRATIONS if options.demonstrate else layout.EPISODES
    spool = EpisodeSpool(run.folder / "actors" / options.actor_id / "spool", folder, options.actor_id)
    return spool, max(spool.next_sequence(), next_stored_sequence(run.store, folder, options.actor_id))


def _actor_settings(run: Run, options: ActorOptions) -> ActorSettings:
    config, fleet = run.config, run.config.fleet
    in_lab = options.actor_id.startswith(layout.LAB_ACTOR)
    return ActorSettings(
        actor_id=options.actor_id,
        tasks=config.robot.all_tasks if in_lab else config.robot.fleet_tasks,
        instructions=run.manifest.instructions,
        seed=zlib.crc32(f"{config.seed}/{options.actor_id}".encode()),
        first_task=zlib.crc32(options.actor_id.encode()),
        reset_options={
            "scene": LAB if options.demonstrate else DEPLOYMENT,
            "time_factor": 1.0 if options.demonstrate else fleet.time_factor,
        },
        reset_s=fleet.reset_s,
        speed=fleet.speed if options.speed is None else options.speed,
        end_sequence=options.end_sequence,
    )


def _close_uploader(uploader: Uploader, actor_id: str) -> None:
    waiting = uploader.close()
    if waiting:
        _log.warning("%d episodes wait in the spool; they go out when %s starts again", waiting, actor_id)
