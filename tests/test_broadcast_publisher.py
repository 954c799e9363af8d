"""The publisher: order, numbers, what is bounded, and what happens when store, bus or process fail."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from broadcast_examples import PATIENCE_S, Gate, bytes_of, facts, place, policy, weights
from sop.broadcast import Publisher, fetch_policy, published_versions
from sop.core import layout
from sop.core.errors import InvalidRecord, NotFound, RunError, StoreUnavailable
from sop.core.events import TOPIC_POLICIES, PolicyPublished, decode_event
from sop.core.policy import Conditioning
from sop.testing.memory import MemoryBus, MemoryStore

MakePublisher = Callable[..., Publisher]


@pytest.fixture
def make() -> Iterator[MakePublisher]:
    """Publishers that are closed at the end of the test; failures that were not asked for fail it."""
    made: list[Publisher] = []

    def make_one(store: MemoryStore, bus: MemoryBus | None = None, **options: object) -> Publisher:
        settings: dict[str, object] = {"keep_policies": 50, "pause": lambda _s: None, "rng": random.Random(0)}
        publisher = Publisher(store, bus or MemoryBus(), **(settings | options))  # type: ignore[arg-type]
        made.append(publisher)
        return publisher

    yield make_one
    for publisher in made:
        publisher.close(PATIENCE_S)


def failing_puts(should_fail: Callable[[str], bool]) -> Callable[[str, str], None]:
    def before(operation: str, key: str) -> None:
        if operation == "put" and should_fail(key):
            raise StoreUnavailable(f"no answer for {key}")

    return before


def test_tensors_then_manifest_then_event(make: MakePublisher) -> None:
    log: list[tuple[str, str]] = []
    store = MemoryStore(before=lambda *call: log.append(call))
    bus = MemoryBus(before=lambda *call: log.append(call))
    publisher = make(store, bus)
    log.clear()
    assert publisher.publish_now(weights(0), facts()) == 0
    assert log == [
        ("put", "policies/00000000/weights.safetensors"),
        ("put", "policies/00000000/manifest.json"),
        ("publish", "policies"),
    ]


def test_a_published_policy_carries_everything_it_came_from(make: MakePublisher) -> None:
    store, bus, clock = MemoryStore(), MemoryBus(), iter([100, 200, 300, 400])
    publisher = make(store, bus, clock_ns=lambda: next(clock))
    publisher.publish_now(weights(0), facts())
    publisher.publish_now(weights(1), facts(step=25))
    manifest, found = fetch_policy(store, 1)
    assert bytes_of(found) == bytes_of(weights(1))
    assert (manifest.version, manifest.parent_version, manifest.learner_step) == (1, 0, 25)
    assert (manifest.spec, manifest.conditioning) == (facts().spec, facts().conditioning)
    assert (manifest.online_episodes, manifest.offline_episodes) == (3, 40)
    assert (manifest.algorithm, manifest.config_hash, manifest.code_version) == ("hg_dagger", "c0ffee", "0.1.0")
    events = [decode_event(data, PolicyPublished) for _, data in bus.poll(TOPIC_POLICIES, None, 0.0)]
    assert [event.version for event in events] == [0, 1]
    assert [event.manifest for event in events] == [layout.policy_manifest(0), layout.policy_manifest(1)]
    assert [event.published_utc_ns for event in events] == [200, 400]
    assert manifest.created_utc_ns == 300, "when the snapshot was handed over"


def test_publish_returns_at_once_and_keeps_only_the_newest_snapshot(make: MakePublisher) -> None:
    gate = Gate()
    store = MemoryStore(before=lambda operation, _key: gate() if operation == "put" else None)
    publisher = make(store)
    publisher.publish(weights(10), facts(10))
    assert gate.reached.wait(PATIENCE_S)
    for step in (11, 12, 13):
        publisher.publish(weights(step), facts(step))
    assert publisher.skipped == 2
    assert publisher.last_published is None
    gate.open.set()
    publisher.close(PATIENCE_S)
    assert list(published_versions(store)) == [0, 1]
    assert [fetch_policy(store, version)[0].learner_step for version in (0, 1)] == [10, 13]
    assert bytes_of(fetch_policy(store, 1)[1]) == bytes_of(weights(13))
    assert publisher.last_published == 1


def test_publish_now_comes_after_what_waits_and_drops_nothing(make: MakePublisher) -> None:
    gate = Gate()
    store = MemoryStore(before=lambda operation, _key: gate() if operation == "put" else None)
    publisher = make(store)
    publisher.publish(weights(10), facts(10))
    assert gate.reached.wait(PATIENCE_S)
    publisher.publish(weights(11), facts(11))
    gate.open.set()
    assert publisher.publish_now(weights(12), facts(12)) == 2
    assert publisher.skipped == 0
    assert [fetch_policy(store, version)[0].learner_step for version in range(3)] == [10, 11, 12]


def test_the_caller_may_change_its_dict_after_publishing(make: MakePublisher) -> None:
    gate, store = Gate(), MemoryStore()
    publisher = make(store, clock_ns=lambda: 1)
    store.before = lambda operation, _key: gate() if operation == "put" else None
    publisher.publish(weights(0), facts())
    assert gate.reached.wait(PATIENCE_S)
    mine = dict(weights(1))
    publisher.publish(mine, facts(1))
    mine["body.weight"] = np.zeros(1)
    gate.open.set()
    publisher.close(PATIENCE_S)
    assert bytes_of(fetch_policy(store, 1)[1]) == bytes_of(weights(1))


def test_an_error_on_the_thread_reaches_the_owner_once_and_publishing_goes_on(make: MakePublisher) -> None:
    store = MemoryStore(before=failing_puts(lambda key: key.startswith("policies/00000000")))
    publisher = make(store, attempts=3)
    publisher.publish(weights(0), facts())
    with publisher._changed:
        assert publisher._changed.wait_for(lambda: publisher._failure is not None, PATIENCE_S)
    with pytest.raises(StoreUnavailable, match="no answer for policies/00000000"):
        publisher.publish(weights(1), facts(1))
    publisher.publish(weights(2), facts(2))
    publisher.close(PATIENCE_S)
    assert list(published_versions(store)) == [1], "number 0 is spent"
    assert fetch_policy(store, 1)[0].learner_step == 2


def test_an_error_on_the_thread_reaches_the_owner_at_close() -> None:
    publisher = Publisher(MemoryStore(), MemoryBus(), keep_policies=5)
    publisher.publish({"bad": np.array([object()])}, facts())
    with pytest.raises(ValueError, match="tensor 'bad' has dtype object"):
        publisher.close(PATIENCE_S)
    publisher.close(PATIENCE_S)
    for publish in (publisher.publish, publisher.publish_now):
        with pytest.raises(ValueError, match="the publisher is closed"):
            publish(weights(0), facts())


def test_what_a_robot_would_refuse_is_not_published(make: MakePublisher) -> None:
    store = MemoryStore()
    publisher = make(store)
    with pytest.raises(InvalidRecord, match=r"conditioning\.guidance"):
        publisher.publish_now(weights(0), replace(facts(), conditioning=Conditioning(guidance=math.inf)))
    not_json = replace(facts(), spec=replace(facts().spec, normalization={"mean": (math.nan,)}))
    with pytest.raises(InvalidRecord, match="normalization"):
        publisher.publish_now(weights(0), not_json)
    assert list(store.keys("")) == []
    assert publisher.publish_now(weights(0), facts()) == 0, "the number is not spent"


@pytest.mark.parametrize("broken_put", range(4))
def test_an_interruption_at_any_put_never_shows_a_half_policy(make: MakePublisher, broken_put: int) -> None:
    puts = iter(range(100))
    store, bus = MemoryStore(before=failing_puts(lambda _key: next(puts) >= broken_put)), MemoryBus()
    publisher = make(store, bus, attempts=1)
    outcomes = []
    for step in range(2):
        try:
            outcomes.append(publisher.publish_now(weights(step), facts(step)))
        except StoreUnavailable:
            break
    whole = broken_put // 2
    assert outcomes == list(range(whole))
    assert list(published_versions(store)) == list(range(whole))
    announced = [decode_event(data, PolicyPublished).version for _, data in bus.poll(TOPIC_POLICIES, None, 0.0)]
    assert announced == list(range(whole))
    for version in range(whole):
        assert bytes_of(fetch_policy(store, version)[1]) == bytes_of(weights(version))
    store.before = lambda *_: None
    again = make(store, bus)
    half_written = broken_put % 2
    assert again.last_published == (whole - 1 if whole else None)
    assert again.publish_now(weights(9), facts(9)) == whole + half_written, "a half-written folder is stepped over"
    assert fetch_policy(store, whole + half_written)[0].parent_version is None, "what it goes on from was not said"


def test_a_restarted_learner_goes_on_above_everything_in_the_store(make: MakePublisher) -> None:
    store = MemoryStore()
    manifest, data = policy(4)
    place(store, manifest, data, 4)
    store.put(layout.policy_weights(7), b"half")
    store.put("policies/notes.txt", b"not a version")
    publisher = make(store)
    assert publisher.last_published == 4
    publisher.continue_from(4)
    assert publisher.publish_now(weights(8), facts()) == 8
    assert publisher.publish_now(weights(9), facts()) == 9
    assert [fetch_policy(store, version)[0].parent_version for version in (8, 9)] == [4, 8]


def test_a_second_learner_on_the_same_run_is_noticed(make: MakePublisher) -> None:
    store = MemoryStore()
    one, other = make(store), make(store)
    one.publish_now(weights(0), facts())
    with pytest.raises(RunError, match=r"policy 0 appeared in the store.*another learner publishes"):
        other.publish_now(weights(1), facts())
    assert bytes_of(fetch_policy(store, 0)[1]) == bytes_of(weights(0))


def test_an_unavailable_store_is_tried_again(make: MakePublisher) -> None:
    failures = iter([True, True, False, True, False])
    store, pauses = MemoryStore(before=failing_puts(lambda _key: next(failures))), []
    publisher = make(store, pause=pauses.append)
    assert publisher.publish_now(weights(0), facts()) == 0
    assert len(pauses) == 3
    assert bytes_of(fetch_policy(store, 0)[1]) == bytes_of(weights(0))


def test_an_unavailable_bus_costs_the_event_and_not_the_policy(make: MakePublisher) -> None:
    def away(operation: str, topic: str) -> None:
        raise StoreUnavailable("the bus is away")

    store = MemoryStore()
    publisher = make(store, MemoryBus(before=away))
    assert publisher.publish_now(weights(0), facts()) == 0
    assert list(published_versions(store)) == [0]
    assert publisher.lost_events == 1


def tensors_in(store: MemoryStore) -> list[int]:
    return [layout.version_of(key) for key in store.keys("policies/") if key.endswith("weights.safetensors")]


def test_retention_keeps_the_newest_and_the_protected_and_every_manifest(make: MakePublisher) -> None:
    store = MemoryStore()
    publisher = make(store, keep_policies=2, protected={0, 3})
    for step in range(7):
        publisher.publish_now(weights(step), facts(step))
    assert tensors_in(store) == [0, 3, 5, 6]
    assert list(published_versions(store)) == list(range(7))
    with pytest.raises(NotFound):
        fetch_policy(store, 4)


def test_retention_collects_what_a_killed_learner_left_but_counts_whole_policies_only(make: MakePublisher) -> None:
    store = MemoryStore()
    for version in (0, 1, 2):
        place(store, *policy(version), version)
    for version in (3, 4):
        store.put(layout.policy_weights(version), b"half")
    publisher = make(store, keep_policies=2)
    assert publisher.publish_now(weights(5), facts()) == 5
    assert tensors_in(store) == [0, 2, 3, 4, 5], "2 and 5 are the newest two that are whole"
    publisher.publish_now(weights(6), facts())
    assert tensors_in(store) == [0, 5, 6]


def test_a_failed_deletion_is_made_up_for_later(make: MakePublisher) -> None:
    store = MemoryStore()
    publisher = make(store, keep_policies=1, protected=())

    def no_delete(operation: str, key: str) -> None:
        if operation == "delete":
            raise StoreUnavailable("no answer")

    store.before = no_delete
    assert [publisher.publish_now(weights(step), facts(step)) for step in range(3)] == [0, 1, 2]
    assert tensors_in(store) == [0, 1, 2]
    store.before = lambda *_: None
    publisher.publish_now(weights(3), facts(3))
    assert tensors_in(store) == [3]


def test_closing_gives_up_on_a_store_that_hangs() -> None:
    gate = Gate()
    store = MemoryStore(before=lambda operation, _key: gate() if operation == "put" else None)
    publisher = Publisher(store, MemoryBus(), keep_policies=1)
    publisher.publish(weights(0), facts())
    assert gate.reached.wait(PATIENCE_S)
    with pytest.raises(RunError, match=r"not written within 0\.0 s"):
        publisher.close(0.0)
    gate.open.set()
    publisher.close(PATIENCE_S)
    assert list(published_versions(store)) == [0]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_policies and attempts must be at least 1, got 0 and 8"):
        Publisher(MemoryStore(), MemoryBus(), keep_policies=0)
