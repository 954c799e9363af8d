"""Keys that vouch for policies and channels: ed25519, one file per private key."""

import os
import re
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from sop.core.errors import InvalidRecord, RunError

MAX_KEY_BYTES = 16 << 10
"""A file with a key is small; what is larger is not read."""
_HEX = re.compile(r"[0-9a-f]{64}")


@cache
def load_dsse() -> ModuleType:
    """`sop.trust.dsse`. Takes some 0.2 s the first time in a process.

    Raises:
        RunError: its libraries are not installed; says what to do.
    """
    try:
        from sop.trust import dsse
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("securesystemslib", "cryptography"):
            raise
        raise RunError("signed policies need securesystemslib and cryptography: pip install -e '.[fleet]'") from error
    return dsse


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The half that everybody may have. Checked on construction.

    Raises:
        InvalidRecord: not a key, or its id is not the one that follows from it: a key with two names could sign twice.
    """

    key_id: str
    """64 hexadecimal digits that follow from the key."""
    public: str
    """The ed25519 key: 64 hexadecimal digits."""

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.public):
            raise InvalidRecord("public", f"must be 64 hexadecimal digits, got {self.public[:80]!r}")
        try:
            expected = load_dsse().key_id(self.public)
        except ValueError as error:
            raise InvalidRecord("public", f"not an ed25519 key: {error}") from error
        if self.key_id != expected:
            raise InvalidRecord("key_id", f"the id of this key is {expected}, got {self.key_id[:80]!r}")

    def to_json(self) -> bytes:
        """For people to pass on; `from_json` is its inverse."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> "PublicKey":
        """Read and check a key.

        Raises:
            InvalidRecord: too large, not JSON, or not a key.
        """
        if len(data) > MAX_KEY_BYTES:
            raise InvalidRecord("public key", f"has {len(data)} bytes, at most {MAX_KEY_BYTES} are read")
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRecord("public key", str(error)) from error


class SigningKey:
    """The half that signs. Its representation shows the id alone.

    key = SigningKey.generate()
    key.save(folder / "signing.pem")
    envelope = key.sign(STATEMENT_TYPE, encode_record(statement))
    """

    def __init__(self, signer: Any) -> None:
        self.signer = signer
        """securesystemslib's `CryptoSigner`: a secret."""
        self.public = PublicKey(*load_dsse().public_half(signer))
        """For those who check what it signed."""

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new key of the operating system's randomness.

        Raises:
            RunError: the libraries are not installed.
        """
        return cls(load_dsse().generate())

    @classmethod
    def load(cls, path: Path) -> "SigningKey":
        """Read what `save` wrote.

        Raises:
            RunError: missing, not such a file, or others can read it; says what to do, never quotes the key.
        """
        try:
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise RunError(f"{path} can be read by others: chmod 600 {path}")
            with path.open("rb") as file:
                return cls(load_dsse().from_pem(file.read(MAX_KEY_BYTES)))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is not a key to sign with: {error}") from error

    def save(self, path: Path) -> None:
        """Write the key (PEM, PKCS8, no password), readable by its owner alone. Never replaces a file. Durable.

        Raises:
            RunError: the file exists, or cannot be written.
        """
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(self.signer.private_bytes)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError as error:
            raise RunError(f"{path} exists and a key is never replaced: move it away first") from error
        except OSError as error:
            raise RunError(f"the key cannot be written: {error}") from error

    @property
    def key_id(self) -> str:
        """What signatures of this key are marked with."""
        return self.public.key_id

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """A DSSE envelope (JSON) with the payload and our signature of it. About 0.1 ms."""
        return msgspec.json.encode(load_dsse().sign(self.signer, payload_type, payload))

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"
