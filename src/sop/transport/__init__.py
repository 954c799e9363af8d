"""BYTES: objects and events, wherever they are kept. Knows nothing of robots, episodes or policies.

Add an engine: write one class that passes the contract tests and name its scheme in `STORES` or `BUSES`.
"""

import uuid
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from sop.core.errors import AlreadyExists, RunError
from sop.transport.base import Cursor, Data, EventBus, MapsObjects, ObjectStore
from sop.transport.directory import DirectoryStore
from sop.transport.sqlite_bus import SqliteBus

__all__ = [
    "BUSES",
    "STORES",
    "Cursor",
    "Data",
    "DirectoryStore",
    "EventBus",
    "MapsObjects",
    "ObjectStore",
    "SqliteBus",
    "default_bus_url",
    "open_bus",
    "open_store",
    "probe",
]

STORES: Mapping[str, Callable[[str], ObjectStore]] = {"file": DirectoryStore}
"""URL scheme -> constructor, called with what follows `scheme://`."""

BUSES: Mapping[str, Callable[[str, bool, Mapping[str, float]], EventBus]] = {"sqlite": SqliteBus}
"""URL scheme -> constructor, called with what follows `scheme://`, owner, and seconds to keep per topic."""


def open_store(url: str) -> ObjectStore:
    """Open the store behind a URL: `file:///absolute/path`, `file://relative/path`, or a plain path.

    Raises:
        ValueError: unknown scheme or no path.
        StoreUnavailable: the store does not answer.
    """
    scheme, place = _split(url, default_scheme="file")
    if scheme not in STORES:
        raise ValueError(f"store {url!r}: unknown scheme {scheme!r}, known are {sorted(STORES)} and plain paths")
    return STORES[scheme](place)


def open_bus(url: str, owner: bool = False, keep_s: Mapping[str, float] | None = None) -> EventBus:
    """Open the bus behind a URL: `sqlite:///absolute/path` or `sqlite://relative/path`.

    Args:
        url: what to open.
        owner: the one process that maintains the bus (the learner).
        keep_s: topic -> seconds after which the owner forgets its events; topics not named are kept for ever.

    Raises:
        ValueError: unknown scheme or no path.
        StoreUnavailable: the bus does not answer.
    """
    scheme, place = _split(url, default_scheme="")
    if scheme not in BUSES:
        raise ValueError(f"bus {url!r}: unknown scheme {scheme!r}, known are {sorted(BUSES)}")
    return BUSES[scheme](place, owner, keep_s or {})


def default_bus_url(store_url: str) -> str:
    """The bus that belongs to a store on this machine: `bus.sqlite` beside the directory.

    Raises:
        ValueError: the store is not a directory, so its bus has to be named.
    """
    scheme, place = _split(store_url, default_scheme="file")
    if scheme != "file":
        raise ValueError(f"store {store_url!r} has no bus beside it: name one, e.g. sqlite:///path/bus.sqlite")
    return f"sqlite://{PurePosixPath(place).parent / 'bus.sqlite'}"


def probe(store: ObjectStore) -> None:
    """Make sure that the store keeps its word: an object is created once. Call it before a run starts.

    Some servers accept `create only` and replace all the same; every racing writer would believe that it won.

    Raises:
        RunError: the second create succeeded, or the first bytes are not read back.
        StoreUnavailable: the store does not answer.
    """
    key = f"probes/{uuid.uuid4().hex}"
    store.put(key, b"first")
    try:
        try:
            store.put(key, b"second")
        except AlreadyExists:
            pass
        else:
            raise RunError(
                f"the store let {key!r} be created twice: it ignores create-only puts and would lose data. "
                "Use a store with conditional writes (If-None-Match) or a local directory"
            )
        found = store.get(key)
        if found != b"first":
            raise RunError(f"the store answers {found!r} for {key!r} where b'first' was put: use another store")
    finally:
        store.delete(key)


def _split(url: str, default_scheme: str) -> tuple[str, str]:
    scheme, separator, place = url.partition("://")
    if not separator:
        scheme, place = default_scheme, url
    if not place:
        raise ValueError(f"{url!r} names no place: write {scheme or 'sqlite'}:///path")
    return scheme, place
