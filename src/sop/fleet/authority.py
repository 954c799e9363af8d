"""The fleet's certificate authority: who may speak TLS with whom. X.509 by `cryptography`, keys on the curve P-256.

    ca.pem, ca.key     signs certificates of servers (their host; for servers alone) and of members (their name; for
                       clients alone: a stolen robot cannot play the server)

A certificate begins a day before it is made, for robots whose clock is late.
"""

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sop.core.errors import RunError
from sop.fleet.files import PUBLIC, check_private, read_file, write_file

CERTIFICATE = "ca.pem"
KEY = "ca.key"
AUTHORITY_DAYS = 3650
"""For which an authority holds that we make."""
CLOCK_SLACK = dt.timedelta(days=1)
_Private = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class Certificate:
    """One that was issued."""

    pem: bytes
    serial: str
    """Hexadecimal."""
    expires_utc_ns: int


class Authority:
    """A certificate and its key. Its representation shows the certificate's name alone."""

    def __init__(self, chain: list[x509.Certificate], key: _Private) -> None:
        self._certificate = chain[0]
        self._key = key
        self.pem = b"".join(link.public_bytes(serialization.Encoding.PEM) for link in chain)
        """Whom everybody believes: the certificate, then those above it."""

    @classmethod
    def make(cls, fleet: str, now_utc_ns: int) -> "Authority":
        """A new one, for this fleet alone."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"{fleet} fleet authority"[:64])
        now = _time(now_utc_ns)
        builder = (
            _certificate(name, key.public_key(), now, now + dt.timedelta(days=AUTHORITY_DAYS))
            .issuer_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        return cls([builder.sign(key, hashes.SHA256())], key)

    @classmethod
    def load(cls, certificate: Path, key: Path, now_utc_ns: int) -> "Authority":
        """Read one, of this fleet or given by others.

        Args:
            certificate: PEM: the one that issues, then those above it up to the root.
            key: PEM of its private key, without a password.
            now_utc_ns: the time.

        Raises:
            RunError: a file is missing or can be read by others, the two do not belong together, or it may not (or no
                longer) issue certificates. Never quotes the key.
        """
        check_private(key)
        try:
            chain = x509.load_pem_x509_certificates(read_file(certificate))
            private = serialization.load_pem_private_key(read_file(key), None)
            constraints = chain[0].extensions.get_extension_for_class(x509.BasicConstraints).value
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
            raise RunError(
                f"{certificate} and {key} are not an authority's certificate and its key without a password, both PEM "
                f"({type(error).__name__})"
            ) from None
        if not isinstance(private, _Private):
            raise RunError(f"{key}: an EC, RSA or ed25519 key is needed, this is {type(private).__name__}")
        found = chain[0]
        if private.public_key() != found.public_key():
            raise RunError(f"{key} is not the key of {certificate}")
        if not constraints.ca:
            raise RunError(f"{certificate} may not issue certificates: it is not that of an authority (CA)")
        if chain[-1].issuer != chain[-1].subject:
            raise RunError(f"{certificate} ends below its root: append the certificates above it, up to the root")
        if found.not_valid_after_utc <= _time(now_utc_ns):
            raise RunError(f"{certificate} expired on {found.not_valid_after_utc:%Y-%m-%d}: take a newer authority")
        return cls(chain, private)

    def save(self, folder: Path) -> None:
        """Write `ca.pem` and `ca.key` (0600)."""
        write_file(folder / KEY, private_pem(self._key))
        write_file(folder / CERTIFICATE, self.pem, PUBLIC)

    def issue_server(self, host: str, public: ec.EllipticCurvePublicKey, now_utc_ns: int, days: int) -> Certificate:
        """For the server at a host (name or IP address); one of this machine answers to every name of this machine."""
        names = ["localhost", "127.0.0.1", "::1"] if host in ("localhost", "127.0.0.1", "::1") else [host]
        alternatives = x509.SubjectAlternativeName([_host(name) for name in names])
        purpose = ExtendedKeyUsageOID.SERVER_AUTH
        return self._issue(
            host[:64], public, alternatives=alternatives, purpose=purpose, now_utc_ns=now_utc_ns, days=days
        )

    def issue_client(
        self, name: str, uri: str, public: ec.EllipticCurvePublicKey, now_utc_ns: int, days: int
    ) -> Certificate:
        """For a member, with its name and the URI that says its fleet and role."""
        alternatives = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH
        return self._issue(name, public, alternatives=alternatives, purpose=purpose, now_utc_ns=now_utc_ns, days=days)

    def _issue(
        self,
        name: str,
        public: ec.EllipticCurvePublicKey,
        *,
        alternatives: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
        now_utc_ns: int,
        days: int,
    ) -> Certificate:
        now = _time(now_utc_ns)
        end = min(now + dt.timedelta(days=days), self._certificate.not_valid_after_utc)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _certificate(_name(name), public, now, end)
            .issuer_name(self._certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(alternatives, critical=False)
            .add_extension(issuer, critical=False)
        )
        digest = None if isinstance(self._key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        issued = builder.sign(self._key, digest)
        pem = issued.public_bytes(serialization.Encoding.PEM)
        return Certificate(pem, f"{issued.serial_number:x}", int(end.timestamp()) * 10**9)

    def __repr__(self) -> str:
        return f"Authority({self._certificate.subject.rfc4514_string()})"


def make_key() -> ec.EllipticCurvePrivateKey:
    """A new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: _Private) -> bytes:
    """PEM (PKCS8, no password) of a private key: a secret."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_of(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key in a certificate that we issued.

    Raises:
        RunError: it is not one.
    """
    try:
        public = x509.load_pem_x509_certificate(pem).public_key()
    except ValueError as error:
        raise RunError(f"a certificate is damaged: {error}") from error
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise RunError("a certificate is not one that this fleet issued")
    return public


def expires_utc_ns(pem: bytes) -> int:
    """When a certificate ends.

    Raises:
        RunError: it is not one.
    """
    try:
        return int(x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()) * 10**9
    except ValueError as error:
        raise RunError(f"a certificate is damaged: {error}") from error


def _certificate(
    name: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: dt.datetime,
    end: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _time(utc_ns: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(utc_ns // 10**9, dt.UTC)
