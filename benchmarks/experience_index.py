"""One million episodes: memory, time of a draw, cold start, and what it costs when the index is gone.

    store   episodes/<1,000 actors>/<1,000 names each>   empty files: their rows are in the segments, nobody reads them
            episodes/<5 of them>/<one more each>         real episodes, newer than the segments: fetched and checked
            index/<labels>/...                           the segments

A cold start is a fresh process: interpreter and imports, all segments read and checked, index and duplicate detection
built, every actor's folder listed, what is new fetched and indexed, and a batch of window references drawn. Memory is
what the process has gained when index and duplicate detection are built, since it had read a single segment; beside it
the bytes of the arrays, what the process holds as long as the C library keeps freed memory for reuse, and the peak.

    .venv/bin/python benchmarks/experience_index.py FOLDER      # that process; prints JSON
"""

import ctypes
import gc
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from experience_scenes import TASK, Scene, make_scene
from experience_store import TASKS, annotate, scene_manifest, scene_object, scene_row
from harness import RESULTS, timed
from synthetic_index import ROWS_PER_BLOCK, actor_names, rows

from sop.buffer import AdaptiveSampler, EpisodeIndex, Ingest, RowBlock
from sop.buffer.rows import FOLDERS
from sop.buffer.segments import IndexSegments, labels_id
from sop.config import SamplerConfig
from sop.core.experience import Source
from sop.testing.memory import MemoryBus
from sop.transport import DirectoryStore

NEW_EPISODES = 5
"""Episodes that the segments do not hold, one of each of so many actors."""
DRAWS = 1000
BATCH = 256
STATE = "segments.json"
LABELS = labels_id("bench", {}, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is indexed."""

    episodes: int
    actors: int
    new_steps: int
    """Steps of an episode that is newer than the segments; images as large as the scenes'."""
    rebuild: tuple[tuple[int, int, int], ...]
    """(image size in pixels, steps, episodes) of the stores whose index is rebuilt."""


FULL = Size(episodes=1_000_000, actors=1000, new_steps=300, rebuild=((56, 100, 60), (224, 300, 6)))
QUICK = Size(episodes=50_000, actors=1000, new_steps=40, rebuild=((56, 100, 10),))


def measure(size: Size, repeats: int) -> dict[str, Any]:
    """Memory, draw, cold start and rebuild. Blocks for a minute, the first time for several."""
    folder = RESULTS / "cache" / f"index-v1-{size.episodes}-{size.actors}-{size.new_steps}"
    if not (folder / STATE).exists():
        print(f"writing {folder} (once)")
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, size)
    found = [cold_start(folder) for _ in range(repeats + 1)][1:]
    values = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {
        "index_mb": values.pop("index_mb"),
        "draw_ms": values.pop("draw_ms"),
        "cold_start_s": values.pop("cold_start_s"),
        "index": {
            "episodes": size.episodes,
            "index_mb_per_million": found[0]["index_mb"] * 1e6 / size.episodes,
            **values,
            "rebuild_s_per_1000": {
                f"{pixels} px, {steps} steps": rebuild(pixels, steps, count) for pixels, steps, count in size.rebuild
            },
        },
    }


def write(folder: Path, size: Size) -> None:
    """The store of a fleet of that size, see above."""
    store = DirectoryStore(folder / "store")
    index = EpisodeIndex(TASKS)
    for name in actor_names(size.actors):
        source = Source.OFFLINE if name.startswith("lab-") else Source.ONLINE
        (store.root / FOLDERS[source] / name).mkdir(parents=True, exist_ok=True)
    for block in map(_six_tasks, rows(size.episodes, seed=0, actors=size.actors)):
        index.extend(block)
        for place in range(len(block)):
            os.close(os.open(store.root / block.key(place), os.O_CREAT | os.O_WRONLY))
    for number, actor_id in enumerate(actor_names(size.actors)[-NEW_EPISODES:]):
        scene = make_scene(number, size.new_steps)
        key, data = scene_object(scene, actor_id, -(-size.episodes // size.actors))
        store.put(key, data, durable=False)
    segments = IndexSegments(store, LABELS, rows_per_segment=ROWS_PER_BLOCK)
    (folder / STATE).write_text(json.dumps(segments.save(segments.cut(index))))


def cold_start(folder: Path) -> dict[str, float]:
    """What a fresh process measures; `cold_start_s` from before it exists."""
    start = time.time()
    command = [sys.executable, __file__, str(folder), str(start)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    values: dict[str, float] = json.loads(answer)
    return values


def _cold_start(folder: Path, started: float) -> dict[str, float]:
    """The fresh process: everything up to the first draw, then memory and draws."""
    imported = time.time()
    store = DirectoryStore(folder / "store")
    segments = IndexSegments(store, LABELS, rows_per_segment=ROWS_PER_BLOCK)
    keys = json.loads((folder / STATE).read_text())
    EpisodeIndex(TASKS).extend(*segments.load(keys[:1]).blocks)  # what Arrow and numpy take once is not the index
    memory = _memory_mb()
    loaded = segments.load(keys)
    read = time.time()
    index = EpisodeIndex(TASKS)
    index.extend(*loaded.blocks)
    ingest = Ingest(store, MemoryBus(), scene_manifest())
    ingest.resume(loaded.blocks)
    saved = len(index)
    built = time.time()
    del loaded
    untrimmed, gained = _memory_mb() - memory, _memory_mb(trim=True) - memory
    for episode in ingest.everything():
        annotate(episode.encoded)
        index.add(scene_row(episode.key))
    listed = time.time()
    sampler = AdaptiveSampler(index, SamplerConfig(), seed=0)
    sampler.draw(BATCH)
    drawn, processor = time.time(), time.process_time()
    if len(index) != saved + NEW_EPISODES or ingest.quarantined or ingest.missing():
        raise SystemExit(f"{len(index)} episodes, {saved} in segments; {ingest.quarantined}; {ingest.missing()}")
    return {
        "cold_start_s": drawn - started,
        "index_mb": gained,
        "index_arrays_mb": (index.num_bytes + 16 * len(index)) / 1e6,  # ingest knows 16 bytes of each as well
        "draw_ms": _draw_ms(sampler),
        "untrimmed_mb": untrimmed,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - memory,
        "cold_start_cpu_s": processor,
        "import_s": imported - started,
        "read_segments_s": read - imported,
        "build_index_s": built - read,
        "list_and_fetch_s": listed - built,
        "first_draw_ms": (drawn - listed) * 1e3,
    }


def _memory_mb(*, trim: bool = False) -> float:
    """Resident memory of this process, megabytes; with `trim` without the free memory that the C library keeps."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    if trim:
        ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss) / 1e6


def _draw_ms(sampler: AdaptiveSampler) -> float:
    """Median time of a draw while losses are observed as in training."""
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(DRAWS):
        start = time.perf_counter()
        windows = sampler.draw(BATCH)
        seconds.append(time.perf_counter() - start)
        sampler.observe(windows, rng.random(BATCH, np.float32))
    return statistics.median(seconds) * 1e3


def rebuild(pixels: int, steps: int, count: int) -> float:
    """Seconds per 1,000 episodes to fetch, check and index a store without segments. In memory: a disk comes on top."""
    from sop.testing.memory import MemoryStore

    scene = make_scene(0, steps)
    stride = len(scene.images["front"][0]) // pixels
    small = {camera: images[:, ::stride, ::stride].copy() for camera, images in scene.images.items()}
    store = MemoryStore()
    for number in range(count):
        store.put(*scene_object(Scene(images=small, state=scene.state, action=scene.action), "robot-0", number))
    manifest = scene_manifest(pixels)

    def work() -> None:
        index = EpisodeIndex([TASK])
        for episode in Ingest(store, MemoryBus(), manifest).everything():
            annotate(episode.encoded)
            index.add(scene_row(episode.key))
        if len(index) != count:
            raise SystemExit(f"{len(index)} of {count} episodes were indexed")

    return statistics.median(timed(work) for _ in range(3)) * 1000 / count


def _six_tasks(block: RowBlock) -> RowBlock:
    columns = {**block.columns, "task": (block.columns["task"] % len(TASKS)).astype(np.int16)}
    return RowBlock(actors=block.actors, tasks=TASKS, columns=columns, runs=block.runs)


def main() -> None:
    """The fresh process."""
    print(json.dumps(_cold_start(Path(sys.argv[1]), float(sys.argv[2]))))


if __name__ == "__main__":
    main()
