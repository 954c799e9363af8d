"""Event buses: the contract over every implementation, and what only a file can get wrong."""

import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import sop.testing.contracts.bus as contract
from sop.core.errors import StoreUnavailable
from sop.testing.contracts.bus import drain
from sop.testing.memory import MemoryBus
from sop.transport import EventBus, SqliteBus, open_bus, sqlite_bus
from sop.transport.sqlite_bus import MAINTAIN_EVERY_S


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _opener(kind: str, path: Path, closing: ExitStack) -> Callable[[], EventBus]:
    memory = MemoryBus()

    def open_it() -> EventBus:
        bus: EventBus = memory if kind == "memory" else SqliteBus(path)
        closing.callback(bus.close)
        return bus

    return open_it


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("rule", contract.BUS_RULES, ids=lambda rule: rule.__name__)
def test_every_bus_keeps_the_contract(kind: str, rule: Callable[..., None], tmp_path: Path, closing: ExitStack) -> None:
    rule(_opener(kind, tmp_path / "bus.sqlite", closing))


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_cursor_of_a_lost_bus_starts_at_the_beginning(kind: str, tmp_path: Path, closing: ExitStack) -> None:
    old = _opener(kind, tmp_path / "old.sqlite", closing)()
    new = _opener(kind, tmp_path / "new.sqlite", closing)()
    old.publish("a", b"old", "0")
    cursor = old.poll("a", None, 0.0)[-1][0]
    for number in range(3):
        new.publish("a", b"%d" % number, f"{number}")
    assert drain(new, "a", cursor)[0] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("cursor", ["1", ":", "a:", ":1", "a:-1", "a:1.5", "a:" + "9" * 40])
def test_what_is_not_a_cursor_is_refused(kind: str, cursor: str, tmp_path: Path, closing: ExitStack) -> None:
    bus = _opener(kind, tmp_path / "bus.sqlite", closing)()
    with pytest.raises(ValueError, match="not a cursor"):
        bus.poll("a", cursor, 0.0)


def _publish_many(path: str, writer: int, start: object) -> None:
    bus = SqliteBus(path)
    start.wait(60)  # type: ignore[attr-defined]
    for number in range(200):
        bus.publish("a", b"%d-%d" % (writer, number), f"{writer}-{number}")
        bus.publish("a", b"again", f"{writer}-{number // 2}")
    bus.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_two_processes_publish_and_nothing_is_lost_doubled_or_reordered(
    method: str, tmp_path: Path, closing: ExitStack
) -> None:
    path = tmp_path / "bus.sqlite"
    bus = SqliteBus(path, owner=True)
    closing.callback(bus.close)
    context = multiprocessing.get_context(method)
    start = context.Barrier(2)
    processes = [context.Process(target=_publish_many, args=(str(path), writer, start)) for writer in range(2)]
    for process in processes:
        process.start()
    events: list[bytes] = []
    cursor = None
    while len(events) < 400:
        found = bus.poll("a", cursor, 60.0)
        assert found, "the writers stopped early"
        events += [event for _, event in found]
        cursor = found[-1][0]
        bus.maintain()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert bus.poll("a", cursor, 0.0) == []
    for writer in range(2):
        mine = [event for event in events if event.startswith(b"%d-" % writer)]
        assert mine == [b"%d-%d" % (writer, number) for number in range(200)]


def _use_inherited(bus: SqliteBus, ready: object) -> None:
    inherited = bus._connection
    bus.publish("a", b"child", "child")
    events = [event for _, event in bus.poll("a", None, 0.0)]
    ready.put((events, bus._connection is inherited))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_forked_child_may_use_the_bus_of_its_parent(tmp_path: Path, closing: ExitStack) -> None:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    closing.callback(bus.close)
    bus.publish("a", b"parent", "parent")
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    child = context.Process(target=_use_inherited, args=(bus, ready))
    child.start()
    assert ready.get(timeout=60) == ([b"parent", b"child"], False), "a connection must not cross a fork"
    child.join(60)
    assert child.exitcode == 0
    bus.publish("a", b"parent again", "parent again")
    assert drain(bus, "a")[0] == [b"parent", b"child", b"parent again"]


def test_events_and_ids_survive_closing_and_opening_again(tmp_path: Path) -> None:
    path = tmp_path / "bus.sqlite"
    bus = SqliteBus(path)
    for number in range(3):
        bus.publish("a", b"%d" % number, f"{number}")
    _, cursor = drain(bus, "a")
    bus.publish("a", b"3", "3")
    bus.close()
    again = SqliteBus(path, owner=True)
    again.publish("a", b"dropped", "0")
    again.publish("a", b"4", "4")
    assert drain(again, "a", cursor)[0] == [b"3", b"4"]
    again.close()


def test_only_the_owner_moves_the_log_into_the_database(tmp_path: Path, closing: ExitStack) -> None:
    path = tmp_path / "bus.sqlite"
    writer, owner = SqliteBus(path), SqliteBus(path, owner=True)
    closing.callback(writer.close)
    closing.callback(owner.close)
    log = path.with_name("bus.sqlite-wal")
    owner.maintain()
    for number in range(150):
        writer.publish("a", b"x" * 40_000, f"{number}")
    grown = log.stat().st_size
    assert grown > 150 * 40_000, "writers never shorten the log"
    with pytest.raises(ValueError, match="only the owner"):
        writer.maintain()
    with pytest.raises(ValueError, match="only the owner"):
        writer.trim("a", 0.0)
    owner.maintain()
    assert path.stat().st_size > 150 * 40_000
    writer.publish("a", b"y" * 40_000, "next")
    assert log.stat().st_size == grown, "the log is written from its beginning again"
    assert len(drain(owner, "a")[0]) == 151


def test_the_owner_forgets_old_signs_of_life_when_it_is_due(tmp_path: Path, closing: ExitStack) -> None:
    now_s = {"utc": 1000.0, "monotonic": 0.0}
    bus = SqliteBus(
        tmp_path / "bus.sqlite",
        owner=True,
        keep_s={"actors": 60.0},
        clock=lambda: now_s["utc"],
        monotonic=lambda: now_s["monotonic"],
    )
    closing.callback(bus.close)
    for topic in ("actors", "episodes"):
        bus.publish(topic, b"old", "old")
    _, cursor = drain(bus, "actors")
    now_s["utc"] += 61.0
    bus.publish("actors", b"new", "new")
    assert drain(bus, "actors")[0] == [b"old", b"new"], "maintenance is not due yet"
    now_s["monotonic"] += MAINTAIN_EVERY_S
    assert drain(bus, "actors")[0] == [b"new"]
    assert drain(bus, "episodes")[0] == [b"old"], "topics without a limit are kept for ever"
    assert drain(bus, "actors", cursor)[0] == [b"new"], "a cursor outlives its event"
    assert bus.trim("actors", 60.0) == 0


def test_a_file_that_is_not_a_bus_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "bus.sqlite"
    path.write_bytes(b"not a database at all " * 200)
    with pytest.raises(StoreUnavailable, match=r"bus\.sqlite: file is not a database; stop the run and delete"):
        SqliteBus(path)


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bus.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(StoreUnavailable, match="has schema 7, this program knows 1"):
        SqliteBus(path)


def test_a_folder_that_cannot_be_made_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match=r"bus .*/file/bus\.sqlite"):
        SqliteBus(tmp_path / "file" / "bus.sqlite")


def test_a_full_disk_says_what_to_do_and_keeps_what_was_published(tmp_path: Path, closing: ExitStack) -> None:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    closing.callback(bus.close)
    bus.publish("a", b"first", "first")
    pages = bus._connection.execute("PRAGMA page_count").fetchone()[0]
    bus._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreUnavailable, match="the disk is full: free room"):
        bus.publish("a", b"x" * 60_000, "large")
    assert drain(bus, "a")[0] == [b"first"]
    bus._connection.execute(f"PRAGMA max_page_count = {pages + 100}")
    bus.publish("a", b"x" * 60_000, "large")
    assert drain(bus, "a")[0] == [b"first", b"x" * 60_000]


def test_a_schema_that_sqlite_took_back_by_itself_is_reported_with_the_first_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clash = "INSERT INTO once VALUES (1);INSERT OR ROLLBACK INTO once VALUES (1)"
    monkeypatch.setattr(sqlite_bus, "_SCHEMA", f"CREATE TABLE once (key UNIQUE);{clash}")
    with pytest.raises(StoreUnavailable, match="UNIQUE constraint failed"):
        SqliteBus(tmp_path / "bus.sqlite")


def _wait_in_threads(bus: SqliteBus, topic: str, number: int, results: list[list[bytes]]) -> list[threading.Thread]:
    """Threads that wait for the first events of a topic; `results` gets what each one found."""

    def wait() -> None:
        results.append([event for _, event in bus.poll(topic, None, 60.0)])

    threads = [threading.Thread(target=wait) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("same_object", [True, False], ids=["same-object", "another-object"])
def test_two_hundred_waiting_threads_all_get_the_event_of_their_topic(
    same_object: bool, tmp_path: Path, closing: ExitStack
) -> None:
    bus, other = SqliteBus(tmp_path / "bus.sqlite"), SqliteBus(tmp_path / "bus.sqlite")
    closing.callback(bus.close)
    closing.callback(other.close)
    found: dict[str, list[list[bytes]]] = {"a": [], "b": []}
    threads = {topic: _wait_in_threads(bus, topic, 200 if topic == "a" else 5, found[topic]) for topic in found}
    assert [thread.name for thread in threading.enumerate()].count("bus-watch") == 1, "one thread looks for all"
    publisher = bus if same_object else other
    publisher.publish("a", b"for a", "id")
    for thread in threads["a"]:
        thread.join(30)
    assert found == {"a": [[b"for a"]] * 200, "b": []}
    publisher.publish("b", b"for b", "id")
    for thread in threads["b"]:
        thread.join(30)
    assert found["b"] == [[b"for b"]] * 5


def test_a_chain_of_waiting_threads_misses_no_event(tmp_path: Path, closing: ExitStack) -> None:
    """Each thread answers what it was woken by; one lost wake-up would stop the chain."""
    buses = [SqliteBus(tmp_path / "bus.sqlite") for _ in range(2)]
    for bus in buses:
        closing.callback(bus.close)

    def answer(turn: int) -> None:
        bus, cursor, number = buses[turn], None, turn
        while number < 200:
            found = bus.poll("a", cursor, 30.0)
            assert found, f"nothing came before {number}"
            for cursor, event in found:  # noqa: B007 - the last cursor counts
                if int(event) == number:
                    number += 2
                    bus.publish("a", b"%d" % (number - 1), f"{number - 1}")

    threads = [threading.Thread(target=answer, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    buses[0].publish("a", b"0", "0")
    for thread in threads:
        thread.join(60)
    assert drain(buses[0], "a")[0] == [b"%d" % number for number in range(201)]


def test_waiting_polls_with_different_cursors_each_get_what_they_lack(tmp_path: Path, closing: ExitStack) -> None:
    bus, other = SqliteBus(tmp_path / "bus.sqlite"), SqliteBus(tmp_path / "bus.sqlite")
    closing.callback(bus.close)
    closing.callback(other.close)
    for number in range(3):
        other.publish("a", b"%d" % number, f"{number}")
    cursors = [cursor for cursor, _ in bus.poll("a", None, 0.0)]
    with sqlite3.connect(bus.path) as connection:  # forgotten: a poll with an old cursor waits too
        connection.execute("DELETE FROM events")
    connection.close()
    found: dict[int, list[bytes]] = {}

    def wait(position: int) -> None:
        found[position] = [event for _, event in bus.poll("a", cursors[position], 60.0)]

    threads = [threading.Thread(target=wait, args=(position,)) for position in range(3)]
    for thread in threads:
        thread.start()
    other.publish("a", b"new", "new")
    for thread in threads:
        thread.join(30)
    assert found == {0: [b"new"], 1: [b"new"], 2: [b"new"]}


def test_a_waiting_poll_never_gets_what_lies_before_its_cursor(tmp_path: Path, closing: ExitStack) -> None:
    bus, other = SqliteBus(tmp_path / "bus.sqlite"), SqliteBus(tmp_path / "bus.sqlite")
    closing.callback(bus.close)
    closing.callback(other.close)
    other.publish("a", b"zero", "0")
    ((cursor, _),) = bus.poll("a", None, 0.0)
    history, _, row = cursor.partition(":")
    after_next = f"{history}:{int(row) + 1}"  # of a reader that has seen the next event elsewhere
    found: dict[str, list[bytes]] = {}

    def wait(name: str, after: str) -> None:
        found[name] = [event for _, event in bus.poll("a", after, 60.0)]

    threads = [threading.Thread(target=wait, args=pair) for pair in (("behind", cursor), ("ahead", after_next))]
    for thread in threads:
        thread.start()
    connection = sqlite3.connect(bus.path, isolation_level=None, timeout=10.0)
    connection.execute("BEGIN IMMEDIATE")  # both appear at once, in one look of the watcher
    for number, event in enumerate((b"first", b"second")):
        connection.execute(
            "INSERT INTO events (topic, event_id, event, utc_s) VALUES ('a', ?, ?, 0)", (f"new-{number}", event)
        )
    connection.execute("COMMIT")
    connection.close()
    for thread in threads:
        thread.join(30)
    assert found == {"behind": [b"first", b"second"], "ahead": [b"second"]}


def test_the_watching_thread_ends_with_its_bus(tmp_path: Path) -> None:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    assert bus.poll("a", None, 0.01) == []
    (watcher,) = [thread for thread in threading.enumerate() if thread.name == "bus-watch"]
    bus.close()
    assert not watcher.is_alive()


def test_polls_say_what_is_wrong_with_the_file_when_the_watching_thread_cannot_look(
    tmp_path: Path, closing: ExitStack
) -> None:
    bus = SqliteBus(tmp_path / "bus.sqlite")
    closing.callback(bus.close)
    with sqlite3.connect(bus.path) as connection:
        connection.execute("ALTER TABLE events RENAME TO moved")
        connection.commit()
        with pytest.raises(StoreUnavailable, match="no such table: events"):
            bus.poll("a", None, 30.0)
        connection.execute("ALTER TABLE moved RENAME TO events")
    connection.close()
    found: list[list[bytes]] = []
    (thread,) = _wait_in_threads(bus, "a", 1, found)
    bus.publish("a", b"well again", "id")
    thread.join(30)
    assert found == [[b"well again"]]


def test_urls_open_what_they_name(tmp_path: Path, closing: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    owner = open_bus(f"sqlite://{tmp_path}/bus.sqlite", owner=True, keep_s={"actors": 60.0})
    closing.callback(owner.close)
    relative = open_bus("sqlite://bus.sqlite")
    closing.callback(relative.close)
    relative.publish("a", b"x", "id")
    assert drain(owner, "a")[0] == [b"x"]
    with pytest.raises(ValueError, match=r"unknown scheme 'ftp', known are \['nats', 'sqlite', 'tls'\]"):
        open_bus("ftp://host")
    with pytest.raises(ValueError, match="unknown scheme ''"):
        open_bus("bus.sqlite")
