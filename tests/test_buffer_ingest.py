"""Ingest: every valid episode once, whatever happens to the events; bad ones are kept aside with the reason."""

import msgspec
import pytest

from sop.buffer import Ingest
from sop.buffer.ingest import SequenceProgress, actors
from sop.buffer.loader import PayloadCache
from sop.core import layout
from sop.core.codec import content_hash, encode
from sop.core.errors import InvalidRecord, StoreUnavailable
from sop.core.events import TOPIC_EPISODES, EpisodeCommitted, encode_event
from sop.core.experience import Source
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.testing.episodes import TOY_BODY, make_episode
from sop.testing.memory import MemoryBus, MemoryStore

RUN = RunManifest(
    name="test",
    created_utc_ns=0,
    embodiment=TOY_BODY,
    instructions={"push": ("push the block",)},
    fleet_tasks=("push",),
    held_out_tasks=(),
    config={},
)


def put(store: MemoryStore, folder: str = layout.EPISODES, **changes: object) -> str:
    episode = make_episode("pphh", **changes)
    data = encode(episode)
    key = str(EpisodeKey(folder, episode.actor_id, episode.sequence, episode.num_steps, content_hash(data)))
    store.put(key, data)
    return key


def announce(bus: MemoryBus, key: str, times: int = 1) -> None:
    for number in range(times):
        event = EpisodeCommitted(key=key, outcome="success", ended_utc_ns=0, committed_utc_ns=0)
        bus.publish(TOPIC_EPISODES, encode_event(event), event_id=f"{key}/{number}")


def test_a_thousand_events_for_one_episode_index_it_once() -> None:
    store, bus = MemoryStore(), MemoryBus()
    key = put(store)
    announce(bus, key, times=1000)
    ingest = Ingest(store, bus, RUN)
    while ingest.poll(0):
        pass
    ingest.reconcile()
    assert [str(episode.key) for episode in ingest.drain()] == [key]
    assert ingest.drain() == []


def test_lost_and_reordered_events_are_healed_by_the_listing() -> None:
    store, bus = MemoryStore(), MemoryBus()
    keys = [put(store, sequence=number) for number in range(5)]
    announce(bus, keys[3])
    ingest = Ingest(store, bus, RUN)
    ingest.poll(0)
    assert [episode.key.sequence for episode in ingest.drain()] == [3]
    assert ingest.missing() == {"robot-0": [0, 1, 2]}
    assert ingest.reconcile() == 4
    assert [episode.key.sequence for episode in ingest.drain()] == [0, 1, 2, 4]
    assert ingest.missing() == {}


def test_the_folder_decides_the_buffer() -> None:
    store = MemoryStore()
    put(store)
    put(store, folder=layout.DEMONSTRATIONS, actor_id="lab-0")
    ingest = Ingest(store, MemoryBus(), RUN)
    ingest.reconcile()
    assert {episode.key.actor_id: episode.source for episode in ingest.drain()} == {
        "robot-0": Source.ONLINE,
        "lab-0": Source.OFFLINE,
    }


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"task": "fly"}, "task"), ({"robot": "other"}, "robot")],
)
def test_an_episode_of_another_run_is_quarantined_with_the_field(changes: dict[str, str], field: str) -> None:
    store = MemoryStore()
    bad, good = put(store, **changes), put(store, sequence=1)
    ingest = Ingest(store, MemoryBus(), RUN)
    ingest.reconcile()
    assert [str(episode.key) for episode in ingest.drain()] == [good]
    assert list(ingest.quarantined) == [bad]
    note = msgspec.json.decode(store.get(layout.quarantine(bad)))
    assert note["key"] == bad
    assert field in note["reason"]
    assert store.get(bad)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "renamed", "nonsense"])
def test_altered_bytes_never_reach_the_index(damage: str) -> None:
    store = MemoryStore()
    data = encode(make_episode("pphh"))
    key = EpisodeKey(layout.EPISODES, "robot-0", 0, 4, content_hash(data))
    if damage == "truncated":
        data = data[:-40]
    elif damage == "flipped":
        data = data[:500] + bytes([data[500] ^ 1]) + data[501:]
    elif damage == "renamed":
        key = EpisodeKey(layout.EPISODES, "robot-0", 7, 4, content_hash(data))
    else:
        data = b"PK\x03\x04 not an episode"
    store.put(str(key), data)
    ingest = Ingest(store, MemoryBus(), RUN)
    assert ingest.reconcile() == 0
    assert ingest.drain() == []
    assert list(ingest.quarantined) == [str(key)]


def test_an_event_that_is_no_event_is_passed_over() -> None:
    store, bus = MemoryStore(), MemoryBus()
    bus.publish(TOPIC_EPISODES, b"{", event_id="1")
    announce(bus, "episodes/robot-0/../../etc/passwd")
    key = put(store)
    announce(bus, key)
    ingest = Ingest(store, bus, RUN)
    ingest.poll(0)
    assert [str(episode.key) for episode in ingest.drain()] == [key]


def test_the_thread_survives_an_unavailable_store_and_hands_on_other_errors() -> None:
    calls: list[str] = []

    def fail_first(name: str, *_: object) -> None:
        calls.append(name)
        if len(calls) == 1:
            raise StoreUnavailable("away")

    store = MemoryStore(before=fail_first)
    bus = MemoryBus()
    ingest = Ingest(store, bus, RUN, list_every_s=0.0)
    with pytest.raises(StoreUnavailable):
        ingest.reconcile()
    key = put(store)
    ingest.reconcile()
    assert [str(episode.key) for episode in ingest.drain()] == [key]


def test_resuming_takes_exactly_the_given_episodes_in_their_order() -> None:
    store = MemoryStore()
    keys = [put(store, sequence=number) for number in range(3)]
    ingest = Ingest(store, MemoryBus(), RUN)
    assert [str(episode.key) for episode in ingest.take([keys[2], keys[0]])] == [keys[2], keys[0]]
    ingest.reconcile()
    assert [str(episode.key) for episode in ingest.drain()] == [keys[1]]
    with pytest.raises(InvalidRecord, match="not the key"):
        ingest.take(["run.json"])


def test_sequence_progress_knows_the_gaps() -> None:
    progress = SequenceProgress()
    for number in (0, 1, 4, 2, 6):
        progress.add(number, f"key-{number}")
        progress.add(number, f"key-{number}")
    assert (progress.next_sequence, progress.last_key, progress.missing()) == (3, "key-2", [3, 5])


def test_actors_are_found_without_listing_their_episodes() -> None:
    store = MemoryStore()
    for actor in ("robot-1", "robot-10", "robot-1.5", "robot"):
        for number in range(3):
            put(store, actor_id=actor, sequence=number)
    assert sorted(actors(store, layout.EPISODES)) == ["robot", "robot-1", "robot-1.5", "robot-10"]


def test_the_payload_cache_keeps_its_bound_and_the_most_recent() -> None:
    fetched: list[str] = []
    data = encode(make_episode("pppp"))

    def fetch(key: str) -> bytes:
        fetched.append(key)
        return data

    cache = PayloadCache(fetch, max_bytes=2 * len(data) + 1)
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key)
        assert cache.num_bytes <= 2 * len(data) + 1
    assert fetched == ["a", "b", "c", "b"]
