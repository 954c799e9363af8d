"""Named arrays as a safetensors file and back, with a BLAKE3 hash per tensor.

safetensors: 8 bytes length of the header, JSON header {name: {dtype, shape, data_offsets}}, the raw tensors.
It is written here and not by the library because this runs beside a training or control loop: the library's
`save` holds the interpreter lock for the whole copy (2.7 s of 839 MB). Here nothing is copied at all: the file
is a header and the arrays themselves, which the store writes one behind the other.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import blake3
import msgspec
import numpy as np
import numpy.typing as npt

from sop.broadcast.manifest import DTYPES, ENCODINGS, FileEntry, PolicyManifest, TensorEntry, max_header_bytes
from sop.core.codec import content_hash
from sop.core.errors import PolicyRefused
from sop.core.policy import Weights

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BYTES_PER_THREAD = 4 << 20
"""Smaller tensors are hashed by one thread: waking up others takes longer."""


class _HeaderEntry(msgspec.Struct):
    """One tensor in the header of a safetensors file. Defaults let `__metadata__` through, which is dropped."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One form of a version, ready to be put."""

    parts: list[memoryview]
    """One behind the other they are the object; views of the arrays wherever these travel as they are."""
    num_bytes: int
    hash: str
    """As `FileEntry.hash`."""


def tensor_hash(dtype: str, shape: tuple[int, ...], array: npt.NDArray[Any], threads: int = 1) -> str:
    """32 hexadecimal digits of BLAKE3 over dtype, shape and the bytes of a contiguous little-endian array.

    The interpreter lock is free meanwhile. `threads` share a large tensor; the result is the same.
    """
    hasher = blake3.blake3(max_threads=threads if array.nbytes >= threads * _BYTES_PER_THREAD else 1)
    hasher.update(f"{dtype} {list(shape)}\n".encode())
    hasher.update(bytes_of(array))
    return str(hasher.hexdigest(length=16))


def bytes_of(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array as a flat view."""
    return array.reshape(-1).view(np.uint8).data


def travelling(weights: Weights) -> dict[str, npt.NDArray[Any]]:
    """The arrays by name in order, contiguous and little-endian; copies only where they are not.

    Raises:
        ValueError: no tensors, or a dtype that does not travel; names the tensor.
    """
    if not weights:
        raise ValueError("a policy needs at least one tensor, got none")
    return {name: _little_endian(name, weights[name]) for name in sorted(weights)}


def describe(arrays: Weights, threads: int = 1) -> dict[str, TensorEntry]:
    """Table of the tensors that `travelling` returned; reads every byte once."""
    dtypes = {name: _NAMES[array.dtype] for name, array in arrays.items()}
    hashes = _hashes(arrays, dtypes, threads)
    return {name: TensorEntry(dtypes[name], array.shape, hashes[name]) for name, array in arrays.items()}


def undescribed(arrays: Weights) -> dict[str, TensorEntry]:
    """As `describe`, with zeros for hashes: reads nothing."""
    return {name: TensorEntry(_NAMES[array.dtype], array.shape, "0" * 32) for name, array in arrays.items()}


def _hashes(arrays: Weights, dtypes: Mapping[str, str], threads: int) -> dict[str, str]:
    """`tensor_hash` of every array: the threads share the tensors; one that is most of it they share itself."""
    total = sum(array.nbytes for array in arrays.values())

    def one(name: str) -> str:
        array = arrays[name]
        return tensor_hash(dtypes[name], array.shape, array, threads if 2 * array.nbytes > total else 1)

    if threads == 1 or total < threads * _BYTES_PER_THREAD:
        return {name: one(name) for name in arrays}
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        return dict(zip(arrays, pool.map(one, arrays), strict=True))


def encode_full(arrays: Weights) -> Encoded:
    """The safetensors file of tensors that `travelling` returned. The same weights give the same bytes."""
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))  # keeps every tensor aligned
    header: dict[str, _HeaderEntry] = {}
    position = 0
    for name, array in ordered:
        header[name] = _HeaderEntry(_NAMES[array.dtype], array.shape, (position, position + array.nbytes))
        position += array.nbytes
    raw_header = msgspec.json.encode(header)
    raw_header += b" " * (-len(raw_header) % 8)
    start = len(raw_header).to_bytes(8, "little") + raw_header
    parts = [memoryview(start), *(bytes_of(array) for _, array in ordered)]
    return Encoded(parts, len(start) + position, content_hash(start))


def _little_endian(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array = np.asarray(values, order="C")
    if array.dtype not in _NAMES:
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.dtype not in _NAMES:
        raise ValueError(
            f"tensor {name!r} has dtype {array.dtype}, which does not travel; use one of {sorted(DTYPES)} "
            "(BF16 is ml_dtypes.bfloat16)"
        )
    return array


def open_full(
    data: bytes | memoryview, file: FileEntry, expected: Mapping[str, TensorEntry], policy: str
) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a safetensors file as read-only views of `data`: nothing is copied, their bytes are not read.

    Args:
        data: the object under `file.key`.
        file: what the object has to be.
        expected: names, dtypes and shapes; the file has exactly these.
        policy: who it belongs to, for messages.

    Raises:
        PolicyRefused: the object is cut short, its header is altered, or its tensors are not those expected;
            names the policy, and the tensor if one is to blame.
    """
    check_size(data, file, policy)
    header, start = _read_header(data, file, max_header_bytes(expected), policy)
    _check_names(header, expected, policy)
    _check_offsets(header, len(data) - start, policy)
    weights: dict[str, npt.NDArray[Any]] = {}
    for name, found in header.items():
        wanted, tensor = expected[name], f"{policy}: tensor {name!r}"
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            words = f"{wanted.dtype} {list(wanted.shape)}"
            raise PolicyRefused(f"{tensor} is {found.dtype} {list(found.shape)}, the manifest says {words}")
        begin, end = found.data_offsets
        if end - begin != wanted.num_bytes:
            raise PolicyRefused(f"{tensor} has {end - begin} bytes instead of {wanted.num_bytes}")
        array: npt.NDArray[Any] = np.ndarray(wanted.shape, DTYPES[wanted.dtype], buffer=data, offset=start + begin)
        array.flags.writeable = False
        weights[name] = array
    return weights


def verify(weights: Weights, expected: Mapping[str, TensorEntry], policy: str, threads: int = 1) -> None:
    """Make sure that these are the tensors of the manifest; reads every byte of them.

    Raises:
        PolicyRefused: a tensor is missing, has another dtype or shape, or its hash is another; names it.
    """
    for name, entry in expected.items():
        array = weights.get(name)
        if array is None:
            raise PolicyRefused(f"{policy}: tensor {name!r} is missing from its files")
        if (array.dtype, array.shape) != (DTYPES[entry.dtype], entry.shape):
            raise PolicyRefused(f"{policy}: tensor {name!r} is {array.dtype} {list(array.shape)}, not {entry.dtype}")
    found = _hashes({name: weights[name] for name in expected}, {n: e.dtype for n, e in expected.items()}, threads)
    for name, entry in expected.items():
        if found[name] != entry.hash:
            raise PolicyRefused(f"{policy}: tensor {name!r} is altered: its hash is not {entry.hash}")


def check_encoding(manifest: PolicyManifest) -> None:
    """Refuse what this program cannot decode.

    Raises:
        PolicyRefused: names the version and the encoding.
    """
    unknown = [file.encoding for file in manifest.files if file.encoding not in ENCODINGS]
    if unknown and len(unknown) == len(manifest.files):
        raise PolicyRefused(
            f"policy {manifest.version}: encoding {unknown[0][:80]!r} is not known, this program reads "
            f"{list(ENCODINGS)}: update this robot's software, or publish full policies"
        )


def check_size(data: bytes | memoryview, file: FileEntry, policy: str) -> None:
    """Refuse an object that is cut short or goes on; readers fetch one byte more than they expect and no more.

    Raises:
        PolicyRefused: names the object and both sizes.
    """
    if len(data) != file.num_bytes:
        found = f"{len(data)}" if len(data) <= file.num_bytes else f"more than {file.num_bytes}"
        raise PolicyRefused(f"{policy}: {file.key} has {found} bytes instead of {file.num_bytes}")


def _read_header(
    data: bytes | memoryview, file: FileEntry, limit: int, policy: str
) -> tuple[dict[str, _HeaderEntry], int]:
    """Entries of a safetensors file and the position of its first tensor."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(limit, len(data) - 8):
        raise PolicyRefused(f"{policy}: {file.key} is not a safetensors file (its header would have {size} bytes)")
    found = content_hash(data[: 8 + size])
    if found != file.hash:
        raise PolicyRefused(f"{policy}: {file.key} is altered: the hash of its header is {found}, not {file.hash}")
    try:
        header = msgspec.json.decode(data[8 : 8 + size], type=dict[str, _HeaderEntry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyRefused(f"{policy}: {file.key} is not a safetensors file ({error})") from error
    header.pop("__metadata__", None)
    return header, 8 + size


def _check_names(header: Mapping[str, object], expected: Mapping[str, object], policy: str) -> None:
    if missing := sorted(expected.keys() - header.keys()):
        raise PolicyRefused(f"{policy}: tensor {missing[0][:80]!r} is missing from its file ({len(missing)} in all)")
    if extra := sorted(header.keys() - expected.keys()):
        raise PolicyRefused(f"{policy}: tensor {extra[0][:80]!r} is not in the manifest ({len(extra)} in all)")


def _check_offsets(header: Mapping[str, _HeaderEntry], num_bytes: int, policy: str) -> None:
    """Tensors lie one behind the other: no overlap, no hole, nothing behind the last."""
    position = 0
    for (begin, end), name in sorted((entry.data_offsets, name) for name, entry in header.items()):
        if begin != position or end < begin:
            raise PolicyRefused(f"{policy}: tensor {name!r} lies at [{begin}, {end}), expected to begin at {position}")
        position = end
    if position != num_bytes:
        raise PolicyRefused(f"{policy}: the file has {num_bytes} bytes of tensors, its header describes {position}")
