"""Ingest: every valid episode once, whatever happens to the events; bad ones are kept aside with the reason."""

import threading

import msgspec
import pytest

import sop.buffer.ingest
from sop.buffer import EpisodeRow, Ingest, RowBlock
from sop.buffer.cache import PayloadCache
from sop.core import layout
from sop.core.codec import content_hash, encode
from sop.core.episode import Outcome
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
        bus.publish(TOPIC_EPISODES, encode_event(event), event_id=f"{key[:200]}/{number}")


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
    assert ingest.missing() == {"robot-0": [range(3)]}
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


@pytest.mark.parametrize("actor_id", ["lab-0", "base-0"])
def test_who_recorded_before_the_fleet_started_is_not_taken_for_the_fleet(actor_id: str) -> None:
    store = MemoryStore()
    bad, good = put(store, actor_id=actor_id), put(store, layout.DEMONSTRATIONS, actor_id=actor_id)
    ingest = Ingest(store, MemoryBus(), RUN)
    ingest.reconcile()
    assert [str(episode.key) for episode in ingest.drain()] == [good]
    assert "before the fleet started" in ingest.quarantined[bad]


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


def test_resuming_from_rows_looks_only_for_what_is_newer() -> None:
    store, listed, fetched = MemoryStore(), [], []
    keys = [put(store, sequence=number) for number in range(6)]
    other = put(store, folder=layout.DEMONSTRATIONS, actor_id="lab-0")
    rows = [indexed(key) for key in (keys[0], other, keys[1], keys[4], keys[2])]

    def note(operation: str, place: str) -> None:
        (fetched if operation == "get" else listed).append(place)

    store.before = note
    ingest = Ingest(store, MemoryBus(), RUN)
    ingest.resume([RowBlock.from_rows(rows[:2]), RowBlock.from_rows(rows[2:])])
    assert fetched == []
    assert ingest.missing() == {"robot-0": [range(3, 4)]}
    assert ingest.reconcile() == 2
    assert fetched == [keys[3], keys[5]]
    assert [str(episode.key) for episode in ingest.drain()] == [keys[3], keys[5]]
    assert ingest.missing() == {}


def test_everything_is_found_in_the_order_of_folder_actor_and_number() -> None:
    store = MemoryStore()
    expected = [put(store, actor_id=actor, sequence=number) for actor in ("robot-0", "robot-1") for number in range(2)]
    bad = put(store, actor_id="robot-1", sequence=2, task="fly")
    expected.append(put(store, folder=layout.DEMONSTRATIONS, actor_id="lab-0"))
    ingest = Ingest(store, MemoryBus(), RUN)
    assert [str(episode.key) for episode in ingest.everything()] == expected
    assert list(ingest.quarantined) == [bad]
    assert ingest.reconcile() == 0


def test_known_bytes_under_another_key_are_passed_over_and_never_hide_the_true_one() -> None:
    """Whatever comes first: the copy under a wrong name, or the episode."""
    data = encode(make_episode("pphh"))
    true, wrong = (str(EpisodeKey(layout.EPISODES, "robot-0", number, 4, content_hash(data))) for number in (0, 7))
    for order in ((true, wrong), (wrong, true)):
        store, bus = MemoryStore(), MemoryBus()
        for key in order:
            store.put(key, data)
            announce(bus, key)
        ingest = Ingest(store, bus, RUN)
        ingest.poll(0)
        ingest.reconcile()
        assert [str(episode.key) for episode in ingest.drain()] == [true]
        assert set(ingest.quarantined) <= {wrong}


def test_a_refused_episode_is_fetched_once_and_only_the_last_reasons_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sop.buffer.ingest, "MAX_REASONS", 2)
    store, bus = MemoryStore(), MemoryBus()
    bad = [put(store, sequence=number, task="fly") for number in range(4)]
    fetched: list[str] = []
    store.before = lambda operation, key: fetched.append(key) if operation == "get" else None
    ingest = Ingest(store, bus, RUN)
    ingest.reconcile()
    for key in bad:
        announce(bus, key, times=3)
    while ingest.poll(0):
        pass
    ingest.reconcile()
    assert fetched == bad
    assert ingest.num_quarantined == 4
    assert list(ingest.quarantined) == bad[2:]


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"policy_version": -1}, "policy_version"), ({"policy_version": 2**40}, "policy_version")],
)
def test_numbers_that_the_index_cannot_hold_are_refused(changes: dict[str, int], field: str) -> None:
    store = MemoryStore()
    bad = put(store, **changes)
    ingest = Ingest(store, MemoryBus(), RUN)
    ingest.reconcile()
    assert field in ingest.quarantined[bad]
    assert ingest.drain() == []


def test_a_key_with_endless_digits_is_no_key() -> None:
    store, bus = MemoryStore(), MemoryBus()
    announce(bus, f"episodes/robot-0/00000000-{'9' * 5000}-{'0' * 32}.arrow")
    key = put(store)
    announce(bus, key)
    ingest = Ingest(store, bus, RUN)
    ingest.poll(0)
    assert [str(episode.key) for episode in ingest.drain()] == [key]


def test_an_announced_episode_says_when_it_was_spooled_and_uploaded() -> None:
    store, bus = MemoryStore(), MemoryBus()
    keys = [put(store, sequence=number) for number in range(2)]
    event = EpisodeCommitted(key=keys[0], outcome="success", ended_utc_ns=0, spooled_utc_ns=5, committed_utc_ns=7)
    bus.publish(TOPIC_EPISODES, encode_event(event), event_id="1")
    ingest = Ingest(store, bus, RUN)
    ingest.poll(0)
    ingest.reconcile()
    times = [(episode.spooled_utc_ns, episode.uploaded_utc_ns) for episode in ingest.drain()]
    assert times == [(5, 7), (None, None)]


def test_behind_the_learner_only_so_much_waits_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sop.buffer.ingest, "MAX_READY_BYTES", 0)
    store = MemoryStore()
    keys = [put(store, sequence=number) for number in range(4)]
    ingest, taken = Ingest(store, MemoryBus(), RUN), []
    ingest.start()
    while len(taken) < 3:
        ready = ingest.drain()
        assert len(ready) <= 1
        taken += ready
        threading.Event().wait(0.001)
    ingest.close()
    assert [str(episode.key) for episode in [*taken, *ingest.finish()]] == keys


def indexed(key: str) -> EpisodeRow:
    """The row of an episode that was indexed before."""
    facts = EpisodeKey.parse(key)
    return EpisodeRow(
        episode_id=facts.episode_id,
        actor_id=facts.actor_id,
        sequence=facts.sequence,
        task="push",
        source=Source.ONLINE if facts.folder == layout.EPISODES else Source.OFFLINE,
        num_steps=facts.num_steps,
        human_steps=0,
        num_interventions=0,
        policy_version=1,
        outcome=Outcome.SUCCESS,
        start_runs=(),
        end_utc_ns=0,
        indexed_utc_ns=0,
    )


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
