"""From windows to batches: payloads are fetched when needed, kept within a bound, and prepared ahead.

The order of draws does not depend on threads: the learner draws, the loader only fetches. Batch j is drawn
`depth` steps before it is used, always after the same losses, so a run can be repeated and resumed exactly.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sop.buffer.index import EpisodeIndex
from sop.buffer.windows import valid_lengths
from sop.core.codec import EncodedEpisode
from sop.core.experience import Batch, StepLabels, Windows

Annotate = Callable[[EncodedEpisode], StepLabels]


class PayloadCache:
    """Encoded episodes by key, least recently used out first, at most `max_bytes`. Thread-safe.

    Args:
        fetch: reads the bytes of an episode (blocking); the bytes passed `decode` at ingest.
        max_bytes: bound of the encoded bytes that are kept.
    """

    def __init__(self, fetch: Callable[[str], bytes], max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self._fetch = fetch
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[str, EncodedEpisode] = OrderedDict()
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Encoded bytes that are kept now."""
        return self._num_bytes

    def get(self, key: str) -> EncodedEpisode:
        """The episode under `key`; blocks for a fetch when it is not kept."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry
        entry = EncodedEpisode(self._fetch(key))
        self.put(key, entry)
        return entry

    def put(self, key: str, episode: EncodedEpisode) -> None:
        """Keep an episode that is at hand; idempotent."""
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = episode
            self._num_bytes += episode.num_bytes
            while self._num_bytes > self._max_bytes and len(self._entries) > 1:
                _, oldest = self._entries.popitem(last=False)
                self._num_bytes -= oldest.num_bytes


class BatchLoader:
    """Keeps `depth` batches on their way. The learner's use of it:

        batch = loader.next()        # waits only when the payloads are not there yet

    Args:
        index: names the episodes that windows refer to.
        cache: their payloads.
        annotate: the algorithm's opinion on an episode (loss weights, segments).
        draw: makes the next draw; called by `next` in the learner's thread.
        horizon: H, steps per window.
        depth: batches drawn ahead.
    """

    def __init__(
        self,
        index: EpisodeIndex,
        cache: PayloadCache,
        annotate: Annotate,
        draw: Callable[[], Windows],
        *,
        horizon: int,
        depth: int,
    ) -> None:
        self._index = index
        self._cache = cache
        self._annotate = annotate
        self._draw = draw
        self._horizon = horizon
        self._depth = depth
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batch-loader")
        self._pending: deque[tuple[Windows, Future[Batch]]] = deque()

    def next(self) -> Batch:
        """The batch drawn `depth` calls ago; draws another one. Blocks until its payloads are there."""
        while len(self._pending) <= self._depth:
            self._submit(self._draw())
        _, future = self._pending.popleft()
        return future.result()

    def load(self, windows: Windows) -> Batch:
        """Fetch the payload of given windows now (blocking)."""
        parts = [self._window(int(row), int(start)) for row, start in zip(windows.episode, windows.start, strict=True)]
        indicators = [part.indicator for part in parts if part.indicator is not None]
        return Batch(
            windows=windows,
            images={camera: np.stack([part.images[camera] for part in parts]) for camera in parts[0].images},
            state=np.stack([part.state for part in parts]),
            action=np.stack([part.action for part in parts]),
            loss_weight=np.stack([part.loss_weight for part in parts]),
            instruction=tuple(part.instruction for part in parts),
            policy_version=np.asarray([part.policy_version for part in parts], np.int64),
            advantage_indicator=np.asarray(indicators, np.int8) if len(indicators) == len(parts) else None,
        )

    def pending(self) -> list[Windows]:
        """Draws that are on their way, oldest first; part of a checkpoint."""
        return [windows for windows, _ in self._pending]

    def restore(self, pending: Sequence[Windows]) -> None:
        """Take up the draws of a checkpoint; the index has to hold their episodes."""
        self._pending.clear()
        for windows in pending:
            self._submit(windows)

    def close(self) -> None:
        """Stop the worker; what is on its way is dropped. Idempotent."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, windows: Windows) -> None:
        self._pending.append((windows, self._executor.submit(self.load, windows)))

    def _window(self, row: int, start: int) -> "_Window":
        episode = self._cache.get(self._index.rows[row].key)
        labels = self._annotate(episode)
        length = int(valid_lengths(labels, self._horizon)[start])
        steps = np.minimum(np.arange(start, start + self._horizon), start + max(length, 1) - 1)
        weight = np.zeros(self._horizon, np.float32)
        weight[:length] = labels.loss_weight[start : start + length]
        indicator = labels.advantage_indicator
        return _Window(
            images={camera: episode.frame(camera, start) for camera in episode.cameras},
            state=episode.state[start],
            action=episode.action[steps],
            loss_weight=weight,
            instruction=episode.header.instruction,
            policy_version=-1 if episode.policy_version is None else episode.policy_version,
            indicator=None if indicator is None else int(indicator[start]),
        )


class _Window(NamedTuple):
    """The payload of one window; the fields are rows of `Batch`."""

    images: dict[str, npt.NDArray[np.uint8]]
    state: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    loss_weight: npt.NDArray[np.float32]
    instruction: str
    policy_version: int
    indicator: int | None
