"""The store and the bus of the load generator: in the run's folder, or on real servers that are started for it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sop.places import STORE, Place
from sop.testing.servers.nats import NatsServer
from sop.testing.servers.s3 import S3Server
from sop.transport import default_bus_url


@dataclass(frozen=True, slots=True)
class Backends:
    """Where a run is, and the servers that keep it."""

    place: Place | None
    """None: everything is in the run's folder."""
    processes: dict[str, psutil.Process] = field(default_factory=dict)
    """`store` and `bus`, where these are servers."""


@contextmanager
def open_backends(folder: Path, store: str, bus: str) -> Iterator[Backends]:
    """Start what is needed on 127.0.0.1, and stop it at the end (blocking, up to a minute each).

    Args:
        folder: of the run; what the servers keep lies beside the run's files.
        store: `dir`, or `s3` for SeaweedFS, whose credentials go into the environment.
        bus: `sqlite`, or `nats`.
    """
    if (store, bus) == ("dir", "sqlite"):
        yield Backends(None)
        return
    with ExitStack() as stack:
        processes = {}
        store_url = str(folder / STORE)
        bus_url = default_bus_url(store_url)
        if store == "s3":
            s3 = stack.enter_context(S3Server(folder / "s3"))
            os.environ.update(s3.environment)
            store_url = s3.url("fleet", "load")
            processes["store"] = psutil.Process(s3.pid)
        if bus == "nats":
            nats = stack.enter_context(NatsServer(folder / "nats"))
            bus_url = nats.url("load")
            processes["bus"] = psutil.Process(nats.pid)
        yield Backends(Place(store=store_url, bus=bus_url), processes)
