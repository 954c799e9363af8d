"""Snapshots as the forms in which they are stored: one full file, or packed deltas with keyframes in between.

version    0   1   2   3   4   5   6   7   8        keyframe_every = 4
keyframe   *               *               *        stands alone
delta          *   *   *   *   *   *   *   *        from the version before
leap                       *               *        from the keyframe before: for robots that skip versions

Keyframe and leap are written after the version is announced: robots that keep up do not wait for what they do not
need, and the others find them through the next version's manifest.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import blake3

from sop.broadcast.codec import load_codec
from sop.broadcast.manifest import (
    BASE_VERSION,
    ENCODINGS,
    FULL,
    HISTORY_VERSIONS,
    PACKED,
    FileEntry,
    PolicyFacts,
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

Answer = TypeVar("Answer")
AUTO = "auto"
"""Let the store decide between the encodings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPolicy:
    """What is stored of one version, beside its manifest."""

    version: int
    table: "Future[Mapping[str, TensorEntry]]"
    """Becomes the complete table, tensors that are the base's included."""
    on_base: bool
    """Whether some of them are."""
    files: tuple[FileEntry, ...]
    forms: tuple[Encoded, ...]
    """The objects of `files`."""
    history: tuple[FileEntry, ...]
    """For the manifest: forms of older versions."""
    arrays: Weights
    """What the snapshot had."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The complete table. Blocks until every tensor is hashed."""
        return self.table.result()

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the tensors that travel with this version."""
        return tuple(name for name, entry in self.tensors.items() if entry.origin is None)


class PolicyEncoder:
    """Turns snapshots into forms, and remembers what the next delta builds on. Used from one thread at a time.

        encoded = encoder.encode(version, weights, alone=False)
        ...                                # put everything
        encoder.published(encoded)         # only now: what was not published is nothing to build on
        further = encoder.afterwards(encoded)
        ...                                # put these too
        encoder.added(encoded, files)

    Tensors of version 0 that a snapshot does not have are named as the base's, and so are, in packed form, those
    that it has with the base's bytes: they do not travel. With deltas, the arrays of the last published snapshot and
    of the last keyframe are kept.

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
        self._keyframe: EncodedPolicy | None = None
        self._chain: list[FileEntry] = []  # packed forms of published versions, each with its names

    def encode(self, version: int, weights: Weights, *, alone: bool) -> EncodedPolicy:
        """The forms of a snapshot; its arrays are kept, not copied. Blocks for packing; a full file is hashed beside
        whatever comes next, so that it can be written meanwhile.

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
        base = self._base_tensors(version)
        if self._encoding == FULL:
            full = encode_full(arrays)
            return EncodedPolicy(
                version=version,
                table=_in_a_thread(lambda: _complete(describe(arrays), base, same_is_base=False)),
                on_base=any(name not in arrays for name in base),
                files=(FileEntry(layout.policy_weights(version), full.num_bytes, full.hash),),
                forms=(full,),
                history=(),
                arrays=arrays,
            )
        tensors = _complete(describe(arrays, self._threads), base, same_is_base=True)
        own = {name: arrays[name] for name, entry in tensors.items() if entry.origin is None}
        packed = [self._delta(version, tensors, arrays, self._last)] if own else []
        if own and (alone or packed == [None]):
            packed.append(self._form(keyframe_key(version), own, None, None))
        files = [pair for pair in packed if pair is not None]
        follows = any(file.base is not None for file, _ in files)
        return EncodedPolicy(
            version=version,
            table=_done(tensors),
            on_base=len(own) < len(tensors),
            files=tuple(_short(file, own) for file, _ in files),
            forms=tuple(form for _, form in files),
            history=tuple(_short(file, own) for file in self._chain) if follows else (),
            arrays=arrays,
        )

    def afterwards(self, encoded: EncodedPolicy) -> list[tuple[FileEntry, Encoded]]:
        """Further forms of the version that was published last, when they are due: keyframe and leap. Blocks for
        packing. `added` makes them known once they are in the store."""
        own = {name: encoded.arrays[name] for name in encoded.own}
        if self._encoding != PACKED or not own or not self._keyframe_due():
            return []
        found = [self._form(keyframe_key(encoded.version), own, None, None)]
        before = self._keyframe
        if before is not None and all(file.base != before.version for file in encoded.files):
            leap = self._delta(encoded.version, encoded.tensors, encoded.arrays, before)
            found += [leap] if leap is not None else []
        return found

    def added(self, encoded: EncodedPolicy, files: Iterable[FileEntry]) -> None:
        """These further forms of the version are in the store: the next manifests name them."""
        self._chain += files
        self._keyframe = encoded

    def start_over(self) -> None:
        """A keyframe that was due is missing: the next version stands alone."""
        self._last = None

    def published(self, encoded: EncodedPolicy) -> None:
        """The version is in the store: the next one may build on it."""
        if encoded.version == BASE_VERSION:
            self._base = encoded.tensors
        if self._encoding != PACKED:
            return
        own = encoded.own
        files = [replace(file, names=own if file.names is None else file.names) for file in encoded.files]
        if not any(file.base is not None for file in files):
            self._chain.clear()
            self._keyframe = None
        if any(file.base is None for file in files):
            self._keyframe = encoded
        self._chain += files
        versions = sorted({file.version for file in self._chain})[-HISTORY_VERSIONS:]
        self._chain = [file for file in self._chain if file.version in versions]
        self._last = encoded if files else None

    def _base_tensors(self, version: int) -> Mapping[str, TensorEntry]:
        """The table of version 0; empty for version 0 itself, and when there is none."""
        if version == BASE_VERSION:
            return {}
        if self._base is None:
            try:
                self._base = self._fetch_base().tensors
            except NotFound:
                self._base = {}
        return self._base

    def _delta(
        self, version: int, tensors: Mapping[str, TensorEntry], arrays: Weights, old: EncodedPolicy | None
    ) -> tuple[FileEntry, Encoded] | None:
        """The difference from an older version: all that travels, and what went back to the base's.

        None when this version cannot build on it: other tensors, or an array is not at hand.
        """
        if old is None or old.tensors.keys() != tensors.keys():
            return None
        names = [n for n, entry in tensors.items() if entry.origin is None or entry.hash != old.tensors[n].hash]
        for name in names:
            mine, theirs = arrays.get(name), old.arrays.get(name)
            if mine is None or theirs is None or (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
                return None
        chosen = {name: arrays[name] for name in names}
        return self._form(delta_key(version, old.version), chosen, old.arrays, old.version)

    def _keyframe_due(self) -> bool:
        """Whether the last `keyframe_every` versions all lack one."""
        recent = sorted({file.version for file in self._chain})[-self._keyframe_every :]
        return not any(file.base is None and file.version in recent for file in self._chain)

    def _form(self, key: str, arrays: Weights, old: Weights | None, base: int | None) -> tuple[FileEntry, Encoded]:
        packed = load_codec().encode_packed(arrays, old, threads=self._threads)
        hasher = blake3.blake3()
        for part in packed.parts:
            hasher.update(part)
        form = Encoded([memoryview(part) for part in packed.parts], packed.num_bytes, hasher.hexdigest(length=16))
        return FileEntry(key, form.num_bytes, form.hash, PACKED, base, tuple(arrays)), form


def stored_manifest(
    encoded: EncodedPolicy,
    facts: PolicyFacts,
    tensors: Mapping[str, TensorEntry],
    lineage: FileEntry | None,
    *,
    parent_version: int | None,
    created_utc_ns: int,
) -> bytes:
    """The manifest of a version as JSON, read back: what a robot would refuse must not be published.

    Raises:
        InvalidRecord: a robot would refuse it; names the field.
    """
    manifest = PolicyManifest(
        **{field.name: getattr(facts, field.name) for field in fields(PolicyFacts)},
        version=encoded.version,
        parent_version=parent_version,
        created_utc_ns=created_utc_ns,
        files=encoded.files,
        tensors=tensors,
        history=encoded.history,
        lineage=lineage,
    )
    stored = manifest.to_json()
    PolicyManifest.from_json(stored)
    return stored


def _complete(
    entries: Mapping[str, TensorEntry], base: Mapping[str, TensorEntry], *, same_is_base: bool
) -> dict[str, TensorEntry]:
    """All tensors of the policy by name in order; those that are the base's say so.

    Args:
        entries: what the snapshot has.
        base: the table of version 0.
        same_is_base: also what the snapshot has, when its bytes are the base's.
    """
    table = dict(entries)
    for name, entry in base.items():
        if name not in table or (same_is_base and table[name].hash == entry.hash):
            table[name] = replace(entry, origin=BASE_VERSION)
    return dict(sorted(table.items()))


def _in_a_thread(work: Callable[[], Answer]) -> "Future[Answer]":
    pool = ThreadPoolExecutor(1, thread_name_prefix="policy-hash")
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def _done(value: Answer) -> "Future[Answer]":
    future: Future[Answer] = Future()
    future.set_result(value)
    return future


def _short(file: FileEntry, own: Weights) -> FileEntry:
    """As it stands in a manifest: names only where they are not those that travel with its version."""
    if file.names is not None and len(file.names) == len(own) and own.keys() == set(file.names):
        return replace(file, names=None)
    return file
