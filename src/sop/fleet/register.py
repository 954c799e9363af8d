"""`fleet.json`: who belongs to the fleet, and who does no more. Holds no secret; may be shown and kept anywhere.

A name is enrolled once. Revoked, it may be enrolled again with new keys; what it was before stays in `former`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from sop.core.errors import RunError
from sop.fleet.files import PUBLIC, read_file, write_file
from sop.transport.identity import ROLES
from sop.trust import PublicKey

FILE = "fleet.json"
SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
"""One folder of the store, one token of the bus, one common name of a certificate."""
RESERVED = ("anyone", "servers", "trust")
"""The bus's word for nobody in particular, and what `sop fleet renew` renews besides members."""
MAX_DAYS = 3650


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """From when on, and why, a member is none any more."""

    utc_ns: int
    why: str
    from_sequence: int | None = None
    """Its episodes from this sequence number on are not to be believed; None when nobody said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One identity: public halves only."""

    name: str
    role: str
    """One of `sop.transport.identity.ROLES`."""
    serial: str
    """Of its newest certificate, hexadecimal."""
    enrolled_utc_ns: int
    expires_utc_ns: int
    """Of its newest certificate."""
    bus_key: str
    """Public nkey."""
    access_key: str = ""
    """Public half of the store's credentials; empty when it brings its own."""
    signing_key: PublicKey | None = None
    """Of the key with which it signs; None when it signs nothing."""
    revoked: Revocation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """`fleet.json`."""

    fleet: str
    store: str
    """URL."""
    bus: str
    """URL."""
    store_admin: str
    """One of `sop.fleet.STORE_ADMINS`."""
    listen: str = "127.0.0.1"
    """Address on which the bus listens."""
    servers: str
    """Folder of the servers' machine in which their configurations lie."""
    days: int
    """For which a certificate holds."""
    trust_stored: int = 0
    """Newest version of `trust.json` that the store has."""
    version: int = 0
    """Grows by one with every change."""
    members: Mapping[str, Member] = field(default_factory=dict)
    """By name."""
    former: tuple[Member, ...] = ()
    """Revoked members whose names were enrolled again."""
    schema_version: int = SCHEMA_VERSION

    def member(self, name: str) -> Member:
        """Raises:
        RunError: nobody has this name.
        """
        if name not in self.members:
            known = ", ".join(sorted(self.members)) or "nobody"
            raise RunError(f"nobody in fleet {self.fleet} is called {name!r}; there are: {known}")
        return self.members[name]

    def require_free(self, name: str, *, again: bool) -> None:
        """Make sure that a name can be enrolled.

        Args:
            name: of the member.
            again: it was revoked and may come back.

        Raises:
            RunError: it is taken, or was revoked.
        """
        old = self.members.get(name)
        if old is not None and old.revoked is None:
            raise RunError(
                f"{name} is enrolled as {old.role}: take another name, `renew` its certificate, or revoke it"
            )
        if old is not None and old.revoked is not None and not again:
            raise RunError(f"{name} was revoked ({old.revoked.why}): --again enrolls it again, with new keys")

    def active(self) -> list[Member]:
        """Members that are not revoked, by name."""
        return [self.members[name] for name in sorted(self.members) if self.members[name].revoked is None]

    def with_member(self, member: Member) -> "Register":
        """The register with this member in the place of the one of its name; a revoked one stays in `former`."""
        old = self.members.get(member.name)
        former = self.former
        if old is not None and old.revoked is not None and member.revoked is None:
            former = (*former, old)
        return replace(self, members={**self.members, member.name: member}, former=former)


def load_register(folder: Path) -> Register:
    """Read the register of a fleet's folder.

    Raises:
        RunError: missing, damaged, or written by a newer version of `sop`.
    """
    path = folder / FILE
    if not path.exists():
        raise RunError(f"{folder} is not the folder of a fleet (it has no {FILE}): make one with `sop fleet init`")
    data = read_file(path)
    try:
        found = msgspec.json.decode(data, type=_Version).schema_version
        if found != SCHEMA_VERSION:
            raise RunError(f"{path} has format {found}, this version of sop knows {SCHEMA_VERSION}: take a newer sop")
        return msgspec.json.decode(data, type=Register)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}; take it from a backup") from error


def save_register(folder: Path, register: Register) -> Register:
    """Replace the register by one that is newer by one version; returns that one. Atomic and durable."""
    newer = replace(register, version=register.version + 1)
    write_file(folder / FILE, to_json(newer), PUBLIC)
    return newer


def to_json(register: Register) -> bytes:
    """`fleet.json`, as people read it."""
    return msgspec.json.format(msgspec.json.encode(register), indent=2)


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a fleet or a member.

    Raises:
        ValueError: says what a name is.
    """
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(f"name {name[:80]!r}: 1 to 63 letters, digits, '_' and '-', and none of {', '.join(RESERVED)}")


def check_member(name: str, role: str) -> None:
    """Refuse a name or role that a member cannot have.

    Raises:
        ValueError: says which.
    """
    check_name(name)
    if role not in ROLES:
        raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")


def check_days(days: int) -> None:
    """Refuse a span for which a certificate cannot hold.

    Raises:
        ValueError: not in [1, MAX_DAYS].
    """
    if not 1 <= days <= MAX_DAYS:
        raise ValueError(f"days must be in [1, {MAX_DAYS}], got {days}")


class _Version(msgspec.Struct):
    schema_version: int
