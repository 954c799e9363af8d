"""Keys, a trust root and signed policies for the tests of trust and broadcast."""

from functools import cache
from pathlib import Path
from typing import Any

from broadcast_examples import World, place, policy
from sop.broadcast import PolicyVetting, publish_state
from sop.core import layout
from sop.core.channel import STATEMENT_TYPE, TRAIN, ChannelState, PolicyRef, PolicyStatement, encode_record
from sop.core.codec import content_hash
from sop.trust import Role, SigningKey, TrustMemory, TrustRoot

DAY_NS = 24 * 3600 * 10**9
NOW_NS = 20_000 * DAY_NS
RUN = "run-1"
ROBOT_NAME = "robot-1"


@cache
def key(name: str) -> SigningKey:
    """One key pair per name and test session."""
    assert name
    return SigningKey.generate()


def root(version: int = 1, names: dict[str, tuple[str, ...]] | None = None, **changes: Any) -> TrustRoot:
    """A trust root: role -> names of its keys, or, with a threshold, `changes`."""
    names = {"root": ("root",), "candidate": ("learner",), "release": ("release",)} | (names or {})
    thresholds = changes.pop("thresholds", {})
    keys = {key(name).key_id: key(name).public for group in names.values() for name in group}
    roles = {
        role: Role(tuple(key(name).key_id for name in group), thresholds.get(role, 1)) for role, group in names.items()
    }
    fields: dict[str, Any] = {"fleet": "lab", "version": version, "expires_utc_ns": NOW_NS + 100 * DAY_NS}
    return TrustRoot(keys=keys, roles=roles, **(fields | changes))


def trust_json(**changes: Any) -> bytes:
    return root(**changes).sealed([key("root")])


def ref(version: int, **changes: Any) -> PolicyRef:
    """What `publish_signed` puts under a version."""
    return PolicyRef(version, content_hash(policy(version, **changes)[0].to_json()))


def statement(version: int, **changes: Any) -> PolicyStatement:
    fields: dict[str, Any] = {
        "run": RUN,
        "policy": ref(version),
        "issued_utc_ns": NOW_NS,
        "expires_utc_ns": NOW_NS + 7 * DAY_NS,
    }
    return PolicyStatement(**(fields | changes))


def signature(version: int, signer: str = "learner", payload_type: str = STATEMENT_TYPE, **changes: Any) -> bytes:
    return key(signer).sign(payload_type, encode_record(statement(version, **changes)))


def state(sequence: int, channel: str = TRAIN, **changes: Any) -> ChannelState:
    fields: dict[str, Any] = {
        "run": RUN,
        "stable": None,
        "issued_utc_ns": NOW_NS,
        "expires_utc_ns": NOW_NS + 7 * DAY_NS,
    }
    return ChannelState(channel=channel, sequence=sequence, **(fields | changes))


class Fleet(World):
    """A world in which policies are signed, and one robot that believes `root()`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.now_ns = NOW_NS

    def vetting(self, channel: str = TRAIN, trust: bytes | None = None) -> PolicyVetting:
        """As after a start of the robot: with what its file remembers."""
        memory = TrustMemory(self.folder / "memory", RUN)
        trust = trust_json() if trust is None else trust
        clock = lambda: self.now_ns  # noqa: E731
        return PolicyVetting(trust, memory, run=RUN, robot=ROBOT_NAME, channel=channel, clock_ns=clock)

    def place_signed(self, version: int, envelope: bytes | None = None) -> None:
        """A policy and its signature, or that envelope; no event."""
        place(self.store, *policy(version), version)
        self.store.tamper(layout.policy_signature(version), signature(version) if envelope is None else envelope)

    def publish_signed(self, version: int, envelope: bytes | None = None) -> None:
        self.place_signed(version, envelope)
        self.announce(version)

    def order(self, sequence: int, channel: str = TRAIN, **changes: Any) -> None:
        """Publish a state of a channel."""
        publish_state(self.store, self.bus, key("release"), state(sequence, channel, **changes))
