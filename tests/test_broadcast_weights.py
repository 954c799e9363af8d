"""The manifest and the weights file: exact when they are right, refused with the reason when they are not."""

import io
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load

from broadcast_examples import as_json, file_of, policy, read_weights, weights
from sop.broadcast.manifest import MAX_MANIFEST_BYTES, PolicyManifest
from sop.broadcast.weights import check_encoding, encode_full, travelling
from sop.core.errors import InvalidRecord, PolicyRefused

ODD_ONES = {
    "bool": np.array([[True, False]]),
    "big_endian": np.arange(5, dtype=">i4"),
    "transposed": np.arange(12.0).reshape(3, 4).T,
    "strided": np.arange(20, dtype=np.float32)[::3],
    "scalar": np.asarray(2.5, np.float16),
    "empty": np.empty((0, 3), np.int8),
    "nan": np.array([np.nan, -0.0, np.inf]),
    "longlong": np.array([1 << 40], np.longlong),
    **{f"kind_{kind}": np.arange(7).astype(kind) for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")},
}


def refiled(manifest: PolicyManifest, data: bytes) -> PolicyManifest:
    """The manifest of somebody who vouches for other bytes."""
    return replace(manifest, files=(file_of(manifest.version, data),))


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with another header."""
    size = int.from_bytes(data[:8], "little")
    header = msgspec.json.decode(data[8 : 8 + size])
    change(header)
    raw = msgspec.json.encode(header)
    return len(raw).to_bytes(8, "little") + raw + data[8 + size :]


def test_weights_come_back_bit_for_bit_and_the_library_reads_the_same() -> None:
    manifest, data = policy(3, ODD_ONES)
    found, library = read_weights(data, manifest), load(data)
    assert found.keys() == library.keys() == ODD_ONES.keys()
    for name, array in ODD_ONES.items():
        native = array.astype(array.dtype.newbyteorder("="))
        for other in (found[name], library[name]):
            assert (other.dtype, other.shape, other.tobytes()) == (native.dtype, native.shape, native.tobytes()), name


def test_the_same_weights_give_the_same_bytes_in_any_order() -> None:
    backwards = dict(reversed(ODD_ONES.items()))
    first, second = encode_full(travelling(ODD_ONES)), encode_full(travelling(backwards))
    assert (b"".join(first.parts), first.hash) == (b"".join(second.parts), second.hash)


def test_tensors_are_aligned_read_only_views_of_the_file() -> None:
    manifest, data = policy(3, ODD_ONES)
    whole = np.frombuffer(data, np.uint8)
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    for name, array in read_weights(data, manifest).items():
        assert not array.flags.writeable
        assert array.size == 0 or np.shares_memory(array, whole), name
        assert (array.ctypes.data - whole.ctypes.data) % array.itemsize == 0, name
    assert not any(array.flags.writeable for array in read_weights(bytearray(data), manifest).values())  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.array([object()]), np.array(["text"]), np.array([1j]), np.zeros(2, "V2")])
def test_a_dtype_that_does_not_travel_is_refused_by_name(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"tensor 'bad' has dtype .* use one of .*'F32'"):
        travelling({"good": np.zeros(2), "bad": bad})


def test_a_policy_without_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        travelling({})


def test_a_manifest_comes_back_equal() -> None:
    manifest, _ = policy(7)
    again = PolicyManifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.spec.embodiment.difference(manifest.spec.embodiment) is None
    assert again.num_bytes == 66


@given(st.integers(0), st.integers(1, 255))
def test_one_altered_byte_is_noticed_wherever_it_is(position: int, flip: int) -> None:
    manifest, data = policy(3)
    altered = bytearray(data)
    altered[position % len(data)] ^= flip
    in_size, in_header = r"policies/00000003/weights.safetensors is", 8 + int.from_bytes(data[:8], "little")
    where = r"tensor '.*' is altered" if position % len(data) >= in_header else in_size
    with pytest.raises(PolicyRefused, match=f"policy 3: {where}"):
        read_weights(bytes(altered), manifest)


@given(st.integers(0), st.integers(1, 255))
def test_one_altered_byte_is_noticed_even_when_the_hash_of_the_file_agrees(position: int, flip: int) -> None:
    manifest, data = policy(3)
    altered = bytearray(data)
    position %= len(data)
    altered[position] ^= flip
    in_tensors = position >= 8 + int.from_bytes(data[:8], "little")
    if in_tensors:
        with pytest.raises(PolicyRefused, match=r"policy 3: tensor '.*' is altered"):
            read_weights(bytes(altered), refiled(manifest, bytes(altered)))
        return
    try:
        found = read_weights(bytes(altered), refiled(manifest, bytes(altered)))
    except PolicyRefused:
        return
    expected = {name: array.tobytes() for name, array in weights(3).items()}
    assert {name: array.tobytes() for name, array in found.items()} == expected, "a header in other words, at most"


@pytest.mark.parametrize(
    ("cut", "size"), [(slice(0, -1), "bytes instead of"), (slice(0, 5), "5 bytes instead of"), (slice(0, 0), "0 bytes")]
)
def test_a_file_that_is_cut_short_is_refused(cut: slice, size: str) -> None:
    manifest, data = policy(3)
    with pytest.raises(PolicyRefused, match=size):
        read_weights(data[cut], manifest)
    with pytest.raises(PolicyRefused, match=r"has more than \d+ bytes instead of"):
        read_weights(data + b"x", manifest)


def test_tensors_of_another_version_do_not_mix_in() -> None:
    manifest, _ = policy(3)
    _, other = policy(3, {**weights(3), "head.bias": weights(4)["head.bias"]})
    with pytest.raises(PolicyRefused, match=r"policy 3: tensor 'head\.bias' is altered"):
        read_weights(other, refiled(manifest, other))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            {k: v for k, v in weights(3).items() if k != "steps"},
            r"tensor 'steps' is missing from its file \(1 in all\)",
        ),
        (weights(3) | {"more": np.zeros(1)}, r"tensor 'more' is not in the manifest \(1 in all\)"),
        (weights(3) | {"head.bias": np.full((5, 1), 3, np.float16)}, r"'head.bias' is F16 \[5, 1\], .* F16 \[5\]"),
        (weights(3) | {"head.bias": np.full(5, 3, np.int16)}, r"'head.bias' is I16 \[5\], the manifest says F16 \[5\]"),
    ],
)
def test_other_tensors_than_those_of_the_manifest_are_refused(tensors: dict[str, Any], reason: str) -> None:
    manifest, _ = policy(3)
    _, data = policy(3, tensors)
    with pytest.raises(PolicyRefused, match=reason):
        read_weights(data, refiled(manifest, data))


def _offsets(name: str, begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(data_offsets=[begin, end])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_offsets("body.weight", 0, 48), "'body.weight' lies at [0, 48), expected to begin at 8"),
        (_offsets("body.weight", 9, 57), "'body.weight' lies at [9, 57), expected to begin at 8"),
        (_offsets("steps", -8, 0), "'steps' lies at [-8, 0), expected to begin at 0"),
        (_offsets("steps", 8, 0), "'steps' lies at"),
        (_offsets("head.bias", 56, 1 << 60), "the file has 66 bytes of tensors, its header describes"),
        (_offsets("head.bias", 56, 64), "the file has 66 bytes of tensors, its header describes 64"),
        (lambda header: header["steps"].update(data_offsets="ab"), "not a safetensors file"),
    ],
)
def test_overlaps_and_holes_are_refused(change: Callable[[dict[str, Any]], None], reason: str) -> None:
    manifest, data = policy(3)
    bad = with_header(data, change)
    with pytest.raises(PolicyRefused) as caught:
        read_weights(bad, refiled(manifest, bad))
    assert reason in str(caught.value)


def test_metadata_of_other_writers_is_ignored() -> None:
    manifest, data = policy(3)
    written = with_header(data, lambda header: header.update(__metadata__={"format": "pt"}))
    assert read_weights(written, refiled(manifest, written)).keys() == weights(3).keys()


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], object), allow_pickle=True)
    return stream.getvalue() * 2


@pytest.mark.parametrize(
    "foreign",
    [pickle.dumps(dict(weights(3))), b"PK\x03\x04" + bytes(300), _npy(), bytes(150), b"[" * 300, b"\xff" * 200],
    ids=["pickle", "pt", "npy object array", "zeros", "brackets", "ones"],
)
def test_other_formats_are_refused_unopened(foreign: bytes) -> None:
    manifest, _ = policy(3)
    with pytest.raises(PolicyRefused, match=r"policy 3: (.* is not a safetensors file|tensor .* is missing)"):
        read_weights(foreign, refiled(manifest, foreign))


def test_an_unknown_encoding_is_refused_with_advice() -> None:
    manifest, _ = policy(3)
    (file,) = manifest.files
    newer = replace(file, key="policies/00000003/weights.new", encoding="newer")
    with pytest.raises(PolicyRefused, match=r"encoding 'newer' is not known.*update this robot's software"):
        check_encoding(replace(manifest, files=(newer,)))
    check_encoding(replace(manifest, files=(newer, file)))  # one form that it knows is enough


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(plain: dict[str, Any]) -> None:
        *folders, last = path.split("/")
        for folder in folders:
            plain = plain[int(folder) if isinstance(plain, list) else folder]
        plain[last] = value

    return change


BAD_FIELDS: list[tuple[str, object, str]] = [
    ("schema_version", 1, "schema_version: this program reads 2, got 1"),
    ("version", -1, "version: must be in"),
    ("version", 100_000_000, "version: must be in"),
    ("version", "3", "$.version"),
    ("parent_version", 3, "parent_version: must be before version 3"),
    ("learner_step", -1, "learner_step: must be 0 or more"),
    ("online_episodes", -1, "online_episodes"),
    ("created_utc_ns", None, "$.created_utc_ns"),
    ("spec/action_horizon", 0, "execution_horizon: must be in [1, 0]"),
    ("spec/embodiment/action_low", [0.0], "action_low: needs 2 values"),
    ("conditioning/guidance", None, "$.conditioning.guidance"),
    ("files", [], "files: must have 1 to"),
    ("files/0/key", "policies/00000002/weights.safetensors", "files[0].key: must be inside policies/00000003/"),
    ("files/0/key", "episodes/../../secret", "files[0].key: must be inside"),
    ("files/0/num_bytes", 10 << 40, "files[0].num_bytes: must be in"),
    ("files/0/num_bytes", 66, "files[0].num_bytes: 66 does not fit tensors of 66 bytes"),
    ("files/0/num_bytes", 1 << 30, "files[0].num_bytes: must be in [1, 66303], got 1073741824"),
    ("files/0/hash", "0" * 31, "files[0].hash: must be 32 hexadecimal digits"),
    ("tensors", {}, "tensors: must have 1 to"),
    ("tensors/steps/dtype", "O", "tensors['steps'].dtype: must be one of"),
    ("tensors/steps/shape", [-1], "tensors['steps'].shape"),
    ("tensors/steps/shape", [1] * 33, "tensors['steps'].shape"),
    ("tensors/steps/shape", [1 << 40], "tensors: have"),
    ("tensors/steps/shape", [1 << 40, 1 << 40], "tensors['steps'].shape"),
    ("tensors/steps/shape", [0, 1 << 62], "tensors['steps'].shape"),  # no bytes, and yet more than numpy can say
    ("tensors/steps/hash", "g" * 32, "tensors['steps'].hash"),
    ("files/0/base", 2, "files[0].base: encoding 'full' stands alone, got base 2"),
]


@pytest.mark.parametrize(("path", "value", "reason"), BAD_FIELDS)
def test_a_wrong_field_of_the_manifest_is_named(path: str, value: object, reason: str) -> None:
    plain = as_json(policy(3)[0])
    _set(path, value)(plain)
    with pytest.raises(InvalidRecord) as caught:
        PolicyManifest.from_json(msgspec.json.encode(plain))
    assert reason in str(caught.value)


@pytest.mark.parametrize("field", sorted(as_json(policy(3)[0]).keys() - {"history", "lineage"}))
def test_a_missing_field_of_the_manifest_is_named(field: str) -> None:
    plain = as_json(policy(3)[0])
    del plain[field]
    with pytest.raises(InvalidRecord, match=field):
        PolicyManifest.from_json(msgspec.json.encode(plain))


@given(st.binary(max_size=200))
@example(b"[" * 200_000)
@example(b'{"schema_version":2,"spec":' + b"[" * 200_000)
@example(b'{"schema_version":1e400}')
@example(b'{"schema_version":"\xff"}')
def test_bytes_that_are_not_a_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRecord):
        PolicyManifest.from_json(data)


def test_hostile_sizes_are_refused_in_little_memory() -> None:
    manifest, data = policy(3)
    plain = as_json(manifest)
    plain["tensors"] = {f"{i}": {"dtype": "", "shape": [], "hash": ""} for i in range(350_000)}
    crowd = msgspec.json.encode(plain)
    assert len(crowd) < MAX_MANIFEST_BYTES, "gets past the first check"
    million = with_header(data, lambda header: header.update({f"{i}": {} for i in range(1_000_000)}))
    patient = SimpleNamespace(version=3, tensors=manifest.tensors, files=(file_of(3, million),))
    tracemalloc.start()
    with pytest.raises(InvalidRecord, match="tensors: must have 1 to 100000 entries, got 350000"):
        PolicyManifest.from_json(crowd)
    with pytest.raises(InvalidRecord, match="manifest: has more than"):
        PolicyManifest.from_json(bytes(MAX_MANIFEST_BYTES + 1))
    with pytest.raises(InvalidRecord, match=r"files\[0\].num_bytes: must be in \[1, 66303\]"):
        replace(manifest, files=patient.files)
    with pytest.raises(PolicyRefused, match=r"is not a safetensors file \(its header would have \d+ bytes\)"):
        read_weights(million, patient)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_the_limit_of_a_header_has_room_for_the_longest_names() -> None:
    tensors = {f"{i:03d}" + chr(1) * 500: np.zeros((1,) * 32, np.float64) for i in range(50)}
    manifest, data = policy(3, tensors)
    assert read_weights(data, PolicyManifest.from_json(manifest.to_json())).keys() == tensors.keys()
