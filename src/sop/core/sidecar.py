"""Sidecars as bytes: numbers that a learning rule gave to every step of an episode, kept beside it, never in it.

    one Arrow IPC file, one row per step, float32 columns      NaN: the step has no such number
    its metadata: format, version of what computed them, key of the episode

A sidecar is an opinion of one moment: it may be missing, and there may be several of an episode, one per version.
Bytes from a store are checked like everything that comes from outside.
"""

import re
from typing import Annotated

import msgspec
import numpy as np
import pyarrow as pa

from sop.core.arrow import read_single_batch
from sop.core.errors import InvalidRecord
from sop.core.experience import Sidecar
from sop.core.layout import EpisodeKey

SIDECAR_VERSION = 1
"""Raised when the meaning of the file changes; others are refused."""
MAX_SIDECAR_BYTES = 64 << 20
"""Larger objects are refused: half a million steps with 32 columns."""
MAX_COLUMNS = 32
_META = b"sop.sidecar"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sidecar_version: int
    version: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    episode: str


def encode_sidecar(sidecar: Sidecar, key: EpisodeKey) -> bytes:
    """The stored form; `decode_sidecar` is its inverse.

    Args:
        sidecar: 1 to 32 columns; names are lower-case letters, digits and `_`.
        key: of the episode; every column has its number of steps.

    Raises:
        ValueError: the columns are not these.
    """
    names = list(sidecar.columns)
    if not 1 <= len(names) <= MAX_COLUMNS or not all(_NAME.fullmatch(name) for name in names):
        raise ValueError(
            f"a sidecar has 1 to {MAX_COLUMNS} columns called like value_1, got {names[: MAX_COLUMNS + 1]}"
        )
    for name, column in sidecar.columns.items():
        if column.shape != (key.num_steps,) or column.dtype != np.float32:
            raise ValueError(f"column {name} must be float32 [{key.num_steps}], got {column.dtype} {column.shape}")
    header = _Header(sidecar_version=SIDECAR_VERSION, version=sidecar.version, episode=str(key))
    schema = pa.schema([(name, pa.float32()) for name in names], metadata={_META: msgspec.json.encode(header)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(sidecar.columns[name]) for name in names], schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def decode_sidecar(data: bytes, key: EpisodeKey | None = None) -> Sidecar:
    """Read and check a stored sidecar; its columns are copies.

    Args:
        data: the whole object, or the first `MAX_SIDECAR_BYTES + 1` bytes of a larger one.
        key: of the episode that it has to belong to; None takes any.

    Raises:
        InvalidRecord: too large, damaged, of another format or of another episode.
    """
    if len(data) > MAX_SIDECAR_BYTES:
        raise InvalidRecord("sidecar", f"{len(data)} bytes, at most {MAX_SIDECAR_BYTES} are accepted")
    batch = read_single_batch(data, "sidecar", full=True)
    try:
        header = msgspec.json.decode((batch.schema.metadata or {}).get(_META, b""), type=_Header)
        names = list(batch.schema.names)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRecord("sidecar", f"not a readable sidecar ({error})") from error
    if header.sidecar_version != SIDECAR_VERSION:
        raise InvalidRecord("sidecar_version", f"this program reads {SIDECAR_VERSION}, got {header.sidecar_version}")
    owner = EpisodeKey.parse(header.episode)
    if key is not None and owner != key:
        raise InvalidRecord("episode", f"the sidecar belongs to {owner}, not to {key}")
    if not 1 <= len(names) <= MAX_COLUMNS or len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
        raise InvalidRecord("sidecar", f"{len(names)} columns, or one has no proper name")
    if any(column.type != pa.float32() or column.null_count for column in batch.columns):
        raise InvalidRecord("sidecar", "a column is not float32 or has empty cells")
    if batch.num_rows != owner.num_steps:
        raise InvalidRecord("sidecar", f"{batch.num_rows} steps, its episode has {owner.num_steps}")
    columns = {name: np.array(column.to_numpy()) for name, column in zip(names, batch.columns, strict=True)}
    return Sidecar(version=header.version, columns=columns)
