"""Arrow files from outside: read from the front, nothing compressed, one batch."""

import pyarrow as pa
import pytest

from sop.core.arrow import read_single_batch
from sop.core.errors import InvalidRecord

BATCH = pa.record_batch({"a": pa.array(range(1000)), "b": pa.array(["text"] * 1000)})


def file_of(*batches: pa.RecordBatch, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, BATCH.schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def test_what_is_read_is_what_was_written() -> None:
    assert read_single_batch(file_of(BATCH), "thing", full=True).equals(BATCH)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_columns_are_refused_before_they_are_unpacked(compression: str) -> None:
    before = pa.total_allocated_bytes()
    with pytest.raises(InvalidRecord, match="thing: compressed columns are not accepted"):
        read_single_batch(file_of(BATCH, compression=compression), "thing", full=True)
    assert pa.total_allocated_bytes() == before


def test_a_file_has_exactly_one_batch() -> None:
    with pytest.raises(InvalidRecord, match="a record batch expected"):
        read_single_batch(file_of(), "thing", full=True)
    with pytest.raises(InvalidRecord, match="one record batch expected, there are more"):
        read_single_batch(file_of(BATCH, BATCH), "thing", full=True)


def test_a_file_that_is_cut_is_refused_or_still_has_its_whole_batch() -> None:
    batch = BATCH.slice(0, 5)
    good = file_of(batch)
    refused = 0
    for length in range(len(good)):
        try:
            assert read_single_batch(good[:length], "thing", full=True).equals(batch)
        except InvalidRecord:
            refused += 1
    assert refused > len(good) / 3


def test_a_flipped_byte_is_an_error_or_a_batch() -> None:
    good = file_of(BATCH.slice(0, 5))
    for position in range(0, len(good), 2):
        bad = bytearray(good)
        bad[position] ^= 0x55
        try:
            read_single_batch(bytes(bad), "thing", full=True)
        except InvalidRecord as error:
            refusal = error
    assert refusal.field == "thing"
