"""TRUST: who may vouch for policies, and what a robot remembers of what it was told.

    SigningKey --sign--> envelope --open_envelope / TrustRoot.vouched--> payload       signatures: who
                         TrustRoot 1 --successor--> 2 --successor--> 3                 rotation: who, from now on
    TrustMemory                                                                        memory: nothing older, ever

Signatures are securesystemslib's (DSSE, ed25519); nothing here is cryptography of our own.
"""

from sop.trust.envelope import MAX_ENVELOPE_BYTES, claimed_payload, cosign, open_envelope
from sop.trust.keys import PublicKey, SigningKey
from sop.trust.memory import TrustMemory
from sop.trust.root import CANDIDATE, RELEASE, ROOT, Role, TrustRoot

__all__ = [
    "CANDIDATE",
    "MAX_ENVELOPE_BYTES",
    "RELEASE",
    "ROOT",
    "PublicKey",
    "Role",
    "SigningKey",
    "TrustMemory",
    "TrustRoot",
    "claimed_payload",
    "cosign",
    "open_envelope",
]
