"""Segments: the rows of the index in the store, so that a learner need not fetch a million episodes to know them.

    index/<labels id>/0000000000-04096-<hash>.arrow     full: never written again, shared by all checkpoints
    index/<labels id>/0000004096-04096-<hash>.arrow
    index/<labels id>/0000008192-00713-<hash>.arrow     the tail: every checkpoint has its own

A checkpoint names its segments in order. Of an algorithm's opinion they hold window starts alone, which it gives once
and never changes (weights and indicators it may), so they stay right when it changes its mind. They are a cache: the
folder is named by what the opinion depends on (`labels_id`), and a learner that finds none, others, or damaged
ones rebuilds the index from the episodes themselves.
"""

import contextlib
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa

from sop.buffer.index import EpisodeIndex
from sop.buffer.rows import COLUMNS, OUTCOMES, RowBlock
from sop.core import layout
from sop.core.arrow import read_single_batch
from sop.core.codec import content_hash
from sop.core.episode import ACTOR_ID
from sop.core.errors import AlreadyExists, InvalidRecord, StoreUnavailable
from sop.core.experience import Source
from sop.core.layout import SegmentKey
from sop.transport import ObjectStore
from sop.transport.retry import Backoff, put_retrying

LABELS_VERSION = 1
"""Raised when an algorithm's masks or the rules of `windows` change: segments of before are not used."""
SEGMENT_VERSION = 1
"""Raised when the meaning or layout of a column changes; others are refused, and the index is rebuilt."""
ROWS_PER_SEGMENT = 4096
"""About 350 KB; a million episodes are 245 segments."""
MAX_SEGMENT_BYTES = 64 << 20
"""Larger objects are refused before they are read whole."""
_HEADER = b"sop.index"
_RUNS = "start_runs"
_SCHEMA = pa.schema(
    [(name, pa.from_numpy_dtype(dtype)) for name, dtype in COLUMNS.items()] + [(_RUNS, pa.list_(pa.int32()))]
)


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    segment_version: int
    actors: tuple[Annotated[str, msgspec.Meta(pattern=f"^{ACTOR_ID}$")], ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IndexRows:
    """All rows of an index, as a checkpoint carries them."""

    saved: tuple[str, ...] = ()
    """Keys of full segments that were written before: the first rows."""
    blocks: tuple[RowBlock, ...] = ()
    """The rows after them, one block per segment."""


def labels_id(algorithm: str, settings: Mapping[str, Any], horizon: int) -> str:
    """32 hexadecimal digits of all that decides where windows may start: other labels, other segments.

    Args:
        algorithm: name of the learning rule.
        settings: its settings (JSON values).
        horizon: H, steps per window.
    """
    facts = {"algorithm": algorithm, "settings": dict(settings), "horizon": horizon, "version": LABELS_VERSION}
    return content_hash(json.dumps(facts, sort_keys=True).encode())


class IndexSegments:
    """Keeps the rows of one index in the store. The checkpoint's use of it:

        rows = segments.cut(index)            # the learner's thread: copies what is not saved yet
        keys = segments.save(rows)            # the checkpoint's thread
        ...                                   # state.json names the keys
        segments.collect(kept_keys)           # of all checkpoints that are kept

        index.extend(*segments.load(keys).blocks)    # another process

    Equal rows give equal segments, under equal keys: a learner that resumed names the old ones again.

    Args:
        store: where they go.
        labels: `labels_id` of the learner.
        rows_per_segment: rows of a full segment.
    """

    def __init__(self, store: ObjectStore, labels: str, *, rows_per_segment: int = ROWS_PER_SEGMENT) -> None:
        self._store = store
        self._labels = labels
        self._rows = rows_per_segment
        self._full: tuple[str, ...] = ()

    def cut(self, index: EpisodeIndex) -> IndexRows:
        """The rows of `index` as they are now; copies only those that this object did not write in full yet."""
        saved, rows = self._full, len(index)
        firsts = range(len(saved) * self._rows, rows, self._rows)
        return IndexRows(saved, tuple(index.block(first, min(first + self._rows, rows)) for first in firsts))

    def save(self, rows: IndexRows) -> tuple[str, ...]:
        """Write what `cut` gave (blocking); returns the keys of all its rows, in order. Idempotent.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        keys, first = list(rows.saved), len(rows.saved) * self._rows
        there: set[str] = set()
        with contextlib.suppress(StoreUnavailable):  # saves writing what is there; `put` tells it too
            there.update(self._store.keys(f"{layout.INDEX}/{self._labels}/"))
        for block in rows.blocks:
            data = encode_segment(block)
            key = str(SegmentKey(self._labels, first, len(block), content_hash(data)))
            if key not in there:
                self._put(key, data)
            keys.append(key)
            first += len(block)
        self._full = tuple(keys[: first // self._rows])
        return tuple(keys)

    def load(self, keys: Sequence[str]) -> IndexRows:
        """Read the segments of a checkpoint (blocking): its rows, one block per segment.

        Raises:
            InvalidRecord: one is damaged, of other labels, or they do not follow one another.
            NotFound: one is gone.
            StoreUnavailable: the store does not answer.
        """
        first, blocks = 0, []
        for text in keys:
            key = SegmentKey.parse(text)
            if key.labels != self._labels:
                raise InvalidRecord("labels", f"{text} is of other labels than {self._labels}")
            if key.first != first:
                raise InvalidRecord("first", f"{text} does not follow row {first}")
            blocks.append(read_segment(self._store, key))
            first += key.count
        return IndexRows((), tuple(blocks))

    def collect(self, kept: Iterable[str]) -> int:
        """Delete all segments of the store but these (blocking); returns how many went."""
        keep = set(kept)
        gone = [key for key in self._store.keys(f"{layout.INDEX}/") if key not in keep]
        for key in gone:
            self._store.delete(key)
        self._full = tuple(takewhile(keep.__contains__, self._full))
        return len(gone)

    def _put(self, key: str, data: bytes) -> None:
        with contextlib.suppress(AlreadyExists):  # the key holds a content hash: same key, same bytes
            put_retrying(self._store, key, data, attempts=8, backoff=Backoff(random.Random()), pause=time.sleep)


def read_segment(store: ObjectStore, key: SegmentKey) -> RowBlock:
    """Fetch and check a segment (blocking).

    Raises:
        InvalidRecord: its bytes are not those that the key names, or not a segment.
        NotFound: it is gone.
        StoreUnavailable: the store does not answer.
    """
    data = store.get(str(key), slice(0, MAX_SEGMENT_BYTES + 1))
    if content_hash(data) != key.content_hash:
        raise InvalidRecord("content_hash", f"the bytes of {key} are not those that were saved")
    block = decode_segment(data)
    if len(block) != key.count:
        raise InvalidRecord("count", f"{key} holds {len(block)} rows")
    return block


def encode_segment(block: RowBlock) -> bytes:
    """Rows as one Arrow IPC file: the columns of `COLUMNS`, and the runs of a row as a list [first, count, ...]."""
    header = _Header(segment_version=SEGMENT_VERSION, actors=block.actors, tasks=block.tasks)
    offsets = np.concatenate(([0], np.cumsum(2 * block.columns["num_runs"]))).astype(np.int32)
    arrays = [pa.array(block.columns[name]) for name in COLUMNS]
    arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(block.runs.reshape(-1))))
    schema = _SCHEMA.with_metadata({_HEADER: msgspec.json.encode(header)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def decode_segment(data: bytes) -> RowBlock:
    """Read and check a segment: every value is one that an index can hold.

    Raises:
        InvalidRecord: the bytes are no whole, valid segment.
    """
    if len(data) > MAX_SEGMENT_BYTES:
        raise InvalidRecord("segment", f"{len(data)} bytes, at most {MAX_SEGMENT_BYTES} are accepted")
    try:
        batch = read_single_batch(data, "segment", full=True)
        header = msgspec.json.decode((batch.schema.metadata or {})[_HEADER], type=_Header)
        block = _block(batch, header)
    except (pa.ArrowException, msgspec.DecodeError, OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidRecord("segment", f"not a readable segment ({error})") from error
    _check_values(block)
    return block


def _block(batch: pa.RecordBatch, header: _Header) -> RowBlock:
    if header.segment_version != SEGMENT_VERSION:
        raise InvalidRecord("segment_version", f"this program reads {SEGMENT_VERSION}, got {header.segment_version}")
    if any(column.null_count for column in batch.columns):
        raise InvalidRecord("segment", "holds empty cells")
    if not batch.schema.equals(_SCHEMA):
        raise InvalidRecord("segment", "has other columns")
    columns = {name: np.asarray(batch.column(name).to_numpy(zero_copy_only=False)) for name in COLUMNS}
    lists = batch.column(_RUNS)
    values = lists.flatten()
    if values.null_count:
        raise InvalidRecord(_RUNS, "holds empty cells")
    lengths = np.diff(lists.offsets.to_numpy(zero_copy_only=False))
    if (lengths != 2 * columns["num_runs"].astype(np.int64)).any():
        raise InvalidRecord(_RUNS, "does not fit num_runs")
    runs = np.asarray(values.to_numpy(zero_copy_only=False)).reshape(-1, 2)
    return RowBlock(actors=header.actors, tasks=header.tasks, columns=columns, runs=runs)


def _check_values(block: RowBlock) -> None:
    limits = {
        "actor": len(block.actors),
        "task": len(block.tasks),
        "source": len(Source),
        "outcome": len(OUTCOMES),
        "sequence": 10**8,
        "num_steps": 10**9,
    }
    for name in COLUMNS:
        column = block.columns[name]
        low = -1 if name == "policy_version" else 0
        if len(column) and (column.min() < low or column.max() >= limits.get(name, 1 << 64)):
            raise InvalidRecord(name, f"values from {column.min()} to {column.max()}")
    first, count = block.runs.astype(np.int64).T
    steps = np.repeat(block.columns["num_steps"].astype(np.int64), block.columns["num_runs"])
    if ((first < 0) | (count < 1) | (first + count > steps)).any():
        raise InvalidRecord(_RUNS, "a run of window starts lies outside of its episode")
