"""A robot's own copies at work: what it starts with, goes back to, and runs by order of a person beside it."""

import logging
from collections.abc import Callable
from dataclasses import replace

from sop.broadcast.fetch import ReadPolicy
from sop.broadcast.last_good import Keeper, KeptPolicy, LastGood, Rollback
from sop.broadcast.manifest import PolicyManifest
from sop.broadcast.stager import Stager
from sop.broadcast.vetting import PolicyVetting
from sop.core.channel import PROD, PolicyRef
from sop.core.errors import PolicyRefused

_log = logging.getLogger(__name__)


class OwnPolicies:
    """Between a `LastGood` and a `Stager`. Used by the subscriber's thread; nothing here asks the network.

    Args:
        last_good: the copies.
        stager: has them ready.
        vetting: what this robot may run; None allows everything.
        check: raises PolicyRefused for a policy that is not for this robot.
    """

    def __init__(
        self,
        last_good: LastGood,
        stager: Stager,
        vetting: PolicyVetting | None,
        check: Callable[[PolicyManifest], None],
    ) -> None:
        self._last_good = last_good
        self._stager = stager
        self._vetting = vetting
        self._check = check
        self._keeper = Keeper(last_good)
        self._tried: Rollback | None = None
        self._met: tuple[Rollback, Rollback] | None = None  # an order, and the same since it was found here

    @property
    def problem(self) -> str:
        """Why the newest policy is not kept; empty when it is."""
        return self._keeper.problem

    def boot(self) -> ReadPolicy | None:
        """Stage what a robot starts with: the order in force or the last accepted one that its channel lets it run, or,
        when it has none of these, the last accepted one that is not banned. Returns what was staged."""
        order = self._standing()
        if order is not None and (found := self._stage_ordered(order)) is not None:
            return found
        return self._stage(self._unobjectionable) or self._stage(self._allowed)

    def instead(self) -> None:
        """Stage the last accepted one that may run, when what acted may not any more."""
        self._stage(self._unobjectionable)

    def staged(self, wanted: PolicyRef) -> bool:
        """Whether exactly this policy was here and is staged now; it is the last accepted one then."""
        if wanted not in self._last_good.kept():
            return False
        found = self._last_good.boot(lambda policy: policy == wanted)
        if found is None or not self._put(found):
            return False
        self.keep(found)
        return True

    def obey(self) -> None:
        """Stage what a person beside this robot ordered, unless it is at hand or banned."""
        order = self._standing()
        if order is None or order == self._tried or order.policy == self._stager.have:
            return
        self._tried = order
        _log.warning("goes back to policy %d by order on this robot", order.policy.version)
        self._stage_ordered(order)

    def holds_back(self, version: int) -> bool:
        """Whether a standing order is newer than the publication of a version, or than the channel's newest state."""
        order = self._standing()
        if order is None:
            return False
        if self._vetting is not None and self._vetting.channel == PROD:
            return self._vetting.sequence <= order.sequence
        return version <= order.instead_of

    def keep(self, kept: KeptPolicy) -> None:
        """This policy was accepted: it overrules what was ordered before, and goes to the disk. No waiting."""
        self._last_good.overrule()
        self._tried = None
        self._keeper.keep(kept)

    def close(self) -> None:
        """Write what waits. Blocks. Idempotent."""
        self._keeper.close()

    def _standing(self) -> Rollback | None:
        """The order in force, not older than the channel's state at which it was found: who gives it need not know."""
        order = self._last_good.standing()
        if order is None or self._vetting is None:
            return order
        if self._met is None or self._met[0] != order:
            self._met = (order, replace(order, sequence=max(order.sequence, self._vetting.sequence)))
        return self._met[1]

    def _stage_ordered(self, order: Rollback) -> ReadPolicy | None:
        return self._stage(lambda policy: policy == order.policy and self._allowed(policy))

    def _unobjectionable(self, policy: PolicyRef) -> bool:
        return self._vetting is None or not self._vetting.objection(policy)

    def _allowed(self, policy: PolicyRef) -> bool:
        return self._vetting is None or not self._vetting.banned(policy)

    def _stage(self, may_run: Callable[[PolicyRef], bool]) -> ReadPolicy | None:
        found = self._last_good.boot(may_run)
        return found.read if found is not None and self._put(found) else None

    def _put(self, kept: KeptPolicy) -> bool:
        try:
            self._check(kept.read.manifest)
            self._stager.stage(kept.read, kept.policy)
        except PolicyRefused as error:
            _log.warning("the copy on this robot is refused: %s", error)
            return False
        return True
