"""The manifest of a published policy: what it is, what it came from, and the hash of every tensor of it.

A version is defined by its complete table of tensors. What of it travels may be stored in several forms:

    full       weights.safetensors    one safetensors file: read where it lies
    keyframe   keyframe.packed        each tensor encoded by the method that measured smallest
    delta      delta-<base>.packed    the same, of the difference from an older version

Tensors whose bytes are those of the base policy, version 0, do not travel again: their entry says `origin` 0.
The forms of the versions before are listed too (`history`), so that one manifest is enough to plan the cheapest
way from what a robot holds to this version. Only the hashes of the tensors decide whether it has arrived.

Written last, so a policy without a manifest does not exist. A manifest from the store is not trusted: its
size, its numbers and the keys that it points to are bounded before anything is allocated for them.
"""

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from sop.core import layout
from sop.core.errors import InvalidRecord
from sop.core.lineage import MAX_LINEAGE_BYTES
from sop.core.policy import Conditioning, PolicySpec

SCHEMA_VERSION = 2
"""Raised when the meaning of a field changes; a reader refuses versions that it does not know."""
MAX_MANIFEST_BYTES = 16 << 20
"""Room for MAX_TENSORS entries with long names; what is larger is refused unread."""
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 32
MAX_FILES = 16
"""Forms of one version."""
HISTORY_VERSIONS = 8
"""Versions whose forms the publisher lists: a robot further behind starts from the newest keyframe."""
MAX_HISTORY = 256
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
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
"""Element types that travel: safetensors name -> numpy type, little-endian."""
FULL = "full"
"""Encoding: one safetensors file."""
PACKED = "packed"
"""Encoding: a container of `sop.broadcast.delta`."""
LINEAGE = "lineage"
"""Encoding of what the policy learned from, `sop.core.lineage`."""
ENCODINGS = (FULL, PACKED)
"""Encodings of tensors that this program reads; forms in others are left alone."""
BASE_VERSION = 0
"""The base policy of a run."""

_HASH = re.compile(r"[0-9a-f]{32}")
_KEY = re.compile(rf"{layout.POLICIES}/(\d{{8}})/[A-Za-z0-9_-][A-Za-z0-9._-]{{0,199}}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as it is after decoding."""

    dtype: str
    """A key of DTYPES."""
    shape: tuple[int, ...]
    hash: str
    """`tensor_hash` of dtype, shape and bytes."""
    origin: int | None = None
    """None: in this version's own files. 0: the bytes are those of version 0, which has them."""

    @property
    def num_bytes(self) -> int:
        """Size of the decoded tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One object in the store: a form of a version, or its lineage."""

    key: str
    """Key in the store, inside of the folder of its version."""
    num_bytes: int
    hash: str
    """`content_hash` of the object; of a `full` form only up to its first tensor: these have hashes of their own."""
    encoding: str = FULL
    """How it becomes tensors, see ENCODINGS."""
    base: int | None = None
    """The version that a delta builds on; None for what stands alone."""
    names: tuple[str, ...] | None = None
    """The tensors in it; None when they are exactly those that travel with the version of the manifest."""

    @property
    def version(self) -> int:
        """The version that it is a form of."""
        return layout.version_of(self.key)


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
    """The version that the training went on from, None for the first or when it is not known."""
    created_utc_ns: int
    """When the learner handed the snapshot over."""
    files: tuple[FileEntry, ...]
    """The forms of this version, any one of which is enough; none when every tensor is the base's."""
    tensors: Mapping[str, TensorEntry]
    """Tensor name -> what it has to be: the complete list."""
    history: tuple[FileEntry, ...] = ()
    """Forms of versions before this one on which its deltas build, in order of versions."""
    lineage: FileEntry | None = None
    """What the policy learned from since its parent; None when it was not recorded."""
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
        _check_tensors(self)
        _check_files(self)

    @property
    def own(self) -> Mapping[str, TensorEntry]:
        """The tensors that travel with this version."""
        return {name: entry for name, entry in self.tensors.items() if entry.origin is None}

    @property
    def num_bytes(self) -> int:
        """Size of the decoded policy."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

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


def keyframe_key(version: int) -> str:
    """Key of a packed form that stands alone."""
    return f"{layout.policy_folder(version)}/keyframe.packed"


def delta_key(version: int, base: int) -> str:
    """Key of a packed form that builds on version `base`."""
    return f"{layout.policy_folder(version)}/delta-{base:08d}.packed"


def _check_files(manifest: PolicyManifest) -> None:
    own = manifest.own
    if len(manifest.files) > MAX_FILES or bool(own) != bool(manifest.files):
        bounds = f"1 to {MAX_FILES} entries" if own else "no entry, all tensors are the base's"
        raise InvalidRecord("files", f"must have {bounds}, got {len(manifest.files)}")
    if len(manifest.history) > MAX_HISTORY:
        raise InvalidRecord("history", f"must have up to {MAX_HISTORY} entries, got {len(manifest.history)}")
    everything, names = _largest(manifest.tensors), manifest.tensors.keys()
    for index, file in enumerate(manifest.files):
        _check_file(f"files[{index}]", file, manifest.version, everything, names)
        total = sum(tensor.num_bytes for tensor in own.values())
        if file.encoding == FULL and file.names is None and not total < file.num_bytes <= _largest(own):
            raise InvalidRecord(f"files[{index}].num_bytes", f"{file.num_bytes} does not fit tensors of {total} bytes")
    for index, file in enumerate(manifest.history):
        match = _KEY.fullmatch(file.key)
        if match is None or int(match[1]) >= manifest.version:
            before = f"a policy before {manifest.version}"
            raise InvalidRecord(
                f"history[{index}].key", f"must be inside the folder of {before}, got {file.key[:80]!r}"
            )
        _check_file(f"history[{index}]", file, int(match[1]), everything, names)
    keys = [file.key for file in (*manifest.files, *manifest.history)]
    if len(set(keys)) != len(keys):
        raise InvalidRecord("files", "two entries have the same key")
    if manifest.lineage is not None:
        _check_file("lineage", manifest.lineage, manifest.version, MAX_LINEAGE_BYTES, frozenset())
        if manifest.lineage.encoding != LINEAGE:
            raise InvalidRecord("lineage.encoding", f"must be {LINEAGE!r}, got {manifest.lineage.encoding[:80]!r}")


def _check_file(field: str, file: FileEntry, version: int, max_bytes: int, names: Container[str]) -> None:
    folder = f"{layout.policy_folder(version)}/"
    if not (file.key.startswith(folder) and _KEY.fullmatch(file.key)):
        raise InvalidRecord(f"{field}.key", f"must be inside {folder}, got {file.key[:80]!r}")
    if not 0 < file.num_bytes <= max_bytes:
        raise InvalidRecord(f"{field}.num_bytes", f"must be in [1, {max_bytes}], got {file.num_bytes}")
    if not _HASH.fullmatch(file.hash):
        raise InvalidRecord(f"{field}.hash", f"must be 32 hexadecimal digits, got {file.hash[:80]!r}")
    if file.names is not None and not (file.names and all(name in names for name in file.names)):
        raise InvalidRecord(f"{field}.names", "must be one or more of the manifest's tensors")
    if file.base is not None and not 0 <= file.base < version:
        raise InvalidRecord(f"{field}.base", f"must be before version {version}, got {file.base}")
    if file.base is not None and file.encoding in (FULL, LINEAGE):
        raise InvalidRecord(f"{field}.base", f"encoding {file.encoding!r} stands alone, got base {file.base}")


def _largest(tensors: Mapping[str, TensorEntry]) -> int:
    """Upper bound of a form of these tensors: what cannot be made smaller is stored as it is."""
    return 8 + max_header_bytes(tensors) + sum(tensor.num_bytes for tensor in tensors.values())


def _check_tensors(manifest: PolicyManifest) -> None:
    if not 1 <= len(manifest.tensors) <= MAX_TENSORS:
        raise InvalidRecord("tensors", f"must have 1 to {MAX_TENSORS} entries, got {len(manifest.tensors)}")
    for name, tensor in manifest.tensors.items():
        field = f"tensors[{name[:80]!r}]"
        if not 1 <= len(name) <= MAX_NAME_LENGTH:
            raise InvalidRecord(field, f"a name has 1 to {MAX_NAME_LENGTH} characters, got {len(name)}")
        if tensor.dtype not in DTYPES:
            raise InvalidRecord(f"{field}.dtype", f"must be one of {sorted(DTYPES)}, got {tensor.dtype[:80]!r}")
        possible = math.prod(max(1, size) for size in tensor.shape[:MAX_DIMENSIONS]) < 1 << 59  # what numpy can address
        if len(tensor.shape) > MAX_DIMENSIONS or min(tensor.shape, default=0) < 0 or not possible:
            raise InvalidRecord(f"{field}.shape", f"must be up to {MAX_DIMENSIONS} sizes of 0 or more, not astronomic")
        if not _HASH.fullmatch(tensor.hash):
            raise InvalidRecord(f"{field}.hash", f"must be 32 hexadecimal digits, got {tensor.hash[:80]!r}")
        if tensor.origin is not None and not tensor.origin == BASE_VERSION < manifest.version:
            raise InvalidRecord(f"{field}.origin", f"must be none or the base, version 0, got {tensor.origin}")
    total = sum(tensor.num_bytes for tensor in manifest.tensors.values())
    if total > MAX_WEIGHTS_BYTES:
        raise InvalidRecord("tensors", f"have {total} bytes, at most {MAX_WEIGHTS_BYTES} are accepted")
