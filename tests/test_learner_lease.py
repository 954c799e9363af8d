"""The lease: one learner per run, whoever dies, sleeps, races or has another clock."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from recovery_times import Recovery
from sop.core.errors import Forbidden, RunError, StoreUnavailable
from sop.learner.lease import LearnerLease, LeaseLost
from sop.learner.owner import learner_owner
from sop.testing.memory import MemoryStore
from sop.transport import Data, ObjectStore, open_store

PATIENCE_S = 30.0


class Time:
    """Seconds that pass when somebody waits; `during` runs in every wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self.during: Callable[[], object] = lambda: None

    def read(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.during()


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return MemoryStore() if request.param == "memory" else open_store(str(tmp_path / "store"))


def lease(store: ObjectStore, owner: str, time: Time) -> LearnerLease:
    return LearnerLease(
        store, owner=owner, patience_s=PATIENCE_S, clock=time.read, utc_ns=lambda: 10**18, pause=time.wait
    )


def test_the_second_learner_is_told_who_holds_the_lease_and_what_to_do(store: ObjectStore) -> None:
    """Fault 15: two learners on one run: the second is refused."""
    first, time = lease(store, "a", Time()), Time()
    assert first.acquire() == 1
    time.during = first.beat
    with pytest.raises(RunError, match=rf"process {os.getpid()} on .* \(owner a\) since 2001-09-09 .* UTC. Stop it"):
        lease(store, "b", time).acquire()
    assert time.now < PATIENCE_S / 2
    assert first.check() == 1


def test_a_silent_holder_is_replaced_and_its_next_publish_is_refused(store: ObjectStore, recovery: Recovery) -> None:
    """Fault 15: the old learner's publishes are rejected, however long it slept."""
    first, time = lease(store, "a", Time()), Time()
    first.acquire()
    second = lease(store, "b", time)
    recovery.fault_is_over(time.read)
    assert second.acquire() == 2
    recovery.whole("the second holds the lease of a silent first")
    assert time.now == pytest.approx(PATIENCE_S, abs=PATIENCE_S / 10)
    first.beat()
    for _ in range(2):
        with pytest.raises(LeaseLost, match="owner b"):
            first.check()
    assert second.check() == second.token == 2


def test_a_clock_that_is_a_day_off_changes_nothing(store: ObjectStore) -> None:
    """Fault 16: nobody compares his clock with another machine's."""
    first, late = lease(store, "a", Time()), Time()
    late.now = -86_400.0
    first.acquire()
    late.during = first.beat
    with pytest.raises(RunError, match="has a learner already"):
        lease(store, "b", late).acquire()
    late.during = lambda: None
    assert lease(store, "b", late).acquire() == 2


def test_a_restarted_learner_and_one_after_a_clean_end_need_not_wait(store: ObjectStore) -> None:
    time = Time()
    assert lease(store, "a", time).acquire() == 1
    again = lease(store, "a", time)
    assert again.acquire() == 2
    again.close()
    again.close()
    assert lease(store, "b", time).acquire() == 3
    assert time.now == 0


def test_of_many_newcomers_exactly_one_wins() -> None:
    def all_listed(operation: str, key: str) -> None:
        if operation == "put" and key == "leases/learner/00000001.json":
            together.wait()

    together, tokens, refused = threading.Barrier(8), [], []
    store = MemoryStore(before=all_listed)

    def newcomer(number: int) -> None:
        try:
            tokens.append(lease(store, f"owner-{number}", Time()).acquire())
        except RunError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=newcomer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tokens == [1]
    assert len(refused) == 7
    assert all("has a learner already" in text for text in refused)


def test_a_holder_that_cannot_be_heard_publishes_nothing_until_it_is_heard_again() -> None:
    store, time = MemoryStore(), Time()
    holder = lease(store, "a", time)
    holder.acquire()

    def away(operation: str, _: str) -> None:
        if operation == "put":
            raise StoreUnavailable("away")

    store.before = away
    time.now = PATIENCE_S
    with pytest.raises(StoreUnavailable, match="away"):
        holder.beat()
    assert holder.check() == 1
    time.now += 1
    with pytest.raises(StoreUnavailable, match="no sign of life of the learner could be written for 31 s"):
        holder.check()
    store.before = lambda *_: None
    holder.beat()
    assert holder.check() == 1


def test_a_holder_that_is_refused_for_a_while_goes_on_beating() -> None:
    class Refusing(MemoryStore):
        refuses, refused, heard = False, threading.Event(), threading.Event()

        def put(self, key: str, data: Data, *, durable: bool = True) -> None:
            if self.refuses:
                self.refused.set()
                raise Forbidden("credentials are being exchanged")
            super().put(key, data, durable=durable)
            if self.refused.is_set():
                self.heard.set()

    store = Refusing()
    with LearnerLease(store, owner="a", patience_s=0.06) as held:
        store.refuses = True
        assert store.refused.wait(20)
        store.refuses = False
        assert store.heard.wait(20), "the thread lives"
        assert held.token == 1


def test_old_beats_are_collected_and_tokens_stay(store: ObjectStore) -> None:
    time = Time()
    first = lease(store, "a", time)
    first.acquire()
    for _ in range(5):
        first.beat()
    assert list(store.keys("leases/")) == ["leases/learner/00000001-00000006.json", "leases/learner/00000001.json"]
    lease(store, "a", time).acquire()
    assert [key.rpartition("/")[2] for key in store.keys("leases/")] == [
        "00000001.json",
        "00000002-00000001.json",
        "00000002.json",
    ]


def test_foreign_objects_and_damaged_tokens_stop_nobody() -> None:
    store, time = MemoryStore(), Time()
    store.put("leases/learner/notes.txt", b"hello")
    store.put("leases/learner/00000004.json", b"\xff{" * 5000)
    with pytest.raises(RunError, match="a process that left no name"):
        time.during = lambda: store.tamper("leases/learner/00000004-00000009.json", b"")
        lease(store, "b", time).acquire()
    time.during = lambda: None
    assert lease(store, "b", time).acquire() == 5


def test_an_answer_that_was_lost_is_no_lost_race() -> None:
    """The put of the token reached the store, its answer did not reach us."""
    store, time = MemoryStore(), Time()
    put = store.put
    lost = iter([True])

    def losing(key: str, data: bytes, *, durable: bool = True) -> None:
        put(key, data, durable=durable)
        if next(lost, False):
            raise StoreUnavailable("no answer")

    store.put = losing  # type: ignore[method-assign,assignment]
    assert lease(store, "a", time).acquire() == 1


def test_a_folder_has_one_learner_and_one_name_for_ever(tmp_path: Path) -> None:
    with learner_owner(tmp_path) as name, pytest.raises(RunError, match=r"runs in .* already"), learner_owner(tmp_path):
        pass
    with learner_owner(tmp_path) as again:
        assert again == name
    (tmp_path / "learner.owner").write_bytes(b"\xff" * 99)
    with learner_owner(tmp_path) as other:
        assert other != name
    assert len((tmp_path / "learner.owner").read_text()) == 32


_HOLD = """
import sys
from sop.learner.lease import LearnerLease
from sop.transport import open_store
with LearnerLease(open_store(sys.argv[1]), owner="a", patience_s=1.5) as lease:
    print(lease.check(), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_learner_waits_for_the_death_of_another_process_and_then_takes_over(tmp_path: Path) -> None:
    """Fault 15: kill -9 of the learner; the next one takes over with a higher token."""
    url = str(tmp_path / "store")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "1\n"
            with pytest.raises(RunError, match=f"the run has a learner already: process {first.pid}"):
                LearnerLease(open_store(url), owner="b", patience_s=60.0).acquire()
        finally:
            first.kill()
    with LearnerLease(open_store(url), owner="b", patience_s=1.5) as lease:
        assert lease.check() == 2
