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
    sidecars         learner.SidecarWriter  labels per step   an indexed episode     Learner
    prepare batches  buffer.BatchLoader     batches           a draw                 Learner
    decode frames    buffer.decode_worker   frames            a job (own process)    BatchLoader
    publish          broadcast.Publisher    policies          a snapshot             Learner
    checkpoint       learner.checkpoint     saved states      a copy of the state    Learner
    watch the bus    transport.watch.Watch  wake-ups          the bus file           any process

The store is the truth, the bus is a hint: any process can die at any moment and find everything again.
This module wires the parts and calls every constructor (`sop.wiring` those of the learner's side); the parts do not
know each other.
"""

import logging
import os
import re
import zlib
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from threading import Event

import torch

from sop.actor import Actor, ActorReporter, ActorSettings, EpisodeSpool, PinnedPolicy, SpoolWriter, Uploader
from sop.actor.exploration import make_exploration
from sop.actor.uploader import next_stored_sequence
from sop.algorithms import Algorithm, make_algorithm
from sop.broadcast import Subscriber, fetch_policy, prepare_with, published_versions
from sop.buffer import (
    Ingest,
    IngestedEpisode,
)
from sop.buffer.library import StoreLibrary
from sop.config import ExplorationConfig
from sop.core import layout
from sop.core.clock import SystemClock
from sop.core.errors import RunError
from sop.core.experience import Collection
from sop.learner import Learner
from sop.learner.learner import LearnerParts
from sop.learner.pretrain import cosine_after_warmup, pretrain
from sop.learner.warmup import warm_up
from sop.operators import Demonstrator, make_operator
from sop.policies import TrainablePolicy, compute_normalization, conditioned, make_policy, make_spec
from sop.robots import DEPLOYMENT, LAB, make_robot
from sop.runs import Run
from sop.wiring import learner_parts

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorOptions:
    """How one actor of a run differs from the others."""

    actor_id: str
    """Unique in the run; with the same id and folder an actor goes on where it stopped."""
    demonstrate: bool = False
    """Let the expert drive in the lab instead of the policy; episodes go to the offline buffer."""
    rollout: bool = False
    """Act with the base policy alone, whatever else is published; nobody corrects; to the offline buffer."""
    speed: float | None = None
    """Robot seconds per second; None takes the run's."""
    end_sequence: int | None = None
    """Stop before the episode with this number."""

    def __post_init__(self) -> None:
        if self.rollout != self.actor_id.startswith(layout.BASE_ACTOR):
            raise ValueError(f"ids that begin with {layout.BASE_ACTOR} are for --rollout alone, got {self.actor_id!r}")
        if not self.demonstrate and self.actor_id.startswith(layout.LAB_ACTOR):
            raise ValueError(
                f"ids that begin with {layout.LAB_ACTOR} are for --demonstrate alone: no {self.actor_id!r}"
            )


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
        subscriber: Subscriber | PinnedPolicy | None = None
        prepare, operator = prepare_with(make_policy), config.operator
        explored = ExplorationConfig() if demonstrate else config.exploration
        if options.rollout:
            subscriber = PinnedPolicy(run.store, 0, robot.embodiment, prepare=prepare, clock=clock)
            operator, explored = replace(operator, kind="none"), config.rollout_exploration
        elif not demonstrate:
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
            Demonstrator(robot) if demonstrate else make_operator(operator, robot),
            writer,
            next_sequence=next_sequence,
            clock=clock,
            subscriber=subscriber,
            exploration=make_exploration(explored, robot.embodiment),
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
            parts.books.index(_prepared(run, parts))
        else:
            learner.restore(checkpoint)
        del checkpoint  # a copy of all weights and of the index
        parts.ingest.start()
        learner.run(stop)


def run_warmup(run: Run, stop: Event) -> None:
    """Get an algorithm ready that needs it, before the fleet starts: prepare it, install its indicator, publish
    version 1 and leave a checkpoint, from which the fleet's learner goes on (blocking; all processor threads).

    Done once: with a checkpoint in the store only what is missing of the result is published.

    Raises:
        RunError: it was stopped (nothing is left in the store; start it again), or the algorithm cannot work with
            the episodes that there are.
    """
    config = run.config.learner
    torch.set_num_threads(os.cpu_count() or 1)
    policy, algorithm = make_learner_policy(run)
    with learner_parts(run, policy, algorithm, config) as parts:
        learner = Learner(parts, config, target_episodes=None)
        checkpoint = parts.checkpoints.newest()
        if checkpoint is None:
            warm_up(learner, parts, _prepared(run, parts), stop, batch_size=config.batch_size)
        elif not parts.publisher.last_published:  # stopped between the checkpoint and version 1
            learner.restore(checkpoint)
            learner.publish()


def _prepared(run: Run, parts: LearnerParts) -> list[IngestedEpisode]:
    """The episodes that were there before the fleet, in the order of their keys, after the algorithm has learned
    from them what it needs for its first opinion; the learner indexes them next."""
    episodes = parts.ingest.take(_before_fleet(run))
    for episode in episodes:
        parts.payloads.put(str(episode.key), episode.encoded)
    library = StoreLibrary((str(episode.key) for episode in episodes), parts.payloads)
    parts.algorithm.prepare(library, parts.policy)
    return episodes


def run_pretraining(run: Run, stop: Event) -> None:
    """Make the base policy from the lab's demonstrations and publish it as version 0 (blocking).

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
    """The base policy of a run with what the run's algorithm needs of it beside, ready to be trained, and the
    algorithm.

    Raises:
        NotFound: no base policy is published yet.
        ValueError: the algorithm changes the policy's tensors in a way that cannot be published.
    """
    manifest, weights = fetch_policy(run.store, 0)
    policy = make_policy(manifest.spec, seed=run.config.seed)
    policy.load(weights, 0)
    settings = run.config.algorithm_settings
    algorithm = make_algorithm(run.config.algorithm, settings, run.manifest.embodiment.control_hz)
    made = conditioned(policy, algorithm.policy_settings, run.config.seed)
    _require_publishable(set(weights), set(made.module.state_dict()), run.config.learner.freeze)
    return made, algorithm


def _require_publishable(base: set[str], names: set[str], frozen: str) -> None:
    """What a published policy does not bring along is taken from the base: it must be there, and wanted."""
    if unwanted := sorted(base - names):
        raise ValueError(
            f"the base policy has {unwanted[0]}, which the algorithm's policy lacks: robots would refuse it; take the "
            "indicator that the base was made with, or another base"
        )
    missing = sorted(name for name in names - base if frozen and re.search(frozen, name))
    if missing:
        raise ValueError(
            f"learner.freeze: {frozen!r} matches {missing[0]}, which the base policy lacks: it has to be trained"
        )


def _before_fleet(run: Run) -> list[str]:
    """Keys of demonstrations and base rollouts, sorted."""
    return sorted(key for key in run.store.keys(f"{layout.DEMONSTRATIONS}/") if layout.from_lab(key))


def _lab_episodes(run: Run) -> list[str]:
    return sorted(run.store.keys(f"{layout.DEMONSTRATIONS}/{layout.LAB_ACTOR}"))


def _open_spool(run: Run, options: ActorOptions) -> tuple[EpisodeSpool, int]:
    """The actor's spool and its next sequence number; the store knows it too, should the disk be new."""
    folder = layout.DEMONSTRATIONS if options.demonstrate or options.rollout else layout.EPISODES
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
