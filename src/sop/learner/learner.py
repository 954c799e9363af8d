"""The learner: Algorithm 1 of SOP, blind to the robot, the policy's architecture and the learning rule.

on event: index the episode              B_on, B_off grow; the algorithm takes note
labels changed? label again              the algorithm's opinion on what is stored
xi_j  <- S_j(B_on u B_off)               adaptive sampler
theta <- G(theta, xi_j)                  the algorithm's loss, one optimizer step
every 25 steps: publish theta            beside the training
"""

import logging
import threading
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sop.algorithms import Algorithm
from sop.broadcast import PolicyFacts, Publisher
from sop.buffer import AdaptiveSampler, BatchLoader, EpisodeIndex, Ingest, IngestedEpisode, Payloads
from sop.config import LearnerConfig
from sop.core.events import ALL_LEARNED
from sop.core.experience import Collection, Library, Source, Windows
from sop.core.policy import Weights
from sop.learner.bookkeeping import Bookkeeping
from sop.learner.checkpoint import Checkpoint, CheckpointStore
from sop.learner.crew import Lead
from sop.learner.memory import release_freed_memory
from sop.learner.optimization import Optimization, StepResult
from sop.learner.publish_gate import PublishGate
from sop.learner.told import Told
from sop.policies import TrainablePolicy

_log = logging.getLogger(__name__)
_ALGORITHM = "algorithm/"
"""Prefix of the algorithm's own arrays in a checkpoint."""
_DRAWS = "draws/"
"""Prefix of the draw log's arrays."""
PAUSE_S = 0.02
"""Sleep while there is nothing new to learn; bounds the extra delay of a new episode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerParts:
    """What the loop runs on; made in `sop.system`."""

    policy: TrainablePolicy
    algorithm: Algorithm
    algorithm_name: str
    optimization: Optimization
    index: EpisodeIndex
    payloads: Payloads
    library: Library
    """What is indexed, for rules that read whole episodes."""
    ingest: Ingest
    sampler: AdaptiveSampler
    loader: BatchLoader
    lead: Lead
    """Gives the batches of `loader` out, to this process or to several."""
    books: Bookkeeping
    publisher: Publisher
    checkpoints: CheckpointStore
    generator: torch.Generator
    """All randomness of the losses."""
    config_hash: str
    code_version: str
    gate: PublishGate | None = None
    """Says what may be published; None lets everything pass."""


class Learner:
    """Trains until it is stopped, or until the run's episodes are collected and learned from.

    Args:
        parts: what it runs on.
        config: numbers of the loop.
        target_episodes: episodes that the fleet collects in this run; None for no end.
        stays: it does not end by itself: when all is learned it indexes what still comes, until it is stopped.
    """

    def __init__(
        self, parts: LearnerParts, config: LearnerConfig, *, target_episodes: int | None, stays: bool = False
    ) -> None:
        self._p = parts
        self._config = config
        self._target = target_episodes
        self._stays = stays
        self._collected_at: int | None = None
        self._last = StepResult(float("nan"), float("nan"), skipped=False)
        self.step = 0
        """Learner steps taken, those of earlier processes included."""

    def run(self, stop: threading.Event) -> None:
        """Train, then leave the last policy and a checkpoint in the store (blocking)."""
        if self._p.publisher.branch is None:
            self._p.publisher.continue_from_step(self.step)
        release_freed_memory()
        self.train(stop)
        self._index(self._p.ingest.finish())
        weights = self.weights()
        if self._may_publish(weights):
            self._publish_now(weights)
        self._p.checkpoints.save(self.checkpoint())
        self._p.checkpoints.wait()
        self.report("done" if self._done() else "stopped", force=True)

    def publish(self) -> int:
        """Publish the weights as they are, whatever the gate would say; returns their version (blocking)."""
        return self._publish_now(self.weights())

    def train(self, stop: threading.Event) -> None:
        """Algorithm 1. Blocks until all is learned (and beyond, when it stays) or `stop` is set."""
        parts, config = self._p, self._config
        while not stop.is_set():
            if (done := self._done()) and not self._stays:
                return
            self._index(parts.ingest.drain())
            if done or self._nothing_new():
                self.report(ALL_LEARNED if done else "waiting for episodes")
                parts.lead.waiting()
                with parts.books.time.pausing():
                    stop.wait(PAUSE_S)
                continue
            self.take_step()
            if parts.lead.stop_asked:
                stop.set()
            if self.step % config.publish_every == 0:
                weights = self.weights()
                if self._may_publish(weights):
                    parts.publisher.publish(weights, self._facts(), parts.books.draws.hand_over())
            if self.step % config.checkpoint_every == 0:
                parts.checkpoints.save(self.checkpoint())
            self.report("training")

    def take_step(self) -> None:
        """One step of learning: what `train` repeats. Blocks for the batch, and for an algorithm that refreshes."""
        parts, lr_factor = self._p, self._lr_factor()
        if parts.algorithm.refresh(self.step, parts.library):
            parts.loader.relabel()
        with parts.books.time.waiting():
            batch = parts.lead.next_batch(parts.generator, lr_factor)
        losses = parts.algorithm.loss(parts.policy, batch, parts.generator)
        self._last = parts.optimization.step(losses, lr_factor)
        learned, seen = parts.lead.learned(batch, losses)
        parts.sampler.observe(learned.windows, seen)
        self.step += 1
        parts.books.learned(self.step, learned, parts.publisher.last_published)
        if self._last.skipped:
            _log.warning("step %d was not finite and changed nothing: %s", self.step, self._names(learned.windows))

    def report(self, state: str, *, force: bool = False) -> None:
        """Once a second (or now): tell the metrics and whoever watches how it goes; `state` is a few words."""
        self._p.books.report(
            state,
            self.step,
            loss=self._last.loss,
            grad_norm=self._last.grad_norm,
            newest_version=self._p.publisher.last_published,
            quarantined=self._p.ingest.num_quarantined,
            extra=self._extra,
            force=force,
        )

    def checkpoint(self) -> Checkpoint:
        """The whole state after the current step."""
        parts = self._p
        pending = [
            {field.name: getattr(windows, field.name).tolist() for field in fields(windows)}
            for windows in parts.loader.pending()
        ]
        learned = parts.algorithm.state_dict()
        arrays = {name: value for name, value in learned.items() if isinstance(value, np.ndarray)}
        state: dict[str, Any] = {
            "sampler": parts.sampler.state_dict(),
            "pending": pending,
            "optimization": parts.optimization.state_dict(),
            "algorithm": {name: value for name, value in learned.items() if name not in arrays},
            "fresh_draws": parts.books.fresh_draws,
            "collected_at": self._collected_at,
            "told": parts.books.told.state(),
            "branch": parts.publisher.branch,
        }
        if parts.gate is not None:
            state["publish_gate"] = parts.gate.state_dict()
        parts.lead.collect(averaged=False)
        tensors = parts.optimization.tensors() | {"generator": parts.generator.get_state()}
        tensors |= {f"{_ALGORITHM}{name}": torch.from_numpy(value) for name, value in arrays.items()}
        parts.books.draws.forget(parts.publisher.published_step)
        tensors |= {f"{_DRAWS}{name}": torch.tensor(value) for name, value in parts.books.draws.arrays().items()}
        return Checkpoint(self.step, tensors, state, parts.checkpoints.segments.cut(parts.index))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on exactly where `checkpoint` was taken; fetches no episode but those on their way. Call before `run`.

        The algorithm gets its state after the rows, so that it is told of no episode twice when these are rebuilt, then
        what came later, and before the batches on their way are labelled again, so that they get the labels they had.

        Without usable rows of the index all episodes are fetched and indexed again (blocking), in another order:
        nothing is lost, but the batches on their way are dropped and the draws are others from here on.
        """
        parts, state = self._p, checkpoint.state
        late = self._restore_rows(checkpoint)
        exact = late is None
        parts.algorithm.load_state_dict({**state["algorithm"], **_arrays(checkpoint, _ALGORITHM)})
        for key in late or ():
            parts.books.index(parts.ingest.take([key]))
        parts.books.fresh_draws = state["fresh_draws"]
        parts.lead.restore(state["optimization"])
        parts.optimization.load_state(checkpoint.tensors, state["optimization"])
        if parts.gate is not None and "publish_gate" in state:
            parts.gate.load_state_dict(state["publish_gate"])
        branch = state.get("branch")
        published_step = parts.publisher.continue_from_step(
            checkpoint.learner_step, None if branch is None else (int(branch[0]), int(branch[1]))
        )
        parts.books.draws.restore(_arrays(checkpoint, _DRAWS), published_step, same_rows=exact)
        parts.sampler.load_state_dict(state["sampler"])
        parts.generator.set_state(checkpoint.tensors["generator"])
        parts.loader.restore([_windows(saved) for saved in state["pending"]] if exact else [])
        self.step = checkpoint.learner_step
        self._collected_at = state["collected_at"]

    def share_state(self) -> None:
        """Give the weights of this rank to the others, if there are any: all begin with the same bits."""
        parts = self._p
        if parts.lead.followers:
            parts.lead.collect(averaged=False)
            tensors, state = parts.optimization.tensors(), parts.optimization.state_dict()
            parts.lead.restore(state)
            parts.optimization.load_state(tensors, state)

    def _restore_rows(self, checkpoint: Checkpoint) -> list[str] | None:
        """Fill the index; when it had to be rebuilt from the episodes, the keys of later ones: not in it yet."""
        parts = self._p
        if checkpoint.rows is not None:
            try:
                parts.books.restore(checkpoint.rows.blocks)
            except ValueError as error:
                _log.warning("the rows of the index at step %d do not fit this run: %s", checkpoint.learner_step, error)
            else:
                parts.ingest.resume(checkpoint.rows.blocks)
                return None
        _log.warning(
            "the index is rebuilt from all episodes in the store, in another order: the learner goes on from step %d "
            "with nothing lost, but draws other batches than it would have",
            checkpoint.learner_step,
        )
        told = checkpoint.state.get("told")
        return parts.books.rebuild(parts.ingest.everything(), None if told is None else Told(told))

    def _done(self) -> bool:
        """All episodes are there and the cool-down is over (nothing to collect: all steps are done)."""
        if self._p.algorithm.collection is Collection.NOTHING:
            return self.step >= self._config.offline_steps
        seen = self._p.books.collected + self._p.ingest.num_quarantined
        if self._target is None or seen < self._target:
            return False
        if self._collected_at is None:
            self._collected_at = self.step
        return self.step >= self._collected_at + self._config.cooldown_steps

    def _lr_factor(self) -> float:
        """1 while the fleet records; then it falls linearly to `cooldown_lr_factor`."""
        if self._collected_at is None:
            return 1.0
        progress = (self.step - self._collected_at) / max(1, self._config.cooldown_steps)
        return 1.0 + (self._config.cooldown_lr_factor - 1.0) * min(1.0, progress)

    def _nothing_new(self) -> bool:
        """Has every fresh start been drawn often enough for now (spec A.6 #11)?"""
        if self._p.algorithm.collection is Collection.NOTHING or self._collected_at is not None:
            return False
        books, cap = self._p.books, self._config.max_draws_per_start
        return books.fresh_starts == 0 or (cap > 0 and books.fresh_draws > cap * books.fresh_starts)

    def _index(self, episodes: list[IngestedEpisode]) -> None:
        books = self._p.books
        books.log_episodes(books.index(episodes), self.step, self._p.publisher.last_published)

    def weights(self) -> dict[str, Any]:
        """A copy of what can differ from the base policy; of everything when there is no base yet."""
        trained, first = self._p.optimization, self._p.publisher.last_published is None
        names = None if first else trained.unfrozen
        self._p.lead.collect(averaged=True, names=names)
        return dict(self._p.policy.export(trained.averaged(names), dtype=self._config.publish_dtype, names=names))

    def _may_publish(self, weights: Weights) -> bool:
        """Ask the gate. What it refuses is not published; what was drawn for it goes into the next version's lineage.

        Raises:
            RunError: it has refused too often.
        """
        gate = self._p.gate
        if gate is None:
            return True
        verdict = gate.check(weights)
        measures = {f"publish_gate/{name}": value for name, value in verdict.measures.items()}
        self._p.books.log({**measures, "publish_gate/refused": float(not verdict.ok)}, self.step)
        if not verdict.ok:
            _log.warning("the policy of step %d is not published: %s", self.step, "; ".join(verdict.reasons))
        return verdict.ok

    def _publish_now(self, weights: Weights) -> int:
        return self._p.publisher.publish_now(weights, self._facts(), self._p.books.draws.hand_over())

    def _facts(self) -> PolicyFacts:
        parts = self._p
        return PolicyFacts(
            learner_step=self.step,
            algorithm=parts.algorithm_name,
            spec=parts.policy.spec,
            conditioning=parts.algorithm.conditioning(),
            online_episodes=parts.index.num_episodes(Source.ONLINE),
            offline_episodes=parts.index.num_episodes(Source.OFFLINE),
            config_hash=parts.config_hash,
            code_version=parts.code_version,
        )

    def _extra(self) -> dict[str, float]:
        """Metrics that the books do not know."""
        parts = self._p
        missing = (len(numbers) for ranges in parts.ingest.missing().values() for numbers in ranges)
        return {
            "learner/publishes_skipped": float(parts.publisher.skipped),
            "learner/events_lost": float(parts.publisher.lost_events),
            "learner/episodes_missing": float(sum(missing)),
            **parts.algorithm.metrics(),
        }

    def _names(self, windows: Windows) -> str:
        key, places = self._p.index.key, zip(windows.episode, windows.start, strict=True)
        return ", ".join(f"{key(int(row))}@{start}" for row, start in places)


def _arrays(checkpoint: Checkpoint, prefix: str) -> dict[str, npt.NDArray[Any]]:
    found = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor.numpy() for name, tensor in found.items()}


def _windows(saved: dict[str, list[int]]) -> Windows:
    return Windows(
        episode=np.asarray(saved["episode"], np.int64),
        start=np.asarray(saved["start"], np.int32),
        task=np.asarray(saved["task"], np.int32),
        source=np.asarray(saved["source"], np.uint8),
    )
