"""Arrays of any type as compressed byte planes: what is left when there is no old weight, and the check of zstd frames.

The bytes of all elements are sorted by their place: the exponents of floats end up next to each other and compress, the
low mantissa bits do not and stay raw. Floats are rotated left by one bit before, so that their top byte is all exponent
and the sign goes to the bottom.

    payload:  number of planes (u8) | length of each (u32) | planes: raw if that long, else one zstd frame each
"""

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from sop.broadcast.kernels import join_planes, split_planes

LEVEL = 1
"""Entropy coding is all there is to gain; higher levels search for repeats that weights do not have."""
MAX_WINDOW_BYTES = 1 << 23
"""No frame here is larger: what asks for more memory is refused."""
WORTH = 0.98
"""A plane that compresses less stays raw: its decoding is free."""


def encode_planes(values: npt.NDArray[Any], *, rotate: bool) -> bytes:
    """Unsigned integers [n] (a view of the elements' bits) as a payload; `rotate` for floats."""
    if rotate:
        values = values << 1 | values >> (8 * values.itemsize - 1)
    planes = np.empty((values.itemsize, values.size), np.uint8)
    split_planes(values.view(np.uint8), planes)
    coded = [pack_bytes(plane.data) for plane in planes]
    return b"".join((struct.pack(f"<B{len(coded)}I", len(coded), *map(len, coded)), *coded))


def decode_planes(payload: memoryview, out: npt.NDArray[Any], *, rotate: bool) -> None:
    """Inverse of `encode_planes`, into `out` (unsigned integers [n]).

    Raises:
        ValueError: not such a payload, or not of this many elements; says what is wrong.
    """
    header = struct.Struct(f"<B{out.itemsize}I")
    if len(payload) < header.size:
        raise ValueError("is cut short")
    num_planes, *lengths = header.unpack(payload[: header.size])
    if num_planes != out.itemsize or header.size + sum(lengths) != len(payload):
        raise ValueError("has planes that do not fit")
    planes = np.empty((out.itemsize, out.size), np.uint8)
    start = header.size
    for plane, length in zip(planes, lengths, strict=True):
        plane[:] = np.frombuffer(unpack_bytes(payload[start : start + length], out.size), np.uint8)
        start += length
    join_planes(planes, out.view(np.uint8))
    if rotate:
        out[:] = out >> 1 | out << (8 * out.itemsize - 1)


def pack_bytes(data: memoryview | bytes) -> memoryview | bytes:
    """One zstd frame, or `data` itself if that is not clearly longer. Its length tells `unpack_bytes` which."""
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(data)
    return frame if len(frame) < WORTH * len(data) else data


def unpack_bytes(data: memoryview, num_bytes: int) -> memoryview | bytes:
    """Inverse of `pack_bytes`; never allocates more than `num_bytes` for the result.

    Raises:
        ValueError: not a frame of exactly `num_bytes`.
    """
    if len(data) == num_bytes:
        return data
    try:
        found = zstandard.get_frame_parameters(data)
        if found.content_size != num_bytes or found.window_size > MAX_WINDOW_BYTES:
            raise ValueError(f"has a frame of {found.content_size} bytes instead of {num_bytes}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        result = decompressor.decompress(data, max_output_size=num_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"has a broken frame: {error}") from error
    if len(result) != num_bytes:
        raise ValueError(f"has a frame of {len(result)} bytes instead of {num_bytes}")
    return result
