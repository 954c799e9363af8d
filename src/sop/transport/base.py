"""What a store of objects and a bus of events promise, whatever engine is behind them.

    store   the truth: immutable objects, created once, found again by listing
    bus     a hint: small events in order, delivered at least once; losing it costs latency, never data

The rules of both are executed as contract tests (`sop.testing.contracts`) against every implementation.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

Cursor: TypeAlias = str
"""A place in the history of a bus. Opaque; may be kept in a JSON checkpoint and used by another process later."""

Data: TypeAlias = bytes | memoryview | Sequence[bytes | memoryview]
"""What `put` takes: bytes, or contiguous parts that are stored one behind the other as one object."""

MAX_KEY_LENGTH = 1024
"""Longest key in characters: the limit of S3, so that a run can move there."""
MAX_KEY_PART_LENGTH = 255
"""Longest part between two `/`: the limit of file names."""
MAX_EVENT_BYTES = 64 << 10
"""An event carries keys, never data; what is larger belongs into the store."""
MAX_EVENTS_PER_POLL = 1000
"""Bounds the memory of one `poll`; the rest comes with the next call."""
MAX_EVENT_ID_LENGTH = 1024

_CHARACTERS = re.compile(r"[A-Za-z0-9._/-]*")
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,100}")


class ObjectStore(Protocol):
    """Immutable objects under hierarchical keys. Safe to use from several threads and processes.

    How a writer uses it (the uploader; a repeated put of the same episode is a success):

        try:
            store.put(key, data)                       # whole and durable when this returns
        except AlreadyExists:
            pass                                       # the key holds a content hash: same key, same bytes
        bus.publish("episodes", encode_event(EpisodeCommitted(key=key, ...)), event_id=key)

    How a reader uses it (recovery, then every now and then in case an event was lost):

        for key in store.keys("episodes/robot-1/", after=last_key):
            index.add(EpisodeKey.parse(key))
        data = store.get(key)

    Keys are relative paths of the characters `A-Z a-z 0-9 . _ - /`. No part is empty or begins with `.`, and
    a key is never also a folder of another key. Every method raises ValueError for a key that breaks this.
    """

    def put(self, key: str, data: Data, *, durable: bool = True) -> None:
        """Create an object. All or nothing, never replaces. Blocks.

        Durable when it returns: it survives a power cut. With `durable=False` a power cut may lose or tear it,
        a killed process still may not: for what its reader verifies by hash and can do without.

        Of several racing writers of one key exactly one succeeds. After StoreUnavailable the object may
        or may not exist: `put_retrying` settles that.

        Raises:
            AlreadyExists: the key is taken; the stored object is untouched.
            StoreUnavailable: no room or no answer; the same call may work later.
        """
        ...

    def get(self, key: str, span: slice | None = None) -> bytes:
        """The object's bytes, or the part `span` of them as slicing would give it (no step, nothing negative). Blocks.

        Only the span is read and allocated, so `slice(0, limit + 1)` bounds what a hostile object can cost.

        Raises:
            NotFound: no object under this key.
            StoreUnavailable: no answer; the same call may work later.
        """
        ...

    def keys(self, prefix: str, after: str | None = None) -> Iterator[str]:
        """Keys that begin with `prefix` (a string, not a folder), in lexicographic order, strictly after `after`.

        Objects that exist when the walk begins are found; what is created during the walk may be. Lazy: stop
        iterating whenever enough was seen.

        Raises:
            StoreUnavailable: no answer, also in the middle of the iteration.
        """
        ...

    def folders(self, prefix: str) -> Iterator[str]:
        """Names between `prefix` and the next `/` of all keys that have one there, each once, in lexicographic order.

        For `episodes/` the actors. One level is listed, whatever lies below. A folder whose objects were all deleted
        may still be named.

        Args:
            prefix: empty, or ends in `/`.

        Raises:
            ValueError: a prefix that is no folder.
            StoreUnavailable: no answer.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object; none under this key is fine. For retention; a key is used again only by
        the learner that rewrites its own checkpoint.

        Raises:
            StoreUnavailable: no answer; the same call may work later.
        """
        ...


@runtime_checkable
class MapsObjects(Protocol):
    """A store whose objects lie in this machine's memory or file cache anyway: reading one need not copy it.

    data = store.map(key) if isinstance(store, MapsObjects) else store.get(key)
    """

    def map(self, key: str) -> memoryview:
        """The whole object, read-only, without copying it: bytes are read when they are touched. Blocks for a moment.

        Stays valid as long as the view or a part of it is referenced, also when the object is deleted meanwhile.

        Raises:
            NotFound: no object under this key.
            StoreUnavailable: no answer; the same call may work later.
        """
        ...


class EventBus(Protocol):
    """Topics of small events. Safe to use from several threads. A subscriber's loop:

    cursor = None                                           # or the one of a checkpoint
    while not stopping:
        for cursor, event in bus.poll("episodes", cursor, timeout_s=0.5):
            ingest(decode_event(event, EpisodeCommitted))   # idempotent: an event may come twice
    """

    def publish(self, topic: str, event: bytes, event_id: str) -> None:
        """Append an event; visible to every subscriber when this returns. Blocks for a moment.

        An id that the topic has already seen is dropped whatever it carries: publishing again is harmless.

        Raises:
            ValueError: bad topic or id, event above MAX_EVENT_BYTES, or the bus is closed.
            StoreUnavailable: no room or no answer; the same call may work later.
        """
        ...

    def poll(self, topic: str, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
        """Events after the cursor in the order of publication, each with its own cursor; [] after `timeout_s`.

        Returns as soon as there is something, at most MAX_EVENTS_PER_POLL at once. `after=None` starts at the
        beginning. So does a cursor of a bus that was lost and made anew: events come twice rather than never.

        Raises:
            ValueError: bad topic, not a cursor, or the bus is closed. A poll that waits while another
                thread closes the bus returns [].
            StoreUnavailable: no answer; the same call may work later.
        """
        ...

    def close(self) -> None:
        """Release what the bus holds and wake up waiting polls. Idempotent."""
        ...


def check_key(key: str) -> None:
    """Refuse what is not a key.

    Raises:
        ValueError: says which rule of `ObjectStore` is broken.
    """
    _check_characters(key)
    parts = key.split("/")
    if "" in parts:
        raise ValueError(f"key {key!r} has an empty part; write it as folder/name without leading or trailing '/'")
    hidden = [part for part in parts if part.startswith(".")]
    if hidden:
        raise ValueError(f"key {key!r} has the part {hidden[0]!r}; parts must not begin with '.'")
    if max(map(len, parts)) > MAX_KEY_PART_LENGTH:
        raise ValueError(f"key {key[:80]!r}... has a part of more than {MAX_KEY_PART_LENGTH} characters")


def parts_of(data: Data) -> list[memoryview]:
    """What was given to `put` as flat views of bytes, in order; nothing is copied.

    Raises:
        TypeError: neither bytes, nor a view, nor a sequence of these, or a view that is not contiguous.
    """
    parts = [data] if isinstance(data, bytes | memoryview) else data
    if not isinstance(parts, list | tuple) or not all(isinstance(part, bytes | memoryview) for part in parts):
        raise TypeError(f"data must be bytes, a memoryview or a list of these, got {type(data).__name__}")
    return [memoryview(part).cast("B") if len(part) else memoryview(b"") for part in parts]


def check_prefix(prefix: str) -> None:
    """Refuse what no key can begin with.

    Raises:
        ValueError: says which rule of `ObjectStore` is broken.
    """
    _check_characters(prefix)
    if "/" in prefix:
        check_key(prefix.rpartition("/")[0])


def check_folder(prefix: str) -> None:
    """Refuse what is not the prefix of a folder.

    Raises:
        ValueError: neither empty nor a key that ends in `/`.
    """
    check_prefix(prefix)
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"folder {prefix!r} must be empty or end in '/'")


def _check_characters(text: str) -> None:
    if len(text) > MAX_KEY_LENGTH:
        raise ValueError(f"key {text[:80]!r}... has {len(text)} characters, at most {MAX_KEY_LENGTH} are allowed")
    if not _CHARACTERS.fullmatch(text):
        raise ValueError(f"key {text!r} has characters other than A-Z a-z 0-9 . _ - /")


def check_topic(topic: str) -> None:
    """Refuse what is not the name of a topic.

    Raises:
        ValueError: names the topic.
    """
    if not _TOPIC.fullmatch(topic):
        raise ValueError(f"topic {topic!r} must be 1 to 100 characters of A-Z a-z 0-9 . _ -")


def check_event(event: bytes, event_id: str) -> None:
    """Refuse events that a bus does not carry.

    Raises:
        ValueError: no id, too long an id, or more than MAX_EVENT_BYTES.
    """
    if not 1 <= len(event_id) <= MAX_EVENT_ID_LENGTH:
        raise ValueError(f"event_id must have 1 to {MAX_EVENT_ID_LENGTH} characters, got {len(event_id)}")
    if len(event) > MAX_EVENT_BYTES:
        raise ValueError(
            f"event {event_id!r} has {len(event)} bytes, at most {MAX_EVENT_BYTES} are carried: "
            "put data into the store and publish its key"
        )


def resolve_span(span: slice | None) -> tuple[int, int | None]:
    """(start, stop) of a span in bytes; stop is None for the end of the object.

    Raises:
        ValueError: a step, something negative, or an end before the start.
    """
    if span is None:
        return 0, None
    start = 0 if span.start is None else int(span.start)
    stop = None if span.stop is None else int(span.stop)
    if span.step not in (None, 1) or start < 0 or (stop is not None and stop < start):
        raise ValueError(f"span {span} must be slice(start, stop) with 0 <= start <= stop and no step")
    return start, stop


def row_of(cursor: Cursor | None, history: str) -> int:
    """Row number of a cursor `<history>:<row>`; 0 for None and for another history: that bus is gone, begin again.

    Raises:
        ValueError: not a cursor.
    """
    if cursor is None:
        return 0
    its_history, _, row = cursor.partition(":")
    if not its_history or not row.isdecimal() or len(row) > 18:
        raise ValueError(f"{cursor!r} is not a cursor of a bus: pass one that poll returned, or None")
    return int(row) if its_history == history else 0
