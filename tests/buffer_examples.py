"""Episodes in stores and plans over them, for the tests of the payload path."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from sop.buffer import EpisodeIndex
from sop.buffer.jobs import BatchPlan
from sop.core.codec import content_hash, encode
from sop.core.episode import Episode
from sop.core.experience import Windows
from sop.core.layout import EpisodeKey
from sop.testing.episodes import make_episode
from sop.transport import ObjectStore


def colourful(steps: str, sequence: int, size: int = 16, **changes: Any) -> Episode:
    """An episode with two cameras of noise, so that every frame is another one."""
    rng = np.random.default_rng(sequence)
    cameras = {name: rng.integers(0, 255, (len(steps), size, size, 3), np.uint8) for name in ("wrist", "front")}
    facts: dict[str, Any] = {"images": cameras, "sequence": sequence, "instruction": f"öffne {sequence}"} | changes
    return make_episode(steps, **facts)


def put_episode(store: ObjectStore, episode: Episode) -> str:
    data = encode(episode)
    key = str(EpisodeKey("episodes", episode.actor_id, episode.sequence, episode.num_steps, content_hash(data)))
    store.put(key, data)
    return key


def index_of(keys: list[str]) -> EpisodeIndex:
    """As much of an index as a loader reads."""
    return cast("EpisodeIndex", SimpleNamespace(key=keys.__getitem__))


def make_windows(places: list[tuple[int, int]]) -> Windows:
    """Windows at `(row, start)`; task and source tell them apart."""
    rows, starts = zip(*places, strict=True)
    count = np.arange(len(places))
    return Windows(
        episode=np.asarray(rows, np.int64),
        start=np.asarray(starts, np.int32),
        task=count.astype(np.int32),
        source=(count % 2).astype(np.uint8),
    )


def make_plan(keys: list[str], places: list[tuple[int, int]], horizon: int = 4) -> BatchPlan:
    """A plan in which one step of every window counts."""
    windows = make_windows(places)
    weight = np.zeros((len(places), horizon), np.float32)
    weight[:, 0] = 1
    return BatchPlan(
        windows=windows,
        keys=tuple(keys),
        row=windows.episode.astype(np.int32),
        length=np.ones(len(places), np.int16),
        loss_weight=weight,
        advantage_indicator=None,
    )


def paths_of(root: Path, keys: list[str]) -> list[Path]:
    return [root / key for key in keys]
