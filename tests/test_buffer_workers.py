"""Worker processes: the same answers as a thread, whatever dies, and memory that stays valid while it is held."""

import gc
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from buffer_examples import colourful, make_plan, paths_of, put_episode
from sop.buffer import jobs
from sop.buffer.cache import open_episode
from sop.buffer.jobs import (
    Failed,
    Reply,
    allocate_fresh,
    assemble,
    read_message,
    to_job,
    to_plan,
    write_message,
)
from sop.buffer.workers import DecodePool
from sop.core.errors import InvalidRecord, NotFound, RunError
from sop.core.experience import Windows, batch_hash
from sop.transport import DirectoryStore


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def make_pool() -> Iterator[Callable[..., DecodePool]]:
    """Pools that are closed at the end of the test, however it ends."""
    pools: list[DecodePool] = []

    def make(*args: Any, **options: Any) -> DecodePool:
        pools.append(DecodePool(*args, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def put_some(store: DirectoryStore, count: int = 3) -> list[str]:
    return [put_episode(store, colourful("pphhp", number)) for number in range(count)]


def test_a_worker_gives_the_bits_of_a_thread_and_room_is_used_again_only_when_nobody_looks(
    make_pool: Callable[..., DecodePool],
    store: DirectoryStore,
) -> None:
    keys = put_some(store)
    paths = paths_of(store.root, keys)
    plans = [make_plan(keys, [(n % 3, n), (2, 4 - n), (1, 0)]) for n in range(5)]
    expected = [assemble(plan, [open_episode(path) for path in paths], allocate_fresh) for plan in plans]
    pool = make_pool(1)
    first = pool.load(plans[0], paths)
    view = first.images["front"][1, 2:4]
    assert view.flags.writeable
    del first
    held = [pool.load(plan, paths) for plan in plans[1:4]]
    for batch, wanted in zip(held, expected[1:4], strict=True):
        assert batch.content_hash == wanted.content_hash == batch_hash(batch)
        np.testing.assert_array_equal(batch.images["wrist"], wanted.images["wrist"])
    np.testing.assert_array_equal(view, expected[0].images["front"][1, 2:4])
    assert len(pool._rooms._free) == 0
    del batch
    held.clear()
    gc.collect()
    assert len(pool._rooms._free) == 3
    last = pool.load(plans[4], paths)
    np.testing.assert_array_equal(view, expected[0].images["front"][1, 2:4])
    assert len(pool._rooms._free) == 2
    pool.close()
    pool.close()
    assert batch_hash(last) == expected[4].content_hash


def test_a_larger_batch_gets_more_room(make_pool: Callable[..., DecodePool], store: DirectoryStore) -> None:
    small = put_episode(store, colourful("pppp", 0, size=8))
    large = put_episode(store, colourful("pppp", 1, size=200))
    pool = make_pool(1)
    for key in (small, large, small):
        plan, paths = make_plan([key], [(0, 1), (0, 2)]), paths_of(store.root, [key])
        assert (
            pool.load(plan, paths).content_hash == assemble(plan, [open_episode(paths[0])], allocate_fresh).content_hash
        )
        gc.collect()
        assert len(pool._rooms._free) == 1


def test_a_worker_that_is_killed_is_replaced_and_its_job_done(
    make_pool: Callable[..., DecodePool], store: DirectoryStore
) -> None:
    keys = put_some(store)
    plan, paths = make_plan(keys, [(0, 0), (1, 1)]), paths_of(store.root, keys)
    pool = make_pool(2)
    expected = pool.load(plan, paths).content_hash
    before = pool.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert [pool.load(plan, paths).content_hash for _ in range(4)] == [expected] * 4
    assert not set(before) & set(pool.pids)


@pytest.mark.parametrize(
    "worker",
    [
        pytest.param("import sys; sys.stdin.buffer.read(4)", id="dies in the job"),
        pytest.param("import sys; sys.exit(1)", id="never starts"),
        pytest.param("print('hello'); import sys; sys.stdout.flush(); sys.stdin.read()", id="talks nonsense"),
    ],
)
def test_windows_that_kill_three_workers_are_named(
    make_pool: Callable[..., DecodePool], store: DirectoryStore, worker: str
) -> None:
    keys = put_some(store, 2)
    pool = make_pool(1, command=(sys.executable, "-S", "-c", worker))
    with pytest.raises(RunError) as error:
        pool.load(make_plan(keys, [(1, 3), (0, 2)]), paths_of(store.root, keys))
    assert str(error.value).startswith("3 decode workers died")
    assert str(error.value).endswith(f"{keys[1]}@3, {keys[0]}@2")
    assert len(pool._rooms._free) == 1


def test_what_is_wrong_with_a_payload_is_said_as_in_a_thread_and_the_worker_goes_on(
    make_pool: Callable[..., DecodePool], store: DirectoryStore
) -> None:
    keys = [*put_some(store, 2), put_episode(store, colourful("pppp", 5, size=24))]
    paths = paths_of(store.root, keys)
    data = bytearray(paths[0].read_bytes())
    frames = [place for place in range(len(data)) if data[place : place + 3] == b"\xff\xd8\xff"]
    data[frames[3]] = 0
    paths[0].write_bytes(data)
    pool = make_pool(1)
    for plan, field, step in (
        (make_plan(keys, [(1, 0), (0, 3)]), "images.wrist", 3),
        (make_plan(keys, [(1, 0), (2, 1)]), "images.wrist", 1),
        (make_plan(keys, [(1, 0), (1, 5)]), "controller", 5),
    ):
        with pytest.raises(InvalidRecord) as here:
            assemble(plan, [open_episode(path) for path in paths], allocate_fresh)
        with pytest.raises(InvalidRecord) as there:
            pool.load(plan, paths)
        assert str(here.value) == str(there.value)
        assert (there.value.field, there.value.step) == (field, step)
        assert keys[int(plan.row[1])] in str(there.value)
    with pytest.raises(NotFound, match="no-such-file"):
        pool.load(make_plan(keys, [(1, 0)]), [*paths[:2], Path("/no-such-file")])
    mistake = replace(make_plan(keys, [(1, 0), (1, 1)]), length=np.ones(1, np.int16))
    with pytest.raises(RunError, match=r"(?s)failed on the windows .*@1:.*ValueError: zip"):
        pool.load(mistake, paths)
    pid = pool.pids
    assert len(pool.load(make_plan(keys, [(1, 0)]), [paths[1], paths[1], paths[1]])) == 1
    assert pool.pids == pid


def test_workers_end_with_their_learner_however_it_dies() -> None:
    code = (
        "from sop.buffer.workers import DecodePool; import sys\n"
        "pool = DecodePool(2); print(*pool.pids, flush=True); sys.stdin.read()"
    )
    learner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert learner.stdout is not None
    assert learner.stdin is not None
    watched = [os.pidfd_open(int(pid)) for pid in learner.stdout.readline().split()]
    learner.kill()
    learner.wait()
    for descriptor in watched:
        ended, _, _ = select.select([descriptor], [], [], 60)
        assert ended == [descriptor]
        os.close(descriptor)
    learner.stdout.close()
    learner.stdin.close()


def test_a_worker_needs_no_torch() -> None:
    code = "import sop.buffer.decode_worker, sys; print('torch' in sys.modules, 'sop.learner' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_a_plan_survives_its_way_to_a_worker() -> None:
    plan = make_plan(["a", "b"], [(0, 7), (1, 2), (0, 1)])
    for sent in (plan, replace(plan, advantage_indicator=np.asarray([1, -1, 0], np.int8))):
        data = msgspec.msgpack.encode(to_job(sent, ["/x", "/y"], offset=64))
        again = to_plan(msgspec.msgpack.decode(data, type=jobs.LoadJob))
        assert again.names() == "a@7, b@2, a@1"
        for name in ("row", "length", "loss_weight", "advantage_indicator"):
            np.testing.assert_array_equal(getattr(again, name), getattr(sent, name))
        for name in ("episode", "start", "task", "source"):
            assert getattr(again.windows, name).dtype == getattr(sent.windows, name).dtype
            np.testing.assert_array_equal(getattr(again.windows, name), getattr(sent.windows, name))


def test_messages_are_bounded_and_half_of_one_is_none() -> None:
    reader, writer = os.pipe()
    write_message(writer, Failed(kind="missing", field="", problem="gone"))
    assert msgspec.msgpack.decode(read_message(reader) or b"", type=Reply).problem == "gone"
    os.write(writer, (jobs.MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="at most"):
        read_message(reader)
    os.write(writer, (100).to_bytes(4, "little") + b"half")
    os.close(writer)
    assert read_message(reader) is None
    assert read_message(reader) is None
    os.close(reader)


def test_a_batch_that_is_too_large_is_refused_before_it_is_made(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (key,) = put_some(store, 1)
    monkeypatch.setattr(jobs, "MAX_BATCH_BYTES", 3000)
    with pytest.raises(InvalidRecord, match="needs 3200 of 3000 bytes"):
        assemble(
            make_plan([key], [(0, 0), (0, 1)]), [open_episode(store.root / key)], lambda _: pytest.fail("allocated")
        )
    windows = make_plan([key], [(0, 0)]).windows
    empty = Windows(*(getattr(windows, name)[:0] for name in ("episode", "start", "task", "source")))
    nothing = replace(make_plan([key], [(0, 0)]), windows=empty)
    with pytest.raises(ValueError, match="at least one window"):
        assemble(nothing, [], allocate_fresh)
    with pytest.raises(ValueError, match="at least 1"):
        DecodePool(0)


def test_arrays_begin_at_multiples_of_64_bytes() -> None:
    places, num_bytes = jobs.arrange({"a": ((3, 5), "|u1"), "b": ((2,), "<f4"), "c": ((65,), "|u1")})
    assert (places, num_bytes) == ({"a": 0, "b": 64, "c": 128}, 256)
