"""The frame of a packed file: which tensors travel, how they are cut into blocks, and where each block lies.

    bytes            content
    0-7              MAGIC
    8-15             number of tensors (u32), number of blocks (u32)
    16-31            `layout_hash`: of all names, types, shapes, and which of them have an old value
    ceil(T / 8)      one bit per tensor, in the order of sorted names: equal to the old one, does not travel
    B                method of each block (index in METHODS)
    4 B              length of each block (u32)
    ...              the blocks

Names and shapes are not in the file: the reader knows from the manifest what it must contain, and so how it is cut and
how long everything may be. A large tensor is cut into blocks of its own; small ones of one type share blocks.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import blake3
import numpy as np
import numpy.typing as npt

from sop.broadcast.manifest import DTYPES
from sop.core.policy import Weights

MAGIC = b"SOPPACK1"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METHODS = ("raw", "planes", "exponents", "delta")
"""Of a block: its bytes; byte planes with zstd; exponents entropy coded; the difference to the old weights."""
SAME = "same"
"""Of a tensor: equal to the old one; no bytes."""
BLOCK_BYTES = 2 << 20
"""Decoded size: fits the cache of one core, is enough for its tables, and gives all cores something to do."""
SMALL_BYTES = 256 << 10
"""Tensors up to this share blocks."""

_FIXED = struct.Struct("<8sII16s")


class Described(Protocol):
    """What a tensor has to be; `manifest.TensorEntry` is one."""

    @property
    def dtype(self) -> str:
        """A key of DTYPES."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the table that writer and reader agree on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    has_old: bool
    """The old weights have it with the same type and shape."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of a tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Block:
    """What is coded at once: one span of a large tensor, or whole small tensors of one type one after the other."""

    dtype: str
    has_old: bool
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Number of elements, 1 or more."""
        return sum(span.stop - span.start for span in self.spans)

    @property
    def num_bytes(self) -> int:
        """Decoded size."""
        return self.size * DTYPES[self.dtype].itemsize


def tensor_table(expected: Mapping[str, Described], old: Weights | None) -> list[Tensor]:
    """The table in the order of the file: sorted by name."""
    return [
        Tensor(name, (entry := expected[name]).dtype, tuple(entry.shape), _has_old(name, entry, old))
        for name in sorted(expected)
    ]


def _has_old(name: str, entry: Described, old: Weights | None) -> bool:
    if old is None or name not in old:
        return False
    return old[name].dtype == DTYPES[entry.dtype] and old[name].shape == tuple(entry.shape)


def cut_into_blocks(tensors: Iterable[Tensor]) -> list[Block]:
    """The blocks of the tensors that travel, in the order of the file."""
    blocks: list[Block] = []
    groups: dict[tuple[str, bool], list[Span]] = {}
    room: dict[tuple[str, bool], int] = {}
    for tensor in tensors:
        itemsize, key = DTYPES[tensor.dtype].itemsize, (tensor.dtype, tensor.has_old)
        num_bytes = tensor.size * itemsize
        if num_bytes > SMALL_BYTES:
            count = math.ceil(num_bytes / BLOCK_BYTES)
            edges = [tensor.size * k // count for k in range(count + 1)]
            blocks += (Block(*key, (Span(tensor.name, start, stop),)) for start, stop in pairwise(edges))
        elif num_bytes:
            if room.get(key, 0) < num_bytes:
                if key in groups:
                    blocks.append(Block(*key, tuple(groups[key])))
                groups[key], room[key] = [], BLOCK_BYTES
            groups[key].append(Span(tensor.name, 0, tensor.size))
            room[key] -= num_bytes
    return blocks + [Block(*key, tuple(spans)) for key, spans in groups.items()]


def write_header(tensors: Sequence[Tensor], same: Sequence[bool], methods: bytes, lengths: Sequence[int]) -> bytes:
    """Everything before the blocks."""
    bits = np.packbits(np.asarray(same, np.bool_), bitorder="little").tobytes()
    fixed = _FIXED.pack(MAGIC, len(tensors), len(lengths), layout_hash(tensors))
    return b"".join((fixed, bits, methods, np.asarray(lengths, "<u4").tobytes()))


def read_header(
    data: memoryview, tensors: Sequence[Tensor]
) -> tuple[npt.NDArray[np.bool_], list[Block], list[tuple[str, memoryview]]]:
    """(which tensors are equal to the old ones, the blocks, their method and payload). Copies nothing.

    Raises:
        ValueError: not a packed file, not of these tensors, or its lengths do not add up; says what is wrong.
    """
    if len(data) < _FIXED.size:
        raise ValueError(f"has {len(data)} bytes, which is no packed file")
    magic, num_tensors, num_blocks, found = _FIXED.unpack(data[: _FIXED.size])
    if magic != MAGIC:
        raise ValueError(f"starts with {magic!r} instead of {MAGIC!r}")
    if num_tensors != len(tensors) or found != layout_hash(tensors):
        raise ValueError("was packed for other tensors, or over another base, than the manifest says")
    start = _FIXED.size + math.ceil(num_tensors / 8)
    bits = np.frombuffer(data[_FIXED.size : start], np.uint8)
    if len(bits) != math.ceil(num_tensors / 8):
        raise ValueError("is cut short in the header")
    same = np.unpackbits(bits, count=num_tensors, bitorder="little").astype(np.bool_)
    for tensor, is_same in zip(tensors, same, strict=True):
        if is_same and not tensor.has_old:
            raise ValueError(f"says that tensor {tensor.name!r} is as before, which the old weights do not have")
    blocks = cut_into_blocks(tensor for tensor, is_same in zip(tensors, same, strict=True) if not is_same)
    if num_blocks != len(blocks) or len(data) < start + 5 * num_blocks:
        raise ValueError(f"has {num_blocks} blocks instead of {len(blocks)}, or is cut short in the header")
    methods = bytes(data[start : start + num_blocks])
    lengths = np.frombuffer(data[start + num_blocks : start + 5 * num_blocks], "<u4").astype(np.int64)
    edges = start + 5 * num_blocks + np.concatenate(([0], np.cumsum(lengths)))
    if edges[-1] != len(data):
        raise ValueError(f"has {len(data)} bytes, its header describes {edges[-1]}")
    if methods and max(methods) >= len(METHODS):
        raise ValueError(f"has an unknown method {max(methods)}")
    payloads = [data[begin:end] for begin, end in pairwise(edges)]
    return same, blocks, [(METHODS[method], payload) for method, payload in zip(methods, payloads, strict=True)]


def layout_hash(tensors: Sequence[Tensor]) -> bytes:
    """16 bytes that differ when writer and reader do not mean the same tensors or the same kind of base."""
    text = "".join(f"{t.name!r} {t.dtype} {list(t.shape)} {t.has_old}\n" for t in tensors)
    return bytes(blake3.blake3(text.encode()).digest(length=16))
