"""Who is let into a cloud store, whom it believes, and servers that lie."""

import contextlib
import datetime as dt
import http.server
import ipaddress
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sop.core.errors import Forbidden, NotFound, RunError, StoreUnavailable
from sop.testing.servers.s3 import S3Server
from sop.transport.cloud_store import CloudStore
from sop.transport.identity import Identity, IdentityRecord, load_identity
from sop.transport.retry import put_retrying

SECRETS = {
    "learner": "learner-secret-0123456789",
    "robot1": "robot1-secret-0123456789",
    "robot2": "robot2-secret-01234",
}
RUN = "fleet/run"
RIGHTS = {
    "learner": ["Admin", "Read", "Write", "List"],
    **{
        robot: [
            f"Write:{RUN}/episodes/{robot}/*",
            f"Read:{RUN}/episodes/{robot}/*",
            f"List:{RUN}/episodes/{robot}/*",
            f"Read:{RUN}/policies/*",
            f"List:{RUN}/policies/*",
        ]
        for robot in ("robot1", "robot2")
    },
}


def _authority(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """(certificate of an authority, certificate of a server on 127.0.0.1 that it signed, key of that)."""
    folder.mkdir()
    now = dt.datetime.now(dt.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def sign(owner: x509.Name, public: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder(
            issuer_name=subject,
            subject_name=owner,
            public_key=public,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - dt.timedelta(days=1),
            not_valid_after=now + dt.timedelta(days=1),
        ).add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca, certificate, key_file = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    ca.write_bytes(sign(subject, key.public_key(), x509.BasicConstraints(ca=True, path_length=0)))
    local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store")])
    certificate.write_bytes(sign(server_name, server_key.public_key(), local))
    key_file.write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return ca, certificate, key_file


def _identity(folder: Path, name: str, ca: Path, secret: str | None = None) -> Identity:
    folder.mkdir()
    role = "robot" if name.startswith("robot") else "learner"
    record = IdentityRecord(fleet="test", name=name, role=role, store="", bus="", access_key=f"key-{name}")
    (folder / "identity.json").write_bytes(msgspec.json.encode(record))
    (folder / "ca.pem").write_bytes(ca.read_bytes())
    path = folder / "store_secret"
    path.touch(0o600)
    path.write_text(SECRETS[name] if secret is None else secret)
    return load_identity(folder)


class Fleet:
    """A server with TLS and identities, and the identity folders of those who may use it."""

    def __init__(self, folder: Path) -> None:
        self.ca, certificate, key = _authority(folder / "ours", "ours")
        self.other_ca, _, _ = _authority(folder / "other", "other")
        self.identities = {name: _identity(folder / name, name, self.ca) for name in RIGHTS}
        config = folder / "s3.json"
        users = [
            {
                "name": name,
                "credentials": [{"accessKey": f"key-{name}", "secretKey": SECRETS[name]}],
                "actions": actions,
            }
            for name, actions in RIGHTS.items()
        ]
        config.write_text(json.dumps({"identities": users[:1]}))
        self.server = S3Server(folder / "s3", identities=config, certificate=certificate, key=key)
        self.url = self.server.url("fleet", "run")
        self.server.shell(  # those of the file could not be revoked while the server runs
            *(
                f"s3.configure -user {name} -access_key key-{name} -secret_key {SECRETS[name]} "
                f"-actions {','.join(RIGHTS[name])} -apply"
                for name in ("robot1", "robot2")
            )
        )

    def store(self, name: str) -> CloudStore:
        return CloudStore(self.url, self.identities[name])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.server.kill()


@pytest.mark.slow
def test_the_identitys_authority_is_believed_and_no_other(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.store("learner").put("tls/key", b"x")
    assert fleet.store("learner").get("tls/key") == b"x"
    deceived = _identity(tmp_path / "deceived", "learner", fleet.other_ca)
    for roots_of_the_machine in (None, fleet.ca):
        if roots_of_the_machine is not None:
            monkeypatch.setenv("SSL_CERT_FILE", str(roots_of_the_machine))
        with pytest.raises(StoreUnavailable, match="its certificate is not from whom we believe"):
            CloudStore(fleet.url, deceived).get("tls/key")
    assert os.environ["SSL_CERT_FILE"] == str(fleet.ca), "the environment is as it was"


@pytest.mark.slow
def test_a_robot_writes_its_own_episodes_only_and_reads_policies_only(fleet: Fleet) -> None:
    learner, robot1, robot2 = fleet.store("learner"), fleet.store("robot1"), fleet.store("robot2")
    learner.put("policies/00000001/manifest.json", b"policy")
    robot1.put("episodes/robot1/0000001-5-abc.arrow", b"episode of 1")
    robot2.put("episodes/robot2/0000001-5-abc.arrow", b"episode of 2")
    assert list(robot1.keys("episodes/robot1/")) == ["episodes/robot1/0000001-5-abc.arrow"]
    assert robot1.get("policies/00000001/manifest.json") == b"policy"
    assert list(robot1.keys("policies/")) == ["policies/00000001/manifest.json"]
    assert list(robot1.folders("policies/")) == ["00000001"]
    for call in (
        lambda: robot1.get("episodes/robot2/0000001-5-abc.arrow"),
        lambda: robot1.put("episodes/robot2/0000002-5-abc.arrow", b"forged"),
        lambda: robot1.put("policies/00000002/manifest.json", b"forged"),
        lambda: robot1.delete("episodes/robot2/0000001-5-abc.arrow"),
        lambda: robot1.delete("policies/00000001/manifest.json"),
        lambda: list(robot1.keys("episodes/robot2/")),
        lambda: list(robot1.keys("")),
        lambda: robot1.folders("episodes/"),
    ):
        with pytest.raises(Forbidden, match="403 Forbidden AccessDenied"):
            call()
    assert list(learner.keys("episodes/")) == [
        "episodes/robot1/0000001-5-abc.arrow",
        "episodes/robot2/0000001-5-abc.arrow",
    ]


@pytest.mark.slow
def test_who_is_not_let_in_is_not_tried_again_and_no_message_has_the_secret(fleet: Fleet, tmp_path: Path) -> None:
    stranger = CloudStore(fleet.url, _identity(tmp_path / "id", "robot1", fleet.ca, "a-wrong-secret"))
    pauses: list[float] = []
    with pytest.raises(Forbidden, match="SignatureDoesNotMatch; ask who runs the store") as caught:
        put_retrying(stranger, "episodes/robot1/x", b"x", attempts=5, backoff=None, pause=pauses.append)  # type: ignore[arg-type]
    assert pauses == []
    for text in (repr(stranger), str(stranger), str(caught.value), repr(vars(stranger))):
        assert "a-wrong-secret" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.slow
def test_a_revoked_robot_is_out_at_once_and_the_others_stay(fleet: Fleet) -> None:
    robot2 = fleet.store("robot2")
    robot2.put("episodes/robot2/before", b"x")
    fleet.server.shell("s3.configure -user robot2 -delete -apply")
    with pytest.raises(Forbidden, match="InvalidAccessKeyId"):
        for number in range(100):  # in under a second, by what the filer tells the gateway
            robot2.put(f"episodes/robot2/after-{number}", b"x")
            threading.Event().wait(0.05)
    fleet.store("robot1").put("episodes/robot1/after", b"x")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://", "'' is not the name of a bucket"),
        ("s3://A_B/x", "'A_B' is not the name of a bucket"),
        ("s3://key:secret@bucket/x", "must not carry credentials"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/.hidden", "begin with"),
        ("s3://bucket/x?endpiont=https://h", "unknown \\['endpiont'\\]"),
        ("gs://bucket/x?endpoint=https://h", "unknown \\['endpoint'\\]"),
        ("s3://bucket/x?endpoint=http://10.0.0.1:8333", "plain http is only for this machine"),
        ("s3://bucket/x?endpoint=http://store.example", "plain http is only for this machine"),
        ("s3://bucket/x?endpoint=ftp://host", "must be https://host:port"),
        ("s3://bucket/x?endpoint=https://key:secret@host", "must not carry credentials"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused_without_repeating_a_password(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        CloudStore(url)
    assert "secret" not in str(caught.value)


def test_plain_http_from_the_environment_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://10.0.0.1:9000")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with pytest.raises(ValueError, match="plain http is only for this machine"):
        CloudStore("s3://bucket/run")


def test_stores_of_the_three_clouds_are_made_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    for url in ("s3://bucket/a/run", "gs://bucket/a/run", "az://container/a/run"):
        assert repr(CloudStore(url)) == f"CloudStore('{url}')"


def test_an_identity_without_certificates_believes_nobody(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(RunError, match=r"ca\.pem is missing or empty"):
        CloudStore("s3://bucket/run", _identity(tmp_path / "id", "robot1", empty))


class Liar(http.server.BaseHTTPRequestHandler):
    """Answers every request with `status`, `headers` and `body`."""

    status, headers_sent, body = 200, {}, b""  # type: tuple[int, dict[str, str], bytes]

    def do_GET(self) -> None:
        self.send_response(self.status)
        for name, value in {"Content-Length": str(len(self.body)), **self.headers_sent}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Liar], CloudStore]]:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    handler = type("OneLiar", (Liar,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield handler, CloudStore(f"s3://bucket/run?endpoint=http://127.0.0.1:{server.server_port}", timeout_s=2.0)
        server.shutdown()
        thread.join()


def _answer(handler: type[Liar], status: int, body: bytes, **headers: str) -> None:
    handler.status, handler.body = status, body
    handler.headers_sent = {name.replace("_", "-"): value for name, value in headers.items()}


DATED = {"Last_Modified": "Mon, 23 Nov 2026 06:00:00 GMT", "ETag": '"x"'}


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (200, bytes(1000), {}),
        (206, bytes(1000), {"Content_Range": "bytes 0-999/1000"}),
        (206, bytes(10), {"Content_Range": "bytes 5-14/1000"}),
        (206, bytes(1000), {"Content_Range": "bytes 0-9/1000"}),
        (206, bytes(5), {"Content_Range": "bytes 0-9/1000"}),
        (206, bytes(5), {"Content_Range": "bytes 0-9/1000", "Content_Length": "10"}),
        (206, bytes(10), {"Content_Range": "nonsense"}),
        (301, b"", {"Location": "http://127.0.0.1:1/"}),
        (500, b"<Code>\x1b[31mInternal</Code>" + bytes(100), {}),
        (503, b"<Error><Code>SlowDown</Code></Error>", {}),
    ],
)
def test_an_answer_that_is_not_the_bytes_asked_for_is_refused(
    liar: tuple[type[Liar], CloudStore], status: int, body: bytes, headers: dict[str, str]
) -> None:
    handler, store = liar
    _answer(handler, status, body, **DATED, **headers)
    with pytest.raises(StoreUnavailable) as caught:
        store.get("key", slice(0, 10))
    assert str(caught.value).isprintable()


def test_a_server_that_drips_is_given_up(liar: tuple[type[Liar], CloudStore]) -> None:
    handler, _ = liar
    started, ended = threading.Event(), threading.Event()

    def drip(self: Liar) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": "1000000", **DATED}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        started.set()
        with contextlib.suppress(OSError):
            while not ended.wait(0.1):  # each byte in time, the whole in a day
                self.wfile.write(b"x")

    handler.do_GET = drip  # type: ignore[method-assign]
    store = CloudStore(repr(liar[1]).split("'")[1].replace(" at ", "?endpoint="), timeout_s=0.5)
    with pytest.raises(StoreUnavailable, match="sends 'key' too slowly"):
        store.get("key")
    assert started.is_set()
    ended.set()


def test_a_listing_of_other_places_is_refused(liar: tuple[type[Liar], CloudStore]) -> None:
    handler, store = liar
    entry = "<Contents><Key>{}</Key><LastModified>2026-11-23T06:00:00.000Z</LastModified><Size>1</Size></Contents>"
    for keys, problem in ((["other/key"], "other places"), (["run/a/b", "run/a/a"], "must list in order")):
        found = "".join(entry.format(key) for key in keys)
        _answer(handler, 200, f"<ListBucketResult>{found}</ListBucketResult>".encode())
        with pytest.raises(StoreUnavailable, match=problem):
            list(store.keys("a/"))


def test_a_clock_that_is_wrong_is_not_a_refusal_for_ever(liar: tuple[type[Liar], CloudStore]) -> None:
    handler, store = liar
    _answer(handler, 403, b"<Error><Code>RequestTimeTooSkewed</Code></Error>")
    with pytest.raises(StoreUnavailable, match="set this machine's clock"):
        store.get("key")
    _answer(handler, 404, b"<Error><Code>NoSuchKey</Code></Error>")
    with pytest.raises(NotFound, match="no object 'key' in s3://bucket/run at http"):
        store.get("key")
