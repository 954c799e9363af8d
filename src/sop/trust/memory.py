"""What this robot has seen: so that nobody can sell it something older as new, not even after a restart.

    <file>    32 hexadecimal digits: hash of what follows
              JSON: run, trust root, newest state per channel, the last policies that were accepted

Signatures say who; only memory says when. The file lies beside the robot's spool, is written whole (fsync, rename), and
nothing in it ever goes back. A damaged file is not the same as no file: the robot says so, keeps what it runs and
accepts nothing new until a person looks, because forgetting silently is what an attacker would like. Deleting the file
is that person's way to start again from `trust.json`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from sop.core.channel import PolicyRef, PolicyStatement
from sop.core.codec import content_hash
from sop.core.errors import RunError
from sop.transport.durable import write_durably

MAX_MEMORY_BYTES = 8 << 20
"""A trust root, one state per channel, KEPT policies: a larger file is damaged."""
KEPT = 16
"""Policies that are remembered by hash: a robot that must leave its policy goes back to the newest of these that it
may run, and to no older one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenState:
    """The newest state of a channel, as it was signed."""

    sequence: int
    envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The content of the file."""

    run: str = ""
    root: bytes = b""
    """Envelope of the newest trust root; empty before the first."""
    root_version: int = 0
    states: dict[str, SeenState] = field(default_factory=dict)
    """Channel -> its newest state."""
    accepted: tuple[PolicyStatement, ...] = ()
    """What was accepted, newest last, each once."""
    newest_utc_ns: int = 0
    """`seen_utc_ns` of what was remembered, the latest: it is not earlier than that now."""
    schema_version: int = 1


class TrustMemory:
    """The file and its content. Used by one process, from one thread; a disk that is full or broken is said in
    `problem`, never raised.

    Args:
        path: of the file; made when there is something to remember.
        run: whose policies are remembered.

    Raises:
        RunError: the file remembers another run.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._damage = ""
        self._unwritten = ""
        self.content = Memory(run=run)
        """What is remembered; nothing while the file is damaged."""
        try:
            with path.open("rb") as file:
                found = _decode(file.read(MAX_MEMORY_BYTES + 1))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._damage = f"{path} is damaged ({error}): this robot does not know any more what it has seen, and "
            self._damage += "accepts nothing new. Look why, then delete the file to start again from its trust.json"
            return
        if found.run != run:
            raise RunError(f"{path} remembers run {found.run!r}, not {run!r}: take another folder for this robot")
        self.content = found

    @property
    def problem(self) -> str:
        """Why nothing can be remembered, with what to do; empty when it can. Tries again what could not be written."""
        if self._unwritten:
            self._write()
        return self._damage or self._unwritten

    def remember_root(self, version: int, envelope: bytes) -> None:
        """A trust root was believed. One that is not newer changes nothing. Durable when it returns."""
        if version > self.content.root_version:
            self._change(replace(self.content, root=envelope, root_version=version))

    def remember_state(self, channel: str, sequence: int, envelope: bytes, seen_utc_ns: int) -> None:
        """A state of a channel was believed. One that is not newer changes nothing. Durable when it returns."""
        known = self.content.states.get(channel)
        if known is None or sequence > known.sequence:
            states = self.content.states | {channel: SeenState(sequence=sequence, envelope=envelope)}
            newest = max(self.content.newest_utc_ns, seen_utc_ns)
            self._change(replace(self.content, states=states, newest_utc_ns=newest))

    def remember_policy(self, statement: PolicyStatement, seen_utc_ns: int) -> None:
        """A policy was accepted. The same one again is the newest again. Durable when it returns."""
        older = tuple(known for known in self.content.accepted if known.policy != statement.policy)
        if self.content.accepted[-1:] != (statement,):
            newest = max(self.content.newest_utc_ns, seen_utc_ns)
            accepted = (*older, statement)[-KEPT:]
            self._change(replace(self.content, accepted=accepted, newest_utc_ns=newest))

    def accepted(self, policy: PolicyRef) -> bool:
        """Whether this robot has accepted exactly this policy, not too long ago."""
        return any(known.policy == policy for known in self.content.accepted)

    def _change(self, content: Memory) -> None:
        if not self._damage:
            self.content = content
            self._write()

    def _write(self) -> None:
        data = msgspec.json.encode(self.content)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._path, content_hash(data).encode() + b"\n" + data)
            self._unwritten = ""
        except OSError as error:
            self._unwritten = f"{self._path} cannot be written ({error}): nothing new is accepted until it can"


def _decode(data: bytes) -> Memory:
    """Raises ValueError (msgspec's and InvalidRecord's included) with what is wrong."""
    if len(data) > MAX_MEMORY_BYTES:
        raise ValueError(f"more than {MAX_MEMORY_BYTES} bytes")
    head, _, body = data.partition(b"\n")
    if head != content_hash(body).encode():
        raise ValueError("its hash is another")
    try:
        content = msgspec.json.decode(body, type=Memory)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if content.schema_version != 1:
        raise ValueError(f"schema {content.schema_version} is that of another program")
    return content
