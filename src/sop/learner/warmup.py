"""Warm-up: the offline pass that teaches a policy its advantage indicator before the fleet starts.

    what was there before the fleet -> some episodes are held out -> the loop's steps on the others
    every 25 steps, on the same held-out windows, noise and flow times, with the averaged weights (what robots get):
        D         = E||v(positive) - v(null)||^2 / E||v(null)||^2      do the two branches differ?
        null loss = the policy's loss without an indicator             is it still as good as the base?
    installed: D >= warmup_separation and null loss <= the base's * (1 + warmup_null_tolerance)
    checkpoint -> version 1 -> the fleet's learner goes on from the checkpoint

A policy that was just conditioned is the base policy as long as no indicator is given, so the base's loss is what is
measured before the first step. The held-out episodes are indexed like all others at the end.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from sop.algorithms.base import WarmUpSettings
from sop.buffer import AdaptiveSampler, BatchLoader, EpisodeIndex, IngestedEpisode
from sop.config import SamplerConfig
from sop.core.errors import RunError
from sop.core.experience import Batch, Source, Windows
from sop.learner.learner import Learner, LearnerParts
from sop.policies.base import ConditionedPolicy

_log = logging.getLogger(__name__)
CHECK_EVERY = 25
"""Steps between two measurements."""
CHECK_BATCHES = 4
"""Batches that are measured on."""
CHECK_SEED = 1405
"""Of the held-out windows, their noise and flow times: the same at every measurement."""
HELD_OUT = 8
"""One of so many episodes of a task and kind is held out, at least one where there are two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How far the indicator is installed."""

    separation: float
    """D."""
    null_loss: float
    """Mean loss of the null branch."""


class HeldOut:
    """Windows that are measured on, always in the same way.

    Args:
        batches: with payload.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def measure(self, parts: LearnerParts) -> Measured:
        """Measure the policy with its averaged weights; nothing is changed. Blocks for four predictions per batch.

        Raises:
            RunError: the policy has no branches.
        """
        policy, generator = parts.policy, torch.Generator().manual_seed(CHECK_SEED)
        if not isinstance(policy, ConditionedPolicy):
            raise RunError(f"a policy of kind {policy.spec.kind} has no branches to be told apart: take install=cold")
        apart = size = 0.0
        losses: list[float] = []
        with _averaged(parts), torch.no_grad():
            for batch in self._batches:
                velocity = policy.branch_velocities(batch, generator)
                apart += float(np.square(velocity.positive - velocity.null, dtype=np.float64).sum())
                size += float(np.square(velocity.null, dtype=np.float64).sum())
                without = replace(batch, advantage_indicator=None)
                losses += policy.loss(without, generator).detach().double().cpu().tolist()
        return Measured(separation=apart / max(size, 1e-30), null_loss=float(np.mean(losses)))


def warm_up(
    learner: Learner,
    parts: LearnerParts,
    episodes: Sequence[IngestedEpisode],
    stop: threading.Event,
    *,
    batch_size: int,
) -> Measured | None:
    """Install the indicator as the algorithm wishes; leave a checkpoint and version 1 in the store (blocking).

    Args:
        learner: at step 0, its algorithm prepared.
        parts: what it runs on; nothing is indexed yet.
        episodes: what was there before the fleet, to be indexed.
        stop: ends it without a result.
        batch_size: windows per batch that is measured on.

    Returns:
        The last measurement; None when the algorithm wants no steps.

    Raises:
        RunError: it was stopped: nothing is saved or published; or there is nothing to learn from.
    """
    settings = parts.algorithm.warm_up
    parts.publisher.continue_from_step(learner.step)
    found = None
    if settings is None or settings.install != "warmup":
        parts.books.index(episodes)
    else:
        learned_from, held_out = hold_out(episodes)
        parts.books.index(learned_from)
        found = _install(learner, parts, load_held_out(parts, held_out or episodes, batch_size), settings, stop)
        parts.books.index(held_out)
    if stop.is_set():
        raise RunError(f"the warm-up was stopped at step {learner.step}: nothing is installed; start it again")
    parts.checkpoints.save(learner.checkpoint())
    parts.checkpoints.wait()
    learner.publish()
    learner.report("warm", force=True)
    return found


def hold_out(episodes: Sequence[IngestedEpisode]) -> tuple[list[IngestedEpisode], list[IngestedEpisode]]:
    """Episodes to learn from and episodes to measure on: per task and kind the last eighth is held out."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for place, episode in enumerate(episodes):
        groups.setdefault((episode.encoded.task, episode.encoded.policy_version is None), []).append(place)
    chosen = {
        place for group in groups.values() if len(group) > 1 for place in group[-max(1, len(group) // HELD_OUT) :]
    }
    kept = [episode for place, episode in enumerate(episodes) if place not in chosen]
    return kept, [episodes[place] for place in sorted(chosen)]


def load_held_out(parts: LearnerParts, episodes: Sequence[IngestedEpisode], batch_size: int) -> HeldOut:
    """Draw the windows that are measured on from these episodes, of all their tasks alike (blocking).

    Raises:
        RunError: they hold no window.
    """
    index = EpisodeIndex(parts.index.tasks)
    for episode in episodes:
        index.add(parts.books.row(episode))
        parts.payloads.put(str(episode.key), episode.encoded)
    if not any(index.num_starts(task, Source.OFFLINE) for task in range(len(index.tasks))):
        raise RunError(f"the {len(episodes)} episodes to measure the warm-up on hold no window: record more of them")
    sampler = AdaptiveSampler(index, SamplerConfig(), seed=CHECK_SEED)

    def no_draw() -> Windows:
        raise AssertionError("the windows are given")

    horizon = parts.policy.spec.action_horizon
    loader = BatchLoader(index, parts.payloads, parts.algorithm.annotate, no_draw, horizon=horizon, depth=1)
    with closing(loader):
        return HeldOut([loader.load(sampler.draw(batch_size)) for _ in range(CHECK_BATCHES)])


def _install(
    learner: Learner, parts: LearnerParts, held_out: HeldOut, settings: WarmUpSettings, stop: threading.Event
) -> Measured:
    """Take steps until the indicator is installed."""
    base = found = held_out.measure(parts)
    allowed = base.null_loss * (1 + settings.warmup_null_tolerance)
    while not stop.is_set() and learner.step < settings.warmup_max_steps:
        learner.take_step()
        learner.report("warming up")
        if learner.step % CHECK_EVERY and learner.step < settings.warmup_max_steps:
            continue
        found = held_out.measure(parts)
        parts.books.log(
            {
                "warmup/separation": found.separation,
                "warmup/null_loss": found.null_loss,
                "warmup/base_loss": base.null_loss,
            },
            learner.step,
        )
        if found.separation >= settings.warmup_separation and found.null_loss <= allowed:
            return found
    if not stop.is_set():
        _log.warning(
            "the warm-up ends after %d steps without its goal: separation %.4f of %.4f, null loss %.4f, at most %.4f: "
            "the policy may ignore the indicator, or have lost some of what the base could do",
            learner.step,
            found.separation,
            settings.warmup_separation,
            found.null_loss,
            allowed,
        )
    return found


@contextmanager
def _averaged(parts: LearnerParts) -> Iterator[None]:
    """The policy has its averaged weights inside."""
    module, names = parts.policy.module, set(parts.optimization.unfrozen)
    own = {name: tensor.detach().clone() for name, tensor in module.state_dict().items() if name in names}
    averaged = parts.optimization.averaged()
    module.load_state_dict({name: averaged[name] for name in own}, strict=False)
    try:
        yield
    finally:
        module.load_state_dict(own, strict=False)
