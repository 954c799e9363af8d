"""The bus on a real nats-server: the contract, many who wait, one identity in two processes, limits, bad URLs."""

import itertools
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import sop.testing.contracts.bus as contract
from sop.core.errors import RunError
from sop.testing.contracts.bus import drain
from sop.testing.servers.nats import NatsServer
from sop.transport import EventBus, Identity, nats_feed, nats_stream
from sop.transport.base import MAX_EVENT_BYTES
from sop.transport.identity import IdentityRecord
from sop.transport.nats_bus import NatsBus
from sop.transport.nats_stream import Answer, api
from sop.transport.nats_subjects import name_token, stream_of, subject_of, subjects_of

pytestmark = pytest.mark.slow
_namespaces = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(tmp_path_factory.mktemp("nats"), sync_interval="2m") as server:
        yield server


@pytest.fixture
def url(server: NatsServer) -> str:
    return server.url(f"run-{next(_namespaces)}")


@pytest.fixture
def opener(url: str) -> Iterator[Callable[..., NatsBus]]:
    with ExitStack() as closing:

        def open_it(**options: object) -> NatsBus:
            bus = NatsBus(url, **options)  # type: ignore[arg-type]
            closing.callback(bus.close)
            return bus

        yield open_it


def _identity(name: str, role: str = "robot") -> Identity:
    return Identity(Path("/nowhere"), IdentityRecord(fleet="f", name=name, role=role, store="", bus=""))


def _ask(bus: NatsBus, subject: str) -> Answer:
    async def ask() -> Answer:
        return await api(await bus._link.session(0.0), subject)

    return bus._link.run(ask)


@pytest.mark.parametrize("rule", contract.BUS_RULES, ids=lambda rule: rule.__name__)
def test_a_nats_bus_keeps_the_contract(rule: Callable[..., None], opener: Callable[[], EventBus]) -> None:
    rule(opener)


def test_fifty_subscribers_see_four_writers_events_in_one_order(opener: Callable[..., NatsBus]) -> None:
    writer, reader = opener(), opener()
    seen: list[list[bytes]] = []

    def subscribe() -> None:
        events: list[bytes] = []
        cursor = None
        while len(events) < 400:
            found = reader.poll("a", cursor, 60.0)
            assert found, "the writers stopped early"
            events += [event for _, event in found]
            cursor = found[-1][0]
        seen.append(events)

    def publish(number: int) -> None:
        for count in range(100):
            writer.publish("a", b"%d-%d" % (number, count), f"{number}-{count}")

    threads = [threading.Thread(target=subscribe) for _ in range(50)]
    threads += [threading.Thread(target=publish, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(seen) == 50
    assert all(events == seen[0] for events in seen)
    for number in range(4):
        mine = [event for event in seen[0] if event.startswith(b"%d-" % number)]
        assert mine == [b"%d-%d" % (number, count) for count in range(100)]


def test_the_consumer_wakes_a_poll_and_the_look_is_not_needed(
    opener: Callable[..., NatsBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_feed, "LOOK_EVERY_S", 3600.0)
    writer, reader = opener(), opener()
    writer.publish("a", b"0", "0")
    ((cursor, _),) = reader.poll("a", None, 60.0)
    for number in range(1, 20):
        publishing = threading.Timer(0.01, lambda number=number: writer.publish("a", b"%d" % number, f"{number}"))
        publishing.start()
        ((cursor, event),) = reader.poll("a", cursor, 60.0)
        assert event == b"%d" % number
        publishing.join()


def test_an_event_that_two_processes_publish_comes_once(opener: Callable[..., NatsBus], url: str) -> None:
    program = (
        "import sys; from sop.transport.nats_bus import NatsBus; bus = NatsBus(sys.argv[1]);"
        "[bus.publish('a', b'%d' % number, f'id/{number}') for number in range(20)]; bus.close()"
    )
    processes = [subprocess.Popen([sys.executable, "-W", "error", "-c", program, url]) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert sorted(drain(opener(), "a")[0], key=int) == [b"%d" % number for number in range(20)]


def test_ids_that_differ_only_in_what_a_header_cannot_carry_are_two_ids(opener: Callable[..., NatsBus]) -> None:
    bus = opener()
    for number, event_id in enumerate(("a b", "a\nb", " a b", "a%20b", "\u00e4" * 1000)):
        bus.publish("a", b"%d" % number, event_id)
        bus.publish("a", b"again", event_id)
    assert drain(bus, "a")[0] == [b"0", b"1", b"2", b"3", b"4"]


def test_what_a_process_died_with_is_delivered_to_the_next_one_of_its_identity(
    opener: Callable[..., NatsBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_stream, "ACK_WAIT_S", 0.1)
    writer = opener()
    writer.publish("policies", b"0", "0")
    first = opener(identity=_identity("r.1"))
    ((start, _),) = first.poll("policies", None, 0.0)
    publishing = threading.Timer(0.2, lambda: writer.publish("policies", b"1", "1"))
    publishing.start()
    assert [event for _, event in first.poll("policies", start, 60.0)] == [b"1"]
    publishing.join()
    first.close()  # without having asked for what follows
    stream = stream_of(writer.address.namespace, "policies")
    assert _ask(writer, f"CONSUMER.INFO.{stream}.r=2E1").error is None, "the consumer outlives its process"
    second = opener(identity=_identity("r.1"))
    ((cursor, event),) = second.poll("policies", start, 60.0)
    assert event == b"1"
    polls = (second.poll("policies", cursor, 0.1) for _ in range(100))  # delivered again; a poll says it was dealt with
    assert any(_pending(second, stream) == 0 for found in polls if found == [])
    assert _ask(writer, f"STREAM.INFO.{stream}").state.consumer_count == 1


def _pending(bus: NatsBus, stream: str) -> int:
    answer = _ask(bus, f"CONSUMER.INFO.{stream}.r=2E1")
    assert answer.error is None
    return answer.num_ack_pending


def test_two_processes_of_one_identity_both_see_everything(
    opener: Callable[..., NatsBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_feed, "LOOK_EVERY_S", 0.2)
    writer = opener()
    readers = [opener(identity=_identity("learner-1", "learner")) for _ in range(2)]
    seen: dict[int, list[bytes]] = {0: [], 1: []}

    def follow(number: int) -> None:
        cursor = None
        while len(seen[number]) < 30:
            found = readers[number].poll("a", cursor, 60.0)
            seen[number] += [event for _, event in found]
            cursor = found[-1][0]

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for number in range(30):
        writer.publish("a", b"%d" % number, f"{number}")
    for thread in threads:
        thread.join(60)
    assert seen == {reader: [b"%d" % number for number in range(30)] for reader in range(2)}


def test_an_event_too_large_is_dropped_with_a_line_in_the_log(
    opener: Callable[..., NatsBus], caplog: pytest.LogCaptureFixture
) -> None:
    bus = opener()
    bus.publish("a", b"0", "0")

    async def publish_too_much() -> None:
        session = await bus._link.session(0.0)
        subject = subject_of(bus.address.namespace, "a", "mallory")
        await session.ask(subject, b"x" * (MAX_EVENT_BYTES + 1), timeout_s=10.0)

    bus._link.run(publish_too_much)
    bus.publish("a", b"1", "1")
    with caplog.at_level(logging.WARNING):
        assert drain(bus, "a")[0] == [b"0", b"1"]
    assert "event 2 has 65537 bytes and is dropped" in caplog.text


def test_the_owner_makes_the_streams_and_changes_their_limits(opener: Callable[..., NatsBus]) -> None:
    opener(keep_s={"actors": 60.0}).publish("actors", b"alive", "0")
    owner = opener(owner=True, keep_s={"actors": 600.0})
    owner.publish("learner", b"alive", "0")
    assert [event for _, event in owner.poll("actors", None, 0.0)] == [b"alive"]
    config = _ask(owner, f"STREAM.INFO.{stream_of(owner.address.namespace, 'actors')}").config
    assert (config["storage"], config["max_age"], config["discard"]) == ("memory", 600 * 10**9, "old")
    config = _ask(owner, f"STREAM.INFO.{stream_of(owner.address.namespace, 'learner')}").config
    assert (config["storage"], config["max_age"], config["max_bytes"]) == ("file", 0, 256 << 20)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ("nats://10.0.0.1:4222/run", ValueError, "this machine only"),
        ("tls://127.0.0.1:4222/run", RunError, "needs an identity"),
        ("nats://127.0.0.1:4222", ValueError, "namespace ''"),
        ("nats://127.0.0.1:4222/a.b", ValueError, r"namespace 'a\.b'"),
        ("nats://127.0.0.1:99999/run", ValueError, "[Pp]ort"),
        ("nats:///run", ValueError, "must be nats://host:port/namespace"),
        ("nats://me:secret@127.0.0.1/run", ValueError, "no user, password"),
    ],
)
def test_a_bad_url_is_refused_without_repeating_a_password(bad: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        NatsBus(bad)
    assert "secret" not in str(caught.value)


def test_names_of_streams_and_senders_cannot_be_mixed_up() -> None:
    assert stream_of("a", "b_c") != stream_of("a_b", "c")
    assert stream_of("a", "episodes") == "sop_a_episodes"
    assert subject_of("a", "episodes", name_token("robot.1")) == "sop.a.episodes.robot=2E1"
    assert name_token("anyone") != "anyone"
    assert subjects_of("a", "robot", "r1").subscribe == ("_INBOX.r1.>",)
    with pytest.raises(ValueError, match="role 'king'"):
        subjects_of("a", "king", "r1")
