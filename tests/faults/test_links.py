"""The network and the bus: away for a day, emptied, split in two. The store decides."""

import threading
from pathlib import Path

import pytest

from hostile_examples import RUN
from recovery_times import Recovery, ingest_until, seconds_of
from sop.actor import EpisodeSpool, Uploader
from sop.buffer import Ingest
from sop.core.errors import StoreUnavailable
from sop.core.events import TOPIC_EPISODES
from sop.testing.clock import FakeClock
from sop.testing.episodes import make_episode
from sop.testing.memory import MemoryBus, MemoryStore
from sop.transport import open_bus

DAY_EPISODES = 48
"""A day of a robot that works at half-hour jobs."""


def indexed(ingest: Ingest) -> list[str]:
    while ingest.poll(0):
        pass
    ingest.reconcile()
    return [str(episode.key) for episode in ingest.drain()]


def upload_until_sent(uploader: Uploader, clock: FakeClock) -> None:
    """Run the uploader's background loop here until it has sent everything; its pauses pass on `clock`."""

    class Sleepless(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            clock.advance(timeout)
            return False

    uploader._stop = Sleepless()
    uploader._stop.set()
    uploader.wake()
    uploader._loop()


def test_fault_4_a_day_without_a_network_loses_nothing_and_drains_oldest_first(
    tmp_path: Path, recovery: Recovery
) -> None:
    clock = FakeClock()
    back_ns = clock.now_ns + 24 * 3600 * 10**9
    order: list[str] = []

    def link(operation: str, key: str) -> None:
        if clock.now_ns < back_ns:
            raise StoreUnavailable("the network is down")
        if operation == "put":
            order.append(key)

    store, bus = MemoryStore(before=link), MemoryBus()
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    uploader = Uploader(spool, store, bus, clock)
    keys = []
    for number in range(DAY_EPISODES):
        keys.append(str(spool.commit(make_episode(sequence=number))))
        if number % 8 == 0:
            with pytest.raises(StoreUnavailable):
                uploader.upload_pending()
    assert spool.pending() == keys
    clock.advance(23 * 3600.0)  # the pauses between attempts have long been at their longest
    recovery.fault_is_over(lambda: max(clock.now_ns, back_ns) / 1e9)
    upload_until_sent(uploader, clock)
    recovery.whole("the first attempt after it, which sent everything")
    assert clock.now_ns >= back_ns
    assert order == keys
    assert spool.pending() == []
    assert indexed(Ingest(store, bus, RUN, speedup=1e9)) == keys


def test_fault_9_a_bus_that_lost_everything_costs_no_episode(tmp_path: Path, recovery: Recovery) -> None:
    """The learner has read some, then the queue is gone with what it had not read."""
    store, spool, clock = MemoryStore(), EpisodeSpool(tmp_path / "spool", "episodes", "robot-0"), FakeClock()
    first = open_bus(f"sqlite://{tmp_path / 'first.sqlite'}")
    ingest = Ingest(store, first, RUN, speedup=1e9, clock=seconds_of(clock))
    ingest.reconcile()
    keys = [str(spool.commit(make_episode(sequence=number))) for number in range(6)]
    Uploader(spool, store, first, FakeClock()).upload_pending()
    ingest.poll(0)
    first.close()
    keys += [str(spool.commit(make_episode(sequence=number))) for number in range(6, 9)]
    empty = open_bus(f"sqlite://{tmp_path / 'second.sqlite'}")
    Uploader(spool, store, MemoryBus(), FakeClock()).upload_pending()  # announced to nobody who hears it
    ingest._bus = empty
    recovery.fault_is_over(seconds_of(clock))
    ingest_until(ingest, clock, lambda: len(ingest._ready) == len(keys))
    recovery.whole("the learner has all")
    found = indexed(ingest)
    empty.close()
    assert sorted(found) == keys
    assert ingest.missing() == {}


def test_fault_10_of_two_histories_the_index_is_that_of_the_store(tmp_path: Path, recovery: Recovery) -> None:
    """Half of the fleet speaks to one half of the queue; the learner hears one, then the other, then both at once."""
    store, halves = MemoryStore(), [open_bus(f"sqlite://{tmp_path / name}.sqlite") for name in "ab"]
    keys: list[str] = []
    clock = FakeClock()
    ingest = Ingest(store, halves[0], RUN, speedup=1e9, clock=seconds_of(clock))
    ingest.reconcile()
    for number, bus in enumerate(halves):
        spool = EpisodeSpool(tmp_path / f"spool-{number}", "episodes", f"robot-{number}")
        keys += [str(spool.commit(make_episode(actor_id=f"robot-{number}", sequence=episode))) for episode in range(4)]
        Uploader(spool, store, bus, FakeClock()).upload_pending()
    assert ingest.poll(0) == 4
    alone = Ingest(store, halves[0], RUN, speedup=1e9, clock=seconds_of(clock))
    alone._listed_at = ingest._listed_at
    recovery.fault_is_over(seconds_of(clock))
    ingest_until(alone, clock, lambda: len(alone._ready) == len(keys))
    recovery.whole("a learner that hears one half has all")
    ingest._bus = halves[1]  # the cursor is of another history: it begins again
    assert ingest.poll(0) == 4
    for _, event in halves[1].poll(TOPIC_EPISODES, None, 0):  # and then the halves are merged: all of it twice
        halves[0].publish(TOPIC_EPISODES, event, event_id=f"merged-{hash(event)}")
    ingest._bus = halves[0]
    found = indexed(ingest)
    for bus in halves:
        bus.close()
    assert sorted(found) == sorted(keys)
