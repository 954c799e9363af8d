"""The fleet's keys that sign, and the table that says whose signatures count: every version of `trust.json`.

    keys/root.pem          signs the table; belongs offline
    trust/00000001.json    every version, signed; the highest number is what holds

A role that nobody holds is the root key's, which could give it to itself anyway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sop.core import layout
from sop.core.errors import AlreadyExists, RunError
from sop.fleet.files import PUBLIC, make_private, read_file, write_file
from sop.transport import ObjectStore
from sop.trust import CANDIDATE, MAX_ENVELOPE_BYTES, RELEASE, ROOT, PublicKey, Role, SigningKey, TrustRoot

ROOT_KEY = "keys/root.pem"
ROOTS = "trust"
STORED = "root"
"""Folder beside the channels of the store in which robots look for the version after the one they believe."""
SIGNS = {"learner": CANDIDATE, "release": RELEASE}
"""Role of a member -> role of its key in the table."""


class Roots:
    """The trust roots in a fleet's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, fleet: str, expires_utc_ns: int) -> None:
        """Make the root key and version 1.

        Raises:
            RunError: there is one, or it cannot be written.
        """
        for name in ("keys", ROOTS):
            make_private(self._folder / name)
        key = SigningKey.generate()
        key.save(self._folder / ROOT_KEY)
        own = Role((key.key_id,), 1)
        roles = dict.fromkeys((ROOT, CANDIDATE, RELEASE), own)
        keys = {key.key_id: key.public}
        self._write(TrustRoot(fleet=fleet, version=1, expires_utc_ns=expires_utc_ns, keys=keys, roles=roles))

    def versions(self) -> list[int]:
        """Versions that were made, ascending."""
        return sorted(int(path.stem) for path in (self._folder / ROOTS).glob("*.json") if path.stem.isdecimal())

    def envelope(self, version: int) -> bytes:
        """`trust.json` of a version."""
        return read_file(self._path(version))

    def newest(self) -> TrustRoot:
        """The table that holds.

        Raises:
            RunError: there is none, or it is damaged.
        """
        versions = self.versions()
        if not versions:
            raise RunError(f"{self._folder / ROOTS} is empty: take the fleet's folder from a backup")
        return TrustRoot.load(self._path(versions[-1]))

    def sync(self, keys: Mapping[str, Sequence[PublicKey]], expires_utc_ns: int, *, prolong: bool = False) -> int:
        """Make the table say what it should; returns the version that holds then. Idempotent.

        Args:
            keys: role of the table -> keys that count in it; none: the root key's.
            expires_utc_ns: when a new version ends.
            prolong: make a new version even if only its end is new.

        Raises:
            RunError: the root key is not here, or the table is damaged.
        """
        root = self.newest()
        own = root.roles[ROOT]
        roles, table = {ROOT: own}, {name: root.keys[name] for name in own.key_ids}
        for role in (CANDIDATE, RELEASE):
            ids = tuple(sorted(key.key_id for key in keys.get(role, ())))
            roles[role] = Role(ids or own.key_ids, own.threshold if not ids else 1)
            table.update({key.key_id: key for key in keys.get(role, ())})
        if not prolong and roles == root.roles:
            return root.version
        self._write(replace(root, version=root.version + 1, expires_utc_ns=expires_utc_ns, keys=table, roles=roles))
        return root.version + 1

    def _write(self, root: TrustRoot) -> None:
        key = SigningKey.load(self._folder / ROOT_KEY)
        write_file(self._path(root.version), root.sealed([key]), PUBLIC)

    def _path(self, version: int) -> Path:
        return self._folder / ROOTS / f"{version:08d}.json"


def trust_key(version: int) -> str:
    """Key of a version of `trust.json`: create-only, and it proves itself, so that it does not matter who put it."""
    return layout.channel_state(STORED, version)


def put_once(store: ObjectStore, key: str, data: bytes) -> None:
    """Put an object that nobody else may have made differently. Blocks; idempotent.

    Raises:
        RunError: another object has the key: somebody else makes trust roots.
        StoreError: the store does not do it.
    """
    try:
        store.put(key, data)
    except AlreadyExists:
        if store.get(key, slice(0, MAX_ENVELOPE_BYTES + 1)) != data:
            raise RunError(f"{key} in the store is another one than ours: find out who put it there") from None
