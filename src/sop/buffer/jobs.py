"""What a batch is made of, and the one place where it is made: in a thread of the learner or in a worker process.

    learner    BatchPlan: which episodes, which steps, which of them count
    anywhere   assemble(plan, episodes, allocate) -> Batch      the same bits wherever it runs
    worker     LoadJob (msgpack, through a pipe) -> assemble into shared memory -> Loaded or Failed

A message is its length (4 bytes, little endian), then msgpack. Arrays of images travel in shared memory only.
Shapes: B windows, E distinct episodes, H steps per window, S state and A action elements.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sop.core.codec import EncodedEpisode
from sop.core.errors import InvalidRecord
from sop.core.experience import Batch, Windows, batch_hash

MAX_BATCH_BYTES = 4 << 30
"""A larger batch is refused before anything is allocated for it."""
MAX_MESSAGE_BYTES = 64 << 20
ALIGNMENT = 64
"""Arrays in shared memory begin at multiples of it."""
_IMAGES = "images."

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Name of an array (`state`, `action`, `images.<camera>`) -> shape and dtype."""
Allocate = Callable[[Shapes], Mapping[str, npt.NDArray[Any]]]
"""Makes room for arrays; their content may be anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """A draw with everything about it that is known without its payload."""

    windows: Windows
    keys: tuple[str, ...]
    """E keys of the episodes that the windows are cut from, each once."""
    row: npt.NDArray[np.int32]
    """[B] place of each window's episode in `keys`."""
    length: npt.NDArray[np.int16]
    """[B] steps that count; the last of them is repeated up to H."""
    loss_weight: npt.NDArray[np.float32]
    """[B, H]"""
    advantage_indicator: npt.NDArray[np.int8] | None
    """[B] or None."""
    label_version: int = 0
    """As in `Batch`; stays in the learner's process."""

    def names(self) -> str:
        """The windows as `key@start, ...`, for messages."""
        return ", ".join(f"{self.keys[row]}@{start}" for row, start in zip(self.row, self.windows.start, strict=True))


def part_of(plan: BatchPlan, begin: int, end: int) -> BatchPlan:
    """The windows [begin, end) of a plan, in their order, with the episodes that they need and no others."""
    rows = slice(begin, end)
    needed, row = np.unique(plan.row[rows], return_inverse=True)
    windows, indicator = plan.windows, plan.advantage_indicator
    return BatchPlan(
        windows=Windows(windows.episode[rows], windows.start[rows], windows.task[rows], windows.source[rows]),
        keys=tuple(plan.keys[number] for number in needed.tolist()),
        row=row.astype(np.int32),
        length=plan.length[rows],
        loss_weight=plan.loss_weight[rows],
        advantage_indicator=None if indicator is None else indicator[rows],
        label_version=plan.label_version,
    )


def assemble(plan: BatchPlan, episodes: Sequence[EncodedEpisode], allocate: Allocate) -> Batch:
    """Cut the windows of a plan out of their episodes, and hash the result. Blocks for the decoding.

    Args:
        plan: at least one window.
        episodes: E episodes in the order of `plan.keys`; all show the same cameras and sizes.
        allocate: is asked once.

    Raises:
        InvalidRecord: an episode does not hold what the plan says or does not fit to the others; names the
            field, the episode and the step.
    """
    arrays = allocate(_shapes(plan, episodes))
    state, action = arrays["state"], arrays["action"]
    images = {name.removeprefix(_IMAGES): array for name, array in arrays.items() if name.startswith(_IMAGES)}
    horizon = np.arange(plan.loss_weight.shape[1])
    rows, starts, lengths = plan.row.tolist(), plan.windows.start.tolist(), plan.length.tolist()
    for window, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        episode = episodes[row]
        try:
            _check(episode, start, length, state.shape[1], action.shape[2])
            state[window] = episode.state[start]
            action[window] = episode.action[start + np.minimum(horizon, max(length, 1) - 1)]
            for camera, out in images.items():
                episode.frame_into(camera, start, out[window])
        except InvalidRecord as error:
            raise _naming(error, plan.keys[row]) from error
    versions = [episode.policy_version for episode in episodes]
    batch = Batch(
        windows=plan.windows,
        images=images,
        state=state,
        action=action,
        loss_weight=plan.loss_weight,
        instruction=tuple(episodes[row].header.instruction for row in rows),
        policy_version=np.asarray([-1 if versions[row] is None else versions[row] for row in rows], np.int64),
        advantage_indicator=plan.advantage_indicator,
        label_version=plan.label_version,
    )
    return replace(batch, content_hash=batch_hash(batch))


def allocate_fresh(shapes: Shapes) -> dict[str, npt.NDArray[Any]]:
    """Room in this process's own memory."""
    return {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}


def arrange(shapes: Shapes) -> tuple[dict[str, int], int]:
    """Where each array begins in one piece of memory, and how many bytes there are in all."""
    places, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        places[name] = end
        end += -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
    return places, end


class EpisodeFile(msgspec.Struct, frozen=True, array_like=True):
    """An episode that a worker opens."""

    key: str
    path: str


class LoadJob(msgspec.Struct, frozen=True, kw_only=True):
    """One batch to be loaded: a `BatchPlan` as bytes, and where the result goes."""

    offset: int
    """First byte of the room in shared memory."""
    files: tuple[EpisodeFile, ...]
    horizon: int
    arrays: dict[str, bytes]
    """The plan's arrays, C order, dtypes as in `BatchPlan` and `Windows`; no indicator, no entry."""


class ArrayPlace(msgspec.Struct, frozen=True, array_like=True):
    """An array in shared memory; `offset` counts from the beginning of the room."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to a job that went well."""

    num_bytes: int
    arrays: tuple[ArrayPlace, ...]
    instruction: tuple[str, ...]
    policy_version: tuple[int, ...]
    content_hash: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to a job that did not: an `InvalidRecord`, a file that cannot be read, or a mistake of the program."""

    kind: str
    """`invalid`, `missing`, `unavailable` or `error`."""
    field: str
    problem: str
    step: int | None = None


Reply = Loaded | Failed


def to_job(plan: BatchPlan, paths: Sequence[str], offset: int) -> LoadJob:
    """A plan as a message; `paths` are the files of `plan.keys`."""
    windows = {name: getattr(plan.windows, name).tobytes() for name in ("episode", "start", "task", "source")}
    arrays = {name: getattr(plan, name).tobytes() for name in ("row", "length", "loss_weight")}
    if plan.advantage_indicator is not None:
        arrays["advantage_indicator"] = plan.advantage_indicator.tobytes()
    return LoadJob(
        offset=offset,
        files=tuple(EpisodeFile(key, path) for key, path in zip(plan.keys, paths, strict=True)),
        horizon=plan.loss_weight.shape[1],
        arrays=windows | arrays,
    )


def to_plan(job: LoadJob) -> BatchPlan:
    """The inverse of `to_job`."""

    def read(name: str, dtype: type) -> npt.NDArray[Any]:
        return np.frombuffer(job.arrays[name], dtype)

    return BatchPlan(
        windows=Windows(
            episode=read("episode", np.int64),
            start=read("start", np.int32),
            task=read("task", np.int32),
            source=read("source", np.uint8),
        ),
        keys=tuple(file.key for file in job.files),
        row=read("row", np.int32),
        length=read("length", np.int16),
        loss_weight=read("loss_weight", np.float32).reshape(-1, job.horizon),
        advantage_indicator=read("advantage_indicator", np.int8) if "advantage_indicator" in job.arrays else None,
    )


def write_message(descriptor: int, message: msgspec.Struct) -> None:
    """Send a message; blocks until the pipe has taken it.

    Raises:
        BrokenPipeError: nobody reads any more.
    """
    body = msgspec.msgpack.encode(message)
    data = memoryview(len(body).to_bytes(4, "little") + body)
    while data:
        data = data[os.write(descriptor, data) :]


def read_message(descriptor: int) -> bytes | None:
    """Wait for a message; None when the other end is gone, also in the middle of one.

    Raises:
        ValueError: the length is no length of ours.
    """
    head = _read(descriptor, 4)
    if head is None:
        return None
    size = int.from_bytes(head, "little")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes, at most {MAX_MESSAGE_BYTES} are accepted")
    return _read(descriptor, size)


def _read(descriptor: int, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(descriptor, size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _shapes(plan: BatchPlan, episodes: Sequence[EncodedEpisode]) -> Shapes:
    """Shapes of a batch after its first window."""
    count = len(plan.windows)
    if not count:
        raise ValueError("a batch needs at least one window")
    row, start = int(plan.row[0]), int(plan.windows.start[0])
    first = episodes[row]
    try:
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for camera in first.cameras:
            shapes[_IMAGES + camera] = ((count, *first.frame_size(camera, start), 3), "|u1")
        shapes["state"] = ((count, first.state.shape[1]), "<f4")
        shapes["action"] = ((count, plan.loss_weight.shape[1], first.action.shape[1]), "<f4")
    except InvalidRecord as error:
        raise _naming(error, plan.keys[row]) from error
    _, num_bytes = arrange(shapes)
    if num_bytes > MAX_BATCH_BYTES:
        raise InvalidRecord("images", f"a batch like {plan.keys[row]} needs {num_bytes} of {MAX_BATCH_BYTES} bytes")
    return shapes


def _check(episode: EncodedEpisode, start: int, length: int, states: int, actions: int) -> None:
    if not 0 <= start < start + max(length, 1) <= episode.num_steps:
        raise InvalidRecord("controller", f"{episode.num_steps} steps are too few for {length} more", step=start)
    for name, found, expected in (("state", episode.state, states), ("action", episode.action, actions)):
        if found.dtype != np.float32 or found.shape[1:] != (expected,):
            raise InvalidRecord(name, f"{found.dtype} {found.shape} where the batch has {expected} float32", step=start)


def _naming(error: InvalidRecord, key: str) -> InvalidRecord:
    problem = str(error).partition(": ")[2]
    return InvalidRecord(error.field, f"{problem} in {key}", step=error.step)
