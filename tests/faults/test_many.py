"""A hundred robots at one publish."""

import random
import threading

import pytest

from broadcast_examples import ROBOT, bytes_of, facts, weights
from recovery_times import Recovery
from sop.broadcast import Publisher, Subscriber
from sop.testing.memory import MemoryBus, MemoryStore

pytestmark = pytest.mark.slow
ROBOTS = 100
PATIENCE_S = 60.0


def test_fault_47_a_hundred_robots_fetch_and_the_learner_does_not_wait(recovery: Recovery) -> None:
    """The hand-over returns while the store takes nothing yet, and while every robot reads."""
    held, reading = threading.Event(), threading.Semaphore(0)

    def store_is_slow(operation: str, key: str) -> None:
        if operation in ("map", "get") and not key.endswith(".json"):
            reading.release()
            assert held.wait(PATIENCE_S)

    store, bus = MemoryStore(before=store_is_slow), MemoryBus()
    publisher = Publisher(store, bus, keep_policies=8)
    publisher.publish_now(weights(0), facts())
    robots = [Subscriber(store, bus, ROBOT, poll_s=0.2, rng=random.Random(number)) for number in range(ROBOTS)]
    try:
        for _ in range(ROBOTS):
            assert reading.acquire(timeout=PATIENCE_S)
        for number in (1, 2, 3):
            publisher.publish(weights(number), facts(number))  # returns while a hundred robots hold the store's door
        held.set()
        recovery.fault_is_over()
        publisher.close()
        newest = publisher.last_published
        for robot in robots:
            staged = robot.wait_first(PATIENCE_S)
            while staged.version != newest:
                staged = robot.wait_first(PATIENCE_S)
            assert bytes_of(staged.weights) == bytes_of(weights(3))
            assert robot.refusals == {}
        recovery.whole("all hundred had the newest, of a few bytes")
    finally:
        held.set()
        for robot in robots:
            robot.close()
