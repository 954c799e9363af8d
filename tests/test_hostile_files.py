"""Files of formats that are never opened, and weights whose header lies: refused at once, in little memory."""

import io
import json
import struct
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hostile_examples import RUN, altered, good, refusal
from sop.broadcast.manifest import MAX_MANIFEST_BYTES, FileEntry, PolicyManifest
from sop.broadcast.weights import describe, encode_full, open_full, travelling
from sop.core.arrow import read_single_batch
from sop.core.codec import content_hash
from sop.core.errors import InvalidRecord, PolicyRefused
from sop.core.lineage import Lineage
from sop.core.run import RunManifest
from sop.core.sidecar import decode_sidecar

ARRAYS = travelling({"a": np.arange(8, dtype=np.float32), "b": np.ones(4, np.float16)})


def formats(marker: Path) -> dict[str, bytes]:
    """What would write `marker` if somebody opened it, and other formats."""
    pickled = b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    array = io.BytesIO()
    np.save(array, np.asarray([{"a": 1}], object), allow_pickle=True)
    npy = array.getvalue()
    parquet = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": pa.array([b"0" * 16], pa.uuid())}), parquet)
    return {
        "pickle": pickled,
        "pt": b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + pickled,
        "npy": npy[: npy.index(b"\n") + 1] + pickled,
        "parquet": parquet.getvalue().to_pybytes(),
    }


@pytest.mark.parametrize("kind", ["pickle", "pt", "npy", "parquet"])
def test_other_formats_are_refused_by_their_first_bytes_and_never_opened(kind: str, tmp_path: Path) -> None:
    """Fault 21: pickle, .pt, .npy object array. Fault 23: parquet with an extension type."""
    marker = tmp_path / "opened"
    data = formats(marker)[kind]
    assert "not a readable Arrow file (it does not begin with ARROW1)" in refusal(data)
    for read in (decode_sidecar, Lineage.decode, PolicyManifest.from_json):
        with pytest.raises(InvalidRecord):
            read(data)
    with pytest.raises(PolicyRefused, match="is not a safetensors file"):
        open_full(data, FileEntry(key="w", num_bytes=len(data), hash=content_hash(data)), describe(ARRAYS), "policy 1")
    assert not marker.exists()


def test_an_arrow_file_with_an_extension_type_is_refused() -> None:
    """Fault 23: the same type in the format that is read, whether this program knows the type or not."""
    known = {"monotonic_ns": lambda column: pa.array([b"0" * 16] * len(column), pa.uuid())}
    assert "extension types are not accepted" in refusal(altered(good(0), known))
    field = pa.field("a", pa.int8(), metadata={"ARROW:extension:name": "theirs", "ARROW:extension:metadata": "x"})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([field])) as writer:
        writer.write_batch(pa.record_batch([pa.array([1], pa.int8())], schema=pa.schema([field])))
    with pytest.raises(InvalidRecord, match="thing: extension types are not accepted"):
        read_single_batch(sink.getvalue().to_pybytes(), "thing", full=True)


def hostile_weights(header: object, num_bytes: int = 40) -> tuple[bytes, FileEntry]:
    """A safetensors file with any header, and an entry that vouches for it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(raw)) + raw
    return start + bytes(num_bytes), FileEntry("w", len(start) + num_bytes, content_hash(start))


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry("F32", [8], 0, 32), "b": entry("F16", [4], 32, 40)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (GOOD | {"b": entry("F16", [4], 28, 36)}, "lies at|overlap|bytes of tensors"),
        (GOOD | {"a": entry("F32", [2, 4], 0, 32)}, "'a'"),
        (GOOD | {"a": entry("F64", [8], 0, 32)}, "'a'"),
        (GOOD | {"a": entry("F32", [1 << 40], 0, 32)}, "'a'"),
        (GOOD | {"b": entry("F16", [4], 32, 1 << 60)}, "'b'|describes"),
        (GOOD | {"b": entry("F16", [4], -8, 0)}, "."),
        ({"a": GOOD["a"]}, "'b' is missing"),
        (b"[" * 500, "not a safetensors file"),
        (b'{"a": \xff}', "not a safetensors file"),
    ],
)
def test_weights_whose_header_lies_are_refused(header: object, message: str) -> None:
    """Fault 22: overlapping offsets, wrong shapes, wrong types."""
    data, file = hostile_weights(header)
    with pytest.raises(PolicyRefused, match=message):
        open_full(data, file, describe(ARRAYS), "policy 1")


def test_a_million_tensors_cost_less_than_a_second_and_200_mb() -> None:
    """Fault 22: refused by the size of the header, before it is parsed; a manifest that lists them is too large."""
    whole = b"{" + b'"tensor":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 10**6 + b'"last":{}}'
    data, file = hostile_weights(whole)
    before, began = _peak_kb(), time.process_time()
    with pytest.raises(PolicyRefused, match="is not a safetensors file"):
        open_full(data, file, describe(ARRAYS), "policy 1")
    assert len(whole) > MAX_MANIFEST_BYTES
    with pytest.raises(InvalidRecord, match="manifest: has more than"):
        PolicyManifest.from_json(whole)
    assert time.process_time() - began < 1  # of processor time, so a busy machine does not matter
    assert _peak_kb() - before < 200 << 10


def test_the_honest_file_is_read() -> None:
    encoded = encode_full(ARRAYS)
    data = b"".join(bytes(part) for part in encoded.parts)
    found = open_full(data, FileEntry("w", len(data), encoded.hash), describe(ARRAYS), "policy 1")
    np.testing.assert_array_equal(found["a"], ARRAYS["a"])


def _peak_kb() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("name", ["", "..", "../other", "/etc", "a/b", "a\0b"])
def test_a_runs_name_leads_to_no_other_folder(name: str) -> None:
    """It comes from the store and names the folder of the spool, the latch and what a robot remembers."""
    fields = json.loads(RUN.to_json()) | {"name": name}
    with pytest.raises(InvalidRecord, match="must be the name of a folder"):
        RunManifest.from_json(json.dumps(fields).encode())
