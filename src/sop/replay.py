"""`sop replay-batch`: the batch of a learner step, drawn again from the stored episodes and compared with its hash."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from rich.table import Table

from sop.algorithms import make_algorithm
from sop.broadcast import PolicyManifest
from sop.buffer import BatchLoader, EpisodeIndex, EpisodeRow, PayloadCache
from sop.buffer.loader import BatchLabels
from sop.core.codec import EncodedEpisode, content_hash
from sop.core.errors import InvalidRecord
from sop.core.experience import Batch, Source, Windows, hash_like
from sop.core.layout import EPISODES, EpisodeKey
from sop.core.lineage import StepDraw
from sop.lineage import find_draw
from sop.runs import Run, open_run
from sop.tracing import make_console

CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Replay:
    """A batch that was drawn again."""

    manifest: PolicyManifest
    """The version that learned from it."""
    draw: StepDraw
    batch: Batch

    @property
    def same(self) -> bool:
        """Whether it is the batch that the learner had, to the bit."""
        return self.content_hash == self.draw.batch_hash

    @property
    def content_hash(self) -> str:
        """Of the batch, in the form of the one that was recorded: a learner on several ranks records one per rank."""
        return hash_like(self.batch, self.draw.batch_hash)


def replay_batch(run: Run, learner_step: int, version: int | None = None) -> Replay:
    """Draw the batch of a step again: the same windows, frames, labels and order (blocking).

    Labels are those that the draw keeps, where they were an opinion of the moment; else those of the version's
    algorithm with this run's settings, by the code as it is now.

    Args:
        run: whose step.
        learner_step: 1 is the learner's first.
        version: the version that learned in it; None finds it along the ancestry of the newest.

    Raises:
        RunError: no published version has the step.
        NotFound, InvalidRecord: an episode is gone or damaged, or the labels are not those of the windows.
    """
    manifest, draw = find_draw(run.store, learner_step, version)
    labels = _labels(draw, manifest.spec.action_horizon)
    settings = run.config.algorithm_settings if manifest.algorithm == run.config.algorithm else {}
    algorithm = make_algorithm(manifest.algorithm, settings, run.manifest.embodiment.control_hz)
    index = EpisodeIndex(run.config.robot.all_tasks)
    cache = PayloadCache(run.store.get, CACHE_BYTES)
    for key in dict.fromkeys(draw.keys):
        index.add(_row(run, key))
    windows = _windows(index, draw)

    def no_draw() -> Windows:
        raise AssertionError("a replay draws nothing new")

    loader = BatchLoader(index, cache, algorithm.annotate, no_draw, horizon=manifest.spec.action_horizon, depth=1)
    try:
        return Replay(manifest, draw, loader.load(windows, labels))
    finally:
        loader.close()


def _labels(draw: StepDraw, horizon: int) -> BatchLabels | None:
    """What the draw keeps of its labels, None when they are facts."""
    if draw.loss_weight is None:
        return None
    if draw.loss_weight.shape != (len(draw.keys), horizon):
        raise InvalidRecord(
            "loss_weight",
            f"step {draw.learner_step} keeps weights {draw.loss_weight.shape} for {len(draw.keys)} windows of "
            f"{horizon} steps",
        )
    return BatchLabels(loss_weight=draw.loss_weight, advantage_indicator=draw.advantage_indicator)


def _row(run: Run, key: str) -> EpisodeRow:
    """A row that names the episode; nothing is drawn from this index, so it holds no window starts."""
    name, data = EpisodeKey.parse(key), run.store.get(key)
    if content_hash(data) != name.episode_id:
        raise InvalidRecord("episode_id", f"{key} is altered: its bytes hash to {content_hash(data)}")
    episode = EncodedEpisode(data)
    return EpisodeRow(
        episode_id=name.episode_id,
        actor_id=name.actor_id,
        sequence=name.sequence,
        task=episode.header.task,
        source=Source.ONLINE if name.folder == EPISODES else Source.OFFLINE,
        num_steps=name.num_steps,
        human_steps=int(episode.controller.sum()),
        num_interventions=len(episode.interventions),
        policy_version=episode.policy_version,
        outcome=episode.outcome,
        start_runs=(),
        end_utc_ns=episode.header.end_utc_ns,
        indexed_utc_ns=time.time_ns(),
    )


def _windows(index: EpisodeIndex, draw: StepDraw) -> Windows:
    rows = {key: number for number, key in enumerate(dict.fromkeys(draw.keys))}
    episodes = [index.row(rows[key]) for key in draw.keys]
    return Windows(
        episode=np.asarray([rows[key] for key in draw.keys], np.int64),
        start=np.asarray(draw.starts, np.int32),
        task=np.asarray([index.tasks.index(episode.task) for episode in episodes], np.int32),
        source=np.asarray([episode.source for episode in episodes], np.uint8),
    )


def print_replay(place: str, learner_step: int, *, version: int | None, out: Path | None) -> bool:
    """Print what a step learned from, and whether the batch is the same; True when it is.

    Args:
        place: folder of the run, or URL of its store.
        learner_step: 1 is the learner's first.
        version: see `replay_batch`.
        out: write the batch to this file (safetensors); None writes nothing.
    """
    run, console = open_run(place), make_console()
    replay = replay_batch(run, learner_step, version)
    batch, draw = replay.batch, replay.draw
    console.print(f"step {learner_step}: {len(batch)} windows, learned by version {replay.manifest.version}")
    drawn: Counter[tuple[str, str, int]] = Counter()
    for key, acted, task in zip(draw.keys, batch.policy_version.tolist(), batch.windows.task.tolist(), strict=True):
        drawn[key, run.config.robot.all_tasks[task], acted] += 1
    table = Table(title=f"{len(drawn)} episodes")
    for column in ("episode", "actor", "task", "buffer", "acted", "windows"):
        table.add_column(column)
    for (key, task, acted), count in sorted(drawn.items()):
        name = EpisodeKey.parse(key)
        buffer = "online" if name.folder == EPISODES else "offline"
        by = "demonstration" if acted < 0 else f"version {acted}"
        table.add_row(name.episode_id[:12], name.actor_id, task, buffer, by, str(count))
    console.print(table)
    if draw.loss_weight is not None:
        console.print(f"labels as they were learned from (label version {draw.label_version})")
    verdict = "the same batch" if replay.same else f"NOT the batch that was learned from ({draw.batch_hash})"
    console.print(f"content hash {replay.content_hash}: {verdict}")
    if out is not None:
        arrays = {f"images.{camera}": images for camera, images in batch.images.items()}
        arrays |= {name: getattr(batch, name) for name in ("state", "action", "loss_weight", "policy_version")}
        safetensors.numpy.save_file(arrays | {"start": batch.windows.start}, out)
        console.print(f"written to {out}")
    return replay.same
