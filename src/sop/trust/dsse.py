"""Every call into securesystemslib and cryptography: ed25519 keys and DSSE envelopes. Nothing else imports them.

Load it with `sop.trust.keys.load_dsse`: the two are an extra, and a run on one machine needs neither.
"""

from collections.abc import Collection, Mapping
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import CryptoSigner, SSlibKey


def generate() -> CryptoSigner:
    """A new ed25519 key pair."""
    return CryptoSigner.generate_ed25519()


def from_pem(pem: bytes) -> CryptoSigner:
    """The key pair of a PKCS8 file without a password.

    Raises:
        ValueError: not such a file, or another kind of key; never quotes it.
    """
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"not a private key without a password ({type(error).__name__})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"an ed25519 key is needed, this is {type(key).__name__}")  # noqa: TRY004  content, not a type
    return CryptoSigner(key)


def public_half(signer: CryptoSigner) -> tuple[str, str]:
    """(key id, 64 hexadecimal digits)."""
    return signer.public_key.keyid, str(signer.public_key.keyval["public"])


def key_id(public: str) -> str:
    """What a public key of 64 hexadecimal digits is called: it follows from the key, so no key has two names.

    Raises:
        ValueError: not a key.
    """
    return str(SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))).keyid)


def sign(signer: CryptoSigner, payload_type: str, payload: bytes) -> dict[str, Any]:
    """A new envelope with one signature, as JSON values."""
    return cosign(signer, Envelope(payload, payload_type, {}))


def cosign(signer: CryptoSigner, envelope: Envelope) -> dict[str, Any]:
    """The envelope with one signature more, as JSON values."""
    envelope.sign(signer)
    found: dict[str, Any] = envelope.to_dict()
    return found


def read(values: dict[str, Any]) -> Envelope:
    """An envelope of JSON values whose types are checked already; `values` are used up.

    Raises:
        ValueError: not base64, or two signatures of one key.
    """
    return Envelope.from_dict(values)


def verified_by(envelope: Envelope, keys: Mapping[str, str]) -> Collection[str]:
    """Ids of those keys (id -> 64 hexadecimal digits) that signed exactly this payload and payload type."""
    pae, found = envelope.pae(), []
    for signature in envelope.signatures.values():
        if signature.keyid not in keys:
            continue
        key = SSlibKey(signature.keyid, "ed25519", "ed25519", {"public": keys[signature.keyid]})
        try:
            key.verify_signature(signature, pae)
        except UnverifiedSignatureError:
            continue
        found.append(signature.keyid)
    return found
