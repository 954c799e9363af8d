"""What the learner knows about its data besides the weights: rows indexed, draws made, and what it tells others."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sop.algorithms import Algorithm
from sop.buffer import AdaptiveSampler, EpisodeIndex, EpisodeRow, IngestedEpisode, Payloads, RowBlock
from sop.buffer.rows import OUTCOMES
from sop.buffer.sequences import known_runs
from sop.buffer.windows import start_runs
from sop.core.episode import Outcome
from sop.core.events import LearnerReported
from sop.core.experience import Batch, Source
from sop.core.freshness import HOPS, HopSample, arrival_hops, summary
from sop.core.layout import before_fleet, from_lab
from sop.learner.ages import PolicyAges
from sop.learner.draws import DrawLog, LearnedBatch
from sop.learner.sidecars import SidecarWriter
from sop.learner.stopwatch import Stopwatch
from sop.learner.told import Told
from sop.metrics import MetricSink, percentile

REPORT_EVERY_S = 1.0
RECENT_EPISODES = 100
"""Freshness that is reported live is the median over this many last episodes."""


@dataclass(slots=True)
class TaskCounts:
    """What the fleet recorded for one task, aborted episodes not counted as episodes."""

    episodes: int = 0
    interventions: int = 0


class Bookkeeping:
    """Indexes episodes in the learner's thread and counts what becomes of them.

    An episode is *fresh* when the fleet recorded it in this run, into whichever buffer; what was there before is
    not: demonstrations (actors `lab-...`) and rollouts of the base policy (`base-...`).

    Args:
        index: gets the rows.
        cache: gets the payloads that ingest has in hand anyway.
        algorithm: annotates each episode once, to know where windows may start; then takes note of it.
        sampler: its metrics are reported.
        horizon: H, steps per window.
        metrics: gets `episode/...` and `freshness/...` once per episode, and `learner/...`, `sampler/...`, `batch/...`
            and the percentiles of `freshness/...` once a second.
        report: tells whoever watches.
        sidecars: stores what the algorithm computed about each episode.
    """

    def __init__(
        self,
        index: EpisodeIndex,
        cache: Payloads,
        algorithm: Algorithm,
        sampler: AdaptiveSampler,
        *,
        horizon: int,
        metrics: MetricSink,
        report: Callable[[LearnerReported], None],
        sidecars: SidecarWriter,
    ) -> None:
        self._index = index
        self._cache = cache
        self._algorithm = algorithm
        self._sampler = sampler
        self._horizon = horizon
        self._metrics = metrics
        self._report = report
        self._sidecars = sidecars
        self._sampleable_s: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._hops: deque[HopSample] = deque(maxlen=RECENT_EPISODES * len(HOPS))
        self._ages = PolicyAges()
        self._tasks = {task: TaskCounts() for task in index.tasks}
        self._started_utc_ns = time.time_ns()
        self.draws = DrawLog(index)
        """What the weights learned from since the policy in the store."""
        self.told = Told()
        """The episodes that are indexed, and noted by the algorithm unless screening has flagged them."""
        self.time = Stopwatch()
        self.fresh_starts = 0
        """Window starts that the fleet added."""
        self.fresh_draws = 0
        """How often they were drawn."""

    @property
    def collected(self) -> int:
        """Fresh episodes, aborted ones not counted."""
        return sum(counts.episodes for counts in self._tasks.values())

    def index(self, episodes: Iterable[IngestedEpisode]) -> list[EpisodeRow]:
        """Index episodes in the given order; returns the new rows that the fleet recorded."""
        from_fleet = []
        for episode in episodes:
            row = self.row(episode)
            if not self._index.add(row):
                continue
            self._cache.put(row.key, episode.encoded)
            if row.num_starts:
                self.draws.arrived(len(self._index) - 1, episode)
            self._note(episode)
            self.told.add(episode.key.folder, row.actor_id, row.sequence, row.sequence + 1)
            if not before_fleet(row.actor_id):
                self.fresh_starts += row.num_starts
                self._tasks[row.task].episodes += row.outcome is not Outcome.ABORTED
                self._tasks[row.task].interventions += row.num_interventions
                from_fleet.append(row)
        return from_fleet

    def restore(self, blocks: Sequence[RowBlock]) -> None:
        """Index the rows of a checkpoint, in their order, without their payloads.

        Raises:
            ValueError: they are not rows of this run; nothing was indexed.
        """
        self._index.extend(*blocks)
        for (folder, actor_id), runs in known_runs(blocks).items():
            for run in runs:
                self.told.add(folder, actor_id, run.first, run.stop)
        for block in blocks:
            fresh = block.from_fleet()
            ended = fresh & (block.columns["outcome"] != OUTCOMES.index(Outcome.ABORTED))
            self.fresh_starts += int(block.num_starts()[fresh].sum())
            for number, task in enumerate(block.tasks):
                mine = block.columns["task"] == number
                self._tasks[task].episodes += int((ended & mine).sum())
                self._tasks[task].interventions += int(block.columns["num_interventions"][fresh & mine].sum())

    def rebuild(self, episodes: Iterable[IngestedEpisode], told: Told | None) -> list[str]:
        """Index episodes without rows, before the algorithm has its state; returns the keys of those that this state
        was not `told` of, to be indexed when it has. None: it is not known, all count as told."""
        late = []
        for episode in episodes:
            if told is None or episode.key in told or episode.flags:
                self.index([episode])
            else:
                late.append(str(episode.key))
        return late

    def learned(self, learner_step: int, batch: Batch | LearnedBatch, newest_version: int | None) -> None:
        """A step learned from a batch. One metrics line per episode that was new to it, with its hops."""
        fresh = self._index.from_fleet(batch.windows.episode)
        self.fresh_draws += int(fresh.sum())
        self._ages.add(batch.policy_version[fresh], newest_version)
        for episode in self.draws.drawn(learner_step, batch):
            if episode.recorded_utc_ns < self._started_utc_ns or from_lab(episode.key):
                continue
            hops = arrival_hops(episode)
            self._hops.extend(hops)
            place = f"{episode.task}/{episode.actor_id}"
            self._metrics.log({f"freshness/{hop.hop}_s/{place}": hop.seconds for hop in hops}, learner_step)

    def log_episodes(self, rows: Sequence[EpisodeRow], learner_step: int, newest_version: int | None) -> None:
        """One line per episode that just became sampleable; those that waited for this process carry no delays."""
        for row in rows:
            values = {
                f"episode/success/{row.task}": float(row.outcome is Outcome.SUCCESS),
                "episode/steps": float(row.num_steps),
                "episode/human_steps": float(row.human_steps),
                "episode/interventions": float(row.num_interventions),
                "episode/collected": float(self.collected),
                "episode/aborted": float(row.outcome is Outcome.ABORTED),
            }
            if row.end_utc_ns >= self._started_utc_ns:
                self._sampleable_s.append((row.indexed_utc_ns - row.end_utc_ns) / 1e9)
                values["episode/sampleable_s"] = self._sampleable_s[-1]
                if row.policy_version is not None and newest_version is not None:
                    values["episode/staleness"] = float(max(0, newest_version - row.policy_version))
            self._metrics.log(values, learner_step)

    def report(
        self,
        state: str,
        learner_step: int,
        *,
        loss: float,
        grad_norm: float,
        newest_version: int | None,
        quarantined: int,
        extra: Callable[[], Mapping[str, float]],
        force: bool = False,
    ) -> None:
        """Once a second (or now): the state of the loop, to the metrics (`extra()` too) and to whoever watches."""
        lap = self.time.lap(learner_step, REPORT_EVERY_S, force=force)
        if lap is None:
            return
        sampler, share = self._sampler.metrics(), "sampler/online_share/"
        version = -1 if newest_version is None else newest_version
        values = {
            "learner/loss": loss,
            "learner/grad_norm": grad_norm,
            "learner/steps_per_s": lap.steps_per_s,
            "learner/busy": lap.busy,
            "learner/worked_s": lap.worked_s,
            "learner/version": float(version),
            "learner/fresh_draws_per_start": self.fresh_draws / max(1, self.fresh_starts),
            "learner/sidecars_lost": float(self._sidecars.lost),
        }
        for hop, found in summary(self._hops).items():
            values |= {f"freshness/{hop}_p50_s": found.p50, f"freshness/{hop}_p99_s": found.p99}
        self._metrics.log({**values, **self._ages.take(), **sampler, **extra()}, learner_step)
        self._report(
            LearnerReported(
                state=state,
                learner_step=learner_step,
                steps_per_s=lap.steps_per_s,
                busy=lap.busy,
                version=version,
                loss=loss if math.isfinite(loss) else 0.0,
                online_episodes=self._index.num_episodes(Source.ONLINE),
                offline_episodes=self._index.num_episodes(Source.OFFLINE),
                quarantined=quarantined,
                online_share={name.removeprefix(share): v for name, v in sampler.items() if name.startswith(share)},
                episodes={task: counts.episodes for task, counts in self._tasks.items()},
                interventions={task: counts.interventions for task, counts in self._tasks.items()},
                episode_to_sampleable_p50_s=percentile(self._sampleable_s or [0.0], 50),
                utc_ns=time.time_ns(),
            )
        )

    def log(self, values: Mapping[str, float], learner_step: int) -> None:
        """One line of metrics."""
        self._metrics.log(values, learner_step)

    def row(self, episode: IngestedEpisode) -> EpisodeRow:
        """What the index is to know of an episode; window starts are the algorithm's opinion, which never changes."""
        encoded, key = episode.encoded, episode.key
        labels = self._algorithm.annotate(encoded)
        return EpisodeRow(
            episode_id=key.episode_id,
            actor_id=key.actor_id,
            sequence=key.sequence,
            task=encoded.header.task,
            source=episode.source,
            num_steps=encoded.num_steps,
            human_steps=int(encoded.controller.sum()),
            num_interventions=len(encoded.interventions),
            policy_version=encoded.policy_version,
            outcome=encoded.outcome,
            start_runs=() if episode.flags else tuple(start_runs(labels, self._horizon)),
            end_utc_ns=encoded.header.end_utc_ns,
            indexed_utc_ns=time.time_ns(),
        )

    def _note(self, episode: IngestedEpisode) -> None:
        """The algorithm takes note of an episode that has a row; what it computed goes to the store. What screening
        has flagged is stored and counted, and nobody learns from it."""
        if episode.flags:
            return
        self._algorithm.indexed(episode.encoded, episode.source)
        if from_lab(str(episode.key)) and episode.encoded.policy_version is None:
            return
        sidecar = self._algorithm.sidecar(episode.encoded)
        if sidecar is not None:
            self._sidecars.write(episode.key, sidecar)
