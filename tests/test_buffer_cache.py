"""Where episodes come from: the bound and the honesty of the cache on disk, and the three kinds of payloads."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from sop.buffer import PayloadCache, open_payloads
from sop.buffer.cache import CachedPayloads, LocalPayloads, OpenFiles, open_episode
from sop.buffer.disk_cache import DiskCache
from sop.core.codec import EncodedEpisode, content_hash, encode
from sop.core.errors import InvalidRecord, NotFound, StoreUnavailable
from sop.core.layout import EpisodeKey
from sop.testing.episodes import make_episode
from sop.testing.memory import MemoryStore
from sop.transport import DirectoryStore, ObjectStore


def put(store: ObjectStore, sequence: int = 0, steps: str = "pppp") -> str:
    data = encode(make_episode(steps, sequence=sequence))
    key = str(EpisodeKey("episodes", "robot-0", sequence, len(steps), content_hash(data)))
    store.put(key, data)
    return key


def objects(*texts: str) -> list[tuple[str, bytes]]:
    return [(content_hash(text.encode()), text.encode()) for text in texts]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_disk_cache_keeps_its_bound_and_what_was_used_last(tmp_path: Path) -> None:
    (a, data_a), (b, data_b), (c, data_c), (d, data_d) = objects("aaaa", "bbbb", "cccc", "dddd")
    cache = DiskCache(tmp_path, max_bytes=12)
    for name, data in ((a, data_a), (b, data_b), (c, data_c)):
        assert cache.put(name, data).read_bytes() == data
    assert cache.path(a) == tmp_path / f"{a}.arrow"
    cache.put(d, data_d)
    assert files(tmp_path) == {f"{name}.arrow" for name in (a, c, d)}
    assert (cache.num_bytes, cache.path(b), b in cache, a in cache) == (12, None, False, True)


def test_putting_an_object_again_counts_it_once(tmp_path: Path) -> None:
    ((a, data),) = objects("aaaa")
    cache = DiskCache(tmp_path, max_bytes=12)
    for _ in range(3):
        cache.put(a, data)
    assert cache.num_bytes == 4


def test_an_object_larger_than_the_bound_is_kept_alone(tmp_path: Path) -> None:
    (a, data_a), (b, data_b) = objects("a", "b" * 100)
    cache = DiskCache(tmp_path, max_bytes=10)
    cache.put(a, data_a)
    cache.put(b, data_b)
    assert files(tmp_path) == {f"{b}.arrow"}
    cache.put(a, data_a)
    assert files(tmp_path) == {f"{a}.arrow"}


def test_what_is_held_stays_and_the_bound_is_kept_again_afterwards(tmp_path: Path) -> None:
    (a, data_a), (b, data_b), (c, data_c) = objects("aaaa", "bbbb", "cccc")
    cache = DiskCache(tmp_path, max_bytes=8)
    with cache.holding([a, b, b]), cache.holding([b]):
        cache.put(a, data_a)
        cache.put(b, data_b)
        cache.put(c, data_c)
        assert {f"{a}.arrow", f"{b}.arrow"} <= files(tmp_path)
    cache.put(c, data_c)
    assert (cache.num_bytes, a in cache) == (8, False)


def test_a_restart_finds_what_is_there_in_its_order_and_collects_the_parts_of_the_dead(tmp_path: Path) -> None:
    (a, data_a), (b, data_b), (c, data_c) = objects("aaaa", "bbbb", "cccc")
    before = DiskCache(tmp_path, max_bytes=12)
    for number, (name, data) in enumerate(((a, data_a), (b, data_b), (c, data_c))):
        before.put(name, data)
        os.utime(tmp_path / f"{name}.arrow", ns=(number, number))
    os.utime(tmp_path / f"{a}.arrow", ns=(9, 9))
    dead, living, other = f"{a}.4194304999-0.part", f"{a}.{os.getppid()}-3.part", "README"
    for name in (dead, living, other):
        (tmp_path / name).write_bytes(b"half")
    after = DiskCache(tmp_path, max_bytes=8)
    assert files(tmp_path) == {f"{a}.arrow", f"{c}.arrow", living, other}
    assert after.path(a) is not None
    assert after.num_bytes == 8


def test_a_file_that_was_damaged_while_nobody_looked_is_deleted_and_missed(tmp_path: Path) -> None:
    (a, data_a), (b, data_b) = objects("aaaa", "bbbb")
    before = DiskCache(tmp_path, max_bytes=100)
    before.put(a, data_a)
    before.put(b, data_b)
    (tmp_path / f"{a}.arrow").write_bytes(b"aaxa")
    after = DiskCache(tmp_path, max_bytes=100)
    assert after.path(a) is None
    assert after.path(b) == tmp_path / f"{b}.arrow"
    assert (files(tmp_path), after.num_bytes) == ({f"{b}.arrow"}, 4)


def test_a_folder_that_somebody_cleared_is_only_empty(tmp_path: Path) -> None:
    ((a, data),) = objects("aaaa")
    cache = DiskCache(tmp_path / "cache", max_bytes=100)
    cache.put(a, data).unlink()
    assert cache.path(a) is None
    (tmp_path / "cache").rmdir()
    assert cache.put(a, data).read_bytes() == data


def test_a_disk_that_cannot_be_written_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    ((a, data),) = objects("aaaa")
    cache = DiskCache(tmp_path, max_bytes=100)
    (tmp_path / f"{a}.arrow").mkdir()
    with pytest.raises(StoreUnavailable, match="cannot write"):
        cache.put(a, data)
    assert files(tmp_path) == {f"{a}.arrow"}
    with pytest.raises(ValueError, match="max_bytes must be positive"):
        DiskCache(tmp_path, 0)


def test_a_directory_store_is_read_in_place_and_nothing_is_copied(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    key = put(store)
    payloads = open_payloads(store, tmp_path / "cache", memory_bytes=1, disk_bytes=1)
    assert isinstance(payloads, LocalPayloads)
    payloads.put(key, payloads.get(key))
    with payloads.holding([key]) as paths:
        assert list(paths) == [store.root / key]
    assert payloads.get(key) is payloads.get(key)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(NotFound):
        payloads.get(key.replace("robot-0", "robot-1"))


def test_a_directory_store_that_is_away_is_waited_for_and_one_that_stays_away_is_named(tmp_path: Path) -> None:
    store, away = DirectoryStore(tmp_path / "store"), tmp_path / "away"
    key, waits = put(store), list[float]()

    def comes_back_after_three(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            away.rename(store.root)

    payloads = LocalPayloads(store, pause=comes_back_after_three)
    for reach in (lambda: payloads.get(key).num_steps, lambda: payloads.holding([key]).__enter__() and 4):
        store.root.rename(away)
        waits.clear()
        assert reach() == 4
        assert len(waits) == 3
    store.root.rename(away)
    waits.clear()
    assert payloads.get(key).num_steps == 4, "what is open stays open"
    waits += [0.0] * 3
    with pytest.raises(StoreUnavailable, match="is its disk mounted"):
        payloads.get(key.replace("robot-0", "robot-1"))
    longest = [0.1 * 2**pause for pause in range(7)]
    assert len(waits[3:]) == len(longest)
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits[3:], longest, strict=True))


def test_a_store_that_is_elsewhere_is_asked_once_per_episode_and_not_again_after_a_restart(tmp_path: Path) -> None:
    store = MemoryStore()
    keys = [put(store, number) for number in range(3)]
    fetched: list[str] = []
    store.before = lambda operation, key: fetched.append(key)
    for _ in range(2):
        payloads = open_payloads(store, tmp_path, memory_bytes=1, disk_bytes=1 << 20)
        for key in (keys[1], keys[0], keys[1]):
            assert payloads.get(key).header.sequence == EpisodeKey.parse(key).sequence
        payloads.close()
    assert fetched == [keys[1], keys[0]]
    with payloads.holding(keys) as paths:
        assert [content_hash(path.read_bytes()) for path in paths] == [EpisodeKey.parse(key).episode_id for key in keys]
    assert fetched == [keys[1], keys[0], keys[2]]


def test_what_ingest_has_in_hand_is_not_fetched_again(tmp_path: Path) -> None:
    store = MemoryStore()
    key = put(store)
    encoded = EncodedEpisode(store.get(key))

    def refuse(operation: str, key: str) -> None:
        raise StoreUnavailable("away")

    store.before = refuse
    payloads = open_payloads(store, tmp_path, memory_bytes=1, disk_bytes=1 << 20)
    payloads.put(key, encoded)
    payloads.put(key, encoded)
    assert payloads.get(key).num_steps == 4
    payloads.close()
    assert files(tmp_path) == {f"{EpisodeKey.parse(key).episode_id}.arrow"}
    assert payloads.get(key).num_steps == 4


def test_more_than_can_wait_for_the_disk_is_dropped_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    keys = [put(store, number) for number in range(3)]
    encoded = [EncodedEpisode(store.get(key)) for key in keys]
    monkeypatch.setattr("sop.buffer.cache.MAX_UNWRITTEN_BYTES", encoded[0].num_bytes)
    disk, go_on = DiskCache(tmp_path, 1 << 20), threading.Event()
    write = disk.put

    def wait_and_write(object_id: str, data: bytes | memoryview) -> Path:
        go_on.wait()
        return write(object_id, data)

    monkeypatch.setattr(disk, "put", wait_and_write)
    payloads = CachedPayloads(store.get, disk)
    for key, episode in zip(keys, encoded, strict=True):
        payloads.put(key, episode)
    assert payloads.get(keys[0]) is encoded[0]
    go_on.set()
    payloads.close()
    assert files(tmp_path) == {f"{EpisodeKey.parse(keys[0]).episode_id}.arrow"}


def test_other_bytes_than_at_ingest_are_refused(tmp_path: Path) -> None:
    for disk_bytes in (0, 1 << 20):
        store = MemoryStore()
        key = put(store)
        store.tamper(key, encode(make_episode("pppp", sequence=9)))
        payloads = open_payloads(store, tmp_path, memory_bytes=1 << 20, disk_bytes=disk_bytes)
        with pytest.raises(InvalidRecord, match="other bytes for episodes/robot-0"):
            payloads.get(key)


def test_episodes_in_memory_have_no_files() -> None:
    payloads = open_payloads(MemoryStore(), Path("unused"), memory_bytes=10, disk_bytes=0)
    assert isinstance(payloads, PayloadCache)
    assert not payloads.on_disk
    with pytest.raises(ValueError, match="use a cache on disk"):
        payloads.holding(["key"])


def test_open_files_are_bounded_and_stay_readable_after_they_are_deleted(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    paths = [tmp_path / put(store, number) for number in range(3)]
    opened = OpenFiles(max_files=2)
    first, second = opened.get(paths[0]), opened.get(paths[1])
    assert opened.get(paths[0]) is first
    opened.get(paths[2])
    paths[0].unlink()
    assert opened.get(paths[0]) is first
    assert opened.get(paths[1]) is not second
    assert abs(int(first.frame("front", 3).mean()) - 15) <= 1


@pytest.mark.parametrize("content", [b"", b"no episode at all", b"ARROW1\0\0" * 20])
def test_a_file_that_is_no_episode_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InvalidRecord):
        open_episode(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(StoreUnavailable):
        open_episode(path)


def test_a_file_that_changed_behind_our_back_gives_errors_not_crashes(tmp_path: Path) -> None:
    """Every byte of the tables is set to 255 in turn; reading ends in an error or in values, never in a signal."""
    data = encode(make_episode("pppp"))
    frames = data.index(b"\xff\xd8\xff")
    path = tmp_path / "file"
    outcomes = set()
    for place in [*range(frames), *range(len(data) - 900, len(data))]:
        path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        try:
            episode = open_episode(path)
            for name in ("state", "action", "controller"):
                episode.column(name)
            for step in range(episode.num_steps):
                episode.frame("front", step)
            outcomes.add("read")
        except InvalidRecord:
            outcomes.add("refused")
        path.unlink()
    assert outcomes == {"read", "refused"}


def test_a_frame_is_decoded_in_place_or_refused_with_its_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(encode(make_episode("ppp")))
    episode = open_episode(path)
    room = np.zeros((2, 16, 16, 3), np.uint8)
    episode.frame_into("front", 2, room[1])
    np.testing.assert_array_equal(room, np.stack([np.zeros_like(room[0]), episode.frame("front", 2)]))
    assert bytes(episode.jpeg("front", 0)).startswith(b"\xff\xd8\xff")
    for camera, step, size, problem in (
        ("front", 3, 16, "no such step, the episode has 3"),
        ("front", -1, 16, "no such step"),
        ("back", 1, 16, "no such camera, the episode has"),
        ("front", 1, 15, r"\(16, 16, 3\) where \(15, 15, 3\) is expected"),
        ("front", 1, 17, r"\(16, 16, 3\) where \(17, 17, 3\) is expected"),
    ):
        with pytest.raises(InvalidRecord, match=f"images.{camera}.*: {problem}"):
            episode.frame_into(camera, step, np.zeros((size, size, 3), np.uint8))
