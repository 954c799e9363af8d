"""Deltas and keyframes through publisher and reader: what travels, what is skipped, what breaks and heals."""

from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from broadcast_examples import PATIENCE_S, FarStore, World, bytes_of, eventually, facts
from broadcast_packed_examples import FROZEN, MakePublisher, forms, packed_publishers, run_of, trained, whole
from recovery_times import Recovery
from sop.broadcast import PolicyReader, Publisher, fetch_manifest, fetch_policy
from sop.broadcast.manifest import HISTORY_VERSIONS, delta_key, keyframe_key
from sop.core import layout
from sop.core.errors import NotFound, PolicyRefused
from sop.testing.memory import MemoryBus, MemoryStore

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def make() -> Iterator[MakePublisher]:
    yield from packed_publishers()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for subscriber in world.subscribers:
        subscriber.close()


def test_deltas_follow_each_other_and_every_fourth_version_stands_alone_too(make: MakePublisher) -> None:
    store = MemoryStore()
    run_of(make(store), 10)
    assert forms(store) == [
        "00000000/keyframe.packed",
        *(f"{v:08d}/delta-{v - 1:08d}.packed" for v in (1, 2, 3)),
        "00000004/delta-00000000.packed",
        "00000004/delta-00000003.packed",
        "00000004/keyframe.packed",
        *(f"{v:08d}/delta-{v - 1:08d}.packed" for v in (5, 6, 7)),
        "00000008/delta-00000004.packed",
        "00000008/delta-00000007.packed",
        "00000008/keyframe.packed",
        "00000009/delta-00000008.packed",
    ]
    for version in range(10):
        assert bytes_of(fetch_policy(store, version)[1]) == whole(version), version


def test_the_manifest_lists_a_bounded_history_that_reaches_the_newest_keyframe(make: MakePublisher) -> None:
    store = MemoryStore()
    run_of(make(store, keyframe_every=8), 20)
    manifest = fetch_manifest(store, 19)
    versions = [file.version for file in manifest.history]
    assert versions == sorted(versions)
    assert set(versions) == set(range(19 - HISTORY_VERSIONS, 19))
    assert keyframe_key(16) in [file.key for file in manifest.history]
    assert all(file.names is None for file in (*manifest.history, *manifest.files)), "the same tensors all along"
    assert fetch_manifest(store, 8).history[0].version == 0
    assert all(len(fetch_manifest(store, version).history) <= 3 * HISTORY_VERSIONS for version in range(20))
    assert [file.base for file in fetch_manifest(store, 16).files] == [15], "nobody waits for keyframe and leap"


def test_a_robot_that_was_away_leaps_from_keyframe_to_keyframe(make: MakePublisher) -> None:
    store = MemoryStore()
    run_of(make(store), 14)
    far = FarStore(store)
    reader = PolicyReader(far)
    reader.read(fetch_manifest(store, 7))
    far.got.clear()
    read = reader.read(fetch_manifest(store, 13))
    assert bytes_of(read.weights) == whole(13)
    assert [key.removeprefix("policies/") for key, _ in far.got] == [
        "00000008/delta-00000007.packed",
        "00000012/delta-00000008.packed",
        "00000013/delta-00000012.packed",
    ]


def test_frozen_tensors_travel_once_whether_the_learner_hands_them_over_or_not(make: MakePublisher) -> None:
    store = MemoryStore()
    publisher, frozen_bytes = make(store), sum(array.nbytes for array in FROZEN.values())
    run_of(publisher, 3)
    publisher.publish_now({**trained(3), **FROZEN}, facts(3))
    publisher.publish_now({**trained(4), **FROZEN}, facts(4))
    for version in range(1, 5):
        origins = {name: entry.origin for name, entry in fetch_manifest(store, version).tensors.items()}
        assert origins == {"body": None, "scale": None, "count": None, "eyes": 0, "words": 0}
        if version >= 3:
            keyframe = len(store.get(keyframe_key(version)))
            assert keyframe < sum(array.nbytes for array in trained(version).values()) + 200 < frozen_bytes
        assert bytes_of(fetch_policy(store, version)[1]) == whole(version)
    far = FarStore(store)
    reader, taken = PolicyReader(far), []
    for version in (0, 1, 2, 4):
        before = far.num_bytes
        read = reader.read(fetch_manifest(store, version))
        assert bytes_of(read.weights) == whole(version)
        assert read.cost.num_bytes == far.num_bytes - before
        taken.append(read.cost.num_bytes)
    assert taken[0] > frozen_bytes * 0.6
    assert all(later < 0.5 * len(b"".join(bytes_of(trained(0)).values())) for later in taken[1:3])
    files = [next(f for f in fetch_manifest(store, v).files if f.base is not None) for v in (1, 2)]
    assert taken[1:3] == [file.num_bytes for file in files]


def test_a_late_joiner_fetches_the_base_once_for_what_is_frozen(make: MakePublisher) -> None:
    store = MemoryStore()
    run_of(make(store), 7)
    far = FarStore(store)
    reader = PolicyReader(far)
    assert bytes_of(reader.read(fetch_manifest(store, 6)).weights) == whole(6)
    got = [key.removeprefix("policies/") for key, _ in far.got]
    assert got == [
        "00000000/manifest.json",
        "00000000/keyframe.packed",
        "00000004/keyframe.packed",
        "00000005/delta-00000004.packed",
        "00000006/delta-00000005.packed",
    ]


def test_skipped_versions_are_made_up_for_by_their_deltas_or_a_keyframe(make: MakePublisher) -> None:
    store = MemoryStore()
    run_of(make(store), 10)
    for held, expected in ((5, ["6/d", "7/d"]), (6, ["7/d"]), (1, None)):
        far = FarStore(store)
        reader = PolicyReader(far)
        reader.read(fetch_manifest(store, held))
        far.got.clear()
        read = reader.read(fetch_manifest(store, 7))
        assert bytes_of(read.weights) == whole(7)
        if expected is not None:
            assert [f"{layout.version_of(key)}/{key.split('/')[2][0]}" for key, _ in far.got] == expected


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "long"])
def test_a_broken_delta_is_gone_around_by_the_keyframe(damage: str, make: MakePublisher, recovery: Recovery) -> None:
    store = MemoryStore()
    run_of(make(store), 6)
    reader = PolicyReader(store)
    reader.read(fetch_manifest(store, 3))
    _break(store, delta_key(4, 3), damage)
    recovery.fault_is_over()
    read = reader.read(fetch_manifest(store, 5))
    recovery.whole("it is read by another way")
    assert bytes_of(read.weights) == whole(5)
    before = read.weights["body"]
    assert not before.flags.writeable
    fresh = PolicyReader(store)
    assert bytes_of(fresh.read(fetch_manifest(store, 5)).weights) == whole(5)


def _break(store: MemoryStore, key: str, damage: str) -> None:
    data = store.get(key)
    if damage == "missing":
        store.delete(key)
    else:
        flipped = data[:-5] + bytes([data[-5] ^ 64]) + data[-4:]
        store.tamper(key, {"flipped": flipped, "cut": data[:-1], "long": data + b"x"}[damage])


def test_when_every_way_is_broken_the_older_version_gets_its_chance(world: World) -> None:
    publisher = Publisher(world.store, world.bus, keep_policies=50, encoding="packed", threads=1)
    run_of(publisher, 4)
    publisher.close(PATIENCE_S)
    _break(world.store, delta_key(3, 2), "flipped")
    subscriber = world.subscribe()
    staged = subscriber.wait_first(PATIENCE_S)
    assert (staged.version, bytes_of(staged.weights)) == (2, whole(2))
    assert subscriber.refusals == {3: f"policy 3: {delta_key(3, 2)} is altered: its hash is not {_hash(world, 3)}"}


def _hash(world: World, version: int) -> str:
    return fetch_manifest(world.store, version).files[0].hash


def test_a_delta_over_other_bytes_than_its_base_is_noticed_by_the_tensors_hashes(make: MakePublisher) -> None:
    store = MemoryStore()
    run_of(make(store), 3)
    reader = PolicyReader(store)
    reader.read(fetch_manifest(store, 1))
    assert reader._held is not None
    other = {name: np.array(array) for name, array in reader._held.weights.items()}
    other["body"][0, 0] += 1
    reader._held = replace(reader._held, weights=other)
    assert bytes_of(reader.read(fetch_manifest(store, 2)).weights) == whole(2), "from the keyframe again"
    store.delete(keyframe_key(0))
    reader._held = replace(reader._held, manifest=fetch_manifest(store, 1), weights=other)
    with pytest.raises(PolicyRefused, match=r"policy 2: .*tensor 'body' (is altered|does not decode)"):
        reader.read(fetch_manifest(store, 2))


def test_without_the_base_a_robot_waits_for_it_and_refuses_another_one(make: MakePublisher) -> None:
    store = MemoryStore()
    run_of(make(store), 2)
    manifest, base = fetch_manifest(store, 1), store.get(layout.policy_manifest(0))
    store.delete(layout.policy_manifest(0))
    with pytest.raises(NotFound):
        PolicyReader(store).read(manifest)
    hash_of = manifest.tensors["eyes"].hash.encode()
    store.tamper(layout.policy_manifest(0), base.replace(hash_of, hash_of[::-1]))
    with pytest.raises(PolicyRefused, match=r"policy 1: tensor 'eyes' is not that of the base, policy 0"):
        PolicyReader(store).read(manifest)
    store.tamper(layout.policy_manifest(0), b"{}")
    with pytest.raises(PolicyRefused, match="policy 1: the manifest of its base, policy 0, is not valid"):
        PolicyReader(store).read(manifest)


def test_a_subscriber_follows_a_packed_run_and_says_what_it_took(world: World) -> None:
    publisher = Publisher(world.store, world.bus, keep_policies=50, encoding="packed", threads=1)
    far = FarStore(world.store)
    subscriber = world.subscribe(store=far)
    sizes = []
    for step in range(6):
        publisher.publish_now({**trained(step), **FROZEN}, facts(step))
        eventually(subscriber, lambda step=step: subscriber._current == step)
        staged = subscriber.wait_first(PATIENCE_S)
        assert bytes_of(staged.weights) == whole(step)
        assert staged.policy is None
        assert min(staged.cost.fetch_s, staged.cost.decode_s, staged.cost.verify_s) >= 0
        sizes.append(staged.cost.num_bytes)
    publisher.close(PATIENCE_S)
    assert sum(sizes) == far.num_bytes
    assert all(size < sizes[0] / 3 for size in sizes[1:])


def test_bad_encodings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoding must be one of \['auto', 'full', 'packed'\], got 'zip'"):
        Publisher(MemoryStore(), MemoryBus(), keep_policies=1, encoding="zip")
    with pytest.raises(ValueError, match=r"keyframe_every must be in \[1, 8\], got 9"):
        Publisher(MemoryStore(), MemoryBus(), keep_policies=1, encoding="packed", keyframe_every=9)
