"""A robot that store and bus refuse (it was revoked): it says so, keeps everything, and goes on when it is let in."""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import sop.transport.retry as retry_module
from broadcast_examples import PATIENCE_S, World, eventually
from sop.actor import ActorReporter, EpisodeSpool, Uploader
from sop.core.codec import content_hash
from sop.core.errors import Forbidden, StoreUnavailable
from sop.core.events import TOPIC_ACTORS, TOPIC_EPISODES
from sop.core.layout import EpisodeKey
from sop.testing.clock import FakeClock
from sop.testing.episodes import make_episode
from sop.testing.memory import MemoryBus, MemoryStore
from sop.transport.retry import FORBIDDEN_PAUSE_S, Backoff

REVOKED = "the server does not let 'robot-0' in"


def refuse(until: Callable[[], bool] = lambda: False, *, only: str = "") -> Callable[[str, str], None]:
    """Before every operation (or that one alone), until it holds."""

    def before(operation: str, _place: str) -> None:
        if not until() and only in ("", operation):
            raise Forbidden(REVOKED)

    return before


@pytest.fixture
def world() -> Iterator[World]:
    """Closes its subscribers."""
    made = World()
    yield made
    for subscriber in made.subscribers:
        subscriber.close()


def test_whoever_is_refused_asks_rarely_and_whoever_is_alone_asks_soon() -> None:
    backoff = Backoff(random.Random(1), first_s=0.1, max_s=1.0)
    assert backoff.after(Forbidden("no")) == FORBIDDEN_PAUSE_S == 30.0
    assert 0.05 <= backoff.after(StoreUnavailable("away")) <= 0.1, "the refusal has not made the pauses longer"


def test_a_refused_uploader_says_so_keeps_everything_and_ends_at_once(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    keys = [str(spool.commit(make_episode(sequence=number))) for number in range(3)]
    asked: list[str] = []

    def before(operation: str, place: str) -> None:
        asked.append(place)
        raise Forbidden(REVOKED)

    uploader = Uploader(spool, MemoryStore(before=before), MemoryBus(), FakeClock())
    uploader.start()
    pause = threading.Event()
    while not uploader.problem:
        pause.wait(0.001)
    uploader.wake()
    assert uploader.close() == 3, "and raises nothing"
    assert uploader.problem == REVOKED
    assert uploader.refused == ""
    assert set(asked) == {keys[0]}
    assert len(asked) <= 2, "once, and perhaps a last time at the end"
    assert spool.pending() == keys


def test_an_uploader_that_is_let_in_again_sends_what_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FORBIDDEN_PAUSE_S", 0.001)
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    keys = [str(spool.commit(make_episode(sequence=number))) for number in range(2)]
    refusals = iter([True, True, True])
    announced = threading.Event()
    store = MemoryStore(before=refuse(lambda: not next(refusals, False)))
    uploader = Uploader(spool, store, MemoryBus(before=lambda *_: announced.set()), FakeClock())
    uploader.start()
    assert announced.wait(PATIENCE_S)
    assert uploader.close() == 0
    assert list(store.keys("")) == keys


def test_what_a_refusing_bus_does_not_announce_is_in_the_store_all_the_same(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    key, store = str(spool.commit(make_episode())), MemoryStore()
    assert Uploader(spool, store, MemoryBus(before=refuse()), FakeClock()).upload_pending() == 1
    assert list(store.keys("")) == [key]
    assert spool.pending() == []


def test_a_put_whose_answer_was_lost_counts_only_when_its_bytes_are_read_back(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    key = str(spool.commit(make_episode()))
    store = MemoryStore(before=refuse(only="get"))
    store.put(key, spool.read(key))
    bus = MemoryBus()
    uploader = Uploader(spool, store, bus, FakeClock())
    with pytest.raises(Forbidden):
        uploader.upload_pending()
    assert spool.pending() == [key], "a store that says `taken` and shows nothing has nothing"
    store.before = refuse(lambda: True)
    assert uploader.upload_pending() == 1
    assert spool.pending() == []
    assert len(bus.poll(TOPIC_EPISODES, None, 0)) == 1
    assert content_hash(store.get(key)) == EpisodeKey.parse(key).episode_id


def test_a_refused_subscriber_keeps_its_policy_and_takes_the_next_one_when_it_is_let_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_module, "FORBIDDEN_PAUSE_S", 0.01)
    world.publish(1)
    subscriber = world.subscribe(list_every_s=0.0)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    let_in: list[bool] = []
    world.store.before = world.bus.before = refuse(lambda: bool(let_in))
    eventually(subscriber, lambda: subscriber._problem == REVOKED)
    assert subscriber.problem == REVOKED
    assert subscriber.take() is None, "and raises nothing"
    let_in.append(True)
    world.publish(2)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    eventually(subscriber, lambda: subscriber._problem == "")


def test_a_refused_reporter_says_so_once_and_reports_again_when_it_is_let_in(caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[int] = []
    reported = threading.Event()

    def before(operation: str, _topic: str) -> None:
        if operation == "publish":
            attempts.append(1)
            if len(attempts) <= 4:
                raise Forbidden(REVOKED)

    bus = MemoryBus(before=before)
    reporter = ActorReporter(bus, FakeClock(tick_ns=1), every_s=0.001)
    spool, uploader = SimpleNamespace(pending=list), SimpleNamespace(problem="", refused="")
    with caplog.at_level(logging.WARNING):
        reporter.start(cast("Any", _acting()), cast("Any", spool), cast("Any", uploader), None)
        while len(attempts) < 6:
            reported.wait(0.001)
        reporter.close()
    assert len(bus.poll(TOPIC_ACTORS, None, 0)) >= 2
    assert [record.getMessage() for record in caplog.records] == [f"reports are dropped: {REVOKED}"]


def _acting() -> SimpleNamespace:
    names = (
        "episodes",
        "successes",
        "interventions",
        "human_steps",
        "steps",
        "overruns",
        "gated",
        "nonfinite",
        "stops",
    )
    return SimpleNamespace(
        settings=SimpleNamespace(actor_id="robot-0"),
        counts=SimpleNamespace(**dict.fromkeys(names, 0)),
        state="acting",
        task="push",
        policy_version=1,
        problem="",
        refusal="",
    )
