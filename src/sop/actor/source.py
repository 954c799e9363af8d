"""Where an actor gets its policies from: the newest that is published (`Subscriber`), or one and no other."""

import logging
import threading
from collections.abc import Mapping
from typing import Protocol

from sop.broadcast import PolicyReader, PolicyVetting, Prepare, StagedPolicy
from sop.broadcast.admission import Admission
from sop.core.clock import Clock
from sop.core.embodiment import Embodiment
from sop.core.errors import Forbidden, StoreUnavailable, Untrusted
from sop.core.policy import Policy
from sop.transport import ObjectStore

_log = logging.getLogger(__name__)
LOOK_EVERY_S = 10.0
"""How often a pinned policy is looked up among the banned ones, seconds."""


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

    Blocks for the transfer when it is made. Then it looks for bans in a thread: a banned policy is taken away at the
    end of the episode (`take` raises), at once if the ban says so (`must_leave`).

    Its statement may have expired: that is said (log and `problem`) and not refused. The expiry of a statement guards
    against a store that holds back what is newer and calls something old the newest (freeze). Who names a version does
    not ask which one is newest, and a run signs its base once, however long it lasts. What an old version could do
    harm by is refused as ever: no signature, another run, other bytes, a ban, one older than this robot has accepted.
    A ban that the store holds back is not seen, with an expired statement as without.

    Args:
        store: where policies are; read only.
        version: the one to act with.
        embodiment: this robot.
        prepare: puts the weights into a policy.
        clock: stamps when it was ready.
        vetting: whom this robot believes; None asks for no signatures, and knows no bans.
        look_every_s: seconds between two looks for a ban.

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
        look_every_s: float = LOOK_EVERY_S,
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
        found, statement = admission.fetch(version, named=True)
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
        self._policy, self._store, self._vetting = found.policy, store, vetting
        self._expired = "" if vetting is None or statement is None else vetting.expired(statement)
        self.problem = self._expired
        if self._expired:
            _log.warning("%s: it was asked for by its number, so it is taken all the same", self._expired)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, args=(look_every_s,), name="bans", daemon=True)
        if vetting is not None:
            self._thread.start()

    @property
    def must_leave(self) -> str:
        """See `PolicySource`."""
        return self._ban if self._vetting is not None and self._vetting.immediate else ""

    @property
    def _ban(self) -> str:
        return "" if self._vetting is None else self._vetting.objection(self._policy)

    def take(self, instead_of: Policy | None = None) -> StagedPolicy | None:  # noqa: ARG002
        """The policy, once; then None for ever.

        Raises:
            Untrusted: it was banned meanwhile; there is no other to act with.
        """
        if ban := self._ban:
            raise Untrusted(f"{ban}; this robot was to run no other policy, so it ends")
        staged, self._staged = self._staged, None
        return staged

    def close(self) -> None:
        """Stop looking for bans. Idempotent."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self, look_every_s: float) -> None:
        while self._vetting is not None and not self._closed.wait(look_every_s):
            try:
                self._vetting.refresh(self._store)
                self.problem = self._expired
            except (StoreUnavailable, Forbidden) as error:
                self.problem = f"bans are not heard of: {error}"
