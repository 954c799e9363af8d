"""What is said about policies and signed: a published policy is vouched for, a channel names what robots run.

    PolicyStatement   policies/<version>/signature.json        "version 412 of this run is the manifest with this hash"
    ChannelState      channels/<channel>/<sequence>.json       "on this channel, from now on, this is what robots run"

Both travel inside signed envelopes (`sop.trust`). A state replaces the one before as a whole and has a higher sequence
number, so a rollback is one more state that names an older version, never an undoing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from sop.core.episode import ACTOR_ID
from sop.core.errors import InvalidRecord

TRAIN = "train"
"""Channel of robots in supervised learning: every published version that is not banned, as soon as it is there."""
PROD = "prod"
"""Channel of robots at work: what a state names, and nothing else."""
CHANNELS = (TRAIN, PROD)
STATEMENT_TYPE = "application/vnd.sop.policy+json"
"""Payload type of an envelope with a `PolicyStatement`."""
CHANNEL_TYPE = "application/vnd.sop.channel+json"
"""Payload type of an envelope with a `ChannelState`."""
MAX_RECORD_BYTES = 1 << 20
"""A signed record is small; what is larger is refused before it is parsed."""
MAX_SEQUENCE = 10**8 - 1
"""A sequence number has 8 digits in the store."""

_HASH = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """One published policy, beyond doubt."""

    version: int
    manifest_hash: str
    """`content_hash` of the bytes of `manifest.json`, which has the hash of every tensor: 32 hexadecimal digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatement:
    """The learner vouches for one version. Checked on construction.

    Raises:
        InvalidRecord: names the field.
    """

    run: str
    """`RunManifest.name`: a policy of another run is foreign."""
    policy: PolicyRef
    issued_utc_ns: int
    expires_utc_ns: int
    """After this moment a robot that does not act with it yet refuses it."""
    fence: int = 0
    """Token of the learner's lease; a version of a learner that lost its lease has a lower one than the newest."""

    def __post_init__(self) -> None:
        _check_ref("policy", self.policy)
        _check_times(self.issued_utc_ns, self.expires_utc_ns)
        if self.fence < 0:
            raise InvalidRecord("fence", f"must be 0 or more, got {self.fence}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelState:
    """What the robots of a channel run from now on. Checked on construction.

    Raises:
        InvalidRecord: names the field.
    """

    run: str
    channel: str
    sequence: int
    """1, 2, 3, ... per channel; a robot never goes back to a lower one."""
    stable: PolicyRef | None
    """What every robot runs that is not named in `candidate_robots`. None on `train`: the newest that is not banned."""
    candidate: PolicyRef | None = None
    """What the canaries run; None when nothing is being tried."""
    candidate_robots: tuple[str, ...] = ()
    """The canaries: names of robots."""
    control_robots: tuple[str, ...] = ()
    """The concurrent control arm: robots that stay on `stable` and are compared with the canaries."""
    banned: Mapping[str, str] = field(default_factory=dict)
    """Manifest hash -> why no robot may run it."""
    immediate: bool = False
    """A robot that runs something else now holds and changes at once instead of at the end of its episode."""
    reason: str = ""
    """Why it was made, for people."""
    issued_utc_ns: int
    expires_utc_ns: int
    """After this moment the state still holds, but a robot says that nothing newer reaches it (freeze)."""

    def __post_init__(self) -> None:
        if self.channel not in CHANNELS:
            raise InvalidRecord("channel", f"must be one of {CHANNELS}, got {self.channel[:80]!r}")
        if not 1 <= self.sequence <= MAX_SEQUENCE:
            raise InvalidRecord("sequence", f"must be in [1, {MAX_SEQUENCE}], got {self.sequence}")
        if (self.stable is None) != (self.channel == TRAIN):
            raise InvalidRecord("stable", f"must be named on {PROD} and on no other channel")
        if (self.candidate is None) != (not self.candidate_robots):
            raise InvalidRecord("candidate_robots", "must be named exactly when there is a candidate")
        _check_robots(self)
        _check_bans(self)
        _check_times(self.issued_utc_ns, self.expires_utc_ns)

    def policy_of(self, robot: str) -> PolicyRef | None:
        """What a robot runs; None on `train`: the newest that is not banned."""
        return self.candidate if self.candidate is not None and robot in self.candidate_robots else self.stable


Signed = TypeVar("Signed", PolicyStatement, ChannelState)


def encode_record(record: PolicyStatement | ChannelState) -> bytes:
    """JSON bytes of a record: the payload of an envelope."""
    return msgspec.json.encode(record)


def decode_record(data: bytes, kind: type[Signed]) -> Signed:
    """Read the payload of an envelope; fields and types are checked.

    Raises:
        InvalidRecord: too large, not JSON, or a field is missing or wrong.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise InvalidRecord(kind.__name__, f"has {len(data)} bytes, at most {MAX_RECORD_BYTES} are read")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRecord(kind.__name__, str(error)) from error


def _check_robots(state: ChannelState) -> None:
    for name in ("candidate_robots", "control_robots"):
        for robot in getattr(state, name):
            if not re.fullmatch(ACTOR_ID, robot):
                raise InvalidRecord(name, f"not the name of a robot: {robot[:80]!r}")
    if both := set(state.candidate_robots) & set(state.control_robots):
        raise InvalidRecord("control_robots", f"{min(both)} is a canary, too")


def _check_bans(state: ChannelState) -> None:
    for name, ref in (("stable", state.stable), ("candidate", state.candidate)):
        if ref is not None:
            _check_ref(name, ref)
            if ref.manifest_hash in state.banned:
                raise InvalidRecord(name, f"policy {ref.version} is banned in the same state")
    for banned in state.banned:
        if not _HASH.fullmatch(banned):
            raise InvalidRecord("banned", f"not the hash of a manifest: {banned[:80]!r}")


def _check_ref(name: str, ref: PolicyRef) -> None:
    if ref.version < 0 or not _HASH.fullmatch(ref.manifest_hash):
        raise InvalidRecord(name, f"not a policy: version {ref.version}, manifest {ref.manifest_hash[:80]!r}")


def _check_times(issued_utc_ns: int, expires_utc_ns: int) -> None:
    if not 0 <= issued_utc_ns < expires_utc_ns:
        raise InvalidRecord("expires_utc_ns", f"{expires_utc_ns} is not after issued_utc_ns {issued_utc_ns}")
