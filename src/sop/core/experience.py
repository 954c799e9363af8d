"""The words in which buffer, algorithm and learner talk about experience.

Shapes: B windows, H steps per window (the action horizon), T steps per episode, A action elements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import Any, Protocol

import blake3
import numpy as np
import numpy.typing as npt

from sop.core.episode import Intervention, Outcome
from sop.core.errors import InvalidRecord

HASHED_ROW_STRIDE = 16
"""Of every image the rows 0, 16, 32, ... go into a batch's hash: 0.7 % of making the batch, all rows cost 5 to 10 %.
Another frame, order, decoder or shape changes them just as well."""


class Source(IntEnum):
    """Which buffer a window comes from: the paper's B_off and B_on."""

    OFFLINE = 0
    ONLINE = 1


class Collection(StrEnum):
    """What the fleet does while an algorithm trains."""

    ON_POLICY = "on_policy"
    """Robots act with the policy, operators correct; episodes go to the online buffer."""
    DEMONSTRATIONS = "demonstrations"
    """Operators demonstrate in the lab; episodes go to the offline buffer."""
    NOTHING = "nothing"
    """No episodes are collected."""


class StoredEpisode(Protocol):
    """What a learning rule reads of an episode. `Episode` is one, and so is `EncodedEpisode`, which decodes an image
    only when it is asked for it."""

    @property
    def actor_id(self) -> str:
        """Who acted; with `sequence` the name of the episode within a run."""
        ...

    @property
    def sequence(self) -> int:
        """The actor's number of the episode."""
        ...

    @property
    def task(self) -> str:
        """Task id."""
        ...

    @property
    def instruction(self) -> str:
        """The text that the policy read."""
        ...

    @property
    def num_steps(self) -> int:
        """T."""
        ...

    @property
    def policy_version(self) -> int | None:
        """The version that drove or proposed; None for a demonstration."""
        ...

    @property
    def outcome(self) -> Outcome:
        """How the episode ended."""
        ...

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """One entry per maximal run of HUMAN steps, in order."""
        ...

    @property
    def controller(self) -> npt.NDArray[np.uint8]:
        """[T] `Controller` values."""
        ...

    @property
    def state(self) -> npt.NDArray[np.float32]:
        """[T, S] proprioception before the action."""
        ...

    @property
    def action(self) -> npt.NDArray[np.float32]:
        """[T, A] executed actions."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras."""
        ...

    def frame(self, camera: str, step: int) -> npt.NDArray[np.uint8]:
        """The image [h, w, 3] that a camera saw before the step's action. Decodes: about 0.2 ms.

        Raises:
            InvalidRecord: no such camera or step, or the image is damaged.
        """
        ...


class Library(Protocol):
    """The stored episodes, as a learning rule reads them that learns from whole episodes (e.g. a value function)."""

    def keys(self, source: Source) -> Sequence[str]:
        """Keys of the episodes of a buffer, in the order of the index."""
        ...

    def get(self, key: str) -> StoredEpisode:
        """An episode; may block for a fetch.

        Raises:
            NotFound, StoreUnavailable, InvalidRecord: it cannot be had.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLabels:
    """An algorithm's opinion on one stored episode: a sidecar, recomputable, never written into the episode."""

    loss_weight: npt.NDArray[np.float32]
    """[T] weight of a step's action in the loss, 0 = not learned from."""
    segment: npt.NDArray[np.int32]
    """[T] steps with equal numbers form one segment; what lies beyond a window's first segment is padding."""
    can_start: npt.NDArray[np.bool_]
    """[T] whether a window may start at this step."""
    advantage_indicator: npt.NDArray[np.int8] | None = None
    """[T] -1 negative, +1 positive, 0 unknown; None when the algorithm has no such opinion."""
    label_version: int = 0
    """Version of what made the labels, e.g. of the value function."""

    def __post_init__(self) -> None:
        steps = len(self.loss_weight)
        for name in ("segment", "can_start", "advantage_indicator"):
            array = getattr(self, name)
            if array is not None and len(array) != steps:
                raise InvalidRecord(name, f"needs {steps} steps like loss_weight, got {len(array)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """Numbers that a learning rule computed for every step of a stored episode, to be kept beside it."""

    version: int
    """Version of what computed them, e.g. of the value function."""
    columns: Mapping[str, npt.NDArray[np.float32]]
    """Name -> [T], NaN where a step has none; e.g. `value`, `realised`, `advantage`."""


@dataclass(frozen=True, slots=True)
class Windows:
    """A draw of the sampler: B references `(episode, start)` into the buffers. Holds no payload."""

    episode: npt.NDArray[np.int64]
    """[B] row of the episode in the index."""
    start: npt.NDArray[np.int32]
    """[B] first step of the window."""
    task: npt.NDArray[np.int32]
    """[B] row of the task in the index's list of tasks."""
    source: npt.NDArray[np.uint8]
    """[B] `Source` values."""

    def __len__(self) -> int:
        return len(self.episode)


@dataclass(frozen=True, slots=True)
class Share:
    """Which windows of a whole batch a rank of several has: rows [first, first + B) of `total`."""

    first: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B windows with their payload, as numpy arrays; the algorithm and the policy turn them into tensors."""

    windows: Windows
    images: Mapping[str, npt.NDArray[np.uint8]]
    """Camera -> [B, h, w, 3], seen at each window's first step."""
    state: npt.NDArray[np.float32]
    """[B, S] at each window's first step."""
    action: npt.NDArray[np.float32]
    """[B, H, A] executed actions; rows beyond the window's segment repeat the last valid action."""
    loss_weight: npt.NDArray[np.float32]
    """[B, H] weight per step, 0 beyond the segment or the episode."""
    instruction: tuple[str, ...]
    """B instructions."""
    policy_version: npt.NDArray[np.int64]
    """[B] version that acted, -1 for demonstrations."""
    advantage_indicator: npt.NDArray[np.int8] | None = None
    """[B] indicator at each window's first step, None when the algorithm gives none."""
    label_version: int = 0
    """Largest `StepLabels.label_version` among the windows; 0 when the labels are facts. Not covered by the hash."""
    content_hash: str = ""
    """`batch_hash` of the fields above, set by the batch loader; empty for a batch that was made by hand."""
    share: Share | None = None
    """Set on a rank of several: these are some windows of a batch. Random numbers for the windows are drawn for the
    whole batch (see `sop.policies.draws`), so that the ranks together learn what one would."""

    def __len__(self) -> int:
        return len(self.windows)


def rows_of(batch: Batch, begin: int, end: int) -> Batch:
    """Some windows of a batch as a batch, with its own hash; arrays are views."""
    rows = slice(begin, end)
    windows, indicator = batch.windows, batch.advantage_indicator
    part = replace(
        batch,
        windows=Windows(windows.episode[rows], windows.start[rows], windows.task[rows], windows.source[rows]),
        images={camera: images[rows] for camera, images in batch.images.items()},
        state=batch.state[rows],
        action=batch.action[rows],
        loss_weight=batch.loss_weight[rows],
        instruction=batch.instruction[rows],
        policy_version=batch.policy_version[rows],
        advantage_indicator=None if indicator is None else indicator[rows],
        share=Share(begin, len(batch)),
    )
    return replace(part, content_hash=batch_hash(part))


def shared_hash(parts: Sequence[str]) -> str:
    """The hash of a batch that several ranks learned from, each of an equal part: the hashes of the parts, in order."""
    return "+".join(parts)


def hash_like(batch: Batch, recorded: str) -> str:
    """The hash of a whole batch in the form of one that was recorded: of as many equal parts as that has.

    What cannot be divided so has the hash of the whole, which equals no such record.
    """
    parts = recorded.count("+") + 1
    if parts == 1 or len(batch) % parts:
        return batch.content_hash
    size = len(batch) // parts
    return shared_hash([rows_of(batch, first, first + size).content_hash for first in range(0, len(batch), size)])


def batch_hash(batch: Batch) -> str:
    """32 hexadecimal digits of BLAKE3 that prove that two batches hold the same: what a replay compares.

    Covers, in this order: start, task and source of the windows (not the row of their episode, which is another one
    in another index), every camera in alphabetical order (rows 0, 16, 32, ... of each image), state, action, loss
    weights, policy versions, indicators, instructions; each array with its name, dtype and shape. Does not depend
    on memory layout, on `content_hash` or on `share`.
    """
    hasher = blake3.blake3()

    def add(name: str, array: npt.NDArray[Any] | None, rows: int = 1) -> None:
        if array is None:
            hasher.update(f"{name}|none|".encode())
            return
        hasher.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        hasher.update((array[:, ::rows] if rows > 1 else array).tobytes())

    for name in ("start", "task", "source"):
        add(f"windows.{name}", getattr(batch.windows, name))
    for camera in sorted(batch.images):
        add(f"images.{camera}", batch.images[camera], HASHED_ROW_STRIDE)
    for name in ("state", "action", "loss_weight", "policy_version", "advantage_indicator"):
        add(name, getattr(batch, name))
    texts = "".join(batch.instruction)
    hasher.update(f"instruction|{[len(text) for text in batch.instruction]}|{texts}".encode())
    return str(hasher.hexdigest(length=16))
