"""Chains of deltas over restarts, failures, retention, and tensors that come and go."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from broadcast_examples import PATIENCE_S, bytes_of, facts
from broadcast_packed_examples import FROZEN, MakePublisher, forms, packed_publishers, run_of, trained, whole
from sop.broadcast import PolicyReader, fetch_manifest, fetch_policy
from sop.core.errors import StoreUnavailable
from sop.testing.memory import MemoryStore
from sop.transport import DirectoryStore


@pytest.fixture
def make() -> Iterator[MakePublisher]:
    yield from packed_publishers()


def test_after_a_restart_in_the_middle_of_a_chain_a_keyframe_begins_a_new_one(make: MakePublisher) -> None:
    store = MemoryStore()
    run_of(make(store), 3)
    reader = PolicyReader(store)
    reader.read(fetch_manifest(store, 2))
    again = make(store)
    for step in (3, 4):
        again.publish(trained(step), facts(step))
        again.close(PATIENCE_S) if step == 4 else again.publish_now(trained(step), facts(step))
    assert forms(store)[3:] == [
        "00000003/keyframe.packed",
        "00000004/delta-00000003.packed",
        "00000004/keyframe.packed",
        "00000005/delta-00000004.packed",
    ]
    assert [file.version for file in fetch_manifest(store, 5).history] == [3, 4, 4]
    assert bytes_of(reader.read(fetch_manifest(store, 5)).weights) == whole(4)


def test_a_store_that_is_away_when_the_base_is_asked_for_is_asked_again(make: MakePublisher) -> None:
    store, pauses = MemoryStore(), []
    run_of(make(store), 1)
    failures = iter([True, True, False])

    def away(operation: str, key: str) -> None:
        if operation == "get" and next(failures):
            raise StoreUnavailable("503")

    publisher = make(store, pause=pauses.append)
    store.before = away
    assert publisher.publish_now({**trained(1), **FROZEN}, facts(1)) == 1
    assert len(pauses) == 2
    store.before = lambda *_: None
    assert fetch_manifest(store, 1).tensors["eyes"].origin == 0


def test_what_failed_to_be_published_is_nothing_to_build_on(make: MakePublisher) -> None:
    store = MemoryStore()
    publisher = make(store, attempts=1)
    run_of(publisher, 2)

    def no_manifest(operation: str, key: str) -> None:
        if operation == "put" and key.endswith("2/manifest.json"):
            raise StoreUnavailable("503")

    store.before = no_manifest
    with pytest.raises(StoreUnavailable):
        publisher.publish_now(trained(2), facts(2))
    assert publisher.publish_now(trained(3), facts(3)) == 3
    assert [file.base for file in fetch_manifest(store, 3).files] == [1, None]
    assert bytes_of(fetch_policy(store, 3)[1]) == whole(3)


def test_retention_keeps_the_chain_below_a_kept_version_and_the_base(make: MakePublisher) -> None:
    store = MemoryStore()
    publisher = make(store, keep_policies=2, protected=())
    run_of(publisher, 8)
    kept = {int(key[:8]) for key in forms(store)}
    assert kept == {0, 4, 5, 6, 7}, "6 and 7 build on 5 and on the keyframe 4; frozen tensors are in 0"
    for version in (6, 7):
        assert bytes_of(fetch_policy(store, version)[1]) == whole(version)
    again = make(store, keep_policies=1, protected=())
    again.publish_now(trained(8), facts(8))
    assert {int(key[:8]) for key in forms(store)} == {0, 8}
    assert bytes_of(fetch_policy(store, 8)[1]) == whole(8)


def test_a_keyframe_that_cannot_be_stored_ends_nothing_and_the_next_version_stands_alone(make: MakePublisher) -> None:
    store = MemoryStore()
    publisher = make(store, attempts=2, keep_policies=2, protected=())
    run_of(publisher, 4)
    store.before = _refuse_keyframes
    publisher.publish(trained(4), facts(4))
    with publisher._changed:
        assert publisher._changed.wait_for(lambda: publisher._published[-1] == 4 and not publisher._writing, 60)
    store.before = lambda _operation, _key: None
    for step in (5, 6):
        publisher.publish(trained(step), facts(step))
        with publisher._changed:
            assert publisher._changed.wait_for(lambda: not publisher._writing and publisher._waiting is None, 60)
    assert [file.base for file in fetch_manifest(store, 5).files] == [None]
    assert [file.base for file in fetch_manifest(store, 6).files] == [5]
    assert bytes_of(fetch_policy(store, 6)[1]) == whole(6)


def _refuse_keyframes(operation: str, key: str) -> None:
    if operation == "put" and "keyframe" in key:
        raise StoreUnavailable("the store went away after the announcement")


def test_a_version_that_is_the_base_again_keeps_the_base(make: MakePublisher) -> None:
    """It has no file of its own: all that it is lies in version 0, which nothing else protects."""
    store = MemoryStore()
    publisher = make(store, keep_policies=1, protected=())
    run_of(publisher, 3)
    again = publisher.publish_now({**trained(0), **FROZEN}, facts())
    manifest = fetch_manifest(store, again)
    assert all(entry.origin == 0 for entry in manifest.tensors.values())
    assert {int(key[:8]) for key in forms(store)} == {0}
    assert bytes_of(fetch_policy(store, again)[1]) == whole(0)


def test_a_tensor_that_leaves_the_base_or_returns_to_it_stays_exact_in_every_chain(make: MakePublisher) -> None:
    """Tensors flip between "the base's" and "own", version by version; every robot ends with the same bytes."""
    store = MemoryStore()
    publisher = make(store, keyframe_every=3)
    states = ["aa", "ab", "bb", "ba", "aa", "bc", "ac", "aa", "ca", "aa"]
    values = {letter: np.full(5000, ord(letter), np.float32) for letter in "abc"}

    def tensors(state: str) -> dict[str, np.ndarray]:
        return {"one": values[state[0]], "two": values[state[1]]}

    readers = [PolicyReader(store) for _ in range(4)]
    for version, state in enumerate(states):
        publisher.publish_now(tensors(state), facts()) if version == 0 else publisher.publish(tensors(state), facts())
        with publisher._changed:
            publisher._changed.wait_for(lambda: not publisher._writing and publisher._waiting is None, 60)
        manifest = fetch_manifest(store, version)
        assert {n: e.origin for n, e in manifest.tensors.items() if version} == {
            name: 0 if array[0] == ord("a") else None for name, array in tensors(state).items() if version
        }
        for period, reader in enumerate(readers, 1):
            if version % period == 0:
                assert bytes_of(reader.read(manifest).weights) == bytes_of(tensors(state)), (version, period)
        assert bytes_of(fetch_policy(store, version)[1]) == bytes_of(tensors(state))


def test_another_set_of_tensors_begins_a_new_chain(make: MakePublisher) -> None:
    store = MemoryStore()
    publisher, reader = make(store), PolicyReader(store)
    run_of(publisher, 2)
    reader.read(fetch_manifest(store, 1))
    changed = {**trained(2), "body": np.zeros((3, 3), np.float32), "new": np.ones(7, np.int8)}
    publisher.publish(changed, facts(2))
    publisher.close(PATIENCE_S)
    assert [file.base for file in fetch_manifest(store, 2).files] == [None]
    assert fetch_manifest(store, 2).history == ()
    assert bytes_of(reader.read(fetch_manifest(store, 2)).weights) == bytes_of({**changed, **FROZEN})


def test_a_robot_at_a_mapped_full_form_takes_the_next_delta(make: MakePublisher, tmp_path: Path) -> None:
    """The encoding may change at a restart; what is mapped outlives the retention that deletes its file."""
    store = DirectoryStore(tmp_path)
    run_of(make(store, encoding="auto", keep_policies=1, protected=()), 3)
    assert forms(store) == ["00000000/weights.safetensors", "00000002/weights.safetensors"]
    reader = PolicyReader(store)
    old = reader.read(fetch_manifest(store, 2)).weights
    packed = make(store, keep_policies=1, protected=())
    packed.publish_now(trained(3), facts(3))
    packed.publish_now(trained(4), facts(4))
    assert forms(store)[:1] == ["00000000/weights.safetensors"]
    assert "00000002/weights.safetensors" not in forms(store)
    assert bytes_of(old) == whole(2)
    assert bytes_of(reader.read(fetch_manifest(store, 4)).weights) == whole(4)
