"""BYTES: objects and events, wherever they are kept. Knows nothing of robots, episodes or policies.

    store   file:///path   s3://bucket/prefix   gs://bucket/prefix   az://container/prefix
    bus     sqlite:///path   nats://host:port/namespace   tls://host:port/namespace

Add an engine: write one class that passes the contract tests and name its scheme in `STORES` or `BUSES`. Libraries of
engines are imported when a URL asks for them.
"""

import uuid
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from sop.core.errors import AlreadyExists, RunError
from sop.transport.base import Cursor, Data, EventBus, MapsObjects, ObjectStore
from sop.transport.directory import DirectoryStore
from sop.transport.identity import Identity, load_identity, own_identity
from sop.transport.sqlite_bus import SqliteBus

__all__ = [
    "BUSES",
    "STORES",
    "Cursor",
    "Data",
    "DirectoryStore",
    "EventBus",
    "Identity",
    "MapsObjects",
    "ObjectStore",
    "SqliteBus",
    "default_bus_url",
    "load_identity",
    "open_bus",
    "open_store",
    "own_identity",
    "probe",
]


def _directory(url: str, identity: Identity | None) -> ObjectStore:  # noqa: ARG001 - files know no identity
    return DirectoryStore(_split(url, default_scheme="file")[1])


def _cloud(url: str, identity: Identity | None) -> ObjectStore:
    from sop.transport.cloud_store import CloudStore

    return CloudStore(url, identity)


def _sqlite(url: str, owner: bool, keep_s: Mapping[str, float], identity: Identity | None) -> EventBus:  # noqa: ARG001
    return SqliteBus(_split(url, default_scheme="sqlite")[1], owner, keep_s)


def _nats(url: str, owner: bool, keep_s: Mapping[str, float], identity: Identity | None) -> EventBus:
    from sop.transport.nats_bus import NatsBus

    return NatsBus(url, owner, keep_s, identity)


STORES: Mapping[str, Callable[[str, Identity | None], ObjectStore]] = {
    "file": _directory,
    "s3": _cloud,
    "gs": _cloud,
    "az": _cloud,
}
"""URL scheme -> constructor, called with the URL and who we are."""

BUSES: Mapping[str, Callable[[str, bool, Mapping[str, float], Identity | None], EventBus]] = {
    "sqlite": _sqlite,
    "nats": _nats,
    "tls": _nats,
}
"""URL scheme -> constructor, called with the URL, owner, seconds to keep per topic, and who we are."""


def open_store(url: str, identity: Identity | None = None) -> ObjectStore:
    """Open the store behind a URL: `file:///absolute/path`, `file://relative/path`, a plain path, or
    `s3://bucket/prefix`, `gs://...`, `az://...` (see `cloud_store`).

    Args:
        url: what to open.
        identity: who we are; None takes the one that `SOP_IDENTITY` names, if any.

    Raises:
        ValueError: unknown scheme or no path.
        StoreUnavailable: the store does not answer.
        RunError: the identity is damaged, or a library is missing.
    """
    scheme, _ = _split(url, default_scheme="file")
    if scheme not in STORES:
        raise ValueError(f"store {url!r}: unknown scheme {scheme!r}, known are {sorted(STORES)} and plain paths")
    return STORES[scheme](url, identity or own_identity())


def open_bus(
    url: str, owner: bool = False, keep_s: Mapping[str, float] | None = None, identity: Identity | None = None
) -> EventBus:
    """Open the bus behind a URL: `sqlite:///absolute/path`, `sqlite://relative/path`, or `nats://host:port/namespace`
    and `tls://...` (see `nats_bus`).

    Args:
        url: what to open.
        owner: the one process that maintains the bus (the learner).
        keep_s: topic -> seconds after which the owner forgets its events; topics not named are kept for ever.
        identity: who we are; None takes the one that `SOP_IDENTITY` names, if any.

    Raises:
        ValueError: unknown scheme or no path.
        StoreUnavailable: the bus does not answer.
        RunError: the identity is damaged, or a library is missing.
    """
    scheme, _ = _split(url, default_scheme="")
    if scheme not in BUSES:
        raise ValueError(f"bus {url!r}: unknown scheme {scheme!r}, known are {sorted(BUSES)}")
    return BUSES[scheme](url, owner, keep_s or {}, identity or own_identity())


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
