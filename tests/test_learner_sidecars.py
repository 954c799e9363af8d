"""The writer of sidecars: created once, never in the learner's way, and honest about what it drops."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from sop.core import layout
from sop.core.errors import StoreUnavailable
from sop.core.experience import Sidecar
from sop.core.layout import EpisodeKey
from sop.core.sidecar import decode_sidecar
from sop.learner.sidecars import SidecarWriter
from sop.testing.memory import MemoryStore


def key(number: int) -> EpisodeKey:
    return EpisodeKey("episodes", "robot-0", number, 2, f"{number:032x}")


def numbers(value: float, version: int = 1) -> Sidecar:
    return Sidecar(version=version, columns={"value": np.full(2, value, np.float32)})


def place(number: int, version: int = 1) -> str:
    return layout.sidecar("recap", version, key(number).episode_id)


def no_pause(_: float) -> None:
    """The store is asked again at once."""


def away(operation: str, _: str) -> None:
    if operation == "put":
        raise StoreUnavailable("away")


class Gate:
    """A store that hangs in its puts until it is opened."""

    def __init__(self, then: Callable[[str, str], None] = lambda *_: None) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self._then = then

    def __call__(self, operation: str, place: str) -> None:
        self.entered.set()
        assert self.opened.wait(20)
        self._then(operation, place)


def test_every_version_of_an_episode_is_created_once_and_closing_stores_what_waits() -> None:
    store = MemoryStore()
    writer = SidecarWriter(store, "recap")
    for value, version in ((1.0, 1), (2.0, 1), (3.0, 2)):
        writer.write(key(0), numbers(value, version))
    writer.close()
    writer.close()
    assert list(store.keys("labels/")) == [place(0), place(0, 2)]
    assert decode_sidecar(store.get(place(0)), key(0)).columns["value"].tolist() == [1.0, 1.0]
    assert writer.lost == 0
    with pytest.raises(ValueError, match="closed"):
        writer.write(key(1), numbers(1.0))


def test_more_than_can_wait_is_dropped_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    store = MemoryStore(before=gate)
    writer = SidecarWriter(store, "recap", max_waiting=2)
    writer.write(key(0), numbers(0.0))
    assert gate.entered.wait(20)
    for number in (1, 2, 3, 4):
        writer.write(key(number), numbers(0.0))
    assert writer.lost == 2
    gate.opened.set()
    writer.close()
    assert list(store.keys("labels/")) == [place(0), place(1), place(2)]
    assert caplog.text.count("sidecars of episodes are dropped") == 1


def test_a_store_that_is_away_costs_sidecars_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(away)
    store = MemoryStore(before=gate)
    writer = SidecarWriter(store, "recap", pause=no_pause)
    for number in range(5):
        writer.write(key(number), numbers(0.0))
    gate.opened.set()
    writer.close()
    assert writer.lost == 5
    assert caplog.text.count("sidecars of episodes are dropped") == 1


def test_a_store_that_comes_back_in_time_loses_nothing() -> None:
    failures = iter([True, True, False])
    store = MemoryStore()

    def twice(operation: str, where: str) -> None:
        if next(failures, False):
            away(operation, where)

    store.before = twice
    writer = SidecarWriter(store, "recap", pause=no_pause)
    writer.write(key(0), numbers(0.0))
    writer.close()
    assert (list(store.keys("labels/")), writer.lost) == ([place(0)], 0)


def test_a_mistake_of_the_program_reaches_the_learner() -> None:
    store = MemoryStore()
    writer = SidecarWriter(store, "recap")
    with pytest.raises(ValueError, match="must be float32"):
        writer.write(key(0), Sidecar(version=1, columns={"value": np.zeros(3, np.float32)}))
    writer.close()
    broken = SidecarWriter(store, "")
    broken.write(key(0), numbers(0.0))
    with pytest.raises(ValueError, match="empty part"):
        broken.close()
