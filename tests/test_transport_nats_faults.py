"""The bus while its server dies, is wiped, is set back, or lies."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sop.core.errors import StoreUnavailable
from sop.testing.contracts.bus import drain
from sop.testing.servers.nats import NatsServer
from sop.transport import nats_feed, nats_link
from sop.transport.nats_bus import NatsBus

pytestmark = pytest.mark.slow


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def server(tmp_path: Path, closing: ExitStack) -> NatsServer:
    return closing.enter_context(NatsServer(tmp_path / "nats"))


@pytest.fixture
def bus(server: NatsServer, closing: ExitStack) -> NatsBus:
    bus = NatsBus(server.url("run"), owner=True)
    closing.callback(bus.close)
    return bus


def _publish(bus: NatsBus, *numbers: int) -> None:
    for number in numbers:
        bus.publish("episodes", b"%d" % number, f"{number}")


def test_nothing_acknowledged_is_lost_when_the_server_is_killed(server: NatsServer, bus: NatsBus) -> None:
    _publish(bus, *range(10))
    events, cursor = drain(bus, "episodes")
    assert len(events) == 10
    _publish(bus, *range(10, 20))
    server.kill()
    with pytest.raises(StoreUnavailable):
        bus.publish("episodes", b"never", "never")
    with pytest.raises(StoreUnavailable):
        bus.poll("episodes", cursor, 0.0)
    server.start()
    found = bus.poll("episodes", cursor, 60.0)
    assert [event for _, event in found] == [b"%d" % number for number in range(10, 20)]
    _publish(bus, *range(15, 22))
    assert drain(bus, "episodes", found[-1][0])[0] == [b"20", b"21"], "ids outlive the server"


def test_a_poll_that_waits_outlives_its_server(server: NatsServer, bus: NatsBus) -> None:
    _publish(bus, 0)
    _, cursor = drain(bus, "episodes")
    found: list[bytes] = []
    waiting = threading.Thread(target=lambda: found.extend(event for _, event in bus.poll("episodes", cursor, 60.0)))
    waiting.start()
    server.kill()
    server.start()
    _publish_when_back(bus, 1)
    waiting.join(60)
    assert found == [b"1"]


def _publish_when_back(bus: NatsBus, number: int) -> None:
    for _ in range(20):
        try:
            _publish(bus, number)
            return
        except StoreUnavailable:
            continue


def test_a_server_that_lost_everything_is_filled_and_read_from_the_beginning(server: NatsServer, bus: NatsBus) -> None:
    _publish(bus, *range(5))
    _, cursor = drain(bus, "episodes")
    server.stop()
    shutil.rmtree(server.data)
    server.start()
    _publish_when_back(bus, 100)
    assert drain(bus, "episodes", cursor)[0] == [b"100"]


def test_a_server_that_was_set_back_is_read_from_the_beginning(
    server: NatsServer, bus: NatsBus, tmp_path: Path
) -> None:
    _publish(bus, 0, 1)
    server.stop()
    shutil.copytree(server.data, tmp_path / "backup")
    server.start()
    _publish_when_back(bus, 2)
    _publish(bus, 3, 4)
    _, cursor = drain(bus, "episodes")
    server.stop()
    shutil.rmtree(server.data)
    shutil.copytree(tmp_path / "backup", server.data)
    server.start()
    found = bus.poll("episodes", cursor, 60.0)
    assert [event for _, event in found] == [b"0", b"1"]
    _publish(bus, 2)
    assert drain(bus, "episodes", found[-1][0])[0] == [b"2"]


def test_a_bus_without_a_server_opens_says_so_and_closes() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        bus = NatsBus(f"nats://127.0.0.1:{taken.getsockname()[1]}/run")
        with pytest.raises(StoreUnavailable, match="no connection"):
            bus.poll("episodes", None, 0.0)
        with pytest.raises(StoreUnavailable, match="no connection"):
            bus.publish("episodes", b"x", "x")
        bus.close()


_INFO = b'INFO {"max_payload": 1048576, "headers": true}\r\n'


@pytest.mark.parametrize(
    "lines",
    [
        [b"INFO [1, 2]\r\n"],
        [b"INFO " + b"x" * 200_000],
        [b"HTTP/1.1 400 Bad Request\r\n"],
        [_INFO, b"PONG\r\n", b"MSG _INBOX.anyone.x 1 99999999999\r\n" + b"x" * 4096],
        [_INFO, b"PONG\r\n", b"M" * 200_000],
        [_INFO, b"PONG\r\n", b"HMSG _INBOX.anyone.x 1 10 10\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\r\n"],
        [_INFO, b"PONG\r\n", b"INFO {not json\r\n"],
    ],
    ids=["info-list", "info-endless", "other-protocol", "message-of-100-GB", "line-endless", "bad-header", "bad-info"],
)
def test_a_server_that_lies_costs_an_error_and_nothing_else(
    lines: list[bytes], closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (nats_feed, nats_link):
        monkeypatch.setattr(module, "GRACE_S", 0.5)
    listener = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
    listener.settimeout(60)
    stop = threading.Event()
    answering = threading.Thread(target=_lie, args=(listener, lines, stop))
    answering.start()
    bus = NatsBus(f"nats://127.0.0.1:{listener.getsockname()[1]}/run")
    try:
        with pytest.raises(StoreUnavailable):
            bus.poll("episodes", None, 0.0)
    finally:
        bus.close()
        stop.set()
        socket.create_connection(listener.getsockname()).close()
        answering.join(60)


def _lie(listener: socket.socket, lines: list[bytes], stop: threading.Event) -> None:
    while not stop.is_set():
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(5)
            try:
                for line in lines:
                    connection.sendall(line)
                while connection.recv(4096):
                    pass
            except OSError:
                continue


def test_a_forked_child_may_not_use_the_bus_of_its_parent(
    bus: NatsBus, monkeypatch: pytest.MonkeyPatch, closing: ExitStack
) -> None:
    monkeypatch.setattr(bus._link, "_process", -1)
    with pytest.raises(ValueError, match="open it after the fork"):
        bus.publish("episodes", b"x", "x")
    bus.close()
    monkeypatch.undo()
    _publish(bus, 0)


def test_closing_ends_the_thread_and_wakes_every_poll(bus: NatsBus) -> None:
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(bus.poll("episodes", None, 60.0))) for _ in range(5)]
    for thread in threads:
        thread.start()
    _wait_for(lambda: bool(bus._feeds) and len(bus._feed("episodes")._waiting) == 5)
    bus.close()
    for thread in threads:
        thread.join(30)
    assert found == [[]] * 5
    assert not [thread for thread in threading.enumerate() if thread.name == "bus-nats"]


def _wait_for(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came true")
