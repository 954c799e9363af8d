"""Object stores in the cloud: the contract and the faults of a link, against a real S3 server."""

import hashlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sop.testing.contracts.store as contract
from recovery_times import Recovery
from sop.core.errors import AlreadyExists, NotFound, StoreUnavailable
from sop.testing.servers.proxy import CuttingProxy
from sop.testing.servers.s3 import S3Server
from sop.transport import MapsObjects, open_store, probe
from sop.transport import cloud_store as cloud_store_module
from sop.transport.cloud_store import CloudStore
from sop.transport.retry import Backoff, get_retrying, put_retrying

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _administrator(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def url(s3_server: S3Server, request: pytest.FixtureRequest) -> str:
    """An empty place on the server."""
    return s3_server.url("tests", f"{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}/run")


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[CuttingProxy]:
    with CuttingProxy("127.0.0.1", s3_server.port) as made:
        yield made


def _through(proxy: CuttingProxy, url: str) -> str:
    before, _, _ = url.partition("?")
    return f"{before}?endpoint=http://127.0.0.1:{proxy.port}&region=us-east-1"


def _put(store: CloudStore, key: str, data: bytes, attempts: int = 5) -> list[float]:
    pauses: list[float] = []
    backoff = Backoff(random.Random(0))
    put_retrying(store, key, data, attempts=attempts, backoff=backoff, pause=pauses.append)
    return pauses


@pytest.mark.parametrize("rule", contract.STORE_RULES, ids=lambda rule: rule.__name__)
def test_a_cloud_store_keeps_the_contract(rule: Callable[..., None], url: str) -> None:
    rule(lambda: open_store(url))


def test_the_probe_accepts_the_server(url: str) -> None:
    store = CloudStore(url)
    probe(store)
    assert list(store.keys("")) == []
    assert not isinstance(store, MapsObjects)


def test_one_of_sixteen_racing_writers_wins(url: str) -> None:
    stores, start = [CloudStore(url) for _ in range(4)], threading.Barrier(16)
    outcome: dict[int, str] = {}

    def write(writer: int) -> None:
        start.wait(30)
        try:
            stores[writer % 4].put("race/key", bytes([writer]) * 100_000)
        except AlreadyExists:
            outcome[writer] = "lost"
        else:
            outcome[writer] = "won"

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcome.values()) == ["lost"] * 15 + ["won"]
    (winner,) = [writer for writer, how in outcome.items() if how == "won"]
    assert stores[0].get("race/key") == bytes([winner]) * 100_000


def test_a_large_object_in_parts_is_created_once_and_read_back_whole(url: str) -> None:
    store, block = CloudStore(url), random.Random(0).randbytes(1 << 20)
    parts = [memoryview(block)[number:] for number in range(66)]
    size = sum(map(len, parts))
    assert size > 64 << 20
    store.put("large", parts)
    with pytest.raises(AlreadyExists):
        store.put("large", parts[:1])
    assert store.get("large") == b"".join(parts)
    assert store.get("large", slice(size - 3, size + 10)) == block[-3:]


def test_more_than_one_request_can_carry_is_refused_before_it_is_sent(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_store_module, "MAX_PUT_BYTES", 10)
    store = CloudStore(url)
    store.put("key", bytes(10))
    with pytest.raises(ValueError, match="11 bytes, one object holds at most 10: split it"):
        store.put("other", [bytes(5), bytes(6)])


def test_a_put_cut_in_the_middle_leaves_nothing_and_is_made_once_by_trying_again(
    url: str, proxy: CuttingProxy, recovery: Recovery
) -> None:
    store, data = CloudStore(_through(proxy, url)), random.Random(1).randbytes(2 << 20)
    proxy.truncate(500_000)
    with pytest.raises(StoreUnavailable, match="cannot put 'a/key'"):
        store.put("a/key", data)
    with pytest.raises(NotFound):
        CloudStore(url).get("a/key")
    assert list(CloudStore(url).keys("")) == []
    proxy.truncate(500_000)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        recovery.fault_is_over()
        pauses.append(seconds)
        threading.Event().wait(seconds)

    put_retrying(store, "a/key", data, attempts=5, backoff=Backoff(random.Random(0)), pause=pause)
    recovery.whole("the whole of it is stored")
    assert len(pauses) == 1
    assert CloudStore(url).get("a/key") == data
    with pytest.raises(AlreadyExists):
        store.put("a/key", data)


def test_a_lost_answer_is_no_answer_and_trying_again_finds_ones_own_bytes(url: str, proxy: CuttingProxy) -> None:
    store = CloudStore(_through(proxy, url))
    store.put("a/first", b"x")
    proxy.lose_answer()
    with pytest.raises(StoreUnavailable):
        store.put("a/key", b"mine")
    assert CloudStore(url).get("a/key") == b"mine", "it was stored: only the answer is lost"
    proxy.lose_answer()
    assert len(_put(store, "a/other", b"mine")) == 1
    CloudStore(url).put("a/third", b"a stranger's")
    with pytest.raises(AlreadyExists):
        _put(store, "a/third", b"mine")


def test_a_link_that_is_down_is_unavailable_until_it_heals(url: str, proxy: CuttingProxy) -> None:
    store = CloudStore(_through(proxy, url))
    store.put("a/key", b"data")
    proxy.cut()
    for call in (
        lambda: store.get("a/key"),
        lambda: store.put("a/new", b"x"),
        lambda: list(store.keys("")),
        lambda: store.folders("a/"),
        lambda: store.delete("a/key"),
    ):
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{proxy.port}"):
            call()
    proxy.heal()
    assert store.get("a/key") == b"data"


def test_a_link_that_stands_still_is_given_up_in_bounded_time(url: str, proxy: CuttingProxy) -> None:
    store = CloudStore(_through(proxy, url), timeout_s=0.3)
    CloudStore(url).put("a/key", bytes(300_000))
    proxy.delay(3600.0)
    for call in (lambda: store.put("b/new", b"x"), lambda: store.get("a/key"), lambda: list(store.keys(""))):
        with pytest.raises(StoreUnavailable):
            call()


def test_what_was_acknowledged_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    with S3Server(tmp_path / "s3") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        store = CloudStore(server.url("kept", "run"), timeout_s=5.0)
        for number in range(10):
            store.put(f"a/{number}", bytes([number]) * 50_000)
        before = server.pid
        server.kill()
        with pytest.raises(StoreUnavailable):
            store.get("a/0")
        server.start()
        assert server.pid != before
        assert list(store.keys("")) == [f"a/{number}" for number in range(10)]
        for number in range(10):
            found = get_retrying(
                store,
                f"a/{number}",
                attempts=60,
                backoff=Backoff(random.Random(0), max_s=0.5),
                pause=threading.Event().wait,
            )
            assert found == bytes([number]) * 50_000
        with pytest.raises(AlreadyExists):
            store.put("a/3", b"other")


def test_a_bucket_that_is_not_there_is_not_an_empty_store(s3_server: S3Server) -> None:
    store = CloudStore(f"s3://nobody-made-this/run?endpoint={s3_server.endpoint}")
    for call in (lambda: store.get("a/key"), lambda: list(store.keys(""))):
        with pytest.raises(StoreUnavailable, match="NoSuchBucket; create it"):
            call()


def test_listings_are_read_from_an_offset_and_not_further_than_needed(url: str, proxy: CuttingProxy) -> None:
    store = CloudStore(_through(proxy, url))
    for number in range(30):
        store.put(f"episodes/robot-1/{number:07d}-5-abc.arrow", b"x")
    after = "episodes/robot-1/0000027-5-abc.arrow"
    assert list(store.keys("episodes/robot-1/", after)) == [
        "episodes/robot-1/0000028-5-abc.arrow",
        "episodes/robot-1/0000029-5-abc.arrow",
    ]
    found = store.keys("episodes/")
    assert next(found) == "episodes/robot-1/0000000-5-abc.arrow"


_FORK = """
import os, sys
from sop.core.errors import RunError
from sop.transport.cloud_store import CloudStore

store = CloudStore(sys.argv[1])
assert list(store.keys("")) == []
if os.fork() == 0:
    for use in (lambda: list(store.keys("")), lambda: CloudStore(sys.argv[1])):
        try:
            use()
        except RunError as error:
            print(error, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_forked_child_is_told_so_instead_of_waiting_for_ever(url: str) -> None:
    done = subprocess.run([sys.executable, "-c", _FORK, url], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("does not survive a fork") == 2
