"""Trying again, within bounds: growing pauses with jitter, and a create-only put whose answer was lost."""

import random
from collections.abc import Callable
from typing import TypeVar

from sop.core.errors import AlreadyExists, Forbidden, NotFound, StoreError, StoreUnavailable
from sop.transport.base import Data, ObjectStore, parts_of

Answer = TypeVar("Answer")
FORBIDDEN_PAUSE_S = 30.0
"""Between two attempts of whom store or bus refuse: an administrator has to change that."""


class Backoff:
    """Pauses that double from `first_s` to `max_s`, each drawn from its upper half so that a fleet spreads out.

    Args:
        rng: source of the jitter; seed it to repeat a test.
        first_s: longest first pause, seconds.
        max_s: longest pause, seconds.
    """

    def __init__(self, rng: random.Random, *, first_s: float = 0.1, max_s: float = 10.0) -> None:
        if not 0 < first_s <= max_s:
            raise ValueError(f"backoff needs 0 < first_s <= max_s, got {first_s} and {max_s}")
        self._rng = rng
        self._first_s = first_s
        self._max_s = max_s
        self._limit_s = first_s

    def next_s(self) -> float:
        """The next pause in seconds."""
        pause_s = self._rng.uniform(self._limit_s / 2, self._limit_s)
        self._limit_s = min(2 * self._limit_s, self._max_s)
        return pause_s

    def after(self, error: StoreError) -> float:
        """The pause in seconds after an attempt that failed: the next one, or FORBIDDEN_PAUSE_S after a `Forbidden`."""
        return FORBIDDEN_PAUSE_S if isinstance(error, Forbidden) else self.next_s()

    def reset(self) -> None:
        """Begin with short pauses again, after a success."""
        self._limit_s = self._first_s


def put_retrying(
    store: ObjectStore,
    key: str,
    data: Data,
    *,
    attempts: int,
    backoff: Backoff,
    pause: Callable[[float], object],
    durable: bool = True,
) -> None:
    """`store.put`, tried up to `attempts` times while the store is unavailable. Blocks.

    A put whose answer was lost may have succeeded: a later attempt that finds the key taken by the same
    bytes is a success.

    Args:
        pause: waits for so many seconds, e.g. `time.sleep` or `stop_event.wait`; it may cut the wait short.
        durable: as for `store.put`.

    Raises:
        AlreadyExists: the key was taken before the first attempt, or is taken by other bytes.
        StoreUnavailable: the last attempt failed too.
    """
    for attempt in range(1, attempts + 1):
        try:
            store.put(key, data, durable=durable)
        except StoreUnavailable:
            if attempt == attempts:
                raise
            pause(backoff.next_s())
        except AlreadyExists:
            if attempt > 1 and _holds(store, key, data):
                return
            raise
        else:
            backoff.reset()
            return


def get_retrying(
    store: ObjectStore, key: str, *, attempts: int, backoff: Backoff, pause: Callable[[float], object]
) -> bytes:
    """`store.get`, tried up to `attempts` times while the store is unavailable. Blocks.

    Raises:
        NotFound: no object under the key.
        StoreUnavailable: the last attempt failed too.
    """
    return retrying(lambda: store.get(key), attempts=attempts, backoff=backoff, pause=pause)


def retrying(
    read: Callable[[], Answer], *, attempts: int, backoff: Backoff, pause: Callable[[float], object]
) -> Answer:
    """`read()`, tried up to `attempts` times while the store is unavailable; for what may be repeated. Blocks.

    Raises:
        StoreUnavailable: the last attempt failed too.
    """
    for _ in range(attempts - 1):
        try:
            return read()
        except StoreUnavailable:
            pause(backoff.next_s())
    return read()


def _holds(store: ObjectStore, key: str, data: Data) -> bool:
    parts = parts_of(data)
    try:
        found = memoryview(store.get(key, slice(0, sum(map(len, parts)) + 1)))
    except NotFound:
        return False
    for part in parts:
        if found[: len(part)] != part:
            return False
        found = found[len(part) :]
    return not found
