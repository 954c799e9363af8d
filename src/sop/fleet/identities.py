"""Making a member: its keys, and the identity folder that is handed to it and kept nowhere else."""

import os
import secrets
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec
import nkeys

from sop.core.errors import RunError
from sop.fleet.authority import Authority, Certificate, make_key, private_pem
from sop.fleet.files import PUBLIC, make_private, write_file
from sop.fleet.register import Register
from sop.transport.durable import sync_path
from sop.transport.identity import FILE, IdentityRecord
from sop.trust import PublicKey, SigningKey

SIGNING_KEY = "signing.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKeys:
    """Credentials of a member in the store."""

    access: str = ""
    """Public half; empty when there are none."""
    secret: str = ""

    def __repr__(self) -> str:
        return f"StoreKeys({self.access!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Public halves of what was made."""

    certificate: Certificate
    bus_key: str
    signing_key: PublicKey | None


def make_store_keys() -> StoreKeys:
    """New random credentials: 100 and 240 bits."""
    return StoreKeys(access=f"SOP{secrets.token_hex(13).upper()}", secret=secrets.token_hex(30))


def read_store_keys(path: Path) -> StoreKeys:
    """Credentials that somebody else made: a file with the access key and the secret, one a line.

    Raises:
        RunError: missing, or not two lines; never quotes it.
    """
    try:
        words = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({type(error).__name__})") from None
    if len(words) != 2:
        raise RunError(f"{path} must have two lines: the access key and the secret key")
    return StoreKeys(access=words[0], secret=words[1])


def uri_of(fleet: str, role: str, name: str) -> str:
    """What a certificate says about its owner beside the name."""
    return f"sop://{fleet}/{role}/{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Who is to be made."""

    register: Register
    name: str
    role: str
    store_keys: StoreKeys
    signs: bool
    days: int
    now_utc_ns: int


def make_identity(folder: Path, order: Order, authority: Authority) -> Made:
    """Write a complete identity folder but `trust.json`; secrets 0600, in a folder of its own for its owner alone.

    Raises:
        RunError: it cannot be written.
    """
    key, seed = make_key(), nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    register = order.register
    uri = uri_of(register.fleet, order.role, order.name)
    certificate = authority.issue_client(order.name, uri, key.public_key(), order.now_utc_ns, order.days)
    record = IdentityRecord(
        fleet=register.fleet,
        name=order.name,
        role=order.role,
        store=register.store,
        bus=register.bus,
        access_key=order.store_keys.access,
    )
    make_private(folder)
    write_file(folder / FILE, msgspec.json.format(msgspec.json.encode(record), indent=2), PUBLIC)
    write_file(folder / "ca.pem", authority.pem, PUBLIC)
    write_file(folder / "certificate.pem", certificate.pem, PUBLIC)
    write_file(folder / "key.pem", private_pem(key))
    write_file(folder / "nats.nk", seed)
    if order.store_keys.secret:
        write_file(folder / "store_secret", order.store_keys.secret.encode())
    signing = SigningKey.generate() if order.signs else None
    if signing is not None:
        signing.save(folder / SIGNING_KEY)
    return Made(
        certificate=certificate,
        bus_key=nkeys.from_seed(seed).public_key.decode(),
        signing_key=None if signing is None else signing.public,
    )


def unfinished(folder: Path) -> Path:
    """A name beside a folder under which it can be written before it is complete; what a crash left there, goes."""
    for left in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(left)
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")


def hand_out(part: Path, folder: Path) -> None:
    """Give a complete folder its name; what had the name before, goes.

    Raises:
        RunError: it cannot be done.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
        sync_path(folder.parent)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error}") from error
