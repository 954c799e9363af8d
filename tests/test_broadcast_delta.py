"""Packed weights: every bit of every pattern comes back; hostile bytes are refused or come out wrong."""

import struct
import subprocess
import sys
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sop.broadcast import container
from sop.broadcast.delta import decode_packed, encode_packed
from sop.broadcast.manifest import DTYPES, TensorEntry
from sop.core.errors import PolicyRefused

BF16 = np.dtype(ml_dtypes.bfloat16)
ALL_16 = np.arange(1 << 16, dtype=np.uint16)
Arrays = dict[str, npt.NDArray[Any]]


def entries(weights: Arrays) -> dict[str, TensorEntry]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {name: TensorEntry(names[array.dtype], array.shape, "0" * 32) for name, array in weights.items()}


def fine_tune(
    size: int, seed: int = 0, update: float = 1e-4, dtype: Any = BF16
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    master = rng.normal(0, 0.02, size).astype(np.float32)
    return master.astype(dtype), (master + rng.normal(0, update, size).astype(np.float32)).astype(dtype)


def check_round_trip(new: Arrays, old: Arrays | None, threads: int = 1) -> bytes:
    before = {name: array.tobytes() for name, array in new.items()}
    packed = encode_packed(new, old, threads=threads)
    data = b"".join(packed.parts)
    assert packed.num_bytes == len(data)
    assert set(packed.methods) == set(new)
    result = decode_packed(data, old, entries(new), "policy 3", threads=threads)
    assert list(result) == list(new)
    for name, array in new.items():
        assert (result[name].dtype, result[name].shape) == (array.dtype, array.shape), name
        assert result[name].tobytes() == before[name] == array.tobytes(), name
    return data


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("old", ["zero", "one", "nan", "same_but_for_one", "reversed", "shuffled", "shifted"])
def test_every_16_bit_pattern_survives_over_every_kind_of_old_weight(dtype: str, old: str) -> None:
    rng = np.random.default_rng(1)
    before = {
        "zero": np.zeros_like(ALL_16),
        "one": np.full_like(ALL_16, 0x3F80),
        "nan": np.full_like(ALL_16, 0xFFFF),
        "same_but_for_one": np.where(ALL_16 == 77, 0x8000, ALL_16).astype(np.uint16),
        "reversed": ALL_16[::-1].copy(),
        "shuffled": rng.permutation(ALL_16),
        "shifted": ALL_16 + np.uint16(1),
    }[old]
    check_round_trip({"w": ALL_16.view(DTYPES[dtype])}, {"w": before.view(DTYPES[dtype])})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tensor_of_any_type_survives(data: st.DataObject) -> None:
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40))
    bits = arrays.arrays(np.uint8 if dtype == np.bool_ else f"u{dtype.itemsize}", shape)
    one, two = (data.draw(bits) for _ in range(2))
    if dtype == np.bool_:
        one, two = one & 1, two & 1
    new = {"w": one.view(dtype), "x": two.view(dtype)}
    for old in (None, {"w": two.view(dtype), "x": two.view(dtype)}, {"x": one.view(dtype), "y": one.view(dtype)}):
        check_round_trip(new, old)


@pytest.mark.parametrize("dtype", ["F32", "F64", "I64"])
def test_special_values_survive(dtype: str) -> None:
    rng = np.random.default_rng(2)
    size = DTYPES[dtype].itemsize
    bits = rng.integers(0, 256, 4096 * size, np.uint8).view(f"u{size}")
    edges = [0, 1, (1 << 8 * size) - 1, 1 << (8 * size - 1), (1 << 8 * size - 1) - 1]
    bits[: len(edges)], old = edges, rng.permutation(bits)
    check_round_trip({"w": bits.view(DTYPES[dtype])}, {"w": old.view(DTYPES[dtype])})


@pytest.mark.parametrize(
    "size", [1, 2, 15, 16, 17, 63, 1000, container.BLOCK_BYTES // 2, container.BLOCK_BYTES // 2 + 1]
)
def test_any_number_of_elements_survives(size: int) -> None:
    old, new = fine_tune(size)
    for dtype in (BF16, np.dtype(np.float32)):
        check_round_trip({"w": new.astype(dtype)}, {"w": old.astype(dtype)})


def test_arrays_that_are_not_contiguous_aligned_writable_or_little_endian_are_fine() -> None:
    old, new = fine_tune(60)
    misaligned = np.frombuffer(b"x" + old.tobytes(), np.uint8)[1:].view(BF16)
    weights = {"t": new.reshape(6, 10).T, "s": new[::3], "m": new.copy()}
    check_round_trip(weights, {"t": old.reshape(6, 10).T, "s": old[::3], "m": misaligned})
    big = {"b": np.arange(9, dtype=">f4")}
    data = b"".join(encode_packed(big, None).parts)
    little = decode_packed(data, None, {"b": TensorEntry("F32", (9,), "")}, "policy 3")["b"]
    assert little.dtype == np.dtype("<f4")
    assert little.tolist() == big["b"].tolist()


def test_the_method_is_what_measured_smallest() -> None:
    rng = np.random.default_rng(3)
    old, new = fine_tune(300_000)
    noise = rng.integers(0, 256, 600_000, np.uint8)
    before = {"same": new, "delta": old, "unrelated": noise.view(BF16), "noise": noise, "f32": old.astype(np.float32)}
    weights = {
        "same": new.copy(),
        "delta": new,
        "unrelated": new,
        "noise": rng.permutation(noise),
        "f32": new.astype(np.float32),
        "fresh": new,
        "zeros": np.zeros(600_000, np.float32),
        "reshaped": new,
    }
    before["reshaped"] = old.reshape(2, -1)
    packed = encode_packed(weights, before)
    assert packed.methods == {
        "same": "same",
        "delta": "delta",
        "unrelated": "exponents",
        "noise": "raw",
        "f32": "delta",
        "fresh": "exponents",
        "zeros": "planes",
        "reshaped": "exponents",
    }
    check_round_trip(weights, before)


def test_a_tensor_that_is_as_before_takes_no_bytes_and_is_the_old_array() -> None:
    old, new = fine_tune(200_000)
    weights, before = {"a": old.copy(), "b": new}, {"a": old, "b": old}
    data = check_round_trip(weights, before)
    assert len(data) < len(check_round_trip({"b": new}, {"b": old})) + 8
    assert decode_packed(data, before, entries(weights), "policy 3")["a"] is old


def test_the_delta_is_as_small_as_the_entropy_given_the_old_exponent() -> None:
    old, new = fine_tune(1 << 20)
    before, after = (array.view(np.int16).astype(np.int64) for array in (old, new))
    before, after = (np.where(bits < 0, bits ^ 0x7FFF, bits) for bits in (before, after))
    pairs = ((old.view(np.uint16).astype(np.int64) >> 7) & 255) << 16 | ((after - before) & 0xFFFF)
    joint = np.bincount(pairs)
    exponents = np.bincount(pairs >> 16)
    bits = sum(
        (found * np.log2(found)).sum() * sign for found, sign in ((exponents[exponents > 0], 1), (joint[joint > 0], -1))
    )
    assert bits / 8 < encode_packed({"w": new}, {"w": old}).num_bytes < 1.01 * bits / 8


def test_many_small_tensors_cost_little_more_than_one() -> None:
    old, new = fine_tune(500 * 400)
    names = [f"layer.{index}.bias" for index in range(500)]
    many = encode_packed(
        dict(zip(names, np.split(new, 500), strict=True)), dict(zip(names, np.split(old, 500), strict=True))
    )
    assert many.num_bytes < encode_packed({"w": new}, {"w": old}).num_bytes + 200


def test_the_same_weights_give_the_same_bytes_in_any_order_on_any_number_of_threads() -> None:
    old, new = {}, {}
    for index, size in enumerate((3_000_000, 10, 2_000_000, 70_000)):
        old[str(index)], new[str(index)] = fine_tune(size, seed=index)
    expected = b"".join(encode_packed(new, old, threads=1).parts)
    backwards = dict(reversed(new.items()))
    assert b"".join(encode_packed(backwards, old, threads=3).parts) == expected
    result = decode_packed(expected, old, entries(new), "policy 3", threads=3)
    assert all(result[name].tobytes() == array.tobytes() for name, array in new.items())


def test_a_type_that_does_not_travel_is_named() -> None:
    with pytest.raises(ValueError, match="'w' has dtype complex64"):
        encode_packed({"w": np.zeros(3, np.complex64)}, None)


EXAMPLE = {name: fine_tune(size, seed=size) for name, size in (("a", 900), ("b", 140_000), ("c", 77))}
NEW: Arrays = {name: new for name, (_, new) in EXAMPLE.items()} | {
    "f": EXAMPLE["a"][1].astype(np.float32),
    "k": EXAMPLE["a"][1].copy(),
    "s": EXAMPLE["a"][0],
}
OLD: Arrays = {name: old for name, (old, _) in EXAMPLE.items()} | {
    "f": EXAMPLE["a"][0].astype(np.float32),
    "s": EXAMPLE["a"][0],
}
PACKED = b"".join(encode_packed(NEW, OLD).parts)


def outcome(data: bytes) -> str:
    """What decoding leads to: "right", "wrong" or "refused"; anything else is a failure."""
    try:
        result = decode_packed(data, OLD, entries(NEW), "policy 3", threads=1)
    except PolicyRefused as error:
        return "refused" if str(error).startswith("policy 3: ") else "the policy is not named"
    assert {name: (array.dtype, array.shape) for name, array in result.items()} == {
        name: (array.dtype, array.shape) for name, array in NEW.items()
    }
    return "right" if all(result[name].tobytes() == array.tobytes() for name, array in NEW.items()) else "wrong"


def test_altered_bytes_are_refused_or_come_out_wrong() -> None:
    rng = np.random.default_rng(5)
    outcomes = {"right": 0, "wrong": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(PACKED)
        for position in rng.integers(0, len(data) if rng.random() < 0.5 else 1500, rng.integers(1, 4)):
            data[position] ^= 1 << rng.integers(8)
        outcomes[outcome(bytes(data))] += 1
    assert outcomes["refused"] > 200
    assert outcomes["right"] < 20  # two flips of one bit


def test_every_truncation_is_refused() -> None:
    lengths = [*range(200), *range(200, len(PACKED), 997), len(PACKED) - 1]
    assert {outcome(PACKED[:length]) for length in lengths} == {"refused"}
    assert outcome(PACKED + b"\0") == "refused"
    assert outcome(PACKED) == "right"


def block(index: int) -> tuple[int, int, int]:
    """Where the header has the length of a block, and where the block begins and ends."""
    num_tensors, num_blocks = struct.unpack_from("<II", PACKED, 8)
    lengths_at = 32 + -(-num_tensors // 8) + num_blocks
    lengths = struct.unpack_from(f"<{num_blocks}I", PACKED, lengths_at)
    begin = lengths_at + 4 * num_blocks + sum(lengths[:index])
    return lengths_at + 4 * index, begin, begin + lengths[index]


@pytest.mark.parametrize("field", range(4))
@pytest.mark.parametrize("value", [0, 1, 2, 1000, 0x7FFF, 0xFFFF])
def test_hostile_lengths_of_streams_are_refused(field: int, value: int) -> None:
    _, begin, _ = block(0)
    data = bytearray(PACKED)
    layout, offset = [("<H", 0), ("<I", 4), ("<I", 8), ("<I", 12)][field]
    assert struct.unpack_from(layout, data, begin + offset)[0] != value
    for number in {value, value << 16 if layout == "<I" else value}:
        struct.pack_into(layout, data, begin + offset, number)
        assert outcome(bytes(data)) == "refused"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3), st.binary(max_size=400), st.integers(0, 3))
def test_any_bytes_in_place_of_a_block_are_refused_or_come_out_wrong(index: int, content: bytes, method: int) -> None:
    length_at, begin, end = block(index)
    data = bytearray(PACKED[:begin] + content + PACKED[end:])
    struct.pack_into("<I", data, length_at, len(content))
    num_tensors = struct.unpack_from("<I", PACKED, 8)[0]
    data[32 + -(-num_tensors // 8) + index] = method
    assert outcome(bytes(data)) in {"refused", "wrong"}


def test_a_frame_that_says_or_holds_more_than_expected_is_refused_before_it_is_unpacked() -> None:
    weights = {"z": np.zeros(1000, np.uint8)}
    bomb = b"".join(encode_packed({"z": np.zeros(100 << 20, np.uint8)}, None).parts)
    good = b"".join(encode_packed(weights, None).parts)
    num_blocks = struct.unpack_from("<I", bomb, 12)[0]
    frame = bomb[33 + 5 * num_blocks :]
    length = struct.unpack_from("<I", bomb, 33 + num_blocks)[0]
    data = good[:34] + struct.pack("<I", length) + frame[:length]
    tracemalloc.start()
    with pytest.raises(PolicyRefused, match="policy 9: the block of tensor 'z' has a frame"):
        decode_packed(data, None, entries(weights), "policy 9", threads=1)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_a_delta_over_another_base_is_refused_or_comes_out_wrong() -> None:
    entry = entries(NEW)
    with pytest.raises(PolicyRefused, match="another base"):
        decode_packed(PACKED, None, entry, "policy 3")
    with pytest.raises(PolicyRefused, match="another base"):
        decode_packed(PACKED, OLD, {**entry, "a": TensorEntry("BF16", (30, 30), "")}, "policy 3")
    with pytest.raises(PolicyRefused, match="does not decode"):
        decode_packed(PACKED, {**OLD, "b": OLD["b"][::-1]}, entry, "policy 3")
    more = decode_packed(PACKED, {**OLD, "z": OLD["a"]}, entry, "policy 3")
    assert set(more) == set(NEW)


def test_the_package_is_light_until_the_codec_is_used_and_the_kernels_come_from_a_cache() -> None:
    light = "import sop.broadcast, sys; print('numba' in sys.modules)"
    cached = (
        "from sop.broadcast import kernels, rans\n"
        "hits = [k.stats.cache_hits for m in (kernels, rans) for k in vars(m).values() if hasattr(k, 'stats')]\n"
        "print(len(hits) >= 14 and all(sum(hit.values()) == 1 for hit in hits))"
    )
    for code, expected in ((light, "False"), (cached, "True")):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected
