"""Certificates: who issues them, for what they hold, and which authorities are taken."""

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet_examples import DAY, NOW, make_fleet
from sop.core.errors import RunError
from sop.fleet.authority import Authority, expires_utc_ns, make_key, private_pem

START = dt.datetime.fromtimestamp(NOW // 10**9, dt.UTC)


def _read(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_a_member_is_named_and_can_be_a_client_alone() -> None:
    authority = Authority.make("lab", NOW)
    issued = authority.issue_client("robot-1", "sop://lab/robot/robot-1", make_key().public_key(), NOW, 90)
    found = _read(issued.pem)
    found.verify_directly_issued_by(_read(authority.pem))
    assert found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "robot-1"
    extensions = found.extensions
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["sop://lab/robot/robot-1"]
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert found.not_valid_before_utc == START - dt.timedelta(days=1), "a robot's clock may be a day late"
    assert found.not_valid_after_utc == START + dt.timedelta(days=90)
    assert issued.expires_utc_ns == expires_utc_ns(issued.pem) == NOW + 90 * DAY
    assert int(issued.serial, 16) == found.serial_number


@pytest.mark.parametrize(
    ("host", "dns", "addresses"),
    [
        ("store.example.org", ["store.example.org"], []),
        ("192.0.2.7", [], ["192.0.2.7"]),
        ("2001:db8::1", [], ["2001:db8::1"]),
        ("127.0.0.1", ["localhost"], ["127.0.0.1", "::1"]),
    ],
)
def test_a_server_is_its_host_and_a_server_alone(host: str, dns: list[str], addresses: list[str]) -> None:
    issued = Authority.make("lab", NOW).issue_server(host, make_key().public_key(), NOW, 365)
    extensions = _read(issued.pem).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == dns
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == addresses
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_no_certificate_outlives_its_authority() -> None:
    authority = Authority.make("lab", NOW)
    issued = authority.issue_client("robot-1", "sop://lab/robot/robot-1", make_key().public_key(), NOW, 100_000)
    assert issued.expires_utc_ns == expires_utc_ns(authority.pem)


def _save(folder: Path, authority: Authority) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    authority.save(folder)
    return folder / "ca.pem", folder / "ca.key"


def test_a_given_authority_issues_the_fleets_certificates(tmp_path: Path) -> None:
    given = _save(tmp_path / "company", Authority.make("company", NOW))
    fleet = make_fleet(tmp_path / "fleet", given=given)
    assert fleet.authority_pem() == given[0].read_bytes()
    issued = _read((fleet.folder / "certificates" / "release.pem").read_bytes())
    issued.verify_directly_issued_by(_read(given[0].read_bytes()))


def test_unfit_authorities_are_refused_in_words_and_leave_no_folder(tmp_path: Path) -> None:
    certificate, key = _save(tmp_path / "a", Authority.make("a", NOW))
    other = _save(tmp_path / "b", Authority.make("b", NOW))
    key_of_member = make_key()
    leaf = Authority.load(certificate, key, NOW).issue_client("x", "sop://x", key_of_member.public_key(), NOW, 9)
    member = tmp_path / "leaf.pem", tmp_path / "leaf.key"
    member[0].write_bytes(leaf.pem)
    member[1].write_bytes(private_pem(key_of_member))
    member[1].chmod(0o600)
    old = _save(tmp_path / "c", Authority.make("c", NOW - 4000 * DAY))
    swapped = tmp_path / "garbage.key"
    swapped.write_text("-----BEGIN PRIVATE KEY-----\nnothing\n-----END PRIVATE KEY-----\n")
    swapped.chmod(0o600)
    for pair, why in [
        ((certificate, other[1]), "is not the key of"),
        (member, "may not issue certificates"),
        (old, "expired on"),
        ((certificate, swapped), "not an authority's certificate and its key"),
        ((certificate, tmp_path / "nowhere"), "cannot be read"),
    ]:
        with pytest.raises(RunError, match=why):
            make_fleet(tmp_path / "fleet", given=pair)
        assert not (tmp_path / "fleet").exists()
    key.chmod(0o640)
    with pytest.raises(RunError, match="chmod 600"):
        make_fleet(tmp_path / "fleet", given=(certificate, key))


def test_an_authority_below_a_root_brings_the_root_along(tmp_path: Path) -> None:
    root, key = Authority.make("company", NOW), make_key()
    public, name = key.public_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plant")])
    middle = (
        x509.CertificateBuilder(_read(root.pem).subject, name, public, 7, START, START + dt.timedelta(days=99))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(root._key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    certificate, private = tmp_path / "plant.pem", tmp_path / "plant.key"
    certificate.write_bytes(middle)
    private.write_bytes(private_pem(key))
    private.chmod(0o600)
    with pytest.raises(RunError, match="append the certificates above it"):
        make_fleet(tmp_path / "fleet", given=(certificate, private))
    certificate.write_bytes(middle + root.pem)
    fleet = make_fleet(tmp_path / "fleet", given=(certificate, private))
    assert fleet.authority_pem() == middle + root.pem
    _read((fleet.folder / "certificates" / "release.pem").read_bytes()).verify_directly_issued_by(_read(middle))


def test_an_authority_shows_its_name_and_no_key(tmp_path: Path) -> None:
    authority = Authority.make("lab", NOW)
    _save(tmp_path / "a", authority)
    assert repr(authority) == "Authority(CN=lab fleet authority)"
