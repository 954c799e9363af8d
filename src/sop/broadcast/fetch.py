"""Reading published policies from the store: by listing, one manifest, its tensors."""

import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from sop.broadcast.codec import load_codec
from sop.broadcast.manifest import BASE_VERSION, FULL, MAX_MANIFEST_BYTES, FileEntry, PolicyManifest, TensorEntry
from sop.broadcast.plan import cheapest_way
from sop.broadcast.weights import check_encoding, check_size, open_full, verify
from sop.core import layout
from sop.core.codec import content_hash
from sop.core.errors import InvalidRecord, NotFound, PolicyRefused, RunError
from sop.core.policy import Weights
from sop.transport.base import MapsObjects, ObjectStore

_log = logging.getLogger(__name__)

_MANIFEST_KEY = re.compile(rf"{layout.POLICIES}/(\d{{8}})/manifest\.json")
THREADS = 2
"""Processor threads that decode and hash."""


def published_versions(store: ObjectStore, after: int | None = None) -> Iterator[int]:
    """Versions that have a manifest, ascending, above `after`. Lists the store: blocks.

    Raises:
        StoreUnavailable: no answer, also in the middle of the iteration.
    """
    start = None if after is None else layout.policy_manifest(after)
    for key in store.keys(f"{layout.POLICIES}/", start):
        if match := _MANIFEST_KEY.fullmatch(key):
            yield int(match[1])


def parent_at(
    store: ObjectStore, versions: Sequence[int], learner_step: int, then: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """The policy that a training goes on from after a restart, and its learner step (0 for the base). Blocks: reads
    manifests, newest first; damaged ones are passed over.

    Args:
        store: of the run.
        versions: published ones, ascending; the first is the base, which every training descends from.
        learner_step: of the checkpoint; no younger policy is its parent.
        then: when the checkpoint was made, the policy that the training had gone on from, and the newest of all.
            Only a snapshot that was waiting then can be a later parent; all others belong to branches that ended.
            None when it is not known.

    Returns:
        (version, learner step); None when there is no policy.
    """
    for version in reversed(versions):
        if version == versions[0]:
            return version, 0
        try:
            manifest = fetch_manifest(store, version)
        except (InvalidRecord, NotFound) as error:
            _log.warning("policy %d is passed over as a parent: %s", version, error)
            continue
        follows = then is None or version == then[0] or (version > then[1] and manifest.parent_version == then[0])
        if manifest.learner_step <= learner_step and follows:
            return version, manifest.learner_step
    return None


def fetch_manifest(store: ObjectStore, version: int) -> PolicyManifest:
    """The manifest of a published policy, checked. Blocks.

    Raises:
        NotFound: the version is not published (yet).
        InvalidRecord: the manifest is not valid, or is that of another version.
        StoreUnavailable: no answer; the same call may work later.
    """
    return read_manifest(manifest_bytes(store, version), version)


def manifest_bytes(store: ObjectStore, version: int) -> bytes:
    """The manifest of a published policy as it is stored: what a signature vouches for. Blocks.

    Raises:
        NotFound, StoreUnavailable: as `fetch_manifest`.
    """
    return store.get(layout.policy_manifest(version), slice(0, MAX_MANIFEST_BYTES + 1))


def read_manifest(data: bytes, version: int) -> PolicyManifest:
    """The manifest that these bytes are.

    Raises:
        InvalidRecord: as `fetch_manifest`.
    """
    manifest = PolicyManifest.from_json(data)
    if manifest.version != version:
        raise InvalidRecord("version", f"the manifest of policy {version} says it is policy {manifest.version}")
    return manifest


def fetch_weights(store: ObjectStore, manifest: PolicyManifest) -> Weights:
    """The tensors of a published policy as read-only arrays, every byte verified. Blocks for the transfer.

    Raises:
        NotFound, PolicyRefused, StoreUnavailable: as `PolicyReader.read`.
    """
    return PolicyReader(store).read(manifest).weights


def fetch_policy(store: ObjectStore, version: int) -> tuple[PolicyManifest, Weights]:
    """A published policy by its number, for evaluation and for a learner that starts from it. Blocks.

    Raises:
        NotFound, InvalidRecord, PolicyRefused, StoreUnavailable: as `fetch_manifest` and `fetch_weights`.
    """
    manifest = fetch_manifest(store, version)
    return manifest, fetch_weights(store, manifest)


@dataclass(slots=True)
class ReadCost:
    """What reading a policy took."""

    num_bytes: int = 0
    """Of the objects that were fetched or mapped, those that turned out to be broken included."""
    fetch_s: float = 0.0
    """Waiting for the store."""
    decode_s: float = 0.0
    """Making tensors of the objects' bytes."""
    verify_s: float = 0.0
    """Hashing; with mapped objects, also reading them from the disk."""

    def add(self, other: "ReadCost") -> None:
        """Count what something else took as well."""
        self.num_bytes += other.num_bytes
        self.fetch_s += other.fetch_s
        self.decode_s += other.decode_s
        self.verify_s += other.verify_s


@dataclass(frozen=True, slots=True)
class ReadPolicy:
    """A policy whose every tensor has the hash that its manifest says."""

    manifest: PolicyManifest
    weights: Weights
    """Read-only arrays."""
    cost: ReadCost


class _BrokenForm(Exception):
    """A form is missing or refused; there may be another way."""

    def __init__(self, key: str, reason: NotFound | PolicyRefused, *, bytes_are_right: bool = False) -> None:
        self.key = key
        self.reason = reason
        self.bytes_are_right = bytes_are_right


class _Undecodable(PolicyRefused):
    """The bytes are those of the manifest, and yet they do not decode."""


class PolicyReader:
    """Reads one version after the other, each by the cheapest way from the one that it read last.

        reader = PolicyReader(store)
        while True:
            policy = reader.read(fetch_manifest(store, newest))

    It holds the tensors of the version that it read last: deltas build on them, and tensors that are still the
    base policy's are taken over. While it reads, both copies exist. When a form is missing or broken, the next
    best way is tried, down to those that start from nothing. Not thread-safe.

    Args:
        store: where policies are; its objects are mapped instead of copied when it can do that (`MapsObjects`).
        threads: processor threads that decode and hash.
        timer: seconds, for `ReadCost`.
    """

    def __init__(
        self, store: ObjectStore, *, threads: int = THREADS, timer: Callable[[], float] = time.perf_counter
    ) -> None:
        self._store = store
        self._mapped = isinstance(store, MapsObjects)
        self._threads = threads
        self._timer = timer
        self._held: ReadPolicy | None = None
        if not self._mapped:
            load_codec()  # compiles its kernels now, not while a robot acts

    def hold(self, read: ReadPolicy) -> None:
        """Build on these tensors, read from elsewhere and verified, as if they had been read here."""
        self._held = read

    def read(self, manifest: PolicyManifest) -> ReadPolicy:
        """The tensors of a version. Blocks for the transfer.

        Raises:
            NotFound: the tensors, or those of the base, were deleted by retention or are not there yet.
            PolicyRefused: encodings unknown, no way leads there, or what was found is not what the manifest says.
            StoreUnavailable: no answer; the same call may work later.
        """
        check_encoding(manifest)
        cost = ReadCost()
        frozen = self._frozen(manifest, cost)
        own = self._own(manifest, frozen, cost) if manifest.own else {}
        weights = {name: own[name] if name in own else frozen[name] for name in manifest.tensors}
        self._held = ReadPolicy(manifest, weights, cost)
        return self._held

    def _own(self, manifest: PolicyManifest, frozen: Weights, cost: ReadCost) -> Weights:
        """The tensors that travel, by the cheapest way that works."""
        held = None if self._held is None else self._held.manifest.version
        without: set[str] = set()
        problems: list[NotFound | PolicyRefused] = []
        while way := cheapest_way(manifest, held, self._cost_of, without):
            try:
                return self._follow(way, manifest, frozen, cost)
            except _BrokenForm as broken:
                problems.append(broken.reason)
                if broken.bytes_are_right and way[0].base is not None:
                    held = None  # what it was built on is to blame: once more, from nothing
                else:
                    without.add(broken.key)
        refused = [problem for problem in problems if isinstance(problem, PolicyRefused)]
        raise next(
            iter(refused or problems),
            PolicyRefused(f"policy {manifest.version}: none of its forms can be read without a version that it lacks"),
        )

    def _cost_of(self, file: FileEntry) -> int:
        return 0 if self._mapped and file.encoding == FULL else file.num_bytes

    def _follow(self, way: tuple[FileEntry, ...], manifest: PolicyManifest, frozen: Weights, cost: ReadCost) -> Weights:
        """Decode one form after the other; only what comes out at the end is compared with the manifest."""
        tables: dict[str, npt.NDArray[Any]] = {}
        if way[0].base is not None and self._held is not None:
            tables.update(self._held.weights)
        own = manifest.own
        for file in way:
            names = own.keys() if file.names is None else file.names
            expected = {name: manifest.tensors[name] for name in names}
            try:
                if file.base is not None:
                    lacking = [name for name in expected if name not in tables]
                    tables |= self._from_base(lacking, manifest, cost)
                tables |= self._decode(file, expected, tables, f"policy {manifest.version}", cost)
            except (NotFound, PolicyRefused) as error:
                raise _BrokenForm(file.key, error, bytes_are_right=isinstance(error, _Undecodable)) from error
            if file.base is None:
                tables = {**frozen, **tables}
        started = self._timer()
        try:
            verify(tables, own, f"policy {manifest.version}", self._threads)
        except PolicyRefused as error:
            raise _BrokenForm(way[-1].key, error, bytes_are_right=True) from error
        finally:
            cost.verify_s += self._timer() - started
        return {name: tables[name] for name in own}

    def _decode(
        self, file: FileEntry, expected: Mapping[str, TensorEntry], old: Weights, policy: str, cost: ReadCost
    ) -> dict[str, npt.NDArray[Any]]:
        """The tensors of one form, not yet compared with their hashes."""
        started = self._timer()
        data = self._bytes(file)
        fetched = self._timer()
        cost.fetch_s += fetched - started
        cost.num_bytes += len(data)
        try:
            if file.encoding == FULL:
                return open_full(data, file, expected, policy)
            check_size(data, file, policy)
            if content_hash(data) != file.hash:
                raise PolicyRefused(f"{policy}: {file.key} is altered: its hash is not {file.hash}")
            base = None if file.base is None else old
            try:
                found: dict[str, npt.NDArray[Any]] = load_codec().decode_packed(
                    data, base, expected, policy, threads=self._threads
                )
            except RunError as error:
                raise PolicyRefused(f"{policy}: {error}") from error
            except PolicyRefused as error:
                raise _Undecodable(str(error)) from error
        finally:
            cost.decode_s += self._timer() - fetched
        for array in found.values():
            array.flags.writeable = False
        return found

    def _bytes(self, file: FileEntry) -> memoryview:
        """Never more than one byte more than the manifest says."""
        if isinstance(self._store, MapsObjects):
            return self._store.map(file.key)
        return memoryview(self._store.get(file.key, slice(0, file.num_bytes + 1)))

    def _frozen(self, manifest: PolicyManifest, cost: ReadCost) -> dict[str, npt.NDArray[Any]]:
        """The tensors that are the base's: those at hand, the rest from version 0."""
        held = {} if self._held is None else self._held.manifest.tensors
        frozen: dict[str, npt.NDArray[Any]] = {}
        lacking = []
        for name, entry in manifest.tensors.items():
            if entry.origin is None:
                continue
            if self._held is not None and name in held and held[name].hash == entry.hash:
                frozen[name] = self._held.weights[name]
            else:
                lacking.append(name)
        return frozen | self._from_base(lacking, manifest, cost)

    def _from_base(
        self, names: Collection[str], manifest: PolicyManifest, cost: ReadCost
    ) -> dict[str, npt.NDArray[Any]]:
        """Tensors of version 0. Those that the manifest calls the base's must be that, bit for bit."""
        if not names:
            return {}
        policy = f"policy {manifest.version}"
        try:
            base = fetch_manifest(self._store, BASE_VERSION)
        except InvalidRecord as error:
            raise PolicyRefused(f"{policy}: the manifest of its base, policy 0, is not valid: {error}") from error
        for name in names:
            entry, found = manifest.tensors[name], base.tensors.get(name)
            if found is None or (entry.origin is not None and found.hash != entry.hash):
                raise PolicyRefused(
                    f"{policy}: tensor {name!r} is not that of the base, policy 0, as the manifest says"
                )
        read = PolicyReader(self._store, threads=self._threads, timer=self._timer).read(base)
        cost.add(read.cost)
        return {name: read.weights[name] for name in names}
