"""From windows to batches: payloads are fetched when needed, kept within a bound, and prepared ahead.

    learner's thread   draw -> windows -> labels of their episodes (kept) -> BatchPlan
    loader's thread    fetch -> decode here, or in a worker process -> Batch

Neither draws nor labels depend on threads or processes: the learner draws and asks for labels, the loader only
fetches. Batch j is drawn `depth` steps before it is used, always after the same losses. When the algorithm changes
its mind, what is on its way is labelled again, so its labels are always those of the algorithm as it is now, and a
learner that takes up the draws of a checkpoint gives them the labels that they had. A run can be repeated and
resumed exactly.

An episode that is drawn for the first time (since the labels changed) is read in the learner's thread: its columns,
and whatever the algorithm looks at. Where episodes are files of this machine that is a fraction of a millisecond;
where they are not, it is a fetch, unless the episode has just been recorded or was fetched before.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt

from sop.buffer.cache import Payloads
from sop.buffer.fetcher import BatchFetcher, relabelled
from sop.buffer.index import EpisodeIndex
from sop.buffer.jobs import BatchPlan
from sop.buffer.windows import valid_lengths
from sop.core.codec import EncodedEpisode
from sop.core.errors import SopError
from sop.core.experience import Batch, StepLabels, Windows

Annotate = Callable[[EncodedEpisode], StepLabels]
LABEL_BYTES = 256 << 20
"""Labels that are kept if nothing else is said: 7 bytes per step, so those of about 120,000 episodes of 300 steps."""
_ENTRY_BYTES = 600
"""What a kept entry costs beside its arrays' content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLabels:
    """The labels that the windows of a batch had when it was learned from: all that a batch keeps of an opinion."""

    loss_weight: npt.NDArray[np.float32]
    """[B, H], 0 beyond the steps that count."""
    advantage_indicator: npt.NDArray[np.int8] | None
    """[B] or None."""


class BatchLoader:
    """Keeps `depth` batches on their way. The learner's use of it:

        batch = loader.next()        # waits only when the payloads are not there yet

    Args:
        index: names the episodes that windows refer to; read in the thread that calls `next` or `load`.
        cache: their payloads.
        annotate: the algorithm's opinion on an episode (loss weights, segments); asked once per episode, in the
            thread that calls `next`, `load`, `restore` or `relabel`, in the order of the draws.
        draw: makes the next draw; called by `next` in the learner's thread.
        horizon: H, steps per window.
        depth: batches drawn ahead.
        decode_workers: processes that decode; 0 decodes in a thread of this process. The batches are the same.
        part: what is fetched here of a plan, when other ranks fetch the rest; None fetches all of it.
        label_bytes: bound of the labels that are kept.

    Raises:
        ValueError: worker processes and a cache without files.
    """

    def __init__(
        self,
        index: EpisodeIndex,
        cache: Payloads,
        annotate: Annotate,
        draw: Callable[[], Windows],
        *,
        horizon: int,
        depth: int,
        decode_workers: int = 0,
        part: Callable[[BatchPlan], BatchPlan] | None = None,
        label_bytes: int = LABEL_BYTES,
    ) -> None:
        self._fetcher = BatchFetcher(cache, decode_workers)
        self._index = index
        self._labels = LabelCache(cache, annotate, horizon, label_bytes)
        self._draw = draw
        self._depth = depth
        self._part = part
        self._pending: deque[DueBatch] = deque()

    def next(self) -> Batch:
        """The batch drawn `depth` calls ago; draws another one. Blocks until its payloads are there.

        Raises:
            InvalidRecord, NotFound, StoreUnavailable: a payload cannot be had; names the episode.
            RunError: worker processes die of it.
        """
        return self.due().batch()

    def due(self) -> "DueBatch":
        """What `next` would wait for, with its plan; draws another batch. Blocks for labels only."""
        while len(self._pending) <= self._depth:
            self._submit(self._draw())
        return self._pending.popleft()

    def ahead(self) -> list[BatchPlan]:
        """Plans of the draws that are on their way, oldest first, those without one left out."""
        return [one.plan for one in self._pending if one.plan is not None]

    def load(self, windows: Windows, labels: BatchLabels | None = None) -> Batch:
        """Fetch the payload of given windows now (blocking); raises like `next`.

        Args:
            windows: what to load.
            labels: of these windows; None asks the algorithm.
        """
        return self._fetcher.load(self._plan(windows, labels))

    def pending(self) -> list[Windows]:
        """Draws that are on their way, oldest first; part of a checkpoint."""
        return [one.windows for one in self._pending]

    def restore(self, pending: Sequence[Windows]) -> None:
        """Take up the draws of a checkpoint, with the labels that the algorithm gives them now; the index has to
        hold their episodes."""
        for dropped in self._pending:
            dropped.future.cancel()  # one that is being prepared is finished and forgotten
        self._pending.clear()
        for windows in pending:
            self._submit(windows)

    def relabel(self) -> None:
        """Ask the algorithm again about every episode, because its opinion has changed. What is on its way stays, in
        its order, and gets the new labels; frames are not decoded again for it. Blocks as long as the algorithm takes
        for these."""
        self._labels.clear()
        before = list(self._pending)
        self._pending.clear()
        for one in before:
            self._submit(one.windows, prepared=one)

    def close(self) -> None:
        """Stop threads and processes; what is on its way is dropped. Batches stay valid. Idempotent."""
        self._fetcher.close()

    def _submit(self, windows: Windows, prepared: "DueBatch | None" = None) -> None:
        """Label a draw here and now, prepare it in the background. What goes wrong is told when the batch is due.

        Args:
            windows: the draw.
            prepared: the same draw with older labels: what it decodes is used when the same steps count.
        """
        try:
            plan = self._plan(windows)
        except SopError as error:
            failed: Future[Batch] = Future()
            failed.set_exception(error)
            self._pending.append(DueBatch(windows, None, None, failed))
            return
        part = plan if self._part is None else self._part(plan)
        ready = prepared is not None and prepared.decodes(plan)
        future = prepared.future if prepared is not None and ready else self._fetcher.submit(part)
        self._pending.append(DueBatch(windows, plan, part, future))

    def _episodes(self, windows: Windows) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
        """Keys of the distinct episodes, and which of them each window is cut from."""
        rows, inverse = np.unique(windows.episode, return_inverse=True)
        return tuple(self._index.key(int(row)) for row in rows), inverse.astype(np.int32)

    def _plan(self, windows: Windows, given: BatchLabels | None = None) -> BatchPlan:
        keys, row = self._episodes(windows)
        if given is not None:
            return BatchPlan(
                windows=windows,
                keys=keys,
                row=row,
                length=(given.loss_weight > 0).sum(axis=1).astype(np.int16),
                loss_weight=given.loss_weight,
                advantage_indicator=given.advantage_indicator,
            )
        labels = [self._labels.get(key) for key in keys]
        count = len(windows)
        length = np.zeros(count, np.int16)
        weight = np.zeros((count, self._labels.horizon), np.float32)
        indicator = np.zeros(count, np.int8)
        for window, (number, start) in enumerate(zip(row.tolist(), windows.start.tolist(), strict=True)):
            its = labels[number]
            length[window] = steps = int(its.length[start])
            weight[window, :steps] = its.loss_weight[start : start + steps]
            if its.indicator is not None:
                indicator[window] = its.indicator[start]
        complete = all(its.indicator is not None for its in labels)
        return BatchPlan(
            windows=windows,
            keys=keys,
            row=row,
            length=length,
            loss_weight=weight,
            advantage_indicator=indicator if complete else None,
            label_version=max((its.version for its in labels), default=0),
        )


@dataclass(frozen=True, slots=True)
class DueBatch:
    """A draw that is on its way."""

    windows: Windows
    plan: BatchPlan | None
    """With its present labels; None when these could not be had, which `batch` tells."""
    part: BatchPlan | None
    """What of it is fetched here."""
    future: "Future[Batch]"
    """The batch, with these labels or older ones."""

    def batch(self) -> Batch:
        """The part that is fetched here, with its present labels; blocks until it is there. Raises like `next`."""
        batch = self.future.result()
        return batch if self.part is None else relabelled(batch, self.part)

    def decodes(self, plan: BatchPlan) -> bool:
        """Whether images, states and actions are those that a plan for the same windows asks for."""
        return self.plan is not None and np.array_equal(self.plan.length, plan.length)


@dataclass(frozen=True, slots=True)
class WindowLabels:
    """What the windows of one episode need of its labels."""

    length: npt.NDArray[np.int16]
    """[T] steps that count in a window that starts here."""
    loss_weight: npt.NDArray[np.float32]
    """[T]"""
    indicator: npt.NDArray[np.int8] | None
    """[T] or None."""
    version: int = 0
    """`StepLabels.label_version`."""

    @property
    def num_bytes(self) -> int:
        """Memory, about."""
        arrays = (self.length, self.loss_weight, self.indicator)
        return _ENTRY_BYTES + sum(array.nbytes for array in arrays if array is not None)


class LabelCache:
    """Labels of episodes, computed once, least recently used out first. Thread-safe.

    Args:
        payloads: whose columns are annotated; images are not touched.
        annotate: deterministic; may run in two threads at once.
        horizon: H, steps per window, less than 2^15.
        max_bytes: bound of what is kept.
    """

    def __init__(self, payloads: Payloads, annotate: Annotate, horizon: int, max_bytes: int) -> None:
        if not 0 < horizon < 1 << 15:
            raise ValueError(f"horizon must be in [1, 32767], got {horizon}")
        self.horizon = horizon
        self.num_bytes = 0
        """Memory of what is kept, about."""
        self._payloads = payloads
        self._annotate = annotate
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, WindowLabels] = OrderedDict()
        self._generation = 0
        self._lock = Lock()

    def get(self, key: str) -> WindowLabels:
        """Labels of an episode; blocks for its columns when they are not kept. Raises like `Payloads.get`."""
        with self._lock:
            entry, generation = self._entries.get(key), self._generation
            if entry is not None:
                self._entries.move_to_end(key)
                return entry
        labels = self._annotate(self._payloads.get(key))
        entry = WindowLabels(
            valid_lengths(labels, self.horizon).astype(np.int16),
            np.asarray(labels.loss_weight, np.float32),
            None if labels.advantage_indicator is None else np.asarray(labels.advantage_indicator, np.int8),
            labels.label_version,
        )
        with self._lock:
            if generation == self._generation and key not in self._entries:
                self._entries[key] = entry
                self.num_bytes += entry.num_bytes
                while self.num_bytes > self._max_bytes and len(self._entries) > 1:
                    self.num_bytes -= self._entries.popitem(last=False)[1].num_bytes
        return entry

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0
            self._generation += 1
