"""The learner's own save: tensors as safetensors, everything else as JSON, the JSON last.

    checkpoints/<learner_step>/tensors.safetensors
    checkpoints/<learner_step>/state.json             names the hash of the tensors; without it there is no checkpoint

What the fleet gets is something else: a published policy with a manifest.
"""

import logging
import random
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import safetensors.torch
from torch import Tensor

from sop.core import layout
from sop.core.codec import content_hash
from sop.core.errors import InvalidRecord, NotFound, SopError
from sop.transport import ObjectStore
from sop.transport.retry import Backoff, put_retrying

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a learner needs to go on as if it had never stopped."""

    learner_step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """JSON values."""


class CheckpointStore:
    """Writes checkpoints beside the training, reads the newest whole one.

    Args:
        store: where they go.
        keep: newest checkpoints that are kept.
    """

    def __init__(self, store: ObjectStore, *, keep: int = 2) -> None:
        self._store = store
        self._keep = keep
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
        self._writing = self._executor.submit(self._write, checkpoint.learner_step, copy, state)

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
        """The newest checkpoint that is whole; a damaged one is named in the log and passed over (blocking)."""
        for step in reversed(self._steps()):
            try:
                return self._read(step)
            except (SopError, safetensors.SafetensorError) as error:
                _log.error("%s is damaged (%s); trying the one before", layout.checkpoint_folder(step), error)
        return None

    def _steps(self) -> list[int]:
        keys = self._store.keys(f"{layout.CHECKPOINTS}/")
        return sorted(layout.version_of(key) for key in keys if key.endswith("/state.json"))

    def _write(self, step: int, tensors: dict[str, Tensor], state: bytes) -> None:
        folder = layout.checkpoint_folder(step)
        data = safetensors.torch.save(tensors)
        record = {"learner_step": step, "tensors_hash": content_hash(data), "state": msgspec.Raw(state)}
        for name in ("state.json", "tensors.safetensors"):  # of a learner that was here before
            self._store.delete(f"{folder}/{name}")
        self._put(f"{folder}/tensors.safetensors", data)
        self._put(f"{folder}/state.json", msgspec.json.encode(record))
        for old in self._steps()[: -self._keep]:
            self._store.delete(f"{layout.checkpoint_folder(old)}/state.json")
            self._store.delete(f"{layout.checkpoint_folder(old)}/tensors.safetensors")

    def _put(self, key: str, data: bytes) -> None:
        put_retrying(self._store, key, data, attempts=8, backoff=Backoff(random.Random()), pause=time.sleep)

    def _read(self, step: int) -> Checkpoint:
        folder = layout.checkpoint_folder(step)
        try:
            record = msgspec.json.decode(self._store.get(f"{folder}/state.json"))
            data = self._store.get(f"{folder}/tensors.safetensors")
            if content_hash(data) != record["tensors_hash"]:
                raise InvalidRecord("tensors_hash", "the tensors are not those that were saved")
            return Checkpoint(record["learner_step"], safetensors.torch.load(data), record["state"])
        except (msgspec.DecodeError, KeyError, TypeError, NotFound) as error:
            raise InvalidRecord("state.json", str(error)) from error
