"""The learner's own save: tensors as safetensors, rows of the index in segments, the rest as JSON, the JSON last.

    checkpoints/<learner_step>/tensors.safetensors
    index/<labels id>/...                             segments of the index, most of them shared by all checkpoints
    checkpoints/<learner_step>/state.json             names the hash of the tensors and the segments;
                                                      without it there is no checkpoint

What the fleet gets is something else: a published policy with a manifest.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import safetensors.torch
from torch import Tensor

from sop.buffer import IndexSegments
from sop.buffer.segments import IndexRows
from sop.core import layout
from sop.core.codec import content_hash
from sop.core.errors import InvalidRecord, NotFound, StoreUnavailable
from sop.transport import ObjectStore
from sop.transport.retry import Backoff, put_retrying, retrying

_log = logging.getLogger(__name__)
_ATTEMPTS = 8
"""How often a store is asked that does not answer."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a learner needs to go on as if it had never stopped."""

    learner_step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """JSON values."""
    rows: IndexRows | None = IndexRows()
    """The rows of the index; None when they were saved but cannot be read: the index has to be rebuilt."""


class CheckpointStore:
    """Writes checkpoints beside the training, reads the newest whole one.

    Args:
        store: where they go.
        segments: writes and reads the rows of the index.
        keep: newest checkpoints that are kept.
        pause: waits so many seconds between two attempts to read.
        fence: is asked before anything is replaced and before a checkpoint counts; raises when another learner has
            taken over. None: there is no other.
    """

    def __init__(
        self,
        store: ObjectStore,
        segments: IndexSegments,
        *,
        keep: int = 2,
        pause: Callable[[float], object] = time.sleep,
        fence: Callable[[], object] | None = None,
    ) -> None:
        self.segments = segments
        self._store = store
        self._keep = keep
        self._pause = pause
        self._fence = fence
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the tensors and write them in the background; waits for the previous write.

        Raises:
            Exception: whatever stopped the previous write.
        """
        self.wait()
        copy = {name: tensor.detach().clone().contiguous() for name, tensor in checkpoint.tensors.items()}
        state = msgspec.json.encode(dict(checkpoint.state))
        rows = checkpoint.rows or IndexRows()
        self._writing = self._executor.submit(self._write, checkpoint.learner_step, copy, state, rows)

    def wait(self) -> None:
        """Block until the last save is durable; raises what stopped it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait, then stop the thread; idempotent."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; a damaged one is named in the log and passed over (blocking).

        Raises:
            StoreUnavailable: the store did not answer several times: going on without what it holds would lose it.
        """
        backoff = Backoff(random.Random())
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._newest()
            except StoreUnavailable as error:
                _log.warning("waiting for the store to read the last checkpoint: %s", error)
                self._pause(backoff.next_s())
        return self._newest()

    def _newest(self) -> Checkpoint | None:
        for step in reversed(self._steps()):
            try:
                return self._read(step)
            except (InvalidRecord, NotFound, safetensors.SafetensorError) as error:
                _log.error("%s is damaged (%s); trying the one before", layout.checkpoint_folder(step), error)
        return None

    def _steps(self) -> list[int]:
        keys = self._store.keys(f"{layout.CHECKPOINTS}/")
        return sorted(layout.version_of(key) for key in keys if key.endswith("/state.json"))

    def _write(self, step: int, tensors: dict[str, Tensor], state: bytes, rows: IndexRows) -> None:
        folder = layout.checkpoint_folder(step)
        data = safetensors.torch.save(tensors)
        segments = self.segments.save(rows)
        record = {
            "learner_step": step,
            "tensors_hash": content_hash(data),
            "segments": segments,
            "state": msgspec.Raw(state),
        }
        self._require_lease()
        for name in ("state.json", "tensors.safetensors"):  # of a learner that was here before
            self._store.delete(f"{folder}/{name}")
        self._put(f"{folder}/tensors.safetensors", data)
        self._require_lease()
        self._put(f"{folder}/state.json", msgspec.json.encode(record))
        try:
            self._collect()
        except (InvalidRecord, StoreUnavailable) as error:
            _log.warning("left for the next checkpoint: old checkpoints and segments are not collected: %s", error)

    def _require_lease(self) -> None:
        if self._fence is not None:
            retrying(self._fence, attempts=_ATTEMPTS, backoff=Backoff(random.Random()), pause=self._pause)

    def _collect(self) -> None:
        """Delete old checkpoints, and segments that none names; no segment while one cannot tell what it names."""
        for old in self._steps()[: -self._keep]:
            self._store.delete(f"{layout.checkpoint_folder(old)}/state.json")
            self._store.delete(f"{layout.checkpoint_folder(old)}/tensors.safetensors")
        self.segments.collect([key for step in self._steps() for key in named_segments(self._record(step))])

    def _put(self, key: str, data: bytes) -> None:
        put_retrying(self._store, key, data, attempts=_ATTEMPTS, backoff=Backoff(random.Random()), pause=time.sleep)

    def _read(self, step: int) -> Checkpoint:
        folder, record = layout.checkpoint_folder(step), self._record(step)
        try:
            data = self._store.get(f"{folder}/tensors.safetensors")
            if content_hash(data) != record["tensors_hash"]:
                raise InvalidRecord("tensors_hash", "the tensors are not those that were saved")
            tensors = safetensors.torch.load(data)
            return Checkpoint(record["learner_step"], tensors, record["state"], self._rows(step, record))
        except (KeyError, TypeError, NotFound) as error:
            raise InvalidRecord("state.json", str(error)) from error

    def _record(self, step: int) -> dict[str, Any]:
        key = f"{layout.checkpoint_folder(step)}/state.json"
        try:
            record: dict[str, Any] = msgspec.json.decode(self._store.get(key), type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, NotFound) as error:
            raise InvalidRecord(key, str(error)) from error
        return record

    def _rows(self, step: int, record: Mapping[str, Any]) -> IndexRows | None:
        try:
            return self.segments.load(named_segments(record))
        except (InvalidRecord, NotFound) as error:
            _log.warning("%s has no usable rows of the index: %s", layout.checkpoint_folder(step), error)
            return None


def named_segments(record: Mapping[str, Any]) -> list[str]:
    """Keys of the segments that a checkpoint's `state.json` names, in order.

    Raises:
        InvalidRecord: it names none.
    """
    try:
        return msgspec.convert(record["segments"], list[str])
    except (KeyError, msgspec.ValidationError) as error:
        raise InvalidRecord("segments", str(error)) from error
