"""Signed envelopes (DSSE): bytes that somebody vouches for, and how they are opened when nobody is believed.

    {"payload": base64, "payloadType": "application/...", "signatures": [{"keyid": ..., "sig": base64}, ...]}

What is signed is the payload's bytes and its type (DSSE's PAE), so the JSON around them needs no canonical form.
"""

import json
from collections.abc import Collection
from typing import Any

import msgspec

from sop.core.channel import MAX_RECORD_BYTES
from sop.core.errors import Untrusted
from sop.trust.keys import PublicKey, SigningKey, load_dsse

MAX_ENVELOPE_BYTES = MAX_RECORD_BYTES // 3 * 4 + (64 << 10)
"""A payload of MAX_RECORD_BYTES in base64, and the signatures. What is larger is refused before it is parsed."""
MAX_SIGNATURES = 32
"""Bounds the work of one envelope; a fleet has a handful of keys."""


class _Signature(msgspec.Struct):
    keyid: str
    sig: str


class _Envelope(msgspec.Struct):
    payload: str
    payloadType: str  # noqa: N815  DSSE's name
    signatures: list[_Signature]


def open_envelope(envelope: bytes, payload_type: str, keys: Collection[PublicKey], threshold: int = 1) -> bytes:
    """The payload of an envelope that at least `threshold` of the keys signed.

    Signatures of keys that are not asked for are passed over. A key counts once, however often it is given; an
    envelope with two signatures of one key, or with a JSON name twice, is refused whole: it can be read in two ways.

    Args:
        envelope: hostile bytes; for bounded memory fetch at most MAX_ENVELOPE_BYTES + 1 of them.
        payload_type: what the payload has to be; a signature of one kind of record is none of another.
        keys: who may vouch for it.
        threshold: how many of them have to, at least 1.

    Raises:
        ValueError: a threshold below 1.
        Untrusted: says what is wrong, names the keys that signed and how many more are needed.
    """
    if threshold < 1:
        raise ValueError(f"threshold must be at least 1, got {threshold}")
    opened, found_type = _read(envelope)
    if found_type != payload_type:
        raise Untrusted(f"the envelope holds {found_type[:80]!r} instead of {payload_type!r}")
    good = load_dsse().verified_by(opened, {key.key_id: key.public for key in keys})
    if len(good) < threshold:
        signed = ", ".join(sorted(name[:16] for name in opened.signatures)) or "nobody"
        wanted = ", ".join(sorted(key.key_id[:16] for key in keys)) or "nobody"
        raise Untrusted(
            f"{len(good)} valid signatures of the {threshold} that are needed: it is signed by {signed}, believed are "
            f"{wanted}. Sign it with a key of this fleet, or bring the newer trust.json to this machine"
        )
    payload: bytes = opened.payload
    return payload


def claimed_payload(envelope: bytes) -> bytes:
    """What an envelope holds, believed by nobody: for records that name their own signers, and for people.

    Raises:
        Untrusted: not an envelope.
    """
    payload: bytes = _read(envelope)[0].payload
    return payload


def cosign(envelope: bytes, key: SigningKey) -> bytes:
    """The envelope with a signature of `key` added, for keys that live on different machines. Checks no signature:
    look at the payload before you sign it. Signing twice changes nothing.

    Raises:
        Untrusted: not an envelope.
    """
    return msgspec.json.encode(load_dsse().cosign(key.signer, _read(envelope)[0]))


def _read(envelope: bytes) -> tuple[Any, str]:
    """(the library's envelope, its payload type)."""
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise Untrusted(f"the envelope has {len(envelope)} bytes, at most {MAX_ENVELOPE_BYTES} are read")
    try:
        values = msgspec.convert(json.loads(envelope, object_pairs_hook=_unique), type=_Envelope)
        opened = load_dsse().read(msgspec.to_builtins(values))
    except (ValueError, RecursionError) as error:  # of JSON, UTF-8, base64 and types
        raise Untrusted(f"not a signed envelope: {str(error)[:300]}") from error
    if len(opened.signatures) > MAX_SIGNATURES:
        raise Untrusted(f"the envelope has {len(opened.signatures)} signatures, at most {MAX_SIGNATURES} are checked")
    return opened, values.payloadType


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return values
