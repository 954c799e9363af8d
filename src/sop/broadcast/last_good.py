"""The last good policies, on the robot's own disk: it starts, and goes back, with nobody there.

    <folder>/<turn>-<version>-<manifest hash>/manifest.json         bytes as published
                                              signature.json        empty when nobody signs in this fleet
                                              weights.safetensors   all tensors, frozen ones included
    <folder>/rollback.json                                          an order of a person at this robot

A policy appears whole (fsync, rename) or not at all. Turns count up: the highest was accepted last. Every load checks
the manifest's hash, its signature, and the hash of every tensor; a damaged policy is skipped and named.
"""

import logging
import mmap
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sop.broadcast.fetch import ReadCost, ReadPolicy, read_manifest
from sop.broadcast.manifest import MAX_MANIFEST_BYTES, FileEntry, max_header_bytes
from sop.broadcast.weights import encode_full, open_full, verify
from sop.core import layout
from sop.core.channel import PolicyRef
from sop.core.codec import content_hash
from sop.core.errors import InvalidRecord, PolicyRefused, RunError
from sop.transport.durable import sync_path, write_durably
from sop.trust.envelope import MAX_ENVELOPE_BYTES

_log = logging.getLogger(__name__)
_NAME = re.compile(r"(?P<turn>\d{8})-(?P<version>\d{8})-(?P<hash>[0-9a-f]{32})")
_MAX_ORDER_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPolicy:
    """A policy with all that it takes to check it again."""

    policy: PolicyRef
    manifest: bytes
    """Of the bytes that were published."""
    signature: bytes
    """Envelope of the statement; empty when nobody signs."""
    read: ReadPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """An order of a person at this robot: run this until somebody who may orders something newer."""

    policy: PolicyRef
    instead_of: int
    """Version of the newest policy at that moment: versions above it are newer orders."""
    sequence: int
    """Number of the channel's newest state at that moment: higher ones are newer orders."""


class LastGood:
    """The folder. One process keeps policies; another may read and order a rollback meanwhile.

        last_good = LastGood(spool / "policies", check=vetting.signed)
        last_good.keep(kept)                      # after a policy was accepted
        found = last_good.boot()                  # at the start
        last_good.rollback()                      # a person's order; no network needed

    Args:
        folder: belongs to this robot alone; made when missing.
        keep: policies that stay, at least 2.
        check: raises PolicyRefused for a policy whose signature is not good: `PolicyVetting.signed`; None checks hashes
            alone.
    """

    def __init__(
        self, folder: Path, keep: int = 3, *, check: Callable[[PolicyRef, bytes], object] | None = None
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, to have one to go back to, got {keep}")
        self._folder = folder
        self._keep = keep
        self._check = check
        self._order = folder / "rollback.json"
        self.skipped: dict[str, str] = {}
        """Name of a folder -> why the policy in it could not be loaded."""

    def kept(self) -> list[PolicyRef]:
        """What is kept, last accepted first; nothing of it is checked."""
        return [policy for policy, _ in self._entries()]

    def keep(self, kept: KeptPolicy) -> None:
        """Have a policy on the disk as the last accepted one, and forget all but the newest. Durable when it returns.
        The same policy again is only marked.

        Raises:
            OSError: no room or no permission; what was kept is kept.
        """
        entries = self._entries()
        turn = 1 + max((int(path.name[:8]) for _, path in entries), default=0)
        name = f"{turn:08d}-{kept.policy.version:08d}-{kept.policy.manifest_hash}"
        known = [path for policy, path in entries if policy == kept.policy and path.name not in self.skipped]
        if known and known[0] != entries[0][1]:
            known[0].rename(self._folder / name)
        elif not known:
            self._write(name, kept)
        sync_path(self._folder)
        for _, path in self._entries()[self._keep :]:
            shutil.rmtree(path)

    def boot(self, may_run: Callable[[PolicyRef], bool] = lambda _: True) -> KeptPolicy | None:
        """The policy of a standing order, or the last accepted one that is whole; None when there is none.

        Blocks: every byte is read.

        Args:
            may_run: False for those to pass over unread, such as banned ones.
        """
        standing = self.standing()
        entries = self._entries()
        if standing is not None:
            entries.sort(key=lambda entry: entry[0] != standing.policy)
        for policy, path in entries:
            if may_run(policy) and (found := self._load(policy, path)) is not None:
                return found
        return None

    def rollback(self, sequence: int = 0) -> PolicyRef:
        """Order the whole policy before the one that is in force, for a person at this robot. Durable when it returns.

        Args:
            sequence: number of the channel's newest state that this robot has seen.

        Raises:
            RunError: there is no older one that is whole.
        """
        entries, standing = self._entries(), self.standing()
        now = standing.policy if standing is not None else entries[0][0] if entries else None
        older = entries[1 + next((i for i, entry in enumerate(entries) if entry[0] == now), -1) :] if entries else []
        for policy, path in older:
            if self._load(policy, path) is not None:
                newest = max(entry[0].version for entry in entries)
                order = Rollback(policy=policy, instead_of=newest, sequence=sequence)
                write_durably(self._order, msgspec.json.encode(order))
                return policy
        damaged = "".join(f"; {name}: {reason}" for name, reason in self.skipped.items())
        raise RunError(
            f"{self._folder} keeps no policy to go back to{damaged}: order a rollback on the channel instead"
        )

    def standing(self) -> Rollback | None:
        """The order that stands; None without one, and when its file or its policy is damaged or gone."""
        try:
            with self._order.open("rb") as file:
                order = msgspec.json.decode(file.read(_MAX_ORDER_BYTES), type=Rollback)
        except (OSError, msgspec.DecodeError):
            return None
        return order if order.policy in self.kept() else None

    def overrule(self) -> None:
        """A newer order has arrived: the standing one is forgotten. Idempotent.

        Raises:
            OSError: the disk refuses.
        """
        self._order.unlink(missing_ok=True)

    def _entries(self) -> list[tuple[PolicyRef, Path]]:
        """(policy, its folder), last accepted first."""
        names = sorted(self._folder.iterdir(), reverse=True) if self._folder.exists() else []
        found = [(_NAME.fullmatch(path.name), path) for path in names]
        return [(PolicyRef(int(match["version"]), match["hash"]), path) for match, path in found if match]

    def _write(self, name: str, kept: KeptPolicy) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self._folder.glob(".part-*"):
            shutil.rmtree(unfinished)
        part = self._folder / f".part-{name}"
        part.mkdir()
        parts = encode_full(kept.read.weights).parts
        with (part / "weights.safetensors").open("wb") as file:
            for piece in parts:
                file.write(piece)
        for path, data in ((part / "manifest.json", kept.manifest), (part / "signature.json", kept.signature)):
            path.write_bytes(data)
        for path in part.iterdir():
            sync_path(path)
        sync_path(part)
        part.rename(self._folder / name)

    def _load(self, policy: PolicyRef, path: Path) -> KeptPolicy | None:
        try:
            found = self._checked(policy, path)
        except (OSError, PolicyRefused, InvalidRecord, ValueError) as error:
            self.skipped[path.name] = str(error)
            _log.warning("the policy kept in %s is skipped: %s", path, error)
            return None
        self.skipped.pop(path.name, None)
        return found

    def _checked(self, policy: PolicyRef, path: Path) -> KeptPolicy:
        started = time.perf_counter()
        name, manifest = f"policy {policy.version}", _read(path / "manifest.json", MAX_MANIFEST_BYTES)
        signature = _read(path / "signature.json", MAX_ENVELOPE_BYTES)
        if content_hash(manifest) != policy.manifest_hash:
            raise PolicyRefused(f"{name}: its manifest is altered")
        if self._check is not None:
            self._check(policy, signature)
        described = read_manifest(manifest, policy.version)
        with (path / "weights.safetensors").open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        size = min(8 + int.from_bytes(data[:8], "little"), 8 + max_header_bytes(described.tensors), len(data))
        entry = FileEntry(layout.policy_weights(policy.version), len(data), content_hash(data[:size]))
        weights = open_full(data, entry, described.tensors, name)
        verify(weights, described.tensors, name)
        cost = ReadCost(num_bytes=len(data), verify_s=time.perf_counter() - started)
        read = ReadPolicy(described, weights, cost)
        return KeptPolicy(policy=policy, manifest=manifest, signature=signature, read=read)


class Keeper:
    """Writes policies into a `LastGood` on a thread of its own, so that neither acting nor fetching waits for the disk.

    Bounded: one policy waits, a newer one replaces it; two writes are at least `every_s` apart, so that a fast learner
    does not wear it out. A disk that is full is said in `problem`, and the next policy is tried again.

    Args:
        last_good: where to.
        every_s: seconds.
    """

    def __init__(self, last_good: LastGood, every_s: float = 60.0) -> None:
        self._last_good = last_good
        self._every_s = every_s
        self._waiting: KeptPolicy | None = None
        self._closing = False
        self._changed = threading.Condition()
        self.problem = ""
        """Why the last policy could not be kept; empty when it could."""
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def keep(self, kept: KeptPolicy) -> None:
        """Hand over a policy. Never blocks."""
        with self._changed:
            self._waiting = kept
            self._changed.notify_all()

    def close(self) -> None:
        """Write what waits, then stop. Blocks for that write. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting is not None)
                kept, self._waiting = self._waiting, None
            if kept is None:
                return
            try:
                self._last_good.keep(kept)
                self.problem = ""
            except Exception as error:  # noqa: BLE001  a thread's top level: a robot acts on without a spare copy
                self.problem = f"policy {kept.policy.version} could not be kept on this robot's disk: {error}"
                _log.warning(self.problem)
            del kept
            with self._changed:
                self._changed.wait_for(lambda: self._closing, self._every_s)


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit + 1)
