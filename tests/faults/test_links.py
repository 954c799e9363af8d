"""The network and the bus: away for a day, emptied, split in two. The store decides."""

from pathlib import Path

import pytest

from hostile_examples import RUN
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


def test_fault_4_a_day_without_a_network_loses_nothing_and_drains_oldest_first(tmp_path: Path) -> None:
    away = True
    order: list[str] = []

    def link(operation: str, key: str) -> None:
        if away:
            raise StoreUnavailable("the network is down")
        if operation == "put":
            order.append(key)

    store, bus = MemoryStore(before=link), MemoryBus()
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    uploader = Uploader(spool, store, bus, FakeClock())
    keys = []
    for number in range(DAY_EPISODES):
        keys.append(str(spool.commit(make_episode(sequence=number))))
        if number % 8 == 0:
            with pytest.raises(StoreUnavailable):
                uploader.upload_pending()
    assert spool.pending() == keys
    away = False
    assert uploader.upload_pending() == DAY_EPISODES
    assert order == keys
    assert spool.pending() == []
    assert indexed(Ingest(store, bus, RUN, speedup=1e9)) == keys


def test_fault_9_a_bus_that_lost_everything_costs_no_episode(tmp_path: Path) -> None:
    """The learner has read some, then the queue is gone with what it had not read."""
    store, spool = MemoryStore(), EpisodeSpool(tmp_path / "spool", "episodes", "robot-0")
    first = open_bus(f"sqlite://{tmp_path / 'first.sqlite'}")
    ingest = Ingest(store, first, RUN, speedup=1e9)
    keys = [str(spool.commit(make_episode(sequence=number))) for number in range(6)]
    Uploader(spool, store, first, FakeClock()).upload_pending()
    ingest.poll(0)
    first.close()
    keys += [str(spool.commit(make_episode(sequence=number))) for number in range(6, 9)]
    empty = open_bus(f"sqlite://{tmp_path / 'second.sqlite'}")
    Uploader(spool, store, MemoryBus(), FakeClock()).upload_pending()  # announced to nobody who hears it
    ingest._bus = empty
    found = indexed(ingest)
    empty.close()
    assert sorted(found) == keys
    assert ingest.missing() == {}


def test_fault_10_of_two_histories_the_index_is_that_of_the_store(tmp_path: Path) -> None:
    """Half of the fleet speaks to one half of the queue; the learner hears one, then the other, then both at once."""
    store, halves = MemoryStore(), [open_bus(f"sqlite://{tmp_path / name}.sqlite") for name in "ab"]
    keys: list[str] = []
    for number, bus in enumerate(halves):
        spool = EpisodeSpool(tmp_path / f"spool-{number}", "episodes", f"robot-{number}")
        keys += [str(spool.commit(make_episode(actor_id=f"robot-{number}", sequence=episode))) for episode in range(4)]
        Uploader(spool, store, bus, FakeClock()).upload_pending()
    ingest = Ingest(store, halves[0], RUN, speedup=1e9)
    assert ingest.poll(0) == 4
    ingest._bus = halves[1]  # the cursor is of another history: it begins again
    assert ingest.poll(0) == 4
    for _, event in halves[1].poll(TOPIC_EPISODES, None, 0):  # and then the halves are merged: all of it twice
        halves[0].publish(TOPIC_EPISODES, event, event_id=f"merged-{hash(event)}")
    ingest._bus = halves[0]
    found = indexed(ingest)
    for bus in halves:
        bus.close()
    assert sorted(found) == sorted(keys)
