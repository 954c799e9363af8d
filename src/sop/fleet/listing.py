"""What `sop fleet list` shows: members and when something ends. No secret is read for it."""

import datetime as dt
from dataclasses import dataclass

import msgspec

from sop.fleet.authority import expires_utc_ns
from sop.fleet.fleet import Fleet
from sop.fleet.register import Member, Revocation

_DAY_NS = 24 * 3600 * 10**9
SOON_DAYS = 21
"""What ends within so many days is said to end soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A member, or something else that ends."""

    name: str
    role: str
    """Of a member; `server`, `trust` or `authority` for the rest."""
    state: str
    """active, ends soon, expired or revoked."""
    expires_utc: str
    """Day, ISO 8601."""
    access_key: str = ""
    revoked: Revocation | None = None


def entries(fleet: Fleet) -> list[Entry]:
    """All members by name, then servers, `trust.json` and the authority."""
    now, register = fleet.now_utc_ns(), fleet.register
    found = [_member(register.members[name], now) for name in sorted(register.members)]
    ends = {name: ("server", expires_utc_ns(pem)) for name, pem in fleet.server_certificates().items()}
    ends["trust.json"] = ("trust", fleet.trust_expires_utc_ns())
    ends["ca.pem"] = ("authority", expires_utc_ns(fleet.authority_pem()))
    return found + [
        Entry(name=name, role=role, state=_state(end, now), expires_utc=_day(end)) for name, (role, end) in ends.items()
    ]


def as_json(fleet: Fleet) -> bytes:
    """Fleet, register's version and entries."""
    register = fleet.register
    values = {"fleet": register.fleet, "version": register.version, "entries": entries(fleet)}
    return msgspec.json.format(msgspec.json.encode(values), indent=2)


def as_text(fleet: Fleet) -> str:
    """A table, one line an entry."""
    lines = [f"{'name':24s} {'role':10s} {'state':10s} until"]
    for entry in entries(fleet):
        why = "" if entry.revoked is None else f"  revoked {_day(entry.revoked.utc_ns)}: {entry.revoked.why}"
        lines.append(f"{entry.name:24s} {entry.role:10s} {entry.state:10s} {entry.expires_utc}{why}")
    return "\n".join(lines)


def _member(member: Member, now_utc_ns: int) -> Entry:
    return Entry(
        name=member.name,
        role=member.role,
        state=_state(member.expires_utc_ns, now_utc_ns) if member.revoked is None else "revoked",
        expires_utc=_day(member.expires_utc_ns),
        access_key=member.access_key,
        revoked=member.revoked,
    )


def _state(end_utc_ns: int, now_utc_ns: int) -> str:
    if end_utc_ns <= now_utc_ns:
        return "expired"
    return "ends soon" if end_utc_ns < now_utc_ns + SOON_DAYS * _DAY_NS else "active"


def _day(utc_ns: int) -> str:
    return f"{dt.datetime.fromtimestamp(utc_ns // 10**9, dt.UTC):%Y-%m-%d}"
