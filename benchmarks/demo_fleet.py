"""The fleet of the demonstration over TLS: its members, its servers' ports, and what the administrator does."""

from dataclasses import dataclass
from pathlib import Path

from sop.fleet import Fleet, Register
from sop.testing.servers.s3 import free_ports
from sop.transport import Identity, load_identity
from sop.transport.identity import VARIABLE

BUCKET = "fleet"
NAME = "demo"
REVOKED = ("robot-2", "robot-3")
JOINED = ("robot-4", "robot-5")
AUDITOR = "auditor"
"""Reads the store and hears the bus, to see what the others do."""
MEMBERS = {
    "learner": "learner",
    "evaluator": "evaluator",
    AUDITOR: "observer",
    **{f"lab-{number}": "robot" for number in range(2)},
    **{f"robot-{number}": "robot" for number in range(6)},
}
"""Name -> role."""


@dataclass(frozen=True, slots=True)
class DemoFleet:
    """A fleet's folder, and the ports of its servers on 127.0.0.1."""

    folder: Path
    store_port: int
    bus_port: int

    @classmethod
    def make(cls, folder: Path) -> "DemoFleet":
        """`sop fleet init` and `enroll`, in a new folder."""
        store_port, bus_port = free_ports(2)
        made = cls(folder, store_port, bus_port)
        register = Register(
            fleet=NAME,
            store=made.store_url(),
            bus=made.bus_url(),
            store_admin="seaweedfs",
            servers=str(folder.absolute() / "servers"),
            days=1,
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        fleet, _ = Fleet.create(folder, register)
        for name, role in MEMBERS.items():
            fleet.enroll(name, role)
        return made

    def apply(self) -> tuple[str, ...]:
        """`sop fleet apply`; what it leaves to a person."""
        return Fleet(self.folder).apply().todo

    def revoke(self, name: str) -> tuple[str, ...]:
        """`sop fleet revoke`; what it leaves to a person."""
        return Fleet(self.folder).revoke(name, "the demonstration").todo

    def store_url(self, port: int | None = None) -> str:
        """URL of the run's store, perhaps behind a relay."""
        return f"s3://{BUCKET}/{NAME}?endpoint=https://127.0.0.1:{port or self.store_port}&region=us-east-1"

    def bus_url(self, port: int | None = None) -> str:
        """URL of the run's bus, perhaps behind a relay."""
        return f"tls://127.0.0.1:{port or self.bus_port}/{NAME}"

    def identity(self, name: str) -> Identity:
        """What a member was handed."""
        return load_identity(self.folder / "identities" / name)

    def environment(self, name: str) -> dict[str, str]:
        """What a process is told to be a member."""
        return {VARIABLE: str(self.identity(name).folder)}
