"""Who may vouch for what in a fleet: one small signed table, replaced as a whole, each version vouched for by the last.

    role        vouches for
    root        the next version of this table
    candidate   policies: the learner's key
    release     states of channels: what robots run, what is banned

`trust.json` of an identity is the envelope of such a table. A robot that believes version n believes version n + 1 when
a threshold of n's root keys signed it, and a threshold of its own (TUF's rule): stolen keys are dropped by a version
that does not name them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sop.core.channel import MAX_RECORD_BYTES
from sop.core.errors import InvalidRecord, RunError, Untrusted
from sop.trust.envelope import MAX_ENVELOPE_BYTES, claimed_payload, cosign, open_envelope
from sop.trust.keys import PublicKey, SigningKey

ROOT_TYPE = "application/vnd.sop.root+json"
"""Payload type of an envelope with a `TrustRoot`."""
ROOT = "root"
CANDIDATE = "candidate"
RELEASE = "release"
ROLES = (ROOT, CANDIDATE, RELEASE)
MAX_KEYS = 100
MAX_ROOT_VERSION = 10**8 - 1
"""A version has 8 digits in the store."""


@dataclass(frozen=True, slots=True)
class Role:
    """Which keys speak for a role, and how many of them it takes."""

    key_ids: tuple[str, ...]
    threshold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRoot:
    """The table. Checked on construction.

        root = TrustRoot(fleet="lab", version=1, expires_utc_ns=..., keys={key.key_id: key.public, ...},
                         roles={"root": Role((a, b), 2), "candidate": Role((c,), 1), "release": Role((d,), 1)})
        path.write_bytes(root.sealed([root_key_a, root_key_b]))
        root = TrustRoot.load(path)
        record = decode_record(root.vouched(envelope, STATEMENT_TYPE, CANDIDATE), PolicyStatement)

    Raises:
        InvalidRecord: names the field.
    """

    fleet: str
    version: int
    """1, 2, 3, ..."""
    expires_utc_ns: int
    """After this moment a robot keeps what it has and accepts nothing new."""
    keys: Mapping[str, PublicKey]
    """Key id -> key."""
    roles: Mapping[str, Role]
    """Every one of ROLES."""
    schema_version: int = 1

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise InvalidRecord("schema_version", f"this program reads 1, got {self.schema_version}")
        if not 1 <= self.version <= MAX_ROOT_VERSION or self.expires_utc_ns <= 0:
            raise InvalidRecord("version", f"version {self.version}, expiry {self.expires_utc_ns} make no sense")
        if len(self.keys) > MAX_KEYS or any(name != key.key_id for name, key in self.keys.items()):
            raise InvalidRecord("keys", f"must be up to {MAX_KEYS}, each under its own id")
        if set(self.roles) != set(ROLES):
            raise InvalidRecord("roles", f"must be {', '.join(ROLES)}")
        for name, role in self.roles.items():
            if len(set(role.key_ids)) < len(role.key_ids) or not set(role.key_ids) <= self.keys.keys():
                raise InvalidRecord(f"roles.{name}", "names a key twice, or one that is not in the table")
            if not 1 <= role.threshold <= len(role.key_ids):
                raise InvalidRecord(f"roles.{name}", f"{role.threshold} of {len(role.key_ids)} keys cannot be met")

    def to_json(self) -> bytes:
        """The payload that is signed."""
        return msgspec.json.encode(self)

    def sealed(self, keys: Sequence[SigningKey]) -> bytes:
        """The content of `trust.json`: an envelope signed by these keys; `cosign` adds those of other machines.

        Raises:
            ValueError: no keys.
        """
        if not keys:
            raise ValueError("a trust root is signed by one key at least")
        envelope = keys[0].sign(ROOT_TYPE, self.to_json())
        for key in keys[1:]:
            envelope = cosign(envelope, key)
        return envelope

    @classmethod
    def open(cls, envelope: bytes) -> "TrustRoot":
        """The table of an envelope that a threshold of its own root keys signed: consistent, believed by nobody yet.

        Raises:
            Untrusted: not such an envelope; says why.
        """
        claimed = _unchecked(envelope)
        claimed.vouched(envelope, ROOT_TYPE, ROOT)
        return claimed

    @classmethod
    def load(cls, path: Path) -> "TrustRoot":
        """Read `trust.json`: what an administrator put there is where trust begins.

        Raises:
            RunError: missing, or not such a file; says what to do.
        """
        try:
            with path.open("rb") as file:
                return cls.open(file.read(MAX_ENVELOPE_BYTES + 1))
        except (OSError, Untrusted) as error:
            raise RunError(f"{path} says nothing about whom to believe: {error}") from error

    def successor(self, envelope: bytes) -> "TrustRoot":
        """The next version.

        Raises:
            Untrusted: not version n + 1 of this fleet, or too few of this version's root keys, or of its own, signed.
        """
        found = TrustRoot.open(envelope)
        if (found.fleet, found.version) != (self.fleet, self.version + 1):
            raise Untrusted(
                f"trust root {found.version} of fleet {found.fleet[:80]!r} does not follow version {self.version} of "
                f"{self.fleet!r}: bring the versions between, in order"
            )
        self.vouched(envelope, ROOT_TYPE, ROOT)
        return found

    def vouched(self, envelope: bytes, payload_type: str, role: str) -> bytes:
        """The payload of an envelope that a threshold of a role's keys signed.

        Raises:
            Untrusted: as `open_envelope`, with the role.
        """
        needed = self.roles[role]
        try:
            return open_envelope(envelope, payload_type, [self.keys[name] for name in needed.key_ids], needed.threshold)
        except Untrusted as error:
            raise Untrusted(f"not vouched for by the role {role!r} of trust root {self.version}: {error}") from error


def _unchecked(envelope: bytes) -> TrustRoot:
    """What an envelope claims: it takes the table to know whose signatures it needs."""
    payload = claimed_payload(envelope)
    if len(payload) > MAX_RECORD_BYTES:
        raise Untrusted(f"the trust root has {len(payload)} bytes, at most {MAX_RECORD_BYTES} are read")
    try:
        return msgspec.json.decode(payload, type=TrustRoot)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidRecord) as error:
        raise Untrusted(f"not a trust root: {error}") from error
