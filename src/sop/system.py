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
This module wires the parts; `sop.wiring` calls the constructors of the learner's side and `sop.robot_wiring` those of
the robot's. The parts do not know each other.
"""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from threading import Event

import torch

from sop.actor import Actor, ActorReporter, SpoolWriter, StepJournal, Uploader
from sop.actor.exploration import make_exploration
from sop.algorithms import Algorithm, make_algorithm
from sop.algorithms.base import Origin, origin_of
from sop.broadcast import published_versions
from sop.buffer import (
    Ingest,
    IngestedEpisode,
)
from sop.buffer.library import StoreLibrary
from sop.buffer.screening import limits_for
from sop.config import ExplorationConfig
from sop.core import layout
from sop.core.clock import SystemClock
from sop.core.episode import Outcome
from sop.core.errors import RunError
from sop.core.experience import Collection, StoredEpisode
from sop.golden import make_publish_gate
from sop.learner import Learner
from sop.learner.follower import follow
from sop.learner.learner import LearnerParts
from sop.learner.pretrain import cosine_after_warmup, pretrain
from sop.learner.publish_gate import PublishGate
from sop.learner.ranks import OneRank, open_ranks, require_one_rank
from sop.learner.warmup import warm_up
from sop.operators import Demonstrator, make_operator
from sop.policies import TrainablePolicy, compute_normalization, conditioned, make_policy, make_spec
from sop.processes import say_at_work
from sop.robot_wiring import ActorOptions, actor_settings, close_uploader, open_gate, open_spool, open_subscriber
from sop.robots import make_robot
from sop.runs import Run
from sop.vouched import fetch_vouched
from sop.wiring import choose_device, follower_parts, learner_parts

__all__ = ["ActorOptions", "run_actor", "run_learner", "run_pretraining", "run_warmup"]


def run_actor(run: Run, options: ActorOptions, stop: Event) -> None:
    """One robot's process: act until `stop` is set (blocking).

    Everything recorded is in the store at the end, or waits in the spool for the next start.
    """
    torch.set_num_threads(1)
    config, clock = run.config, SystemClock()
    with ExitStack() as stack:
        robot = stack.enter_context(closing(make_robot(config.robot)))
        spool, next_sequence = open_spool(run, options, robot.embodiment)
        bus = stack.enter_context(run.bus())
        subscriber = open_subscriber(stack, run, options, robot.embodiment, bus=bus, clock=clock)
        operator, explored = config.operator, ExplorationConfig() if options.demonstrate else config.exploration
        if options.rollout:
            operator, explored = replace(operator, kind="none"), config.rollout_exploration
        uploader = Uploader(spool, run.store, bus, clock)
        writer = SpoolWriter(spool, lambda _: recorded())
        reporter = stack.enter_context(closing(ActorReporter(bus, clock)))
        stack.callback(close_uploader, uploader, options.actor_id)
        journal = stack.enter_context(closing(StepJournal(spool)))
        stack.enter_context(closing(writer))
        actor = Actor(
            actor_settings(run, options),
            robot,
            robot.embodiment,
            Demonstrator(robot) if options.demonstrate else make_operator(operator, robot),
            writer,
            next_sequence=next_sequence,
            clock=clock,
            subscriber=subscriber,
            exploration=make_exploration(explored, robot.embodiment),
            on_swap=reporter.swapped,
            gate=open_gate(run, options, robot.embodiment, clock),
            journal=journal,
        )

        def recorded() -> None:
            uploader.wake()
            if actor.counts.episodes:
                say_at_work()

        uploader.start()
        reporter.start(actor, spool, uploader, subscriber)
        actor.run(stop)


def run_learner(run: Run, stop: Event, *, stays: bool = False) -> None:
    """The learner's process: train until the run's episodes are learned from or `stop` is set (blocking).

    With `stays` only `stop` ends it: when all is learned it says so and indexes what still comes, so that nothing is
    left out of the index that robots send while they go home.

    Started by torchrun it is one of several, which learn together (see `sop.learner.ranks`) and end together.

    Raises:
        RunError: another rank has ended.
        ValueError: the ranks cannot share a batch equally.
    """
    config = run.config.learner
    torch.set_num_threads(config.threads)
    with open_ranks(choose_device(config.device)) as ranks:
        policy, algorithm = make_learner_policy(run)
        if isinstance(ranks, OneRank) or ranks.rank == 0:
            with learner_parts(run, policy, algorithm, config, ranks=ranks) as parts:
                _lead(run, parts, stop, stays)
        else:
            with follower_parts(run, policy, algorithm, config, ranks) as following:
                follow(following, ranks, stop)


def _lead(run: Run, parts: LearnerParts, stop: Event, stays: bool) -> None:
    """What the only rank does, or the first of several."""
    target = None if parts.algorithm.collection is Collection.NOTHING else run.config.fleet.episodes
    gate = _publish_gate(run, parts)
    learner = Learner(replace(parts, gate=gate), run.config.learner, target_episodes=target, stays=stays)
    checkpoint = parts.checkpoints.newest()
    if checkpoint is None:
        parts.books.index(_prepared(run, parts))
        learner.share_state()
    else:
        learner.restore(checkpoint)
    del checkpoint  # a copy of all weights and of the index
    if gate is not None:
        base = learner.weights() | dict(fetch_vouched(run, parts.publisher.last_published or 0)[1])
        gate.start_from(base)
    parts.ingest.start()
    learner.run(stop)


def _publish_gate(run: Run, parts: LearnerParts) -> PublishGate | None:
    """What looks at every version before robots get it; None when the run wants none."""
    count = run.config.learner.golden_observations
    if not count:
        return None
    spare = make_policy(parts.policy.spec, seed=run.config.seed)
    return make_publish_gate(parts.library, spare, parts.algorithm.conditioning, count)


def run_warmup(run: Run, stop: Event) -> None:
    """Get an algorithm ready that needs it, before the fleet starts: prepare it, install its indicator, publish
    version 1 and leave a checkpoint, from which the fleet's learner goes on (blocking; all processor threads).

    Done once: with a checkpoint in the store only what is missing of the result is published.

    Raises:
        RunError: it was stopped (nothing is left in the store; start it again), or the algorithm cannot work with
            the episodes that there are.
    """
    config = run.config.learner
    require_one_rank("--warmup")
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
    from them what it needs for its first opinion; the learner indexes them next.

    Raises:
        RunError: the algorithm needs rollouts of every task of the fleet, and one has none; or it refuses.
    """
    episodes = parts.ingest.take(_before_fleet(run))
    if parts.algorithm.needs_rollouts:
        _require_rollouts(run.config.robot.fleet_tasks, [one.encoded for one in episodes if not one.flags])
    for episode in episodes:
        parts.payloads.put(str(episode.key), episode.encoded)
    library = StoreLibrary((str(episode.key) for episode in episodes if not episode.flags), parts.payloads)
    # One that is in parts cannot be read; this one has the same weights.
    policy = parts.policy if parts.lead.whole_weights else make_learner_policy(run)[0]
    parts.algorithm.prepare(library, policy)
    return episodes


def _require_rollouts(fleet_tasks: Sequence[str], episodes: Iterable[StoredEpisode]) -> None:
    """A task of which the base policy has shown nothing can be judged by the clock alone: there is no failure of it."""
    usable = (one for one in episodes if origin_of(one) is Origin.ROLLOUT and one.outcome is not Outcome.ABORTED)
    tasks = {rollout.task for rollout in usable}
    if missing := [task for task in fleet_tasks if task not in tasks]:
        raise RunError(
            f"the algorithm needs rollouts of the base policy, and of the fleet's tasks {', '.join(missing)} there is "
            "none to learn from; record some: `sop actor RUN --id base-0 --rollout`, or leave these tasks out"
        )


def run_pretraining(run: Run, stop: Event) -> None:
    """Make the base policy from the lab's demonstrations and publish it as version 0 (blocking).

    Raises:
        RunError: there are no demonstrations, or it was stopped.
    """
    config, settings = run.config, run.config.pretrain
    require_one_rank("--pretrain")
    torch.set_num_threads(os.cpu_count() or 1)
    with run.bus() as bus:
        screening = limits_for(run.manifest.simulated)
        episodes = Ingest(run.store, bus, run.manifest, screening=screening).take(_lab_episodes(run))
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
    manifest, weights = fetch_vouched(run, 0)
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
