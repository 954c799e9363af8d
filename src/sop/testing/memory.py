"""A store and a bus in memory that keep the contract of `sop.transport.base`, for tests.

Both take a hook that is called before every operation. It may record it, raise (a store that is away or
breaks at the n-th put) or block (a store that hangs):

    store = MemoryStore(before=lambda operation, key: log.append((operation, key)))
"""

import threading
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator

from sop.core.errors import AlreadyExists, NotFound
from sop.transport.base import (
    MAX_EVENTS_PER_POLL,
    Cursor,
    Data,
    check_event,
    check_folder,
    check_key,
    check_prefix,
    check_topic,
    parts_of,
    resolve_span,
    row_of,
)


def _nothing(operation: str, place: str) -> None:
    """The hook that does nothing."""


class MemoryStore:
    """`ObjectStore` and `MapsObjects` of one process.

    Args:
        before: called with the method's name (`put`, `get`, `map`, `keys`, `delete`) and the key, outside of the lock.
    """

    def __init__(self, before: Callable[[str, str], None] = _nothing) -> None:
        self.before = before
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: Data, *, durable: bool = True) -> None:  # noqa: ARG002  nothing outlives the process
        """See `ObjectStore.put`."""
        check_key(key)
        parts = parts_of(data)
        self.before("put", key)
        with self._lock:
            if key in self._objects:
                raise AlreadyExists(f"{key!r} exists already and is never replaced")
            self._check_folders(key)
            self._objects[key] = b"".join(parts)

    def get(self, key: str, span: slice | None = None) -> bytes:
        """See `ObjectStore.get`."""
        check_key(key)
        start, stop = resolve_span(span)
        self.before("get", key)
        with self._lock:
            data = self._objects.get(key)
        if data is None:
            raise NotFound(f"no object {key!r} in memory")
        return data if span is None else data[start:stop]

    def map(self, key: str) -> memoryview:
        """See `MapsObjects.map`."""
        check_key(key)
        self.before("map", key)
        with self._lock:
            data = self._objects.get(key)
        if data is None:
            raise NotFound(f"no object {key!r} in memory")
        return memoryview(data)

    def keys(self, prefix: str, after: str | None = None) -> Iterator[str]:
        """See `ObjectStore.keys`."""
        check_prefix(prefix)
        self.before("keys", prefix)
        with self._lock:
            ordered = sorted(self._objects)
        start = bisect_right(ordered, after) if after is not None else 0
        return (key for key in ordered[start:] if key.startswith(prefix))

    def folders(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.folders`."""
        check_folder(prefix)
        self.before("folders", prefix)
        with self._lock:
            below = [key.removeprefix(prefix) for key in self._objects if key.startswith(prefix)]
        return iter(sorted({key.partition("/")[0] for key in below if "/" in key}))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        check_key(key)
        self.before("delete", key)
        with self._lock:
            self._objects.pop(key, None)

    def tamper(self, key: str, data: bytes) -> None:
        """Replace or create an object behind the contract's back: what a hostile or broken store does."""
        with self._lock:
            self._objects[key] = data

    def _check_folders(self, key: str) -> None:
        for other in self._objects:
            if other.startswith(f"{key}/"):
                raise ValueError(f"key {key!r} is a folder of other objects")
            if key.startswith(f"{other}/"):
                raise ValueError(f"key {key!r} is below {other!r}, which is an object")


class MemoryBus:
    """`EventBus` of one process.

    Args:
        before: called with the method's name (`publish`, `poll`) and the topic, outside of the lock.
    """

    def __init__(self, before: Callable[[str, str], None] = _nothing) -> None:
        self.before = before
        self._history = uuid.uuid4().hex[:12]
        self._events: dict[str, list[bytes]] = {}
        self._seen: set[tuple[str, str]] = set()
        self._changed = threading.Condition()
        self._closed = False

    def publish(self, topic: str, event: bytes, event_id: str) -> None:
        """See `EventBus.publish`."""
        check_topic(topic)
        check_event(event, event_id)
        if not isinstance(event, bytes):
            raise TypeError(f"publish on {topic!r}: event must be bytes, got {type(event).__name__}")
        self.before("publish", topic)
        with self._changed:
            self._require_open()
            if (topic, event_id) not in self._seen:
                self._seen.add((topic, event_id))
                self._events.setdefault(topic, []).append(event)
                self._changed.notify_all()

    def poll(self, topic: str, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
        """See `EventBus.poll`."""
        check_topic(topic)
        start = row_of(after, self._history)
        self.before("poll", topic)
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._require_open()
            while not self._closed and len(self._events.get(topic, ())) <= start:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            found = self._events.get(topic, [])[start : start + MAX_EVENTS_PER_POLL]
        return [(f"{self._history}:{start + offset}", event) for offset, event in enumerate(found, 1)]

    def close(self) -> None:
        """See `EventBus.close`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the bus is closed")
