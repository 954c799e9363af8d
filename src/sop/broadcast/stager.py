"""Two policies per robot: one acts, the other is loaded and waits; exchanging them is exchanging two pointers."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sop.broadcast.fetch import ReadCost, ReadPolicy
from sop.broadcast.manifest import PolicyManifest
from sop.core.channel import PolicyRef
from sop.core.errors import PolicyRefused, SopError
from sop.core.policy import Policy, PolicySpec, Weights

Prepare = Callable[[PolicyManifest, Weights, Policy | None], Policy]
"""Puts verified weights into a policy: into the spare one that nobody acts with if it fits, else into a new one.
Raises PolicyRefused or ValueError when it cannot be; the spare is then as it was."""


def prepare_with(make_policy: Callable[[PolicySpec], Policy]) -> Prepare:
    """The usual `Prepare`: a policy is made when there is no spare one or its spec is another."""

    def prepare(manifest: PolicyManifest, weights: Weights, spare: Policy | None) -> Policy:
        fits = spare is not None and spare.spec == manifest.spec
        policy = spare if fits and spare is not None else make_policy(manifest.spec)
        policy.load(weights, manifest.version)
        return policy

    return prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPolicy:
    """A policy that passed every check and waits in memory for the end of the episode."""

    manifest: PolicyManifest
    weights: Weights
    """Read-only arrays."""
    policy: Policy | None
    """With the weights loaded; None when the subscriber was not told how to prepare one."""
    published_utc_ns: int
    """By the learner's clock: when the manifest was in the store; when the event was lost, the earlier moment
    at which the learner handed the snapshot over."""
    staged_utc_ns: int
    """By this robot's clock."""
    cost: ReadCost
    """Bytes and seconds to here, preparing excluded."""
    prepare_s: float
    """Seconds in which the weights were put into the policy."""

    @property
    def version(self) -> int:
        """The policy's version."""
        return self.manifest.version


class Stager:
    """Owns the staged and the spare policy. One thread stages; any thread takes, and holds `changed` for it.

    Args:
        prepare: puts weights into a policy; None stages the weights alone.
        acting: what the actor has already; None when it has nothing.
        clock_ns: UTC nanoseconds.
    """

    def __init__(self, prepare: Prepare | None, acting: PolicyRef | None, clock_ns: Callable[[], int]) -> None:
        self._prepare = prepare
        self._clock_ns = clock_ns
        self._timer = time.perf_counter
        self._spare: Policy | None = None  # nobody acts with it, and it is not staged
        self.changed = threading.Condition()
        """Guards everything here."""
        self.staged: StagedPolicy | None = None
        """What waits to be taken."""
        self.acting = acting
        """What was taken last."""
        self.have = acting
        """What was staged last and not withdrawn, or what acts."""

    def take(self, instead_of: Policy | None) -> StagedPolicy | None:
        """The staged policy, once; `instead_of` is then the stager's. Hold `changed`."""
        staged, self.staged = self.staged, None
        if staged is not None:
            self.acting = self.have
            self._spare = instead_of if instead_of is not None else self._spare
        return staged

    def stage(
        self,
        read: ReadPolicy,
        policy: PolicyRef,
        published_utc_ns: int | None = None,
        accept: Callable[[], None] = lambda: None,
    ) -> None:
        """Load a policy and have it wait. Blocks while the weights are loaded, without `changed`.

        Args:
            read: what is loaded.
            policy: what it is called from then on.
            published_utc_ns: when an event said so; None takes the moment at which it was handed over.
            accept: called when it is loaded, before anybody can take it.

        Raises:
            PolicyRefused: it cannot be loaded; what waited before waits again.
        """
        started_s = self._timer()
        loaded = self._loaded(read)
        staged = StagedPolicy(
            manifest=read.manifest,
            weights=read.weights,
            policy=loaded,
            published_utc_ns=read.manifest.created_utc_ns if published_utc_ns is None else published_utc_ns,
            staged_utc_ns=self._clock_ns(),
            cost=read.cost,
            prepare_s=self._timer() - started_s,
        )
        accept()
        with self.changed:
            self.staged, self.have = staged, policy
            self.changed.notify_all()

    def withdraw(self, objection: Callable[[PolicyRef], str]) -> None:
        """What waits must not be taken any more. At hand is what acts, or nothing if that is objected to as well.

        Hold `changed`."""
        staged, self.staged = self.staged, None
        if staged is not None and self._spare is None:
            self._spare = staged.policy
        self.have = None if self.acting is None or objection(self.acting) else self.acting

    def _loaded(self, read: ReadPolicy) -> Policy | None:
        """A policy with these weights: the spare one, the one that is staged and not taken, or a new one."""
        if self._prepare is None:
            return None
        withdrawn = None
        with self.changed:
            spare, self._spare = self._spare, None
            if spare is None:
                withdrawn, self.staged = self.staged, None
                spare = None if withdrawn is None else withdrawn.policy
        try:
            return self._prepare(read.manifest, read.weights, spare)
        except (SopError, ValueError) as error:
            with self.changed:  # what was there before is there again
                if withdrawn is None:
                    self._spare = spare
                else:
                    self.staged = withdrawn
            raise PolicyRefused(f"policy {read.manifest.version}: it cannot be run here: {error}") from error
