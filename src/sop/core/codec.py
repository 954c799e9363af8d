"""Episodes as bytes: one Arrow IPC file with one row per step, JPEG frames, and a JSON header in the schema.

    encode(episode)       -> bytes            content_hash(bytes) is the episode's id
    decode(bytes)         -> Episode          everything checked, every frame decoded
    EncodedEpisode(bytes) -> facts at once, single frames on demand (what the batch loader uses)

Bytes from outside go through `decode` once (at ingest); `EncodedEpisode` trusts bytes that went through it.
No pickle: Arrow columns of plain types, no extension types, no object arrays.

One version up or down: a reader ignores fields of the header that it does not know, and a missing optional field is
None. Programs of before that rule refuse unknown fields of the header but never look at other entries of the schema:
fields that are younger than the rule travel in an entry of their own, so that those programs read the file as well.
What changes the meaning of a field raises `SCHEMA_VERSION`, and then both sides refuse in words.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import blake3
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg

from sop.core.arrow import read_single_batch
from sop.core.episode import SCHEMA_VERSION, Episode, Intervention, Outcome, PolicyTimes, SafetyCounts
from sop.core.errors import InvalidRecord

JPEG_QUALITY = 95
"""Loss of JPEG at 64 px is below the policy's random shift; 90 shows ringing on thin handles."""
MAX_EPISODE_BYTES = 2 << 30
"""Larger objects are refused before anything is allocated for them."""
MAX_FRAME_PIXELS = 4096 * 4096
_HEADER = b"sop.episode"
_YOUNGER = b"sop.episode.younger"
_YOUNGER_FIELDS = frozenset({"safety"})
"""Optional fields of the header that travel in the second entry."""
_IMAGE = "image."
_COLUMNS = ("state", "action", "policy_action", "proposed", "controller", "monotonic_ns")


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON part of an encoded episode: one value per episode instead of one per step."""

    schema_version: int
    actor_id: str
    sequence: int
    robot: str
    task: str
    instruction: str
    policy_version: int | None
    start_utc_ns: int
    end_utc_ns: int
    outcome: Outcome
    truncated: bool
    interventions: tuple[Intervention, ...]
    policy_times: PolicyTimes | None = None
    safety: SafetyCounts | None = None


def content_hash(data: bytes | memoryview) -> str:
    """Content hash of stored bytes: 32 hexadecimal digits of BLAKE3."""
    return str(blake3.blake3(data).hexdigest(length=16))


def encode(episode: Episode) -> bytes:
    """Serialise an episode. Frames lose what JPEG loses; everything else is exact."""
    columns: dict[str, pa.Array] = {}
    for camera, images in episode.images.items():
        frames = [simplejpeg.encode_jpeg(np.ascontiguousarray(frame), JPEG_QUALITY) for frame in images]
        columns[_IMAGE + camera] = pa.array(frames, pa.binary())
    for name in _COLUMNS:
        columns[name] = _column(getattr(episode, name))
    schema = pa.schema(
        [pa.field(name, column.type) for name, column in columns.items()],
        metadata=_header_entries(episode),
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def decode(data: bytes) -> Episode:
    """Read and check an episode, every frame included.

    Raises:
        InvalidRecord: the bytes are not a whole, valid episode; names the field and the step.
    """
    encoded = EncodedEpisode(data, trusted=False)
    images = {camera: encoded.frames(camera) for camera in encoded.cameras}
    return replace(encoded.without_images(), images=images)


class EncodedEpisode:
    """An episode that stays encoded: columns without a copy, frames decoded one at a time.

    Views into the bytes are made once and kept, so a row costs an index and a frame costs its decoding. Every
    access checks its own bounds: bytes that changed since they were checked give an error, never a crash.

    Args:
        data: the stored bytes, or a read-only view of them (a mapped file); kept as long as this object lives.
        trusted: the bytes passed `decode` before; skips the full validation of the Arrow buffers.

    Raises:
        InvalidRecord: the container or its header cannot be read.
    """

    def __init__(self, data: bytes | memoryview, *, trusted: bool = True) -> None:
        if len(data) > MAX_EPISODE_BYTES:
            raise InvalidRecord("episode", f"{len(data)} bytes, at most {MAX_EPISODE_BYTES} are accepted")
        self.data = data
        self.num_bytes = len(data)
        self._batch = read_single_batch(data, "episode", full=not trusted)
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._tables: dict[str, tuple[npt.NDArray[np.int64], memoryview]] = {}
        self.header = _read_header(self._batch.schema.metadata)
        names = self._batch.schema.names
        self.cameras = tuple(name.removeprefix(_IMAGE) for name in names if name.startswith(_IMAGE))
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise InvalidRecord(missing[0], "column is missing")

    @property
    def num_steps(self) -> int:
        """T."""
        return int(self._batch.num_rows)

    @property
    def controller(self) -> npt.NDArray[np.uint8]:
        """[T] `Controller` values."""
        return self.column("controller")

    @property
    def state(self) -> npt.NDArray[np.float32]:
        """[T, S] proprioception before the action."""
        return self.column("state")

    @property
    def action(self) -> npt.NDArray[np.float32]:
        """[T, A] executed actions."""
        return self.column("action")

    @property
    def task(self) -> str:
        """Task id."""
        return self.header.task

    @property
    def instruction(self) -> str:
        """The text that the policy read."""
        return self.header.instruction

    @property
    def actor_id(self) -> str:
        """Who acted."""
        return self.header.actor_id

    @property
    def sequence(self) -> int:
        """The actor's number of the episode."""
        return self.header.sequence

    @property
    def outcome(self) -> Outcome:
        """How the episode ended."""
        return self.header.outcome

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The runs of HUMAN steps."""
        return self.header.interventions

    @property
    def policy_version(self) -> int | None:
        """The version that drove, None for a demonstration."""
        return self.header.policy_version

    def without_images(self) -> Episode:
        """Everything but the images, checked like every `Episode`; `images` is empty. Columns are not copied.

        Raises:
            InvalidRecord: names the field and the step.
        """
        fields: dict[str, Any] = {name: getattr(self.header, name) for name in Header.__struct_fields__}
        fields |= {name: self.column(name) for name in _COLUMNS}
        return Episode(images={}, **fields)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A per-step field of `Episode` as a read-only array [T] or [T, n]; converted at the first call, then kept.

        Raises:
            InvalidRecord: cells are empty, or the column is of another type.
        """
        if name not in self._columns:
            self._columns[name] = _array(name, self._batch.column(name))
        return self._columns[name]

    def jpeg(self, camera: str, step: int) -> memoryview:
        """The encoded image as it is stored; no copy.

        Raises:
            InvalidRecord: no such camera or step, or the place of the image lies outside of the file.
        """
        field = f"images.{camera}"
        if not 0 <= step < self.num_steps:
            raise InvalidRecord(field, f"no such step, the episode has {self.num_steps}", step=step)
        offsets, values = self._table(camera)
        start, stop = int(offsets[step]), int(offsets[step + 1])
        if not 0 <= start < stop <= len(values):
            raise InvalidRecord(field, f"bytes {start} to {stop} of {len(values)} are no image", step=step)
        return values[start:stop]

    def frame_bytes(self, camera: str) -> npt.NDArray[np.int64]:
        """[T] length of each encoded image.

        Raises:
            InvalidRecord: no such camera.
        """
        return np.diff(self._table(camera)[0])[: self.num_steps]

    def _table(self, camera: str) -> tuple[npt.NDArray[np.int64], memoryview]:
        if camera not in self._tables:
            field = f"images.{camera}"
            if camera not in self.cameras:
                raise InvalidRecord(field, f"no such camera, the episode has {self.cameras}")
            self._tables[camera] = _frame_table(field, self._batch.column(_IMAGE + camera))
        return self._tables[camera]

    def frame_size(self, camera: str, step: int) -> tuple[int, int]:
        """Height and width of an image in pixels, from its header.

        Raises:
            InvalidRecord: no such camera or step, or the bytes are not a JPEG of an acceptable size.
        """
        field, raw = f"images.{camera}", self.jpeg(camera, step)
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(raw)
        except (ValueError, TypeError) as error:
            raise InvalidRecord(field, f"not a readable JPEG ({error})", step=step) from error
        if height * width > MAX_FRAME_PIXELS:
            raise InvalidRecord(field, f"{height} x {width} pixels are too many", step=step)
        return int(height), int(width)

    def frame_into(self, camera: str, step: int, out: npt.NDArray[np.uint8]) -> None:
        """Decode one image into `out` [h, w, 3], C-contiguous. Nothing is allocated, whatever the bytes say.

        Raises:
            InvalidRecord: no such camera or step, not a JPEG, or an image of another size than `out`.
        """
        field, raw = f"images.{camera}", self.jpeg(camera, step)
        try:
            found = simplejpeg.decode_jpeg(raw, colorspace="RGB", buffer=out).shape
        except (ValueError, TypeError) as error:
            found = (*self.frame_size(camera, step), 3)
            if found == out.shape:
                raise InvalidRecord(field, f"not a readable JPEG ({error})", step=step) from error
        if found != out.shape:
            raise InvalidRecord(field, f"{found} where {out.shape} is expected", step=step)

    def frame(self, camera: str, step: int) -> npt.NDArray[np.uint8]:
        """One image [h, w, 3], decoded now.

        Raises:
            InvalidRecord: no such camera or step, or the bytes are not a JPEG of an acceptable size.
        """
        image = np.empty((*self.frame_size(camera, step), 3), np.uint8)
        self.frame_into(camera, step, image)
        return image

    def frames(self, camera: str) -> npt.NDArray[np.uint8]:
        """All images of a camera, [T, h, w, 3]."""
        if not self.num_steps:
            raise InvalidRecord(f"images.{camera}", "an episode needs at least one step")
        frames = np.empty((self.num_steps, *self.frame_size(camera, 0), 3), np.uint8)
        for step, frame in enumerate(frames):
            self.frame_into(camera, step, frame)
        return frames


def _array(name: str, column: pa.Array) -> npt.NDArray[Any]:
    is_list = pa.types.is_fixed_size_list(column.type)
    if column.null_count or (is_list and column.values.null_count):
        raise InvalidRecord(name, "holds empty cells")
    try:
        if is_list:
            flat = column.flatten().to_numpy(zero_copy_only=False)
            return np.asarray(flat.reshape(len(column), column.type.list_size))
        if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
            return np.asarray(column.to_numpy(zero_copy_only=False))
    except (pa.ArrowException, ValueError) as error:
        raise InvalidRecord(name, f"not readable ({error})") from error
    raise InvalidRecord(name, f"unexpected column type {column.type}")


def _frame_table(field: str, column: pa.Array) -> tuple[npt.NDArray[np.int64], memoryview]:
    """Where each image begins and ends, [T + 1], and the bytes of all images."""
    if column.null_count:
        raise InvalidRecord(field, "holds empty cells")
    widths = {pa.binary(): np.int32, pa.large_binary(): np.int64}
    if column.type not in widths:
        raise InvalidRecord(field, f"unexpected column type {column.type}")
    _, offsets, values = column.buffers()
    if offsets is None or values is None:
        raise InvalidRecord(field, "holds no images")
    dtype, count = np.dtype(widths[column.type]), column.offset + len(column) + 1
    if offsets.size < count * dtype.itemsize:
        raise InvalidRecord(field, "the table of images is cut off")
    return np.frombuffer(offsets, dtype, count)[column.offset :].astype(np.int64), memoryview(values).cast("B")


def _column(values: npt.NDArray[Any]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _header_entries(episode: Episode) -> dict[bytes, bytes]:
    facts = {name: getattr(episode, name) for name in Header.__struct_fields__}
    younger = {name: facts.pop(name) for name in _YOUNGER_FIELDS}
    entries = {_HEADER: msgspec.json.encode(facts)}
    if any(value is not None for value in younger.values()):
        entries[_YOUNGER] = msgspec.json.encode(younger)
    return entries


def _read_header(metadata: Mapping[bytes, bytes] | None) -> Header:
    entries = metadata or {}
    if _HEADER not in entries:
        raise InvalidRecord("episode", "not an episode: the header is missing")
    try:
        facts = msgspec.json.decode(entries[_HEADER])
        version = facts.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InvalidRecord("schema_version", f"this program reads {SCHEMA_VERSION}, got {version}")
        younger = msgspec.json.decode(entries.get(_YOUNGER, b"{}"))
        return msgspec.convert(facts | {name: younger.get(name) for name in _YOUNGER_FIELDS}, Header)
    except (msgspec.MsgspecError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRecord("header", str(error)) from error
