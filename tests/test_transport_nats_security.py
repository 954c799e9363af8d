"""The bus with mutual TLS, key pairs and permissions: who is let in, what each may do, and who is thrown out."""

import datetime as dt
import ipaddress
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import nkeys
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sop.core.errors import Forbidden, StoreUnavailable
from sop.testing.contracts.bus import drain
from sop.testing.servers.nats import NatsServer
from sop.transport import Identity
from sop.transport.identity import IdentityRecord
from sop.transport.nats_bus import NatsBus
from sop.transport.nats_subjects import stream_of, subjects_of

pytestmark = pytest.mark.slow
NAMESPACE = "run_1"
PEOPLE = {"learner": "learner", "robot-1": "robot", "robot.2": "robot", "screen": "observer"}


class Fleet:
    """A certificate authority, identities, and a server that knows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleet")])
        self.ca = self._sign("fleet", self.key, ca=True)
        self.users: dict[str, dict[str, object]] = {}
        self.people = {name: self._enroll(name, role) for name, role in PEOPLE.items()}
        self._write_pair(folder, "server", ec.generate_private_key(ec.SECP256R1()))
        self.config = folder / "server.conf"
        self.configure()
        self.server = NatsServer(folder / "nats", config=self.config)

    def configure(self) -> None:
        """Write the server's configuration for those who are enrolled."""
        tls = {
            "cert_file": str(self.folder / "server.pem"),
            "key_file": str(self.folder / "server.key"),
            "ca_file": str(self.folder / "ca.pem"),
            "verify": True,
        }
        people = json.dumps({"users": list(self.users.values())})
        self.config.write_text(f"jetstream {{ max_file_store: 1TB }}\ntls {json.dumps(tls)}\nauthorization {people}\n")

    def _enroll(self, name: str, role: str) -> Identity:
        folder = self.folder / name
        folder.mkdir()
        (folder / "ca.pem").write_bytes(self.ca.public_bytes(serialization.Encoding.PEM))
        (self.folder / "ca.pem").write_bytes(self.ca.public_bytes(serialization.Encoding.PEM))
        self._write_pair(folder, "certificate", ec.generate_private_key(ec.SECP256R1()))
        (folder / "certificate.key").rename(folder / "key.pem")
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        (folder / "nats.nk").write_bytes(seed)
        may = subjects_of(NAMESPACE, role, name)
        self.users[name] = {
            "nkey": nkeys.from_seed(bytearray(seed)).public_key.decode(),
            "permissions": {"publish": list(may.publish), "subscribe": list(may.subscribe)},
        }
        return Identity(folder, IdentityRecord(fleet="f", name=name, role=role, store="", bus=""))

    def _write_pair(self, folder: Path, name: str, key: ec.EllipticCurvePrivateKey) -> None:
        certificate = self._sign(name, key, ca=False)
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}.key").write_bytes(private)

    def _sign(self, name: str, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
        )
        return builder.sign(self.key, hashes.SHA256())


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    with fleet.server:
        yield fleet


@pytest.fixture
def opener(fleet: Fleet, closing: ExitStack) -> Callable[[str], NatsBus]:
    def open_it(name: str) -> NatsBus:
        bus = NatsBus(fleet.server.url(NAMESPACE), owner=name == "learner", identity=fleet.people[name])
        closing.callback(bus.close)
        return bus

    return open_it


def _send(bus: NatsBus, subject: str, payload: bytes = b"x") -> bytes:
    """What the server answers to a robot that does not use our code."""

    async def send() -> bytes:
        session = await bus._link.session(0.0)
        return (await session.ask(subject, payload, timeout_s=10.0)).data

    return bus._link.run(send)


def test_each_role_can_do_its_work(opener: Callable[[str], NatsBus]) -> None:
    learner, robots = opener("learner"), [opener("robot-1"), opener("robot.2")]
    for topic in ("episodes", "actors"):
        learner.poll(topic, None, 0.0)  # makes the topic's stream, if the greeting has not yet
    for number, robot in enumerate(robots):
        robot.publish("episodes", b"%d" % number, f"episode-{number}")
        robot.publish("actors", b"%d" % number, f"alive-{number}")
    learner.publish("policies", b"policy", "policy-1")
    learner.publish("learner", b"alive", "alive-1")
    assert drain(learner, "episodes")[0] == [b"0", b"1"]
    for robot in robots:
        _, cursor = drain(robot, "policies")
        assert robot.poll("policies", cursor, 0.1) == [], "it may have itself woken"
    screen = opener("screen")
    assert [drain(screen, topic)[0] for topic in ("policies", "actors", "learner")] == [
        [b"policy"],
        [b"0", b"1"],
        [b"alive"],
    ]


@pytest.mark.parametrize(
    "subject",
    [
        f"sop.{NAMESPACE}.episodes.robot=2E2",
        f"sop.{NAMESPACE}.policies.learner",
        f"sop.{NAMESPACE}.policies.robot-1",
        f"$JS.API.STREAM.CREATE.{stream_of(NAMESPACE, 'stuff')}",
        f"$JS.API.STREAM.DELETE.{stream_of(NAMESPACE, 'policies')}",
        f"$JS.API.STREAM.PURGE.{stream_of(NAMESPACE, 'policies')}",
        f"$JS.API.STREAM.MSG.DELETE.{stream_of(NAMESPACE, 'policies')}",
        f"$JS.API.DIRECT.GET.{stream_of(NAMESPACE, 'episodes')}",
        f"$JS.API.CONSUMER.DELETE.{stream_of(NAMESPACE, 'policies')}.robot=2E2",
        f"$JS.API.CONSUMER.CREATE.{stream_of(NAMESPACE, 'episodes')}.robot-1",
        "_INBOX.robot=2E2.x",
        "$SYS.REQ.SERVER.PING",
    ],
)
def test_a_robot_may_not_use_what_is_not_its_own(subject: str, opener: Callable[[str], NatsBus]) -> None:
    robot = opener("robot-1")
    with pytest.raises(Forbidden, match="'robot-1' may not use"):
        _send(robot, subject)


def test_what_is_forbidden_is_said_at_once_by_publish_and_poll(opener: Callable[[str], NatsBus]) -> None:
    robot = opener("robot-1")
    with pytest.raises(Forbidden, match=r"may not use 'sop\.run_1\.policies\.robot-1'"):
        robot.publish("policies", b"mine", "mine")
    with pytest.raises(Forbidden, match="may not use"):
        robot.poll("episodes", None, 60.0)
    with pytest.raises(Forbidden, match="may not use"):
        opener("screen").publish("actors", b"x", "x")


def test_who_is_unknown_or_believes_another_authority_is_not_let_in(
    fleet: Fleet, tmp_path: Path, closing: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Fleet(tmp_path)
    foreign.server.stop()
    bus = NatsBus(fleet.server.url(NAMESPACE), identity=foreign.people["robot-1"])
    closing.callback(bus.close)
    with pytest.raises(StoreUnavailable, match=r"certificate verify failed"):
        bus.publish("episodes", b"x", "x")
    stranger = foreign.people["robot.2"]
    for name in ("ca.pem", "certificate.pem", "key.pem"):
        (stranger.folder / name).write_bytes((fleet.people["robot-1"].folder / name).read_bytes())
    bus = NatsBus(fleet.server.url(NAMESPACE), identity=stranger)
    closing.callback(bus.close)
    with pytest.raises(Forbidden, match="does not let 'robot=2E2' in"):
        bus.publish("episodes", b"x", "x")
    seed = (stranger.folder / "nats.nk").read_text()
    assert seed not in caplog.text


def test_a_server_that_offers_no_tls_gets_no_word_from_us(fleet: Fleet, tmp_path: Path, closing: ExitStack) -> None:
    plain = closing.enter_context(NatsServer(tmp_path))
    bus = NatsBus(plain.url("run").replace("nats://", "tls://"), identity=fleet.people["robot-1"])
    closing.callback(bus.close)
    with pytest.raises(StoreUnavailable, match=r"[Ss]ecure"):
        bus.publish("episodes", b"x", "x")


def test_who_is_revoked_is_dropped_and_not_let_in_again(fleet: Fleet, opener: Callable[[str], NatsBus]) -> None:
    learner, robot = opener("learner"), opener("robot.2")
    learner.poll("episodes", None, 0.0)
    robot.publish("episodes", b"before", "before")
    waiting = robot._link.run(lambda: robot._link.session(0.0))
    revoked = fleet.users.pop("robot.2")
    fleet.configure()
    fleet.server.reload()
    robot._link.run(waiting.until_lost)
    with pytest.raises(Forbidden, match="revoked, or not enrolled there"):
        robot.publish("episodes", b"after", "after")
    assert b"after" not in drain(learner, "episodes")[0], "others go on, without it"
    fleet.users["robot.2"] = revoked
    fleet.configure()
    fleet.server.reload()
