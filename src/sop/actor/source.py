"""Where an actor gets its policies from: the newest that is published (`Subscriber`), or one and no other."""

from collections.abc import Mapping
from typing import Protocol

from sop.broadcast import PolicyReader, PolicyVetting, Prepare, StagedPolicy
from sop.broadcast.admission import Admission
from sop.core.clock import Clock
from sop.core.embodiment import Embodiment
from sop.core.policy import Policy
from sop.transport import ObjectStore


class PolicySource(Protocol):
    """What an actor and its reporter need of a `Subscriber`. None of it blocks."""

    @property
    def newest_version(self) -> int | None:
        """Newest version that this robot could be asked to run; None while there is none."""
        ...

    @property
    def refusals(self) -> Mapping[int, str]:
        """Version -> why it was refused."""
        ...

    @property
    def problem(self) -> str:
        """Why nothing new can be had at the moment; empty when it can."""
        ...

    @property
    def must_leave(self) -> str:
        """Why the policy that acts must be left now, the robot held until `take` gives another; empty otherwise."""
        ...

    def take(self, instead_of: Policy | None = None) -> StagedPolicy | None:
        """The staged policy, once; None when there is nothing new."""
        ...


class PinnedPolicy:
    """One version for the whole of an actor's life, whatever else is published: for rollouts of the base policy.

    Blocks for the transfer when it is made.

    Args:
        store: where policies are; read only.
        version: the one to act with.
        embodiment: this robot.
        prepare: puts the weights into a policy.
        clock: stamps when it was ready.
        vetting: whom this robot believes; None asks for no signatures.

    Raises:
        NotFound: the version is not published.
        Untrusted: nobody whom this robot believes vouches for it, or it is banned.
        PolicyRefused: made for another robot, or its tensors are not what the manifest says.
        StoreUnavailable: no answer.
    """

    def __init__(
        self,
        store: ObjectStore,
        version: int,
        embodiment: Embodiment,
        *,
        prepare: Prepare,
        clock: Clock,
        vetting: PolicyVetting | None = None,
    ) -> None:
        admission = Admission(
            store=store,
            reader=PolicyReader(store),
            embodiment=embodiment,
            vetting=vetting,
            accepts=lambda _: None,
        )
        if vetting is not None:
            vetting.refresh(store)
        found, statement = admission.fetch(version)
        read, manifest = found.read, found.read.manifest
        self._staged: StagedPolicy | None = StagedPolicy(
            manifest=manifest,
            weights=read.weights,
            policy=prepare(manifest, read.weights, None),
            published_utc_ns=manifest.created_utc_ns,
            staged_utc_ns=clock.utc_ns(),
            cost=read.cost,
            prepare_s=0.0,
        )
        if vetting is not None and statement is not None:
            vetting.accepted(statement)
        self.newest_version: int | None = version
        """The pinned one: a newer one does not concern this actor."""
        self.refusals: Mapping[int, str] = {}
        self.problem = ""
        self.must_leave = ""

    def take(self, instead_of: Policy | None = None) -> StagedPolicy | None:  # noqa: ARG002
        """The policy, once; then None for ever."""
        staged, self._staged = self._staged, None
        return staged
