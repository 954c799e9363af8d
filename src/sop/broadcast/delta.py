"""Weights as few bytes, without loss: a keyframe, or the difference to weights that the reader has.

    new, old --+-- equal tensors ------------------------------- "same"     0 bytes
               `-- blocks of ~2 MB, on `threads` threads
                     floats with an old value  -> ulp / planes - "delta"
                     16-bit floats without     -> ulp ---------- "exponents"
                     else, or where smaller    -> planes ------- "planes"
                     else                      ----------------- "raw"

Every bit pattern survives (NaN payloads, -0, infinities). The same input gives the same bytes. The threads hold the
interpreter lock only for milliseconds at a time. Importing this module loads (or, once per machine and version of the
code, compiles: about ten seconds) the kernels: do it before a control loop starts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sop.broadcast import kernels
from sop.broadcast.container import (
    DTYPE_NAMES,
    METHODS,
    SAME,
    Block,
    Described,
    Tensor,
    cut_into_blocks,
    read_header,
    tensor_table,
    write_header,
)
from sop.broadcast.manifest import DTYPES
from sop.broadcast.planes import decode_planes, encode_planes
from sop.broadcast.ulp import decode_delta, decode_exponents, encode_delta, encode_exponents
from sop.core.errors import PolicyRefused
from sop.core.policy import Weights

_ULP = ("BF16", "F16")
_FLOATS = ("BF16", "F16", "F32", "F64")
_GOOD = 0.5
"""A delta below this part of the dense size is taken without trying more: sign and mantissa alone are that much."""
_COMPARE_BYTES = 1 << 20
_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A packed file, not yet joined."""

    parts: tuple[bytes, ...]
    """To be written one after the other."""
    methods: Mapping[str, str]
    """Tensor -> SAME or one of METHODS; "delta+planes" where its blocks differ."""

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return sum(map(len, self.parts))


def encode_packed(new: Weights, old: Weights | None, *, threads: int = 2) -> Packed:
    """Pack `new`; with `old` as what differs from it (a tensor with another type or shape stands alone).

    Blocks until done; deterministic; neither argument is changed.

    Raises:
        ValueError: a tensor's dtype does not travel; names it.
    """
    arrays = {name: _plain(name, array) for name, array in new.items()}
    expected = {name: _Entry(DTYPE_NAMES[array.dtype], array.shape) for name, array in arrays.items()}
    table = tensor_table(expected, old)
    bits = {name: _bits(array) for name, array in arrays.items()}
    old_bits = _old_bits(table, old)
    same = _each(lambda t: t.has_old and _equal(bits[t.name], old_bits[t.name]), table, threads)
    blocks = cut_into_blocks(tensor for tensor, is_same in zip(table, same, strict=True) if not is_same)

    def encode(block: Block) -> tuple[str, bytes]:
        return _encode_block(block, _gather(block, bits), _gather(block, old_bits) if block.has_old else None)

    coded = _each(encode, blocks, threads)
    methods = {tensor.name: SAME if is_same else "raw" for tensor, is_same in zip(table, same, strict=True)}
    used: dict[str, set[str]] = {}
    for block, (method, _) in zip(blocks, coded, strict=True):
        for span in block.spans:
            used.setdefault(span.name, set()).add(method)
    methods |= {name: "+".join(sorted(found)) for name, found in used.items()}
    kinds = bytes(METHODS.index(method) for method, _ in coded)
    header = write_header(table, same, kinds, [len(payload) for _, payload in coded])
    return Packed(parts=(header, *(payload for _, payload in coded)), methods=methods)


def decode_packed(
    data: bytes | memoryview,
    old: Weights | None,
    expected: Mapping[str, Described],
    policy: str,
    *,
    threads: int = 2,
) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a packed file: exactly those of `expected`, of its types and shapes, and of no checked content:
    what is altered or made over another base comes out wrong, or refused. Compare the tensors' hashes.

    Blocks until done. Allocates the tensors that travel and a few MB per thread, whatever `data` says. A tensor that
    is as before is the very array of `old`.

    Args:
        data: hostile bytes.
        old: what it was packed over; more tensors than those do no harm. None for a keyframe.
        expected: name -> what the tensor has to be; trusted to be of acceptable size.
        policy: what to call it in errors, such as "policy 12".

    Raises:
        PolicyRefused: it is not such a file; names the policy, and a tensor if one is to blame.
    """
    table = tensor_table(expected, old)
    try:
        same, blocks, payloads = read_header(memoryview(data).cast("B"), table)
    except ValueError as error:
        raise PolicyRefused(f"{policy}: the packed file {error}") from error
    is_same = dict(zip((tensor.name for tensor in table), same.tolist(), strict=True))
    result: dict[str, npt.NDArray[Any]] = {}
    for name, entry in expected.items():
        kept = old[name] if old is not None and is_same[name] else None
        result[name] = np.empty(tuple(entry.shape), DTYPES[entry.dtype]) if kept is None else kept
    bits = {name: _bits(array) for name, array in result.items() if not is_same[name]}
    old_bits = _old_bits((tensor for tensor in table if not is_same[tensor.name]), old)

    def decode(job: tuple[Block, tuple[str, memoryview]]) -> None:
        block, (method, payload) = job
        before = _gather(block, old_bits) if block.has_old else None
        try:
            _decode_block(block, method, payload, before, bits)
        except ValueError as error:
            raise PolicyRefused(f"{policy}: the block of tensor {block.spans[0].name!r} {error}") from error

    _each(decode, list(zip(blocks, payloads, strict=True)), threads)
    return result


@dataclass(frozen=True, slots=True)
class _Entry:
    """What an array is."""

    dtype: str
    shape: tuple[int, ...]


def _encode_block(block: Block, new: npt.NDArray[Any], old: npt.NDArray[Any] | None) -> tuple[str, bytes]:
    """(method, payload) of the smallest result."""
    found = []
    if old is not None and (delta := _delta(block.dtype, new, old)):
        if len(delta) <= _GOOD * new.nbytes:
            return "delta", delta
        found.append(("delta", delta))
    found += [_alone(block.dtype, new), ("raw", new.tobytes())]
    return min(found, key=lambda coded: len(coded[1]))


def _alone(dtype: str, new: npt.NDArray[Any]) -> tuple[str, bytes]:
    """(method, payload) without an old value."""
    if dtype in _ULP and (exponents := encode_exponents(new)):
        return "exponents", exponents
    return "planes", encode_planes(new, rotate=dtype in _FLOATS)


def _delta(dtype: str, new: npt.NDArray[Any], old: npt.NDArray[Any]) -> bytes | None:
    """The payload of the difference; None for types that have none."""
    if dtype in _ULP:
        return encode_delta(new, old)
    if dtype != "F32":
        return None
    zigzag = np.empty_like(new)
    kernels.zigzag32(new, old, zigzag)
    return encode_planes(zigzag, rotate=False)


def _decode_block(
    block: Block,
    method: str,
    payload: memoryview,
    old: npt.NDArray[Any] | None,
    bits: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Write a block into the tensors."""
    first = block.spans[0]
    alone = len(block.spans) == 1
    out = bits[first.name][first.start : first.stop] if alone else np.empty(block.size, bits[first.name].dtype)
    if method == "raw":
        if len(payload) != out.nbytes:
            raise ValueError(f"has {len(payload)} bytes instead of {out.nbytes}")
        out.view(np.uint8)[:] = np.frombuffer(payload, np.uint8)
    elif method == "planes":
        decode_planes(payload, out, rotate=block.dtype in _FLOATS)
    elif method == "exponents" and block.dtype in _ULP:
        decode_exponents(payload, out)
    elif method != "delta" or old is None:
        raise ValueError(f"has method {method!r}, which does not fit")
    elif block.dtype in _ULP:
        decode_delta(payload, old, out)
    elif block.dtype == "F32":
        decode_planes(payload, out, rotate=False)
        kernels.undo_zigzag32(out, old)
    else:
        raise ValueError(f"is a difference of {block.dtype}, which has none")
    if not alone:
        start = 0
        for span in block.spans:
            bits[span.name][:] = out[start : start + span.stop]
            start += span.stop


def _gather(block: Block, bits: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The block's elements in one array: a view where it is a part of one tensor."""
    parts = [bits[span.name][span.start : span.stop] for span in block.spans]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _plain(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array little-endian; a copy only where it is not."""
    array = np.asarray(values)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.dtype not in DTYPE_NAMES:
        raise ValueError(f"tensor {name!r} has dtype {array.dtype}, which does not travel; use one of {sorted(DTYPES)}")
    return array


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The elements as unsigned integers [n], aligned; a view where possible."""
    flat = np.require(array, requirements=["C", "A"]).reshape(-1)
    return flat.view(f"u{array.itemsize}")


def _old_bits(table: Iterable[Tensor], old: Weights | None) -> dict[str, npt.NDArray[Any]]:
    return {} if old is None else {tensor.name: _bits(old[tensor.name]) for tensor in table if tensor.has_old}


def _equal(new: npt.NDArray[Any], old: npt.NDArray[Any]) -> bool:
    """Whether all bits are; stops at the first piece that differs."""
    step = _COMPARE_BYTES // new.itemsize
    return all(np.array_equal(new[at : at + step], old[at : at + step]) for at in range(0, new.size, step))


def _each(work: Callable[[_A], _B], items: Sequence[_A], threads: int) -> list[_B]:
    """[work(item), ...] on threads."""
    if threads <= 1 or len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="weight-codec") as pool:
        return list(pool.map(work, items))
