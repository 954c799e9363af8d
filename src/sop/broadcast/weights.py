"""Named arrays as safetensors bytes and back, with a BLAKE3 hash per tensor.

safetensors: 8 bytes length of the header, JSON header {name: {dtype, shape, data_offsets}}, the raw tensors.
It is written here and not by the library because this runs beside a training or control loop: the library's
`save` holds the interpreter lock for the whole copy (2.7 s of 839 MB), this never for more than a few ms.
"""

from collections.abc import Mapping
from typing import Any

import blake3
import msgspec
import numpy as np
import numpy.typing as npt

from sop.broadcast.manifest import DTYPES, ENCODINGS, PolicyManifest, TensorEntry, max_header_bytes
from sop.core.codec import content_hash
from sop.core.errors import PolicyRefused
from sop.core.policy import Weights

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _HeaderEntry(msgspec.Struct):
    """One tensor in the header of a safetensors file. Defaults let `__metadata__` through, which is dropped."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] = (0, 0)


def tensor_hash(dtype: str, shape: tuple[int, ...], array: npt.NDArray[Any]) -> str:
    """32 hexadecimal digits of BLAKE3 over dtype, shape and the bytes of a contiguous little-endian array."""
    hasher = blake3.blake3(f"{dtype} {list(shape)}\n".encode())
    hasher.update(array.reshape(-1).view(np.uint8).data)
    return str(hasher.hexdigest(length=16))


def encode_weights(weights: Weights) -> tuple[memoryview, dict[str, TensorEntry]]:
    """(safetensors file, entries for the manifest). The same weights give the same bytes in any order.

    Raises:
        ValueError: no tensors, or a dtype that does not travel; names the tensor.
    """
    if not weights:
        raise ValueError("a policy needs at least one tensor, got none")
    arrays = {name: _little_endian(name, weights[name]) for name in sorted(weights)}
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)  # keeps every tensor aligned
    entries: dict[str, TensorEntry] = {}
    header: dict[str, _HeaderEntry] = {}
    position = 0
    for name, array in ordered:
        dtype = _NAMES[array.dtype]
        entries[name] = TensorEntry(dtype, array.shape, tensor_hash(dtype, array.shape, array))
        header[name] = _HeaderEntry(dtype, array.shape, (position, position + array.nbytes))
        position += array.nbytes
    raw_header = msgspec.json.encode(header)
    raw_header += b" " * (-len(raw_header) % 8)
    start = 8 + len(raw_header)
    file = np.empty(start + position, np.uint8)
    file[:start] = np.frombuffer(len(raw_header).to_bytes(8, "little") + raw_header, np.uint8)
    for name, array in ordered:
        begin, end = header[name].data_offsets
        file[start + begin : start + end] = array.reshape(-1).view(np.uint8)  # numpy releases the lock meanwhile
    return file.data, entries


def _little_endian(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, contiguous and little-endian; a copy only where it is not."""
    array = np.asarray(values, order="C")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.dtype not in _NAMES:
        raise ValueError(
            f"tensor {name!r} has dtype {array.dtype}, which does not travel; use one of {sorted(DTYPES)} "
            "(bfloat16: convert to float32, or publish its bits as uint16)"
        )
    return array


def read_weights(data: bytes, manifest: PolicyManifest) -> Weights:
    """The tensors of a policy, every byte of them verified. Read-only views of `data`: nothing is copied.

    Args:
        data: the object under `manifest.files[0].key`.
        manifest: what the object has to be.

    Raises:
        PolicyRefused: the encoding is unknown, the object is cut short or altered, or its tensors are not
            exactly those of the manifest; names the version, and the tensor if one is to blame.
    """
    policy = f"policy {manifest.version}"
    check_encoding(manifest)
    (file,) = manifest.files
    if len(data) != file.num_bytes:
        raise PolicyRefused(
            f"{policy}: {file.key} has {_count(data, file.num_bytes)} bytes instead of {file.num_bytes}"
        )
    if content_hash(data) != file.hash:
        raise PolicyRefused(f"{policy}: {file.key} is altered: its hash is {content_hash(data)}, not {file.hash}")
    header, start = _read_header(data, max_header_bytes(manifest.tensors), policy)
    _check_names(header, manifest.tensors, policy)
    _check_offsets(header, len(data) - start, policy)
    weights: dict[str, npt.NDArray[Any]] = {}
    for name, expected in manifest.tensors.items():
        found, tensor = header[name], f"{policy}: tensor {name!r}"
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            wanted = f"{expected.dtype} {list(expected.shape)}"
            raise PolicyRefused(f"{tensor} is {found.dtype} {list(found.shape)}, the manifest says {wanted}")
        begin, end = found.data_offsets
        if end - begin != expected.num_bytes:
            raise PolicyRefused(f"{tensor} has {end - begin} bytes instead of {expected.num_bytes}")
        array: npt.NDArray[Any] = np.ndarray(expected.shape, DTYPES[expected.dtype], buffer=data, offset=start + begin)
        if tensor_hash(expected.dtype, expected.shape, array) != expected.hash:
            raise PolicyRefused(f"{tensor} is altered: its hash is not {expected.hash}")
        array.flags.writeable = False
        weights[name] = array
    return weights


def check_encoding(manifest: PolicyManifest) -> None:
    """Refuse what this program cannot decode.

    Raises:
        PolicyRefused: names the version and the encoding.
    """
    if manifest.encoding not in ENCODINGS:
        raise PolicyRefused(
            f"policy {manifest.version}: encoding {manifest.encoding[:80]!r} is not known, this program reads "
            f"{list(ENCODINGS)}: update this robot's software, or publish full policies"
        )


def _read_header(data: bytes, limit: int, policy: str) -> tuple[dict[str, _HeaderEntry], int]:
    """Entries of a safetensors file and the position of its first tensor."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(limit, len(data) - 8):
        raise PolicyRefused(f"{policy}: not a safetensors file (its header would have {size} bytes)")
    try:
        header = msgspec.json.decode(memoryview(data)[8 : 8 + size], type=dict[str, _HeaderEntry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyRefused(f"{policy}: not a safetensors file ({error})") from error
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


def _count(data: bytes, limit: int) -> str:
    """Number of bytes in words; readers fetch one byte more than they expect and no more."""
    return f"{len(data)}" if len(data) <= limit else f"more than {limit}"
