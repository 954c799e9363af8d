"""One arm's training: the learner's own parts on a recorded stream, published to a store of its own.

stream's store --- episodes, base policy ---> Learner (sampler, loader, rule, optimizer) ---> <arm>/store
Replay: one episode every few learner steps
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import msgspec

from sop.broadcast import PolicyFacts, Publisher, fetch_manifest, fetch_policy, published_versions
from sop.buffer import (
    Ingest,
    IngestedEpisode,
    labels_id,
    open_payloads,
)
from sop.buffer.library import StoreLibrary
from sop.config import LearnerConfig
from sop.core import layout
from sop.core.experience import Collection
from sop.core.lineage import Lineage
from sop.core.policy import Weights
from sop.experiments.plan import Arm, Kind, Plan
from sop.experiments.rules import GivenValues, make_base_rule, make_rule
from sop.experiments.stream import Replay, Stream, load
from sop.learner import Learner
from sop.learner.learner import LearnerParts
from sop.learner.optimization import constant_after_warmup
from sop.learner.pretrain import cosine_after_warmup, pretrain
from sop.learner.warmup import warm_up
from sop.policies import TrainablePolicy, conditioned, make_policy
from sop.transport import ObjectStore, default_bus_url, open_bus, open_store
from sop.wiring import Places, assemble

_NEVER = 10**9
STORE = "store"
"""Folder of an arm's policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training left behind, beside the policies."""

    versions: tuple[int, ...]
    """In the order of publishing; the first is what the stream began with."""
    warmup_steps: int
    steps: int
    """Learner steps in all."""


class StepByStep(Publisher):
    """Writes every snapshot before the learner goes on, so that none is replaced by a newer one."""

    def publish(self, weights: Weights, facts: PolicyFacts, lineage: Lineage | None = None) -> None:
        """As `publish_now`: blocks."""
        self.publish_now(weights, facts, lineage)


def train_arm(stream: Stream, arm: Arm, plan: Plan, folder: Path, *, base: ObjectStore, values: Path) -> Trained:
    """Train one arm from its base policy to the end of the cool-down (blocking).

    Args:
        stream: what it learns from.
        arm: how.
        plan: numbers.
        folder: of the arm; an unfinished training in it is thrown away.
        base: store whose version 0 is the arm's base policy.
        values: folder in which the values of episodes are kept.
    """
    steps = plan.learner_steps(len(stream.online))
    config = replace(learner_config(stream.run.config.learner, plan), offline_steps=steps)
    rule = make_rule(arm, plan, stream.run.config.algorithm_settings, stream.run.manifest.embodiment.control_hz)
    rule.use_values(stream.rule_state, values)
    manifest, weights = fetch_policy(base, 0)
    policy = make_policy(manifest.spec, seed=stream.run.config.seed)
    policy.load(weights, 0)
    policy = conditioned(policy, rule.policy_settings, stream.run.config.seed)
    stop = threading.Event()
    waits = rule.collection is not Collection.NOTHING
    schedule = None if waits else cooled_down(config, steps)
    with arm_parts(stream, folder, policy, rule, config, plan=plan, schedule=schedule) as (parts, replay):
        episodes = _prepare(stream.offline, parts, rule)
        learner = Learner(parts, config, target_episodes=len(stream.online) if waits else None)
        warm_up(learner, parts, episodes, stop, batch_size=config.batch_size)  # cold: no steps
        warmup_steps = learner.step
        replay.begin(lambda: learner.step)
        learner.run(stop)
        store = open_store(str(folder / STORE))
        return Trained(versions=tuple(published_versions(store)), warmup_steps=warmup_steps, steps=learner.step)


def train_base(stream: Stream, kind: Kind, plan: Plan, folder: Path, values: Path) -> Trained:
    """Make a tuned base policy: the recipe of the stream's own base, with an indicator by advantage (blocking)."""
    config, settings = stream.run.config, stream.run.config.pretrain
    rule = make_base_rule(kind, plan, config.algorithm_settings, stream.run.manifest.embodiment.control_hz)
    rule.use_values(stream.rule_state, values)
    fresh = make_policy(fetch_manifest(stream.run.store, 0).spec, seed=config.seed)
    policy = conditioned(fresh, rule.policy_settings, config.seed)
    loop = replace(
        learner_config(config.learner, plan),
        lr=settings.lr,
        batch_size=settings.batch_size,
        offline_steps=settings.steps,
        publish_every=_NEVER,
    )
    schedule = cosine_after_warmup(settings.steps)
    with arm_parts(stream, folder, policy, rule, loop, plan=plan, schedule=schedule) as (parts, _):
        keys = [key for key in stream.offline if key.split("/")[1].startswith(layout.LAB_ACTOR)]
        parts.books.index(_prepare(keys, parts, rule))
        learner = Learner(parts, loop, target_episodes=None)
        version = pretrain(learner, threading.Event())
        return Trained(versions=(version,), warmup_steps=0, steps=learner.step)


def learner_config(recorded: LearnerConfig, plan: Plan) -> LearnerConfig:
    """The stream's learner, single-threaded and at the plan's pace; the data cap is off: the plan is the cap."""
    return replace(
        recorded,
        publish_every=plan.publish_every,
        cooldown_steps=plan.cooldown_steps,
        checkpoint_every=_NEVER,
        max_draws_per_start=0.0,
        keep_policies=_NEVER,
        decode_workers=0,
        threads=1,
    )


def cooled_down(config: LearnerConfig, steps: int) -> Callable[[int], float]:
    """Learning-rate factor of a learner that collects, for one that does not: the same over `steps` steps in all."""
    warm, began = constant_after_warmup(config.warmup_steps), steps - config.cooldown_steps

    def factor(step: int) -> float:
        cooled = min(1.0, max(0, step - began) / max(1, config.cooldown_steps))
        return warm(step) * (1 + (config.cooldown_lr_factor - 1) * cooled)

    return factor


@contextmanager
def arm_parts(
    stream: Stream,
    folder: Path,
    policy: TrainablePolicy,
    rule: GivenValues,
    config: LearnerConfig,
    *,
    plan: Plan,
    schedule: Callable[[int], float] | None = None,
) -> Iterator[tuple[LearnerParts, Replay]]:
    """What an arm's learner runs on, with the ingest that has to `begin`; closed at the end.

    As `sop.wiring.learner_parts`, but episodes come from the stream and policies go to the arm's own store.
    """
    shutil.rmtree(folder / STORE, ignore_errors=True)
    store = open_store(str(folder / STORE))
    with ExitStack() as stack:
        bus = stack.enter_context(closing(open_bus(default_bus_url(str(folder / STORE)), owner=True)))
        payloads = open_payloads(stream.run.store, folder / "cache", memory_bytes=1 << 30, disk_bytes=0)
        stack.enter_context(closing(payloads))
        replay = Replay(stream.online, partial(load, payloads=payloads), plan.steps_per_episode)
        places = Places(
            store=store,
            payloads=payloads,
            ingest=cast("Ingest", replay),
            publisher=StepByStep(store, bus, keep_policies=config.keep_policies, encoding=config.publish_encoding),
            metrics=folder / "metrics" / "learner.jsonl",
            labels=labels_id(rule.name, msgspec.to_builtins(rule.settings), policy.spec.action_horizon),
            report=lambda _: None,
        )
        yield (
            assemble(stack, stream.run, places, policy, rule, config=config, name=rule.name, schedule=schedule),
            replay,
        )


def _prepare(keys: Sequence[str], parts: LearnerParts, rule: GivenValues) -> list[IngestedEpisode]:
    """The episodes that are there before the stream begins, which the rule has taken note of."""
    episodes = [load(key, parts.payloads) for key in keys]
    rule.prepare(StoreLibrary(keys, parts.payloads), parts.policy)
    return episodes
