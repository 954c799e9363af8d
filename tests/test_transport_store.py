"""Object stores: the contract over every implementation, and what only a directory can get wrong."""

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sop.testing.contracts.store as contract
from sop.core.errors import AlreadyExists, NotFound, RunError, StoreUnavailable
from sop.testing.memory import MemoryStore
from sop.transport import default_bus_url, open_store, probe
from sop.transport import directory as directory_module
from sop.transport.base import Data, parts_of
from sop.transport.directory import TEMP_FOLDER, DirectoryStore
from sop.transport.retry import Backoff, put_retrying

KEYS = st.lists(
    st.text("ab0Z-._", min_size=1, max_size=3).filter(lambda part: not part.startswith(".")), min_size=1, max_size=4
).map("/".join)
"""Keys whose parts are close neighbours in the order: '-' and '.' sort before '/', the rest after it."""


@pytest.mark.parametrize("kind", ["memory", "directory"])
@pytest.mark.parametrize("rule", contract.STORE_RULES, ids=lambda rule: rule.__name__)
def test_every_store_keeps_the_contract(kind: str, rule: Callable[..., None], tmp_path: Path) -> None:
    memory = MemoryStore()
    rule((lambda: memory) if kind == "memory" else (lambda: DirectoryStore(tmp_path / "store")))


@settings(deadline=None, max_examples=50)
@given(st.sets(KEYS, max_size=25), KEYS, st.integers(0, 15), KEYS | st.none())
def test_a_directory_lists_like_a_sorted_list_of_keys(keys: set[str], key: str, cut: int, after: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, stored = DirectoryStore(folder), []
        for new in sorted(keys):
            try:
                store.put(new, b"x")
            except ValueError:  # the key is a folder of another one
                continue
            stored.append(new)
        for prefix in (key[:cut], ""):
            expected = sorted(k for k in stored if k.startswith(prefix) and (after is None or k > after))
            assert list(store.keys(prefix, after)) == expected


def test_listing_after_a_key_does_not_look_into_folders_before_it(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for version in range(20):
        store.put(f"policies/{version:08d}/manifest.json", b"x")
    looked: list[str] = []
    scandir = os.scandir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: looked.append(Path(path).name) or scandir(path))
        found = list(store.keys("policies/", after="policies/00000017/manifest.json"))
    assert found == ["policies/00000018/manifest.json", "policies/00000019/manifest.json"]
    assert looked == ["policies", "00000017", "00000018", "00000019"]


def _race(root: str, barrier: object, writer: int, won: object) -> None:
    store = DirectoryStore(root)
    for attempt in range(10):
        barrier.wait(60)  # type: ignore[attr-defined]
        try:
            store.put(f"race/{attempt}/key", bytes([writer]) * 300_000)
        except AlreadyExists:
            continue
        won.put((attempt, writer))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_one_of_four_racing_processes_wins_and_its_object_is_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_race, args=(str(tmp_path), barrier, n, won)) for n in range(4)]
    for process in processes:
        process.start()
    winners = dict(won.get(timeout=60) for _ in range(10))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(winners) == list(range(10))
    assert won.empty()
    store = DirectoryStore(tmp_path)
    for attempt, writer in winners.items():
        assert store.get(f"race/{attempt}/key") == bytes([writer]) * 300_000
    assert list((tmp_path / TEMP_FOLDER).iterdir()) == []


_STUCK_WRITER = """
import os, sys
from sop.transport import directory

def stop_here(*args):
    print("here", flush=True)
    sys.stdin.read()

store = directory.DirectoryStore(sys.argv[1])
if sys.argv[2] == "half written":
    write, size = os.write, 300_000
    def half(descriptor, data):
        write(descriptor, data[: len(data) // 2])
        stop_here()
    directory.os.write = half
elif sys.argv[2] == "before the link":
    directory._link = stop_here
elif sys.argv[2] == "after the link":
    directory.sync_path = lambda folder, real=directory.sync_path: (
        stop_here() if (folder / "key").exists() else real(folder))
store.put("a/key", b"x" * 300_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half written", "before the link", "after the link"])
def test_a_writer_killed_in_the_middle_leaves_all_or_nothing(tmp_path: Path, moment: str) -> None:
    command = [sys.executable, "-c", _STUCK_WRITER, str(tmp_path), moment]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"here\n"
        writer.send_signal(signal.SIGKILL)
    store = DirectoryStore(tmp_path)
    left_overs = list((tmp_path / TEMP_FOLDER).iterdir())
    assert len(left_overs) == 1, "a young left-over may belong to a living writer and stays"
    if moment == "after the link":
        assert list(store.keys("")) == ["a/key"]
        assert store.get("a/key") == b"x" * 300_000
    else:
        assert list(store.keys("")) == []
        with pytest.raises(NotFound):
            store.get("a/key")
        store.put("a/key", b"x" * 300_000)
    DirectoryStore(tmp_path, clock=lambda: left_overs[0].stat().st_mtime + directory_module.TEMP_MAX_AGE_S + 1)
    assert list((tmp_path / TEMP_FOLDER).iterdir()) == []
    assert store.get("a/key") == b"x" * 300_000


def test_an_object_and_its_new_folders_are_synced_before_put_returns(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    log: list[str] = []
    real_fsync, real_link = os.fsync, os.link

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)
        log.append(f"fsync {TEMP_FOLDER if path.parts[:1] == (TEMP_FOLDER,) else path}")
        real_fsync(descriptor)

    def link(*args: object, **options: object) -> None:
        log.append("link")
        real_link(*args, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "link", link)
        store.put("a/b/key", b"x")
        first, second = list(log), len(log)
        store.put("a/b/key2", b"x")
    put = [f"fsync {TEMP_FOLDER}", "link", "fsync a/b"]
    assert first == ["fsync .", "fsync a", *put], "the new folders a and a/b, then the object"
    assert log[second:] == put, "folders are synced once"


def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)

    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreUnavailable, match=r"cannot write .*/a/key: the disk is full: free room") as caught:
            store.put("a/key", b"x")
    assert str(tmp_path) in str(caught.value)
    assert list(store.keys("")) == []
    assert list((tmp_path / TEMP_FOLDER).iterdir()) == []
    store.put("a/key", b"x")
    assert store.get("a/key") == b"x"


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    store, write = DirectoryStore(tmp_path), os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        store.put("key", bytes(range(100)))
    assert store.get("key") == bytes(range(100))


def test_a_large_object_is_read_in_several_calls(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("key", bytes(range(100)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory_module, "_READ_BYTES", 7)
        assert store.get("key") == bytes(range(100))
        assert store.get("key", slice(3, 40)) == bytes(range(3, 40))


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store = DirectoryStore(tmp_path / "store")
    store.put("real/key", b"x")
    (store.root / "link").symlink_to(outside)
    (store.root / "file").symlink_to(outside / "secret")
    assert list(store.keys("")) == ["real/key"]
    assert list(store.keys("link/")) == []
    for key in ("link/secret", "file"):
        with pytest.raises(NotFound):
            store.get(key)
    with pytest.raises(StoreUnavailable, match="symbolic link"):
        store.put("link/new", b"x")
    store.delete("link/secret")
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


def test_a_root_that_is_a_file_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match=r"cannot open the store .*/file"):
        DirectoryStore(tmp_path / "file")


def test_urls_open_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, url in enumerate([f"file://{tmp_path}/store", "file://store", "store", str(tmp_path / "store")]):
        open_store(url).put(f"key-{number}", b"x")
    assert list(DirectoryStore(tmp_path / "store").keys("")) == ["key-0", "key-1", "key-2", "key-3"]


def test_a_url_that_cannot_be_opened_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"unknown scheme 'ftp', known are \['az', 'file', 'gs', 's3'\]"):
        open_store("ftp://host/path")
    for url in ("", "file://"):
        with pytest.raises(ValueError, match="names no place"):
            open_store(url)


def test_the_bus_of_a_directory_is_beside_it() -> None:
    assert default_bus_url("file:///runs/one/store") == "sqlite:///runs/one/bus.sqlite"
    assert default_bus_url("/runs/one/store/") == "sqlite:///runs/one/bus.sqlite"
    assert default_bus_url("file://runs/store") == "sqlite://runs/bus.sqlite"
    assert default_bus_url("store") == "sqlite://bus.sqlite"
    with pytest.raises(ValueError, match="no bus beside it"):
        default_bus_url("s3://bucket/run")


def test_the_probe_accepts_honest_stores_and_leaves_nothing(tmp_path: Path) -> None:
    for store in (MemoryStore(), DirectoryStore(tmp_path)):
        probe(store)
        assert list(store.keys("")) == []


def test_the_probe_refuses_a_store_that_replaces_objects() -> None:
    class Replacing(MemoryStore):
        def put(self, key: str, data: Data, *, durable: bool = True) -> None:
            self.tamper(key, b"".join(parts_of(data)))

    store = Replacing()
    with pytest.raises(RunError, match=r"created twice.*conditional writes"):
        probe(store)
    assert list(store.keys("")) == []


def test_the_probe_refuses_a_store_that_says_no_but_replaces() -> None:
    class Lying(MemoryStore):
        def put(self, key: str, data: Data, *, durable: bool = True) -> None:
            try:
                super().put(key, data)
            finally:
                self.tamper(key, b"".join(parts_of(data)))

    with pytest.raises(RunError, match="answers b'second'"):
        probe(Lying())


class FlakyStore(MemoryStore):
    """Fails the first `failures` puts; `answers_lost` says whether they took effect all the same."""

    def __init__(self, failures: int, answers_lost: bool) -> None:
        super().__init__()
        self.left, self.answers_lost = failures, answers_lost

    def put(self, key: str, data: Data, *, durable: bool = True) -> None:
        self.left -= 1
        if self.left < 0:
            super().put(key, data)
            return
        if self.answers_lost:
            super().put(key, data)
        raise StoreUnavailable("503")


def _put(store: MemoryStore, attempts: int) -> list[float]:
    pauses: list[float] = []
    backoff = Backoff(random.Random(0), first_s=1.0, max_s=5.0)
    put_retrying(store, "key", b"data", attempts=attempts, backoff=backoff, pause=pauses.append)
    return pauses


@pytest.mark.parametrize("answers_lost", [False, True])
def test_a_put_is_tried_again_and_a_lost_answer_counts_as_success(answers_lost: bool) -> None:
    store = FlakyStore(1, answers_lost)
    assert len(_put(store, attempts=4)) == 1
    assert store.get("key") == b"data"


def test_trying_again_is_bounded_and_its_pauses_grow_with_jitter() -> None:
    store = FlakyStore(100, answers_lost=False)
    pauses: list[float] = []
    backoff = Backoff(random.Random(0), first_s=1.0, max_s=5.0)
    with pytest.raises(StoreUnavailable):
        put_retrying(store, "key", b"data", attempts=6, backoff=backoff, pause=pauses.append)
    assert store.left == 94
    for pause, limit in zip(pauses, [1.0, 2.0, 4.0, 5.0, 5.0], strict=True):
        assert limit / 2 <= pause <= limit
    assert len(set(pauses)) == 5
    backoff.reset()
    assert backoff.next_s() <= 1.0


def test_a_lost_answer_to_a_put_of_parts_counts_as_success_only_for_the_same_bytes() -> None:
    parts = [b"da", b"", memoryview(b"ta")]
    for stored, same in ((b"data", True), (b"dat", False), (b"datas", False), (b"dxta", False)):
        store = FlakyStore(1, answers_lost=False)
        store.tamper("key", stored)
        with contextlib.nullcontext() if same else pytest.raises(AlreadyExists):
            put_retrying(store, "key", parts, attempts=2, backoff=Backoff(random.Random(0)), pause=lambda _s: None)


def test_a_key_taken_by_other_bytes_is_never_a_success() -> None:
    taken = FlakyStore(0, answers_lost=False)
    taken.tamper("key", b"data")
    with pytest.raises(AlreadyExists):
        _put(taken, attempts=4)
    for other in (b"dat", b"data!", b"tada"):
        store = FlakyStore(1, answers_lost=False)
        store.tamper("key", other)
        with pytest.raises(AlreadyExists):
            _put(store, attempts=4)
