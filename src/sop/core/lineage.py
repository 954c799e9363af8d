"""Lineage: what a policy version learned from, step by step, so that every claim about it can be traced and repeated.

    learner step k   drew windows (episode, start) x B     -> StepDraw, with the content hash of the batch
    version v        steps between its parent and itself   -> Lineage: draws, and the episodes that were new to it

A version has learned from its own lineage and from those of its parent, grandparent, ... down to the base policy.
Stored as an Arrow IPC file under zstd: one row per window; facts per step and per new episode in the metadata.

Labels that are facts (who controlled a step) are computed again from the episodes. Those that are an opinion of the
moment (`Batch.label_version` > 0) cannot be: their draws keep them, in two more columns.

    loss_weight          list of H weights; empty where the step keeps none
    advantage_indicator  -1, 0, 1; -128 where the batch had none
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

from sop.core.arrow import read_single_batch
from sop.core.errors import InvalidRecord
from sop.core.layout import EpisodeKey

MAX_LINEAGE_BYTES = 128 << 20
"""Decompressed size that is accepted: about a million windows."""
MAX_HORIZON = (1 << 15) - 1
"""Longest window that is accepted."""
_META = b"sop.lineage"
_SCHEMA = pa.schema([("learner_step", pa.int32()), ("episode", pa.string()), ("start", pa.int32())])
_LABELLED = pa.schema([*_SCHEMA, ("loss_weight", pa.list_(pa.float32())), ("advantage_indicator", pa.int8())])
_NONE = -128
"""In the place of an indicator that the batch did not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedEpisode:
    """An episode at the moment when the learner learned from it for the first time. Times are UTC nanoseconds."""

    key: str
    task: str
    policy_version: int | None
    """The version that acted, None for a demonstration."""
    human_steps: int
    operators: tuple[str, ...] | None
    """Who corrected in it, each once, sorted; None when the learner restarted in between: the episode itself says."""
    learner_step: int
    """The first step that drew from it."""
    recorded_utc_ns: int
    """The robot finished it (the robot's clock)."""
    spooled_utc_ns: int | None = None
    """It was durable on the robot's disk; None when the event that says so was lost."""
    uploaded_utc_ns: int | None = None
    """The store had it; None when the event that says so was lost."""
    indexed_utc_ns: int
    """The learner could sample it (the learner's clock)."""
    sampled_utc_ns: int
    """That step was taken."""

    @property
    def actor_id(self) -> str:
        """Who recorded it."""
        return EpisodeKey.parse(self.key).actor_id


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDraw:
    """What one learner step learned from: B windows, in the order of the batch."""

    learner_step: int
    """The number that the learner had after the step: 1 for the first."""
    keys: tuple[str, ...]
    """B episode keys."""
    starts: npt.NDArray[np.int32]
    """[B] first step of each window."""
    batch_hash: str
    """`Batch.content_hash` of the batch that was learned from."""
    label_version: int = 0
    """`Batch.label_version`; above 0 the labels are kept here, for the opinion that gave them may have changed."""
    loss_weight: npt.NDArray[np.float32] | None = None
    """[B, H], None when the labels are facts."""
    advantage_indicator: npt.NDArray[np.int8] | None = None
    """[B], None when the labels are facts or the batch had none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What happened to the weights between two published versions."""

    draws: tuple[StepDraw, ...]
    """In the order of steps."""
    learned: tuple[LearnedEpisode, ...]
    """Episodes that none of the steps before had drawn from."""

    def followed_by(self, newer: "Lineage") -> "Lineage":
        """Both as one: the version in between was never published."""
        return Lineage(draws=self.draws + newer.draws, learned=self.learned + newer.learned)

    def draw(self, learner_step: int) -> StepDraw | None:
        """The draw of a step, None when the step is not among these."""
        return next((draw for draw in self.draws if draw.learner_step == learner_step), None)

    def draws_of(self, key: str) -> int:
        """How many windows of an episode were drawn."""
        return sum(draw.keys.count(key) for draw in self.draws)

    def encode(self) -> bytes:
        """The stored form; `decode` is its inverse. Blocks for about a millisecond per thousand draws."""
        keys = [key for draw in self.draws for key in draw.keys]
        steps = [np.full(len(draw.keys), draw.learner_step, np.int32) for draw in self.draws]
        starts = [draw.starts for draw in self.draws]
        columns = [
            pa.array(np.concatenate(steps) if steps else np.zeros(0, np.int32)),
            pa.array(keys, pa.string()),
            pa.array(np.concatenate(starts) if starts else np.zeros(0, np.int32)),
        ]
        meta = _Meta(
            steps=tuple((draw.learner_step, draw.batch_hash) for draw in self.draws),
            learned=self.learned,
            label_versions={number: draw.label_version for number, draw in enumerate(self.draws) if draw.label_version},
        )
        schema = _SCHEMA
        if any(draw.loss_weight is not None for draw in self.draws):
            columns += _label_columns(self.draws)
            schema = _LABELLED
        schema = schema.with_metadata({_META: msgspec.json.encode(meta)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return zstandard.ZstdCompressor(level=3).compress(sink.getvalue())

    @classmethod
    def decode(cls, data: bytes) -> "Lineage":
        """Read and check a stored lineage.

        Raises:
            InvalidRecord: too large, damaged, or its parts do not fit together.
        """
        try:
            size = zstandard.frame_content_size(data)  # -1: not said; `decompress` believes it when it is said
            if size > MAX_LINEAGE_BYTES:
                raise InvalidRecord("lineage", f"would have {size} bytes, at most {MAX_LINEAGE_BYTES} are read")
            raw = zstandard.ZstdDecompressor().decompress(
                data, max_output_size=MAX_LINEAGE_BYTES, allow_extra_data=False
            )
            batch = read_single_batch(raw, "lineage", full=True)
            meta = msgspec.json.decode((batch.schema.metadata or {}).get(_META, b""), type=_Meta)
        except (zstandard.ZstdError, pa.ArrowException, ValueError, OSError, IndexError) as error:
            raise InvalidRecord("lineage", f"cannot be read ({error})") from error
        known = batch.schema.equals(_SCHEMA) or batch.schema.equals(_LABELLED)
        if not known or any(column.null_count for column in batch.columns):
            raise InvalidRecord("lineage", "does not have the columns learner_step, episode, start (and its labels)")
        return cls(draws=tuple(_split(batch, meta)), learned=meta.learned)


class _Meta(msgspec.Struct, frozen=True, kw_only=True):
    """The part that is not one row per window."""

    steps: tuple[tuple[int, str], ...]
    learned: tuple[LearnedEpisode, ...]
    label_versions: dict[int, int] = {}
    """Place of a draw -> its label version; not there: 0."""


@dataclass(frozen=True, slots=True)
class _Labels:
    """The two columns of labels."""

    offsets: npt.NDArray[np.int64]
    """[rows + 1] where the weights of each row begin."""
    weights: npt.NDArray[np.float32]
    indicator: npt.NDArray[np.int8]

    def between(self, begin: int, end: int) -> dict[str, npt.NDArray[Any] | None]:
        """Fields of the draw whose windows are the rows in [begin, end)."""
        lengths = np.diff(self.offsets[begin : end + 1])
        weights = self.weights[self.offsets[begin] : self.offsets[end]]
        indicator = self.indicator[begin:end]
        missing = indicator == _NONE
        if len(set(lengths.tolist())) != 1 or lengths[0] > MAX_HORIZON or missing.any() != missing.all():
            raise InvalidRecord("lineage", f"the labels of row {begin} and those after it differ in form")
        if not (np.isfinite(weights) & (weights >= 0)).all() or (~missing & (np.abs(indicator) > 1)).any():
            raise InvalidRecord("lineage", f"row {begin} or one after it has labels that are none")
        if not lengths[0]:
            return {}
        return {
            "loss_weight": weights.reshape(end - begin, -1),
            "advantage_indicator": None if missing.all() else indicator,
        }


def _label_columns(draws: tuple[StepDraw, ...]) -> list[pa.Array]:
    """The columns of `_LABELLED` that `_SCHEMA` does not have."""
    weights = [np.zeros((len(draw.keys), 0)) if draw.loss_weight is None else draw.loss_weight for draw in draws]
    lengths = np.concatenate([np.full(rows.shape[0], rows.shape[1], np.int32) for rows in weights])
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    values = np.concatenate([rows.reshape(-1) for rows in weights]).astype(np.float32)
    indicator = [
        np.full(len(draw.keys), _NONE, np.int8) if draw.advantage_indicator is None else draw.advantage_indicator
        for draw in draws
    ]
    return [
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
        pa.array(np.concatenate(indicator), pa.int8()),
    ]


def _read_labels(batch: pa.RecordBatch) -> _Labels | None:
    if "loss_weight" not in batch.schema.names:
        return None
    lists, values = batch.column("loss_weight"), batch.column("loss_weight").flatten()
    if values.null_count:
        raise InvalidRecord("lineage", "loss_weight holds empty cells")
    offsets = lists.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    return _Labels(
        offsets - offsets[0],
        values.to_numpy(zero_copy_only=False),
        batch.column("advantage_indicator").to_numpy(zero_copy_only=False),
    )


def _split(batch: pa.RecordBatch, meta: _Meta) -> list[StepDraw]:
    """Rows of consecutive equal steps are one draw."""
    steps = batch.column("learner_step").to_numpy(zero_copy_only=False)
    starts = batch.column("start").to_numpy(zero_copy_only=False)
    names: dict[str, str] = {}
    keys = [names.setdefault(key, key) for key in batch.column("episode").to_pylist()]  # one text per episode
    edges = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)] if len(steps) else [0]
    labels = _read_labels(batch)
    found: list[StepDraw] = []
    for begin, end in pairwise(edges):
        number = len(found)
        for key in keys[begin:end]:
            EpisodeKey.parse(key)
        if number >= len(meta.steps) or meta.steps[number][0] != steps[begin]:
            raise InvalidRecord("lineage", f"row {begin} belongs to step {steps[begin]}, which its list does not have")
        found.append(
            StepDraw(
                learner_step=int(steps[begin]),
                keys=tuple(keys[begin:end]),
                starts=starts[begin:end],
                batch_hash=meta.steps[number][1],
                label_version=meta.label_versions.get(number, 0),
                **({} if labels is None else labels.between(begin, end)),
            )
        )
    if len(found) != len(meta.steps):
        raise InvalidRecord("lineage", f"{len(meta.steps)} steps are listed, {len(found)} have windows")
    return found
