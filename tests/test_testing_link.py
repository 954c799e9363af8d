"""The model of a link: what operations cost, what they share, and what is lost."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import sop.testing.contracts.store as contract
from sop.core.errors import AlreadyExists, NotFound, StoreUnavailable
from sop.testing.clock import FakeClock
from sop.testing.link import KEYS_PER_PAGE, LinkStore
from sop.testing.memory import MemoryStore
from sop.transport.base import MapsObjects
from sop.transport.directory import DirectoryStore


def _seconds(clock: FakeClock, work: Callable[[], object]) -> float:
    before_ns = clock.now_ns
    work()
    return (clock.now_ns - before_ns) / 1e9


@pytest.mark.parametrize("rule", contract.STORE_RULES, ids=lambda rule: rule.__name__)
def test_a_store_behind_a_link_keeps_the_contract(rule: Callable[..., None], tmp_path: Path) -> None:
    rule(lambda: LinkStore(DirectoryStore(tmp_path / "store"), bytes_per_s=1e9))


def test_every_operation_pays_a_round_trip_and_its_bytes() -> None:
    clock = FakeClock()
    link = LinkStore(MemoryStore(), delay_s=0.05, bytes_per_s=1e6, clock=clock)
    assert _seconds(clock, lambda: link.put("a/x", bytes(200_000))) == pytest.approx(0.3)
    assert _seconds(clock, lambda: link.get("a/x")) == pytest.approx(0.3)
    assert _seconds(clock, lambda: link.get("a/x", slice(0, 1000))) == pytest.approx(0.101)
    assert _seconds(clock, lambda: list(link.keys("a/"))) == pytest.approx(0.100003)
    assert _seconds(clock, lambda: link.delete("a/x")) == pytest.approx(0.1)
    assert (link.sent_bytes, link.received_bytes) == (200_000, 201_003)


def test_a_refused_operation_pays_its_round_trip_too() -> None:
    clock = FakeClock()
    link = LinkStore(MemoryStore(), delay_s=0.05, clock=clock)
    link.put("x", b"1")

    def refused() -> None:
        with pytest.raises(AlreadyExists):
            link.put("x", b"2")
        with pytest.raises(NotFound):
            link.get("y")

    assert _seconds(clock, refused) == pytest.approx(0.2)


def test_parts_are_counted_together() -> None:
    clock = FakeClock()
    link = LinkStore(MemoryStore(), bytes_per_s=1e6, clock=clock)
    assert _seconds(clock, lambda: link.put("x", [bytes(1000), memoryview(bytes(3000))])) == pytest.approx(0.004)
    assert len(link.get("x")) == 4000


def test_a_long_listing_pays_one_round_trip_per_page_and_loses_no_key() -> None:
    clock, store = FakeClock(), MemoryStore()
    keys = [f"k/{number:05d}" for number in range(2 * KEYS_PER_PAGE + 5)]
    for key in keys:
        store.tamper(key, b"")
    link = LinkStore(store, delay_s=0.05, clock=clock)
    found: list[str] = []
    assert _seconds(clock, lambda: found.extend(link.keys("k/"))) == pytest.approx(0.3)
    assert found == keys
    assert _seconds(clock, lambda: next(iter(link.keys("k/")))) == pytest.approx(0.1), "a listing is lazy"


class _Turns(FakeClock):
    """A sleeper waits at a barrier for the other one, so that two threads' pieces alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(2)

    def sleep_until(self, monotonic_ns: int) -> None:
        self.barrier.wait(30)
        super().sleep_until(monotonic_ns)


def test_two_users_share_the_bandwidth_and_finish_together() -> None:
    clock = _Turns()
    link = LinkStore(MemoryStore(), bytes_per_s=1e6, clock=clock)
    threads = [threading.Thread(target=link.put, args=(key, bytes(100_000))) for key in "ab"]
    started_ns = clock.now_ns
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert clock.now_ns - started_ns == 200_000_000


def test_a_late_sleeper_does_not_slow_the_link_down() -> None:
    class Late(FakeClock):
        def sleep_until(self, monotonic_ns: int) -> None:
            super().sleep_until(monotonic_ns + 1_000_000 if monotonic_ns > self.now_ns else monotonic_ns)

    clock = Late()
    link = LinkStore(MemoryStore(), bytes_per_s=1e6, clock=clock)
    assert _seconds(clock, lambda: link.put("x", bytes(1_000_000))) == pytest.approx(1.0, abs=0.0011)


def test_memory_is_not_shared_over_a_link() -> None:
    assert isinstance(MemoryStore(), MapsObjects)
    assert not isinstance(LinkStore(MemoryStore()), MapsObjects)


def test_directions_do_not_share() -> None:
    clock = FakeClock()
    link = LinkStore(MemoryStore(), bytes_per_s=1e6, clock=clock)
    link.put("x", bytes(500_000))
    clock.now_ns -= 500_000_000  # as seen by another user, who asks while the first one sends
    assert _seconds(clock, lambda: link.get("x")) == pytest.approx(0.5)


def test_losses_hit_the_given_share_and_half_of_the_lost_puts_are_stored() -> None:
    store, clock = MemoryStore(), FakeClock()
    link = LinkStore(store, loss=0.25, seed=1, clock=clock)
    lost = []
    for number in range(1000):
        try:
            link.put(f"k/{number:04d}", bytes(100))
        except StoreUnavailable:
            lost.append(f"k/{number:04d}")
    stored = set(store.keys("k/"))
    assert 200 < len(lost) < 300
    assert link.losses == len(lost)
    assert 0.35 < len(stored & set(lost)) / len(lost) < 0.65, "the answer was lost, not the object"
    assert len(stored | set(lost)) == 1000
    assert link.sent_bytes == 100 * len(stored) + 50 * (1000 - len(stored)), "a lost request got half way"


def test_the_same_seed_loses_the_same_operations() -> None:
    def losses(seed: int) -> list[int]:
        link = LinkStore(MemoryStore(), loss=0.3, seed=seed, clock=FakeClock())
        found = []
        for number in range(100):
            try:
                link.put(f"{number}", b"")
            except StoreUnavailable:
                found.append(number)
        return found

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_a_broken_link_loses_everything_and_says_what() -> None:
    store = MemoryStore()
    store.put("x", b"1")
    link = LinkStore(store, loss=1.0, clock=FakeClock())
    with pytest.raises(StoreUnavailable, match="in the middle of: get x; try again"):
        link.get("x")
    with pytest.raises(StoreUnavailable, match="list"):
        next(link.keys(""))
    with pytest.raises(StoreUnavailable, match="delete x"):
        link.delete("x")


@pytest.mark.parametrize("wrong", [{"delay_s": -1.0}, {"bytes_per_s": 0.0}, {"loss": 1.1}, {"loss": -0.1}])
def test_a_link_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a link needs"):
        LinkStore(MemoryStore(), **wrong)  # type: ignore[arg-type]
