"""LeRobotDataset v3 as a peer: writes a data set with lerobot's own recorder, reads random windows with its own reader.

Runs in lerobot's environment (`.venv-lerobot`, made by `peers.py`); `experience.py` starts it. Needs nothing of `sop`.

    write FOLDER --kind video|image --episodes 20 --steps 300    one data set, {"written": ..}, end
    read  FOLDER [--workers 2] [--chunk actions]                 answers questions, see `workers.serve`:
        {"do": "facts"}                                          what is read, and with which video backend
        {"do": "read", "windows": 64, "seed": 1}                 {"windows": 64, "seconds": .., "cpu_seconds": ..}

Without workers a reading is `dataset[i]` in one process; with workers it is torch's DataLoader, as users have it (its
video decoders must not have been used before it forks: one process per way of reading). Images arrive as float32
[3, h, w] in [0, 1]: lerobot's choice.

What a window holds besides the images and the state of its first step (`delta_timestamps`):
    actions   the actions of HORIZON steps: what an action-chunking policy trains on
    images    these and the images of all HORIZON steps
    none      the action of the step alone
"""

import argparse
import json
import logging
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experience_scenes import CAMERAS, FPS, HORIZON, INSTRUCTION, features, make_scene, scenes
from workers import serve

_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
# PyPI's torchvision is built for CUDA; without these two schemas it does not import beside a torch without CUDA.

from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402

REPO = "sop/bench"
TIMED_BATCHES = 8
"""Batches that torch's DataLoader is timed over."""
BACKENDS = ("torchcodec", "pyav")
"""lerobot's video decoders, the faster first."""


def write(folder: Path, kind: str, episodes: int, steps: int) -> dict[str, Any]:
    """Record the scenes into `folder` (must not exist) with lerobot's default settings."""
    start = time.perf_counter()
    dataset = LeRobotDataset.create(
        REPO, FPS, features(kind), root=folder, use_videos=kind == "video", image_writer_threads=2
    )
    for scene in scenes(episodes, steps):
        for step in range(steps):
            frame = {f"observation.images.{camera}": scene.images[camera][step] for camera in CAMERAS}
            numbers = {"observation.state": scene.state[step], "action": scene.action[step]}
            dataset.add_frame({**frame, **numbers, "task": INSTRUCTION})
        dataset.save_episode()
    dataset.finalize()
    return {"written": episodes, "seconds": time.perf_counter() - start}


class Reader:
    """Answers for one data set.

    Args:
        folder: written by `write`.
        chunk: what a window holds, see above.
        workers: processes of torch's DataLoader; 0 reads without it.
    """

    def __init__(self, folder: Path, chunk: str, workers: int) -> None:
        self._folder = folder
        self._chunk = chunk
        self._workers = workers
        self._backend = _backend()
        self._dataset = self._open()

    def facts(self) -> dict[str, Any]:
        """Windows, backend, megabytes; without workers also how far a decoded picture is from its original."""
        return {
            "steps": len(self._dataset),
            "backend": self._backend,
            "lerobot": metadata.version("lerobot"),
            "datasets": metadata.version("datasets"),
            "mb": sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file()) / 1e6,
            "grey_levels_off": None if self._workers else self._check(),
        }

    def read(self, windows: int, seed: int) -> dict[str, Any]:
        """Read random windows; the seconds that it took."""
        if self._workers:
            return self._read_with_workers(windows)
        chosen = np.random.default_rng(seed).integers(0, len(self._dataset), windows)
        start, busy = time.perf_counter(), time.process_time()
        for number in chosen:
            self._dataset[int(number)]
        cpu_seconds = time.process_time() - busy
        return {"windows": windows, "seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds}

    def _read_with_workers(self, windows: int) -> dict[str, Any]:
        """A DataLoader of its own, which ends with the request: nothing is prepared while others are measured.

        The clock starts when every worker has delivered its first batch.
        """
        batch = max(1, windows // TIMED_BATCHES)
        count = (TIMED_BATCHES + self._workers) * batch
        sampler = torch.utils.data.RandomSampler(self._dataset, replacement=True, num_samples=count)
        loader = torch.utils.data.DataLoader(
            self._dataset, batch_size=batch, sampler=sampler, num_workers=self._workers
        )
        batches = iter(loader)
        for _ in range(self._workers):
            next(batches)
        start = time.perf_counter()
        done = sum(len(found["action"]) for found in batches)
        return {"windows": done, "seconds": time.perf_counter() - start, "cpu_seconds": None}

    def _open(self) -> LeRobotDataset:
        steps = [step / FPS for step in range(HORIZON)]
        deltas = {} if self._chunk == "none" else {"action": steps}
        if self._chunk == "images":
            deltas |= {f"observation.images.{camera}": steps for camera in CAMERAS}
        return LeRobotDataset(REPO, root=self._folder, delta_timestamps=deltas or None, video_backend=self._backend)

    def _check(self) -> float:
        """Mean difference of one window's pictures from the originals, in grey levels; actions must be equal."""
        steps = int(self._dataset.meta.episodes[0]["length"])
        scene, step = make_scene(0, steps), steps // 2
        item = self._dataset[step]
        errors = []
        for camera in CAMERAS:
            found = item[f"observation.images.{camera}"].numpy()
            found = (found if found.ndim == 3 else found[0]).transpose(1, 2, 0) * 255
            errors.append(float(np.abs(found - scene.images[camera][step]).mean()))
        expected = scene.action[step] if self._chunk == "none" else scene.action[step : step + HORIZON]
        if not np.array_equal(item["action"].numpy(), expected):
            raise SystemExit(f"{self._folder} holds other actions than the scenes: remove it")
        return float(np.mean(errors))


def _backend() -> str:
    """torchcodec where it finds a system ffmpeg that it can use, else pyav."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return BACKENDS[1]
    return BACKENDS[0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="LeRobotDataset v3: write scenes, read random windows.")
    parser.add_argument("what", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["video", "image"], default="video")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--chunk", choices=["actions", "images", "none"], default="actions")
    parser.add_argument("--workers", type=int, default=0, help="of torch's DataLoader; 0 reads without it")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.what == "write":
        print(json.dumps(write(options.folder, options.kind, options.episodes, options.steps)))
    else:
        reader = Reader(options.folder, options.chunk, options.workers)
        serve({"facts": reader.facts, "read": reader.read})


if __name__ == "__main__":
    sys.exit(main())
