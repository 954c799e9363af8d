"""One record batch from the bytes of an Arrow IPC file that somebody else wrote.

    "ARROW1" 0 0 | schema message | record batch message | end of stream | footer

Read from the front, never by the footer: what is checked is what is read. Compressed bodies are refused, because Arrow
allocates what their header claims: a file of a few hundred bytes could ask for all memory.
"""

import struct

import pyarrow as pa

from sop.core.errors import InvalidRecord

_MAGIC = b"ARROW1\0\0"
_HEADER, _COMPRESSION = 2, 3
"""Fields of the tables Message and RecordBatch in Arrow's Message.fbs."""


def read_single_batch(data: bytes | memoryview, what: str, *, full: bool) -> pa.RecordBatch:
    """The only record batch of a file; its columns are views of `data`.

    Args:
        data: the whole file.
        what: what it is called in errors.
        full: check every offset and every text: for bytes that were not checked before.

    Raises:
        InvalidRecord: not an Arrow file, damaged, compressed, with dictionaries or extension types, or with more than
            one batch.
    """
    if len(data) < len(_MAGIC) or bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise InvalidRecord(what, "not a readable Arrow file (it does not begin with ARROW1)")
    try:
        reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(pa.py_buffer(data).slice(len(_MAGIC))))
        schema = pa.ipc.read_schema(_next(reader, "schema", what))
        if any(map(_is_extension, schema)):
            raise InvalidRecord(what, "extension types are not accepted")
        message = _next(reader, "record batch", what)
        if _is_compressed(memoryview(message.metadata)):
            raise InvalidRecord(what, "compressed columns are not accepted")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=full)
        _ = batch.schema.names  # decoded when asked for: names that are no text fail here
        if any(True for _ in reader):
            raise InvalidRecord(what, "one record batch expected, there are more")
    except (pa.ArrowException, struct.error, OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRecord(what, f"not a readable Arrow file ({error})") from error
    return batch


def _is_extension(field: pa.Field) -> bool:
    """Whether a column has a type of somebody's own, which this program knows or not: its code could run at reading."""
    return isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {})


def _next(reader: pa.ipc.MessageReader, kind: str, what: str) -> pa.ipc.Message:
    message = next(iter(reader), None)
    found = "nothing" if message is None else message.type
    if found != kind:
        raise InvalidRecord(what, f"not a readable Arrow file (a {kind} expected, found {found})")
    return message


def _is_compressed(metadata: memoryview) -> bool:
    """Whether a record batch message says so (flatbuffers: a table begins with the distance back to its vtable)."""

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", metadata, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0]
        return table + int(offset) if offset else 0

    header = field(int(struct.unpack_from("<I", metadata, 0)[0]), _HEADER)
    return header != 0 and field(header + int(struct.unpack_from("<I", metadata, header)[0]), _COMPRESSION) != 0
