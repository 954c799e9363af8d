"""Snapshots as the forms in which they are stored: one full file, or packed deltas with keyframes in between.

version    0   1   2   3   4   5   6        keyframe_every = 4
keyframe   *               *                stands alone
delta          *   *   *   *   *   *        from the version before
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import blake3

from sop.broadcast.manifest import (
    BASE_VERSION,
    ENCODINGS,
    FULL,
    HISTORY_VERSIONS,
    PACKED,
    FileEntry,
    PolicyManifest,
    TensorEntry,
    delta_key,
    keyframe_key,
)
from sop.broadcast.weights import Encoded, describe, encode_full, travelling
from sop.core import layout
from sop.core.errors import NotFound
from sop.core.policy import Weights
from sop.transport.base import MapsObjects, ObjectStore

AUTO = "auto"
"""Let the store decide between the encodings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPolicy:
    """What is stored of one version, beside its manifest."""

    version: int
    tensors: Mapping[str, TensorEntry]
    """The complete table, those that are the base's included."""
    files: tuple[FileEntry, ...]
    forms: tuple[Encoded, ...]
    """The objects of `files`."""
    history: tuple[FileEntry, ...]
    """For the manifest: forms of older versions."""
    arrays: Weights
    """What the snapshot had."""


class PolicyEncoder:
    """Turns snapshots into forms, and remembers what the next delta builds on. Used from one thread at a time.

        encoded = encoder.encode(version, weights, alone=False)
        ...                                # put everything
        encoder.published(encoded)         # only now: what was not published is nothing to build on

    Tensors that equal those of version 0 do not travel, and neither do those of version 0 that a snapshot does
    not have: both are named as the base's. With deltas, the arrays of the last published snapshot are kept.

    Args:
        store: decides what "auto" means.
        encoding: "full", "packed", or "auto": full when the store maps its objects, packed when it does not.
        keyframe_every: every so many versions one that stands alone; with "packed" only.
        threads: processor threads that hash and encode.
        fetch_base: reads the manifest of version 0; called once, when it was not published here.

    Raises:
        ValueError: unknown encoding, or keyframe_every not in [1, HISTORY_VERSIONS].
    """

    def __init__(
        self,
        store: ObjectStore,
        encoding: str,
        keyframe_every: int,
        threads: int,
        fetch_base: Callable[[], PolicyManifest],
    ) -> None:
        if encoding not in (AUTO, *ENCODINGS):
            raise ValueError(f"encoding must be one of {[AUTO, *ENCODINGS]}, got {encoding!r}")
        if not 1 <= keyframe_every <= HISTORY_VERSIONS:
            raise ValueError(f"keyframe_every must be in [1, {HISTORY_VERSIONS}], got {keyframe_every}")
        self._encoding = encoding
        if encoding == AUTO:
            self._encoding = FULL if isinstance(store, MapsObjects) else PACKED
        self._keyframe_every = keyframe_every
        self._threads = threads
        self._fetch_base = fetch_base
        self._base: Mapping[str, TensorEntry] | None = None
        self._last: EncodedPolicy | None = None
        self._chain: list[FileEntry] = []  # packed forms of published versions, each with its names

    def encode(self, version: int, weights: Weights, *, alone: bool) -> EncodedPolicy:
        """The forms of a snapshot; its arrays are kept, not copied. Blocks for hashing and packing.

        Args:
            version: the number that it will have.
            weights: all tensors of the policy, or those that can differ from version 0.
            alone: one form stands alone whatever the cadence of keyframes says.

        Raises:
            ValueError: no tensors, or one that cannot travel.
            InvalidRecord: the manifest of version 0 is not valid.
            StoreUnavailable: version 0 cannot be read.
        """
        arrays = travelling(weights)
        tensors = self._table(version, arrays)
        own = {name: arrays[name] for name, entry in tensors.items() if entry.origin is None}
        files: list[FileEntry] = []
        forms: list[Encoded] = []
        if own and self._encoding == FULL:
            full = encode_full(own)
            files.append(FileEntry(layout.policy_weights(version), full.num_bytes, full.hash))
            forms.append(full)
        elif own:
            names = self._delta_names(tensors, arrays)
            if names is not None and self._last is not None:
                delta = self._pack({name: arrays[name] for name in names}, self._last.arrays)
                key = delta_key(version, self._last.version)
                files.append(FileEntry(key, delta.num_bytes, delta.hash, PACKED, self._last.version, names))
                forms.append(delta)
            if alone or names is None or self._keyframe_due():
                keyframe, key = self._pack(own, None), keyframe_key(version)
                files.append(FileEntry(key, keyframe.num_bytes, keyframe.hash, PACKED, None, tuple(own)))
                forms.append(keyframe)
        follows = any(file.base is not None for file in files)
        return EncodedPolicy(
            version=version,
            tensors=tensors,
            files=tuple(_short(file, own) for file in files),
            forms=tuple(forms),
            history=tuple(_short(file, own) for file in self._chain) if follows else (),
            arrays=arrays,
        )

    def published(self, encoded: EncodedPolicy) -> None:
        """The version is in the store: the next one may build on it."""
        if encoded.version == BASE_VERSION:
            self._base = encoded.tensors
        if self._encoding != PACKED:
            return
        own = tuple(name for name, entry in encoded.tensors.items() if entry.origin is None)
        files = [replace(file, names=own if file.names is None else file.names) for file in encoded.files]
        if not any(file.base is not None for file in files):
            self._chain.clear()
        self._chain += files
        versions = sorted({file.version for file in self._chain})[-HISTORY_VERSIONS:]
        self._chain = [file for file in self._chain if file.version in versions]
        self._last = encoded if files else None

    def _table(self, version: int, arrays: Weights) -> dict[str, TensorEntry]:
        """All tensors of the policy by name in order; those that are the base's say so."""
        entries = describe(arrays, self._threads)
        if version == BASE_VERSION:
            return entries
        if self._base is None:
            try:
                self._base = self._fetch_base().tensors
            except NotFound:
                self._base = {}
        for name, entry in self._base.items():
            if name not in entries or entries[name].hash == entry.hash:
                entries[name] = replace(entry, origin=BASE_VERSION)
        return dict(sorted(entries.items()))

    def _delta_names(self, tensors: Mapping[str, TensorEntry], arrays: Weights) -> tuple[str, ...] | None:
        """What a delta from the last published version holds: all that travels, and what went back to the base's.

        None when this version cannot build on it: other tensors, or an array is not at hand.
        """
        last = self._last
        if last is None or last.tensors.keys() != tensors.keys():
            return None
        names = [n for n, entry in tensors.items() if entry.origin is None or entry.hash != last.tensors[n].hash]
        for name in names:
            new, old = arrays.get(name), last.arrays.get(name)
            if new is None or old is None or (new.dtype, new.shape) != (old.dtype, old.shape):
                return None
        return tuple(names)

    def _keyframe_due(self) -> bool:
        """Whether the last `keyframe_every` - 1 versions all lack one."""
        newest = sorted({file.version for file in self._chain})[1 - self._keyframe_every :]
        recent = [] if self._keyframe_every == 1 else newest
        return not any(file.base is None and file.version in recent for file in self._chain)

    def _pack(self, arrays: Weights, old: Weights | None) -> Encoded:
        from sop.broadcast.delta import encode_packed  # compiles its kernels when they are needed

        packed = encode_packed(arrays, old, threads=self._threads)
        hasher = blake3.blake3()
        for part in packed.parts:
            hasher.update(part)
        return Encoded([memoryview(part) for part in packed.parts], packed.num_bytes, hasher.hexdigest(length=16))


def _short(file: FileEntry, own: Weights) -> FileEntry:
    """As it stands in a manifest: names only where they are not those that travel with its version."""
    if file.names is not None and len(file.names) == len(own) and own.keys() == set(file.names):
        return replace(file, names=None)
    return file
