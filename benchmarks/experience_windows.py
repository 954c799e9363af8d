"""Random windows per second: our episode container and batch loader, and LeRobotDataset v3, on the same content.

    scenes (made once, see experience_scenes.py) -+-> sop.core.codec in a directory store -> BatchLoader
                                                  +-> LeRobotDataset, video and image     -> dataset[i], DataLoader

A window: the images of both cameras and the state of one step, and the actions of 16 steps. What is written is kept
under runs/bench/cache. Ours arrives as uint8 [B, h, w, 3], lerobot's as float32 [3, h, w] in [0, 1]: our rate is also
measured with that conversion.
"""

import os
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experience_scenes import CAMERAS, HORIZON, TASK, make_scene, scenes
from experience_store import annotate, scene_object, scene_row
from harness import RESULTS, medians
from peers import lerobot_python
from workers import Worker

from sop.buffer import AdaptiveSampler, BatchLoader, EpisodeIndex, Payloads, open_payloads
from sop.config import SamplerConfig
from sop.core import layout
from sop.core.codec import EncodedEpisode
from sop.core.experience import Batch
from sop.core.layout import EpisodeKey
from sop.transport import DirectoryStore

CACHE = RESULTS / "cache"
PEER = Path(__file__).with_name("peer_lerobot_dataset.py")
BATCH = 64
WORKERS = 2
KINDS = ("video", "image")
_PEER_ENVIRONMENT = {
    "HF_HOME": str(CACHE / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is written and how much is read per measurement."""

    episodes: int
    steps: int
    repeats: int
    batches: int
    """Batches of ours per measurement."""
    cold_windows: int
    """Windows of lerobot's first reading after the page cache was emptied of a data set."""
    peer_windows: dict[str, int]
    """Kind -> windows of lerobot's per measurement."""
    peer_workers: bool
    """Whether lerobot's DataLoader and the variants of a window are measured too."""


FULL = Size(
    episodes=20,
    steps=300,
    repeats=5,
    batches=8,
    cold_windows=BATCH,
    peer_windows={"video": 192, "image": 24},
    peer_workers=True,
)
QUICK = Size(
    episodes=2,
    steps=40,
    repeats=1,
    batches=3,
    cold_windows=8,
    peer_windows={"video": 64, "image": 8},
    peer_workers=False,
)


def measure(size: Size, repeats: int) -> dict[str, Any]:
    """All rates, in one run, taking turns; lerobot's are None when its environment is missing. Blocks for minutes."""
    folder = CACHE / f"scenes-v1-{size.episodes}x{size.steps}"
    ours = _write_once(folder / "ours", lambda part: write_ours(part, size))
    python = lerobot_python()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        peers = {} if python is None else _open_peers(stack, python, folder, size)
        facts: dict[str, Any] = {"lerobot": {name: dict(peer.ask(do="facts")) for name, peer in peers.items()}}
        facts["ours"] = {"mb": _megabytes(ours), "grey_levels_off": _grey_levels_off(ours, size)}
        cold: dict[str, float] = {name: _peer_rate(peers[name], size.cold_windows) for name in KINDS if name in peers}
        _drop_from_page_cache(ours)
        with our_loader(ours, workers=0) as cold_loader:
            cold["ours"] = _rate(lambda: cold_loader.load(cold_loader.draw()), 1)
        cpu: dict[str, list[float]] = defaultdict(list)
        work = _ours(stack, ours, size, cpu)
        for name, peer in peers.items():
            windows = size.peer_windows[name.partition("_")[0]] // (4 if name.endswith("image_chunk") else 1)
            work[f"lerobot_{name}"] = _asks(peer, windows, cpu[f"lerobot_{name}"])
        rates = medians(work, repeats)
    missing: dict[str, float | None] = {f"lerobot_{kind}": None for kind in KINDS}
    return {
        "windows_per_s": missing | rates,
        "windows_per_cpu_s": {name: statistics.median(found[1:]) for name, found in cpu.items() if found},
        "windows_per_s_cold": cold,
        "windows_facts": facts,
    }


def write_ours(folder: Path, size: Size) -> None:
    """Write the scenes as demonstrations into a directory store."""
    store = DirectoryStore(folder)
    for number, scene in enumerate(scenes(size.episodes, size.steps)):
        key, data = scene_object(scene, f"{layout.LAB_ACTOR}0", number)
        store.put(key, data, durable=False)


class OurLoader:
    """Sampler and batch loader over all episodes of a store; see `our_loader`."""

    def __init__(self, loader: BatchLoader, sampler: AdaptiveSampler, payloads: Payloads, index: EpisodeIndex) -> None:
        self.loader = loader
        self.draw: Callable[[], Any] = lambda: sampler.draw(BATCH)
        self.load = loader.load
        self.payloads = payloads
        self.index = index


@contextmanager
def our_loader(folder: Path, *, workers: int) -> Iterator[OurLoader]:
    """The learner's path from a draw to a batch; `workers` processes decode, 0 decodes in this one."""
    store = DirectoryStore(folder)
    index = EpisodeIndex([TASK])
    for key in sorted(store.keys(f"{layout.DEMONSTRATIONS}/")):
        index.add(scene_row(EpisodeKey.parse(key)))
    sampler = AdaptiveSampler(index, SamplerConfig(), seed=0)
    with closing(open_payloads(store, folder / "cache", memory_bytes=1 << 30, disk_bytes=0)) as payloads:
        loader = BatchLoader(
            index, payloads, annotate, lambda: sampler.draw(BATCH), horizon=HORIZON, depth=2, decode_workers=workers
        )
        with closing(loader):
            yield OurLoader(loader, sampler, payloads, index)


def _ours(stack: ExitStack, folder: Path, size: Size, cpu: Mapping[str, list[float]]) -> dict[str, Callable[[], float]]:
    """Our measurements by name; `cpu` gets windows per second of processor of those in one process."""
    alone = stack.enter_context(our_loader(folder, workers=0))
    helped = stack.enter_context(our_loader(folder, workers=WORKERS))

    def load() -> Batch:
        return alone.load(alone.draw())

    def workers() -> float:
        for _ in range(4):  # what was prepared while others were measured
            helped.loader.next()
        return _rate(helped.loader.next, 2 * size.batches)

    return {
        "ours": lambda: _rate(load, size.batches, cpu["ours"]),
        "ours_float": lambda: _rate(lambda: _as_lerobot(load()), size.batches, cpu["ours_float"]),
        "ours_workers": workers,
        "ours_image_chunk": lambda: _rate(lambda: _with_image_chunk(alone), 1) / 4,
    }


def _with_image_chunk(ours: OurLoader) -> np.ndarray[Any, Any]:
    """A quarter of a batch's windows with the images of all HORIZON steps, decoded from the container."""
    windows = ours.draw()
    places = list(zip(windows.episode.tolist(), windows.start.tolist(), strict=True))
    for row, start in places[::4]:
        episode = ours.payloads.get(ours.index.key(row))
        steps = [min(start + step, episode.num_steps - 1) for step in range(HORIZON)]
        chunk = np.stack([episode.frame(camera, step) for camera in CAMERAS for step in steps])
    return chunk


def _as_lerobot(batch: Batch) -> list[torch.Tensor]:
    """The images as lerobot gives them: float32 [B, 3, h, w] in [0, 1]."""
    return [torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255) for images in batch.images.values()]


def _rate(work: Callable[[], object], times: int, cpu: list[float] | None = None) -> float:
    """Windows per second of `times` batches; `cpu` gets the windows per second of processor."""
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    if cpu is not None:
        cpu.append(times * BATCH / (time.process_time() - busy))
    return times * BATCH / (time.perf_counter() - start)


def _open_peers(stack: ExitStack, python: Path, folder: Path, size: Size) -> dict[str, Worker]:
    """Name of the measurement -> process that reads. The data sets are written when they are not there."""
    _write_peers(python, folder, size)
    peers = {}
    for kind in KINDS:
        data = folder / f"lerobot_{kind}"
        _drop_from_page_cache(data)
        variants: dict[str, tuple[str, ...]] = {kind: ()}
        if size.peer_workers:
            variants[f"{kind}_workers"] = ("--workers", str(WORKERS))
            variants[f"{kind}_image_chunk"] = ("--chunk", "images")
        if size.peer_workers and kind == "image":
            variants[f"{kind}_no_chunk"] = ("--chunk", "none")
        for name, extra in variants.items():
            command = [str(python), str(PEER), "read", str(data), *extra]
            peers[name] = stack.enter_context(Worker(command, _PEER_ENVIRONMENT))
    return peers


def _write_peers(python: Path, folder: Path, size: Size) -> None:
    """Have lerobot record what is not there yet, side by side.

    Raises:
        SystemExit: lerobot failed; names its log.
    """
    running = {}
    for kind in KINDS:
        if (folder / f"lerobot_{kind}").exists():
            continue
        print(f"lerobot writes {folder / kind} (once)")
        part = folder / f"lerobot_{kind}.part"
        shutil.rmtree(part, ignore_errors=True)
        command = [str(python), str(PEER), "write", str(part), "--kind", kind]
        command += ["--episodes", str(size.episodes), "--steps", str(size.steps)]
        log = part.with_suffix(".log")
        with log.open("wb") as output:
            environment = {**os.environ, **_PEER_ENVIRONMENT}
            running[kind] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    codes = {kind: process.wait() for kind, process in running.items()}
    for kind, code in codes.items():
        part = folder / f"lerobot_{kind}.part"
        if code:
            raise SystemExit(f"lerobot could not write its data set, code {code}: see {part.with_suffix('.log')}")
        part.rename(part.with_suffix(""))


def _asks(peer: Worker, windows: int, cpu: list[float]) -> Callable[[], float]:
    return lambda: _peer_rate(peer, windows, cpu)


def _peer_rate(peer: Worker, windows: int, cpu: list[float] | None = None) -> float:
    answer = peer.ask(do="read", windows=windows, seed=time.time_ns() % 2**32)
    if cpu is not None and answer["cpu_seconds"] is not None:
        cpu.append(answer["windows"] / answer["cpu_seconds"])
    return float(answer["windows"] / answer["seconds"])


def _write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, written by `write` when it is not there; a folder that is there is whole."""
    if not folder.exists():
        print(f"writing {folder} (once)")
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.rename(folder)
    return folder


def _drop_from_page_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages; what is mapped elsewhere stays."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _grey_levels_off(folder: Path, size: Size) -> float:
    """How far our decoded pictures are from the originals: mean of the window that the peer looks at too."""
    scene, step = make_scene(0, size.steps), size.steps // 2
    store = DirectoryStore(folder)
    episode = EncodedEpisode(store.get(min(store.keys(f"{layout.DEMONSTRATIONS}/"))))
    found = [np.abs(episode.frame(name, step).astype(float) - scene.images[name][step]).mean() for name in CAMERAS]
    return float(np.mean(found))


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.arrow")) / 1e6
