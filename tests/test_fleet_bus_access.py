"""A real nats-server with the configuration that a fleet writes: who is let in, who may say what, and who no more."""

import base64
import contextlib
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import nkeys
import pytest

from fleet_examples import DAY, FleetBus, free_bus, make_fleet, secrets_of, until
from recovery_times import Recovery
from sop.core.errors import Forbidden, StoreError, StoreUnavailable
from sop.core.events import TOPIC_ACTORS, TOPIC_EPISODES, TOPIC_LEARNER, TOPIC_POLICIES
from sop.fleet import Fleet
from sop.testing.servers.nats import NatsServer
from sop.transport import EventBus, load_identity, open_bus
from sop.transport.nats_subjects import stream_of, subject_of

pytestmark = pytest.mark.slow


class Place(SimpleNamespace):
    """A fleet, its bus, and a way to be one of its members."""

    fleet: Fleet
    server: NatsServer

    @contextlib.contextmanager
    def bus(self, name: str, folder: Path | None = None) -> Iterator[EventBus]:
        identity = load_identity(folder or self.fleet.folder / "identities" / name)
        with contextlib.closing(
            open_bus(self.server.url("run"), owner=identity.record.role == "learner", identity=identity)
        ) as bus:
            yield bus


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("f")
    fleet = make_fleet(folder / "lab", bus=free_bus(), clock=time.time_ns)
    for name, role in {"robot-1": "robot", "robot-2": "robot", "brain": "learner", "eye": "observer"}.items():
        fleet.enroll(name, role)
    with FleetBus(folder / "nats", fleet) as server:
        found = Place(fleet=fleet, server=server)
        with found.bus("brain") as brain, found.bus("robot-1") as robot:
            brain.publish(TOPIC_POLICIES, b"1", "p1")
            for topic in (TOPIC_EPISODES, TOPIC_ACTORS):  # made by the learner while it stays, some moments after
                until(lambda topic=topic: _accepted(robot, topic), f"the learner has made {topic}")
        yield found


def _refused(action: Callable[[], object]) -> bool:
    """Whether it is forbidden; a connection that is just being lost has not been told anything."""
    try:
        action()
    except Forbidden:
        return True
    except StoreUnavailable:
        return False
    return False


def _accepted(bus: EventBus, topic: str) -> bool:
    """Whether somebody keeps the topic by now."""
    try:
        bus.publish(topic, b"first", "first")
    except StoreUnavailable:
        return False
    return True


def _events(bus: EventBus, topic: str) -> list[bytes]:
    return [event for _, event in bus.poll(topic, None, 1.0)]


def test_each_role_says_and_hears_what_it_may(place: Place) -> None:
    with place.bus("robot-1") as robot, place.bus("brain") as brain, place.bus("eye") as eye:
        robot.publish(TOPIC_EPISODES, b"one", "e1")
        robot.publish(TOPIC_ACTORS, b"alive", "a1")
        assert b"one" in _events(brain, TOPIC_EPISODES)
        assert b"alive" in _events(eye, TOPIC_ACTORS)
        assert _events(robot, TOPIC_POLICIES) == [b"1"]
        for topic in (TOPIC_POLICIES, TOPIC_LEARNER):
            assert _refused(lambda topic=topic: robot.publish(topic, b"evil", "x")), topic
        for topic in (TOPIC_EPISODES, TOPIC_ACTORS, TOPIC_LEARNER):
            assert _refused(lambda topic=topic: robot.poll(topic, None, 0.1)), topic
        for topic in (TOPIC_POLICIES, TOPIC_EPISODES):
            assert _refused(lambda topic=topic: eye.publish(topic, b"evil", "x")), topic


class Raw:
    """The protocol by hand, as an attacker with the identity of a member speaks it."""

    def __init__(self, place: Place, name: str) -> None:
        folder = place.fleet.folder / "identities" / name
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        plain = socket.create_connection(("127.0.0.1", place.server.port), 5)
        info = plain.recv(4096)
        self._socket = context.wrap_socket(plain, server_hostname="127.0.0.1")
        nonce = info.split(b'"nonce":"')[1].split(b'"')[0]
        pair = nkeys.from_seed((folder / "nats.nk").read_bytes())
        signature = base64.urlsafe_b64encode(pair.sign(nonce)).rstrip(b"=").decode()
        public = pair.public_key.decode()
        self.say(f'CONNECT {{"nkey":"{public}","sig":"{signature}","verbose":false,"headers":true}}\r\nPING\r\n')
        self.hears("PONG")

    def say(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def hears(self, word: str) -> str:
        heard = ""
        while word not in heard:
            data = self._socket.recv(4096).decode()
            assert data, f"closed after {heard}"
            heard += data
        return heard

    def close(self) -> None:
        self._socket.close()


def test_a_robot_cannot_speak_as_another_or_hear_what_is_for_others(place: Place) -> None:
    with contextlib.closing(Raw(place, "robot-2")) as raw:
        stream = stream_of("run", TOPIC_EPISODES)
        for subject in (
            subject_of("run", TOPIC_EPISODES, "robot-1"),
            subject_of("run", TOPIC_POLICIES, "robot-2"),
            "_INBOX.robot-1.x",
            f"$JS.API.STREAM.DELETE.{stream}",
            f"$JS.API.STREAM.PURGE.{stream}",
            f"$JS.API.CONSUMER.CREATE.{stream}.robot-2",
            f"$JS.API.CONSUMER.DELETE.{stream_of('run', TOPIC_POLICIES)}.robot-1",
            "$SYS.REQ.SERVER.PING",
        ):
            raw.say(f"PUB {subject} 1\r\nx\r\n")
            assert subject.lower() in raw.hears("Permissions Violation for Publish").lower()
        for number, subject in enumerate((">", "_INBOX.>", "_INBOX.robot-1.>", "sop.run.episodes.*", "$SYS.>")):
            raw.say(f"SUB {subject} {number}\r\n")
            assert f'"{subject}"'.lower() in raw.hears("Permissions Violation for Subscription").lower()


def _handshake(place: Place, folder: Path | None, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> str:
    """What a client hears that comes with the certificate of a folder, or without one, and with no other proof."""
    context = ssl.create_default_context(cafile=str(place.fleet.folder / "ca.pem"))
    context.maximum_version = newest
    if folder is not None:
        stem = "nats" if folder.name == "servers" else "certificate"
        context.load_cert_chain(folder / f"{stem}.pem", folder / ("nats.key" if stem == "nats" else "key.pem"))
    try:
        with socket.create_connection(("127.0.0.1", place.server.port), 5) as plain:
            assert plain.recv(4096).startswith(b"INFO")
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                secure.sendall(b"CONNECT {}\r\nPING\r\n")
                return secure.recv(4096).decode()
    except ssl.SSLError as error:
        return str(error)
    except ConnectionError as error:
        return type(error).__name__


def test_no_certificate_a_foreign_one_an_expired_one_old_tls_and_no_tls_are_refused(
    place: Place, tmp_path: Path
) -> None:
    stranger = make_fleet(tmp_path / "stranger", clock=time.time_ns).folder / "identities" / "release"
    late = Fleet(place.fleet.folder, clock=lambda: time.time_ns() - 100 * DAY)
    late.enroll("late", "robot", out=tmp_path / "late")
    log, good = place.server.folder / "server.log", place.fleet.folder / "identities" / "robot-1"
    for folder, why in [
        (None, "client didn't provide a certificate"),
        (stranger, "certificate signed by unknown authority"),
        (tmp_path / "late", "certificate has expired"),
        (place.fleet.folder / "servers", "incompatible key usage"),
        (good, "unsupported versions"),
    ]:
        newest = ssl.TLSVersion.TLSv1_2 if folder == good else ssl.TLSVersion.TLSv1_3
        before = log.read_text().count(why)
        assert "-ERR" not in _handshake(place, folder, newest), f"let in as far as the protocol: {why}"
        until(lambda why=why, before=before: log.read_text().count(why) > before, why)
    assert "Authorization Violation" in _handshake(place, good), "a certificate alone is not enough"
    with socket.create_connection(("127.0.0.1", place.server.port), 5) as plain:
        plain.recv(4096)
        plain.sendall(b"CONNECT {}\r\nPING\r\n")
        heard = b""
        with contextlib.suppress(ConnectionError):
            while data := plain.recv(4096):
                heard += data
    assert b"PONG" not in heard
    with place.bus("late", tmp_path / "late") as bus, pytest.raises(StoreError):
        bus.publish(TOPIC_EPISODES, b"x", "late")
    late.revoke("late", "test")


def test_a_member_refuses_a_server_of_another_authority_and_one_without_tls(place: Place, tmp_path: Path) -> None:
    other = make_fleet(tmp_path / "other", bus=free_bus(), clock=time.time_ns)
    with FleetBus(tmp_path / "a", other) as false_server:
        found = Place(fleet=place.fleet, server=false_server)
        with found.bus("robot-1") as bus, pytest.raises(StoreError, match=r"(?i)certificate"):
            bus.publish(TOPIC_EPISODES, b"x", "false")
    with NatsServer(tmp_path / "b") as plain:
        identity = load_identity(place.fleet.folder / "identities" / "robot-1")
        url = plain.url("run").replace("nats://", "tls://")
        with contextlib.closing(open_bus(url, identity=identity)) as bus, pytest.raises(StoreError):
            bus.publish(TOPIC_EPISODES, b"x", "plain")


def test_a_revoked_robot_is_dropped_at_once_while_the_others_go_on(
    place: Place, tmp_path: Path, recovery: Recovery
) -> None:
    fleet = Fleet(place.fleet.folder)
    fleet.enroll("robot-3", "robot")
    with place.bus("robot-3") as robot, place.bus("robot-1") as other:

        def may(bus: EventBus, event_id: str) -> bool:
            try:
                bus.publish(TOPIC_EPISODES, b"x", event_id)
            except StoreError:
                return False
            return True

        until(lambda: may(robot, "r3-1"), "the server has read of robot-3")
        assert may(other, "r1-1")
        recovery.fault_is_over()
        steps = fleet.revoke("robot-3", "left the building")
        assert any("nats-server" in text for text in steps.done)
        until(lambda: _refused(lambda: robot.publish(TOPIC_EPISODES, b"x", "r3-2")), "robot-3 cannot speak")
        until(lambda: _refused(lambda: robot.poll(TOPIC_POLICIES, None, 0.1)), "robot-3 cannot listen")
        recovery.whole("the bus refuses it")
        assert may(other, "r1-2")
        assert _events(other, TOPIC_POLICIES) == [b"1"]
    kept = tmp_path / "kept-by-a-thief"
    shutil.move(fleet.folder / "identities" / "robot-3", kept)
    fleet.enroll("robot-3", "robot", again=True)
    with place.bus("robot-3") as robot:
        until(lambda: may(robot, "r3-3"), "it is back with new keys")
    with place.bus("robot-3", kept) as thief:
        assert _refused(lambda: thief.publish(TOPIC_EPISODES, b"x", "r3-4"))


def test_no_secret_is_in_the_log_or_on_the_command_line(place: Place) -> None:
    secrets = secrets_of(place.fleet.folder)
    log = (place.server.folder / "server.log").read_text()
    command = Path(f"/proc/{place.server.pid}/cmdline").read_text()
    assert "robot-3" in log or "Reloaded" in log, "it is the log of what happened here"
    assert not [secret for secret in secrets if secret in log or secret in command]
