"""The manifest of a published policy: what it is, what it came from, and the hash of every byte of it.

Written last, so a policy without a manifest does not exist. A manifest from the store is not trusted: its
size, its numbers and the keys that it points to are bounded before anything is allocated for them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from sop.core import layout
from sop.core.errors import InvalidRecord
from sop.core.policy import Conditioning, PolicySpec

SCHEMA_VERSION = 1
"""Raised when the meaning of a field changes; a reader refuses versions that it does not know."""
MAX_MANIFEST_BYTES = 16 << 20
"""Room for MAX_TENSORS entries with long names; what is larger is refused unread."""
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 32
MAX_FILES = 1000
MAX_WEIGHTS_BYTES = 64 << 30
"""Larger policies do not fit the computer of any robot that this is meant for."""
SPARE_HEADER_BYTES = 64 << 10
"""Room for metadata that other writers put into the header of a safetensors file."""
MAX_VERSION = 99_999_999
"""Eight digits in the key: beyond, the order of keys would no longer be the order of versions."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
"""Element types that travel: safetensors name -> numpy type, little-endian."""
FULL = "full"
"""Encoding: one safetensors file with every tensor."""
ENCODINGS = (FULL,)
"""Encodings that this program reads. A delta would name its `base` and add its own entry here."""

_HASH = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as it is after decoding."""

    dtype: str
    """A key of DTYPES."""
    shape: tuple[int, ...]
    hash: str
    """`tensor_hash` of dtype, shape and bytes."""

    @property
    def num_bytes(self) -> int:
        """Size of the decoded tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One object that holds (encoded) tensors."""

    key: str
    """Key in the store, inside of the policy's own folder."""
    num_bytes: int
    hash: str
    """`content_hash` of the whole object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFacts:
    """What the learner knows about a snapshot of its weights when it hands it to the publisher."""

    learner_step: int
    algorithm: str
    """Name in `sop.algorithms.ALGORITHMS`."""
    spec: PolicySpec
    conditioning: Conditioning
    online_episodes: int
    """Episodes in the online buffer at that moment."""
    offline_episodes: int
    """Episodes in the offline buffer at that moment."""
    config_hash: str
    """Content hash of the run's configuration."""
    code_version: str
    """Commit or version of the program that trained it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyManifest(PolicyFacts):
    """Everything about one published policy. Checked on construction.

    Raises:
        InvalidRecord: names the field that breaks the contract.
    """

    version: int
    parent_version: int | None
    """The version published before this one, None for the first."""
    created_utc_ns: int
    """When the learner handed the snapshot over."""
    files: tuple[FileEntry, ...]
    tensors: Mapping[str, TensorEntry]
    """Tensor name -> what it has to be: the complete list."""
    encoding: str = FULL
    """How the files become tensors, see ENCODINGS."""
    base: int | None = None
    """Version that a delta builds on; None for encodings that stand alone."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise InvalidRecord("schema_version", f"this program reads {SCHEMA_VERSION}, got {self.schema_version}")
        if not 0 <= self.version <= MAX_VERSION:
            raise InvalidRecord("version", f"must be in [0, {MAX_VERSION}], got {self.version}")
        if self.parent_version is not None and not 0 <= self.parent_version < self.version:
            raise InvalidRecord("parent_version", f"must be before version {self.version}, got {self.parent_version}")
        for field in ("learner_step", "online_episodes", "offline_episodes", "created_utc_ns"):
            if getattr(self, field) < 0:
                raise InvalidRecord(field, f"must be 0 or more, got {getattr(self, field)}")
        if not math.isfinite(self.conditioning.guidance):
            raise InvalidRecord("conditioning.guidance", f"must be finite, got {self.conditioning.guidance}")
        _check_files(self)
        _check_tensors(self)

    @property
    def num_bytes(self) -> int:
        """Bytes that a robot fetches for this policy, manifest excluded."""
        return sum(file.num_bytes for file in self.files)

    def to_json(self) -> bytes:
        """The stored form; `from_json` is its inverse."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> "PolicyManifest":
        """Read and check a manifest.

        Raises:
            InvalidRecord: too large, not JSON, an unknown schema, or a field is missing or wrong.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise InvalidRecord("manifest", f"has more than {MAX_MANIFEST_BYTES} bytes")
        try:
            found = msgspec.json.decode(data, type=_Schema).schema_version
            if found != SCHEMA_VERSION:
                raise InvalidRecord("schema_version", f"this program reads {SCHEMA_VERSION}, got {found}")
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRecord("manifest", str(error)) from error


class _Schema(msgspec.Struct):
    """The one field that every version of the manifest has."""

    schema_version: int


def max_header_bytes(tensors: Mapping[str, TensorEntry]) -> int:
    """How long the header of a safetensors file with these tensors can be: a header that describes a million
    others is refused before it is parsed. Escaping makes a character at most six."""
    return SPARE_HEADER_BYTES + sum(160 + 6 * len(name) + 21 * len(tensor.shape) for name, tensor in tensors.items())


def _check_files(manifest: PolicyManifest) -> None:
    if not 1 <= len(manifest.files) <= MAX_FILES:
        raise InvalidRecord("files", f"must have 1 to {MAX_FILES} entries, got {len(manifest.files)}")
    folder = f"{layout.policy_folder(manifest.version)}/"
    for index, file in enumerate(manifest.files):
        if not file.key.startswith(folder):
            raise InvalidRecord(f"files[{index}].key", f"must be inside {folder}, got {file.key!r}")
        if not 0 < file.num_bytes <= MAX_WEIGHTS_BYTES:
            raise InvalidRecord(
                f"files[{index}].num_bytes", f"must be in [1, {MAX_WEIGHTS_BYTES}], got {file.num_bytes}"
            )
        if not _HASH.fullmatch(file.hash):
            raise InvalidRecord(f"files[{index}].hash", f"must be 32 hexadecimal digits, got {file.hash[:80]!r}")
    if manifest.encoding == FULL and (len(manifest.files) != 1 or manifest.base is not None):
        raise InvalidRecord("files", f"encoding {FULL!r} is one file without a base, got {len(manifest.files)}")


def _check_tensors(manifest: PolicyManifest) -> None:
    if not 1 <= len(manifest.tensors) <= MAX_TENSORS:
        raise InvalidRecord("tensors", f"must have 1 to {MAX_TENSORS} entries, got {len(manifest.tensors)}")
    for name, tensor in manifest.tensors.items():
        field = f"tensors[{name[:80]!r}]"
        if not 1 <= len(name) <= MAX_NAME_LENGTH:
            raise InvalidRecord(field, f"a name has 1 to {MAX_NAME_LENGTH} characters, got {len(name)}")
        if tensor.dtype not in DTYPES:
            raise InvalidRecord(f"{field}.dtype", f"must be one of {sorted(DTYPES)}, got {tensor.dtype[:80]!r}")
        if len(tensor.shape) > MAX_DIMENSIONS or min(tensor.shape, default=0) < 0:
            raise InvalidRecord(f"{field}.shape", f"must be up to {MAX_DIMENSIONS} sizes of 0 or more")
        if not _HASH.fullmatch(tensor.hash):
            raise InvalidRecord(f"{field}.hash", f"must be 32 hexadecimal digits, got {tensor.hash[:80]!r}")
    total = sum(tensor.num_bytes for tensor in manifest.tensors.values())
    if total > MAX_WEIGHTS_BYTES:
        raise InvalidRecord("tensors", f"have {total} bytes, at most {MAX_WEIGHTS_BYTES} are accepted")
    if manifest.encoding == FULL and not total < manifest.num_bytes <= total + 8 + max_header_bytes(manifest.tensors):
        raise InvalidRecord("files[0].num_bytes", f"{manifest.num_bytes} does not fit tensors of {total} bytes")
