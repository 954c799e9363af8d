"""Who a process is: the folder that an administrator hands out, and what store and bus are shown of it.

    identity/
        identity.json        fleet, name, role, URLs of store and bus, public half of the store's credentials
        ca.pem               whom to believe
        certificate.pem      who we are, for TLS in both directions
        key.pem              0600
        nats.nk              0600: seed of the bus's key pair
        store_secret         0600
        trust.json           who may sign policies (`sop.trust`)
        signing.pem          0600: only who signs policies or channels has it

A process takes the folder that `SOP_IDENTITY` names, or none: on one machine nobody needs one. Secrets are read where
they are used, never kept in a log, a configuration or the environment of a child.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sop.core.errors import RunError

VARIABLE = "SOP_IDENTITY"
"""Environment variable that names the folder of a process's identity; children inherit it."""
ROLES = ("learner", "robot", "evaluator", "release", "observer")
"""`robot` writes its own episodes and reads policies; `learner` reads episodes and writes policies; `evaluator` reads
policies and writes evaluations; `release` writes channels; `observer` only reads."""
FILE = "identity.json"
_MAX_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityRecord:
    """`identity.json`."""

    fleet: str
    name: str
    """Of the robot or process; for a robot its actor id."""
    role: str
    """One of ROLES."""
    store: str
    """URL."""
    bus: str
    """URL."""
    access_key: str = ""
    """Public half of the store's credentials; empty when the store asks for none."""
    schema_version: int = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """An identity folder that was looked at: complete, and its secrets are for its owner alone."""

    folder: Path
    record: IdentityRecord

    @property
    def ca(self) -> Path:
        """Certificates of whom to believe."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """Our certificate."""
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        """Private key of the certificate."""
        return self.folder / "key.pem"

    @property
    def bus_seed(self) -> Path:
        """Seed of our key pair on the bus."""
        return self.folder / "nats.nk"

    @property
    def trust(self) -> Path:
        """Who may sign policies; missing when this fleet signs none."""
        return self.folder / "trust.json"

    @property
    def signing_key(self) -> Path:
        """What we sign with; only learner and release have one."""
        return self.folder / "signing.pem"

    def store_secret(self) -> str:
        """Secret half of the store's credentials; empty when there is none. Reads the file at each call."""
        path = self.folder / "store_secret"
        return path.read_text().strip() if path.exists() else ""


def load_identity(folder: Path) -> Identity:
    """Read and check an identity folder.

    Raises:
        RunError: a file is missing or wrong, or a secret can be read by others; says which and what to do.
    """
    from sop.core.episode import ACTOR_ID  # loads numpy: not for `--help`

    path = folder / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{folder} is not an identity ({error}): take the folder that `sop fleet enroll` wrote"
        ) from error
    try:
        record = msgspec.json.decode(data[:_MAX_BYTES], type=IdentityRecord)
    except msgspec.DecodeError as error:
        raise RunError(f"{path}: {error}") from error
    if record.role not in ROLES or not re.fullmatch(ACTOR_ID, record.name):
        raise RunError(f"{path}: {record.name!r} with the role {record.role!r} is none of {', '.join(ROLES)}")
    for secret in ("key.pem", "nats.nk", "store_secret", "signing.pem"):
        found = folder / secret
        if found.exists() and stat.S_IMODE(found.stat().st_mode) & 0o077:
            raise RunError(f"{found} can be read by others: chmod 600 {found}")
    return Identity(folder, record)


def own_identity() -> Identity | None:
    """The identity of this process, None when `SOP_IDENTITY` names none.

    Raises:
        RunError: it names a folder that is none.
    """
    folder = os.environ.get(VARIABLE, "")
    return load_identity(Path(folder)) if folder else None
