"""Whether this robot may run a policy: signed, of this run, of this channel, not banned, not older than what was seen.

                          train                                       prod
    which                 the newest that is vouched for              the one that the newest state names
    signed by             candidate (policy), release (bans)          candidate (policy) and release (state)
    going back            only where the newest state bans            only when a newer state says so
                          what was accepted
    expired statement     refused, unless accepted before or named    the state counts
    expired state         said (freeze)                               said (freeze), still obeyed
    expired trust root    grace: what acts goes on acting, nothing new is accepted; so with a damaged memory

Time is only as good as clocks: nothing is ordered by it. It is never earlier than what was signed and accepted, and a
clock that is off by a day neither stops a robot nor makes it run something older.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from sop.broadcast.channels import newest_state, next_root
from sop.core.channel import (
    CHANNELS,
    STATEMENT_TYPE,
    TRAIN,
    ChannelState,
    PolicyRef,
    PolicyStatement,
    decode_record,
)
from sop.core.errors import InvalidRecord, RunError, Untrusted
from sop.transport.base import ObjectStore
from sop.trust import CANDIDATE, TrustMemory, TrustRoot, claimed_payload

_ADVICE = "is anything published, and does this robot reach the store? Check its clock, too"
MAX_SKEW_S = 26 * 3600
"""A statement from further in the future says that a clock is wrong: a day and a bit is borne."""


class NotNow(Untrusted):
    """Nothing can be accepted at this moment; it passes, so nothing is refused for ever. The old policy stays."""


class PolicyVetting:
    """What one robot believes. `refresh` and `admit` on one thread; the rest from any.

        vetting = PolicyVetting(identity.trust.read_bytes(), TrustMemory(spool / "trust-memory", run), run=run,
                                robot=actor_id, channel=TRAIN)
        vetting.refresh(store)                                # now and then, and when an event says so
        statement = vetting.admit(ref, signature)             # before the tensors are fetched
        vetting.accepted(statement)                           # when the policy is staged

    Args:
        trust: content of `trust.json`; the memory's root is believed instead when it is newer.
        memory: of this robot.
        run: `RunManifest.name`.
        robot: its name, as states of channels name it.
        channel: one of CHANNELS.
        clock_ns: UTC nanoseconds.

    Raises:
        RunError: `trust.json` is not valid, is of another fleet than what is remembered, or contradicts it.
    """

    def __init__(
        self,
        trust: bytes,
        memory: TrustMemory,
        *,
        run: str,
        robot: str,
        channel: str = TRAIN,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        if channel not in CHANNELS:
            raise ValueError(f"channel must be one of {CHANNELS}, got {channel!r}")
        self._memory = memory
        self._run = run
        self._robot = robot
        self._channel = channel
        self._clock_ns = clock_ns
        self._root = self._first_root(trust)
        self._rejected_root = ""
        self._state = self._remembered_state()

    @property
    def channel(self) -> str:
        """The channel that this robot listens to."""
        return self._channel

    @property
    def root(self) -> TrustRoot:
        """Whom this robot believes."""
        return self._root

    @property
    def sequence(self) -> int:
        """Number of the newest state of the channel that was seen; 0 before the first."""
        state = self._state
        return 0 if state is None else state.sequence

    @property
    def wanted(self) -> PolicyRef | None:
        """The policy that the channel names for this robot; None on `train`, and before the first state."""
        state = self._state
        return None if state is None else state.policy_of(self._robot)

    @property
    def immediate(self) -> bool:
        """Whether the newest state takes effect at once instead of at the end of the episode."""
        state = self._state
        return state is not None and state.immediate

    @property
    def floor(self) -> int | None:
        """No version below this is accepted on `train`: the newest accepted one that is not banned."""
        allowed = [known.policy.version for known in self._memory.content.accepted if not self.banned(known.policy)]
        return max(allowed, default=None)

    @property
    def problem(self) -> str:
        """Why nothing new is accepted, or since when nothing fresh has come (freeze); empty when all is well."""
        return self._grace() or self._freeze() or self._rejected_root

    def refresh(self, store: ObjectStore) -> bool:
        """Look for a newer trust root and a newer state of the channel; whether there was one. Blocks: one read and one
        listing that begins after what is known.

        Raises:
            StoreUnavailable: no answer; the same call may work later.
        """
        changed = self._follow_roots(store)
        if self._grace():
            return changed
        found = newest_state(store, self._channel, self._root, self._run, self.sequence)
        if found is None:
            return changed
        self._memory.remember_state(
            self._channel, found.state.sequence, found.envelope, min(found.state.issued_utc_ns, self._latest_ns())
        )
        self._state = found.state
        return True

    def banned(self, policy: PolicyRef) -> str:
        """Why no robot may run the policy; empty when it is not banned."""
        state = self._state
        reason = None if state is None else state.banned.get(policy.manifest_hash)
        return "" if reason is None else f"policy {policy.version} is banned: {reason or 'no reason was given'}"

    def objection(self, policy: PolicyRef) -> str:
        """Why this robot has to leave a policy that it may have run until now; empty when it need not."""
        wanted = self.wanted
        if wanted is not None and wanted != policy:
            return f"channel {self._channel} has policy {wanted.version} for this robot since state {self.sequence}"
        return self.banned(policy)

    def signed(self, policy: PolicyRef, signature: bytes) -> PolicyStatement:
        """The statement about a policy: signatures alone, whatever the time and whatever came before.

        Raises:
            Untrusted: not signed by the candidate role, about another policy, or of another run.
        """
        name = f"policy {policy.version}"
        try:
            payload = self._root.vouched(signature, STATEMENT_TYPE, CANDIDATE)
            statement = decode_record(payload, PolicyStatement)
        except Untrusted as error:
            raise Untrusted(f"{name}: {error}") from error
        except InvalidRecord as error:
            raise Untrusted(f"{name}: what was signed is no statement about a policy: {error}") from error
        if statement.run != self._run:
            raise Untrusted(f"{name}: signed for run {statement.run[:80]!r}, this robot works for {self._run!r}")
        if statement.policy != policy:
            raise Untrusted(
                f"{name}: its signature vouches for policy {statement.policy.version} with manifest "
                f"{statement.policy.manifest_hash}, found was {policy.manifest_hash}"
            )
        return statement

    def admit(self, policy: PolicyRef, signature: bytes, *, named: bool = False) -> PolicyStatement:
        """Everything: whether this robot may start to run the policy now.

        Args:
            policy: what was found.
            signature: what lies beside it.
            named: a person or the run asked for this very version, so that it may be old: see `expired`.

        Raises:
            Untrusted: it may not; says why.
            NotNow: nothing new, or not this, is accepted at the moment; it may be later.
        """
        if grace := self._grace():
            raise NotNow(grace)
        statement = self.signed(policy, signature)
        if objection := self.objection(policy):
            raise Untrusted(f"policy {policy.version}: {objection}")
        if self.wanted is None and self._channel == TRAIN:
            self._not_older(statement, named=named)
        elif self.wanted is None:
            raise NotNow(f"no state of channel {self._channel} was seen yet: promote a policy, or check the store")
        return statement

    def expired(self, statement: PolicyStatement) -> str:
        """Since when a statement says nothing about today any more; empty while it does."""
        if statement.expires_utc_ns > self._now_ns():
            return ""
        return f"policy {statement.policy.version}: its statement has expired on {_date(statement.expires_utc_ns)}"

    def accepted(self, statement: PolicyStatement) -> None:
        """The policy is ready to act: from now on nothing older is accepted. Blocks for a write to the disk."""
        self._memory.remember_policy(statement, min(statement.issued_utc_ns, self._latest_ns()))

    def _not_older(self, statement: PolicyStatement, *, named: bool) -> None:
        """Rollback, replay, two policies of one number, a learner that lost its lease, times."""
        policy, name = statement.policy, f"policy {statement.policy.version}"
        floor = self.floor
        if floor is not None and policy.version < floor:
            raise Untrusted(f"{name}: older than policy {floor}, which this robot has accepted (rollback)")
        if self._memory.accepted(policy):
            return
        known = self._memory.content.accepted
        if any(other.policy.version == policy.version for other in known):
            raise Untrusted(f"{name}: this robot has accepted another policy of that number: somebody replaces objects")
        newest_fence = max((other.fence for other in known if other.policy.version < policy.version), default=0)
        if statement.fence < newest_fence:
            raise Untrusted(
                f"{name}: published with lease {statement.fence}, after lease {newest_fence} was taken: by a learner "
                "that lost the run. Stop that learner"
            )
        if (expired := self.expired(statement)) and not named:
            raise NotNow(f"{expired}: {_ADVICE}")
        if statement.issued_utc_ns > self._latest_ns():
            raise NotNow(
                f"{name}: signed on {_date(statement.issued_utc_ns)}, which is more than a day ahead of this robot's "
                "clock: set the clocks"
            )

    def _now_ns(self) -> int:
        return max(self._clock_ns(), self._memory.content.newest_utc_ns)

    def _latest_ns(self) -> int:
        return self._clock_ns() + MAX_SKEW_S * 10**9

    def _grace(self) -> str:
        if problem := self._memory.problem:
            return problem
        if self._root.expires_utc_ns <= self._now_ns():
            return (
                f"trust root {self._root.version} has expired on {_date(self._root.expires_utc_ns)}: this robot keeps "
                "its policy and accepts nothing new. Sign and publish the next version, or check the clock"
            )
        return ""

    def _freeze(self) -> str:
        """Whether the freshest thing that was accepted has expired."""
        signed = [(self._state.expires_utc_ns, self._state.issued_utc_ns)] if self._state is not None else []
        if self._channel == TRAIN:
            known = self._memory.content.accepted
            signed += [(statement.expires_utc_ns, statement.issued_utc_ns) for statement in known]
        if not signed or max(signed)[0] > self._now_ns():
            return ""
        return f"nothing fresh has come since {_date(max(signed)[1])}: {_ADVICE}"

    def _first_root(self, trust: bytes) -> TrustRoot:
        """The newer one of `trust.json` and of what is remembered, which has to follow from the older one."""
        try:
            given = TrustRoot.open(trust)
            remembered = self._memory.content.root
            root = _newer(TrustRoot.open(remembered), given, trust) if remembered else given
        except Untrusted as error:
            raise RunError(f"trust.json cannot be believed after what this robot has seen: {error}") from error
        if root == given:
            self._memory.remember_root(given.version, trust)
        return root

    def _follow_roots(self, store: ObjectStore) -> bool:
        """Believe the versions that follow, one by one."""
        changed = False
        while not self._memory.problem and (envelope := next_root(store, self._root)) is not None:
            try:
                self._root = self._root.successor(envelope)
            except Untrusted as error:
                self._rejected_root = f"the next trust root in the store is refused: {error}"
                return changed
            self._memory.remember_root(self._root.version, envelope)
            self._rejected_root = ""
            changed = True
        return changed

    def _remembered_state(self) -> ChannelState | None:
        """Signed by whoever might have been dropped since: it was believed then, and only a newer one replaces it."""
        known = self._memory.content.states.get(self._channel)
        return None if known is None else decode_record(claimed_payload(known.envelope), ChannelState)


def _newer(known: TrustRoot, given: TrustRoot, trust: bytes) -> TrustRoot:
    """Which of two roots to begin with; one that skips versions waits for those between.

    Raises:
        Untrusted: they contradict one another, or the given one is not vouched for by the known one.
    """
    if given.fleet != known.fleet or (given.version == known.version and given != known):
        raise Untrusted(f"it is version {given.version} of fleet {given.fleet[:80]!r}, which contradicts it")
    return known.successor(trust) if given.version == known.version + 1 else known


def _date(utc_ns: int) -> str:
    """For people; a time that no calendar has is given as it is."""
    try:
        return datetime.fromtimestamp(utc_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{utc_ns} ns"
