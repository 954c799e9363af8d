"""A model of a link between a process and its store, in front of any store: delay, shared bandwidth, loss.

    put     | request + bytes up ------------------> | stored | <----- answer |
            |<-- delay --><-- bytes / bandwidth -->            <-- delay -->
    get     | request -->  | read | <------------- bytes down, answer --------|
            |<-- delay -->          <-- bytes / bandwidth --><---- delay ---->

All users of one `LinkStore` share its bandwidth, each direction for itself: bytes queue in pieces of some
milliseconds, so that a large object slows the others down but does not shut them out.

What it is not: no TCP (slow start, retransmission, a window that limits long fat links), no handshakes, no
headers, no jitter. Loss is that of whole operations, not of packets. Real links are slower than this model.
"""

import random
import threading
from collections.abc import Iterator
from itertools import islice

from sop.core.clock import Clock, SystemClock
from sop.core.errors import StoreUnavailable
from sop.transport.base import Data, ObjectStore, parts_of

KEYS_PER_PAGE = 1000
"""Keys that one answer of a listing carries, as with S3: each page is a round trip."""
_PIECE_S = 0.005
"""Bytes take their turns in pieces that keep the link busy for this long ..."""
_MIN_PIECE_BYTES = 4 << 10
"""... or that are at least this large."""


class _Direction:
    """One direction of a link: a queue of pieces that leave one behind the other."""

    def __init__(self, bytes_per_s: float | None, clock: Clock) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_ns = 0
        self._lock = threading.Lock()
        self.num_bytes = 0

    def carry(self, num_bytes: int, start_ns: int) -> int:
        """Sleep until `num_bytes` that were ready at `start_ns` have gone through; returns when that was."""
        if self._bytes_per_s is None:
            with self._lock:
                self.num_bytes += num_bytes
            return start_ns
        piece_bytes = max(_MIN_PIECE_BYTES, int(self._bytes_per_s * _PIECE_S))
        end_ns, left = start_ns, num_bytes
        while left:
            size = min(left, piece_bytes)
            with self._lock:  # a late sleeper loses nothing: its next piece was ready when the last one was gone
                end_ns = self._free_ns = max(self._free_ns, end_ns) + round(size / self._bytes_per_s * 1e9)
                self.num_bytes += size
            self._clock.sleep_until(end_ns)
            left -= size
        return end_ns


class LinkStore:
    """`ObjectStore` behind a link. Safe to use from several threads; they share the bandwidth.

    Every operation costs a round trip (two delays), and its bytes their time at the bandwidth. It does not map
    objects (`MapsObjects`): memory is not shared over a link.

    Args:
        store: what is at the other end.
        delay_s: one way, seconds; half of a ping.
        bytes_per_s: bandwidth of each direction, None for no limit. 1 Gbit/s is 125e6.
        loss: probability in [0, 1] that an operation fails half way with StoreUnavailable: after half of its bytes,
            or after all of them, so that a `put` or `delete` was done and only the answer is lost.
        seed: of the losses; one thread sees the same losses for the same seed.
        clock: what time is read from and spent on.

    Raises:
        ValueError: a negative delay, a bandwidth of 0 or less, or a loss outside of [0, 1].
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        delay_s: float = 0.0,
        bytes_per_s: float | None = None,
        loss: float = 0.0,
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        if delay_s < 0 or not 0 <= loss <= 1 or (bytes_per_s is not None and bytes_per_s <= 0):
            raise ValueError(
                "a link needs delay_s >= 0, bytes_per_s > 0 or None, and loss in [0, 1], "
                f"got {delay_s}, {bytes_per_s} and {loss}"
            )
        self._store = store
        self._delay_ns = round(delay_s * 1e9)
        self._loss = loss
        self._rng = random.Random(seed)
        self._clock: Clock = clock or SystemClock()
        self._up = _Direction(bytes_per_s, self._clock)
        self._down = _Direction(bytes_per_s, self._clock)
        self._lock = threading.Lock()
        self._losses = 0

    @property
    def sent_bytes(self) -> int:
        """Bytes of objects that have gone up, those of failed operations included."""
        return self._up.num_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes of objects and listed keys that have come down."""
        return self._down.num_bytes

    @property
    def losses(self) -> int:
        """Operations that failed because of the link."""
        return self._losses

    def put(self, key: str, data: Data, *, durable: bool = True) -> None:
        """See `ObjectStore.put`. Blocks for a round trip and the bytes."""
        lost = self._draw()
        size = sum(part.nbytes for part in parts_of(data))
        there_ns = self._travel()
        if lost == "request":
            self._up.carry(size // 2, there_ns)
            raise self._failure("put", key)
        self._up.carry(size, there_ns)
        try:
            self._store.put(key, data, durable=durable)
        finally:
            self._travel()
        if lost:
            raise self._failure("put", key)

    def get(self, key: str, span: slice | None = None) -> bytes:
        """See `ObjectStore.get`. Blocks for a round trip and the bytes."""
        lost = self._draw()
        self._travel()
        try:
            data = self._store.get(key, span)
            self._down.carry(len(data) // 2 if lost else len(data), self._clock.monotonic_ns())
        finally:
            self._travel()
        if lost:
            raise self._failure("get", key)
        return data

    def keys(self, prefix: str, after: str | None = None) -> Iterator[str]:
        """See `ObjectStore.keys`. Each page of keys blocks for a round trip and its bytes."""
        return self._pages(prefix, self._store.keys(prefix, after))

    def folders(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.folders`. Each page of names blocks for a round trip and its bytes."""
        return self._pages(prefix, self._store.folders(prefix))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`. Blocks for a round trip."""
        lost = self._draw()
        self._travel()
        if lost == "request":
            raise self._failure("delete", key)
        self._store.delete(key)
        self._travel()
        if lost:
            raise self._failure("delete", key)

    def _pages(self, prefix: str, found: Iterator[str]) -> Iterator[str]:
        while True:
            lost = self._draw()
            self._travel()
            page = list(islice(found, KEYS_PER_PAGE))
            size = sum(map(len, page))
            self._down.carry(size // 2 if lost else size, self._clock.monotonic_ns())
            self._travel()
            if lost:
                raise self._failure("list", prefix)
            yield from page
            if len(page) < KEYS_PER_PAGE:
                return

    def _travel(self) -> int:
        """Sleep for one way; returns when it was over."""
        there_ns = self._clock.monotonic_ns() + self._delay_ns
        if self._delay_ns:
            self._clock.sleep_until(there_ns)
        return there_ns

    def _draw(self) -> str:
        """What this operation loses: nothing (""), its `request`, or its `answer`."""
        if not self._loss:
            return ""
        with self._lock:
            lost = self._rng.random() < self._loss
            return ("request" if self._rng.random() < 0.5 else "answer") if lost else ""

    def _failure(self, operation: str, key: str) -> StoreUnavailable:
        with self._lock:
            self._losses += 1
        return StoreUnavailable(f"the link broke in the middle of: {operation} {key}; try again")
