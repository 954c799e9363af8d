"""The controller of the `prod` channel: puts a candidate on trial, watches it, promotes it or takes it back.

    begin(candidate, gate) -> state 7: canaries and controls
    step() -> decision     -> state 8: more canaries        (or 8: rolled back, banned)
    step() -> decision     -> state 9: promoted

Each step reads the newest state, the stage's record and the new episodes, decides (`sop.rollout.rules`) and publishes
at most one state. Nothing is kept but what the store has: a controller can be killed at any moment and another one
goes on, on another machine. Two at once are harmless: a sequence number is taken once, and what they would publish
follows from the same episodes.

    channels/prod/<sequence>.json      signed states; what robots obey
    channels/canary/<sequence>.json    where the comparison of a stage begins, and what earlier stages have shown
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from sop.core.channel import ChannelState, PolicyRef
from sop.core.errors import PolicyRefused, RunError
from sop.rollout import states
from sop.rollout.comparison import Comparison
from sop.rollout.evidence import EpisodeSource
from sop.rollout.rules import Action, CanarySettings, Decision, judge
from sop.rollout.stage import Stages
from sop.transport import ObjectStore

_log = logging.getLogger(__name__)
DEFAULTS = CanarySettings()
Gate = Callable[[PolicyRef], str]
"""The offline gate: judges a policy before any robot moves with it. Empty when it passes, else why not. Blocks."""


class ChannelPort(Protocol):
    """The `prod` channel, as far as a controller needs it. Blocks."""

    def newest(self) -> ChannelState | None:
        """The state with the highest sequence number; None while there is none."""
        ...

    def read(self, sequence: int) -> ChannelState | None:
        """The state with this number; None when there is none."""
        ...

    def publish(self, state: ChannelState) -> None:
        """Sign and store a state.

        Raises:
            RunError: somebody else has published a state with this number: look again.
        """
        ...


class Canary:
    """Controller of one run's `prod` channel. Every method may be repeated. Not thread-safe.

    Args:
        run: `RunManifest.name`.
        channel: the signed states.
        store: where the records of stages are kept.
        episodes: facts of episodes.
        tasks: that a candidate has to keep up.
        robots: names of the robots that can take part now.
        execution_horizon: steps per inference of the run's policies.
        utc_ns: the clock.
        settings: numbers of the rules.
    """

    def __init__(
        self,
        run: str,
        channel: ChannelPort,
        store: ObjectStore,
        episodes: EpisodeSource,
        *,
        tasks: Sequence[str],
        robots: Callable[[], Sequence[str]],
        execution_horizon: int,
        utc_ns: Callable[[], int],
        settings: CanarySettings = DEFAULTS,
    ) -> None:
        self._run = run
        self._channel = channel
        self._stages = Stages(store, episodes, tasks=tasks, limits=settings.limits, execution_horizon=execution_horizon)
        self._robots = robots
        self._utc_ns = utc_ns
        self._settings = settings

    def begin(self, candidate: PolicyRef, gate: Gate) -> ChannelState:
        """Let the offline gate judge a candidate, then let the first canaries run it. With the same candidate on trial
        already nothing changes. Blocks for the gate.

        Raises:
            PolicyRefused: by the gate, it is banned, or it is what the robots run.
            RunError: no policy has been promoted yet, another candidate is on trial, too few robots, or another
                controller was quicker.
        """
        state = self._require_state()
        if state.candidate == candidate:
            return state
        if state.candidate is not None:
            raise RunError(f"policy {state.candidate.version} is on trial: let it finish, or `sop policy rollback`")
        robots = self._robots()
        why = f"policy {candidate.version} on trial"
        number = self._settings.num_canaries(0, len(robots))
        states.on_trial(state, candidate, robots, self._stamp(), num_canaries=number, why=why)
        if problem := gate(candidate):
            raise PolicyRefused(f"policy {candidate.version} stays in the lab: {problem}")
        begun = states.on_trial(state, candidate, robots, self._stamp(), num_canaries=number, why=why)
        self._channel.publish(begun)
        return begun

    def step(self) -> Decision | None:
        """Look at what is new and do what follows; None when nothing is on trial. Blocks for the store.

        Raises:
            InvalidRecord: the record of the stage is damaged; names its key.
            RunError: the next stage is due and there are not enough robots for it.
            StoreUnavailable: no answer; the next step may work.
        """
        state = self._channel.newest()
        if state is None:
            return None
        decision = None if state.candidate is None else self._judge(state)
        following = self._following(state, decision)
        if following is None:
            return decision
        try:
            self._channel.publish(following)
        except RunError as error:
            return Decision(action=Action.HOLD, why=str(error))
        _log.info("%s", following.reason)
        return decision

    def promote(self, policy: PolicyRef, why: str) -> ChannelState:
        """A person's decision: every robot runs a policy, without a trial. Also makes the channel's first state.

        Raises:
            PolicyRefused: it is banned.
            RunError: another controller was quicker: look again.
        """
        state, stamp = self._channel.newest(), self._stamp()
        made = (
            states.first_state(self._run, policy, why, stamp)
            if state is None
            else states.promoted(state, policy, why, stamp)
        )
        self._channel.publish(made)
        return made

    def roll_back(self, why: str, *, immediate: bool) -> ChannelState:
        """A person's decision: back to the policy before, and ban what the robots run or try.

        With a candidate on trial that one is banned; else the promoted policy, and every robot runs the one before.

        Raises:
            RunError: there is no policy to go back to, or another controller was quicker.
        """
        state = self._require_state()
        if state.candidate is not None and state.stable is not None:
            return self._publish_rollback(state, state.stable, state.candidate, why, immediate=immediate)
        return self._publish_rollback(state, *self._before(state), why, immediate=immediate)

    def ban(self, policy: PolicyRef, why: str) -> ChannelState:
        """A person's decision: no robot ever runs a policy. Robots that do go back at once, as in `roll_back`.

        Raises:
            RunError: there is no policy to go back to, no channel yet, or another controller was quicker.
        """
        state = self._require_state()
        if policy.manifest_hash in state.banned:
            return state
        if policy in (state.candidate, state.stable):
            to = state.stable if policy == state.candidate and state.stable else self._before(state)[0]
            return self._publish_rollback(state, to, policy, why, immediate=True)
        made = states.banning(state, policy, why, self._stamp())
        self._channel.publish(made)
        return made

    def comparison(self) -> Comparison | None:
        """How the running trial stands; None when nothing is on trial. Blocks for the store."""
        state = self._channel.newest()
        return None if state is None or state.candidate is None else self._stages.compared(state)

    def _judge(self, state: ChannelState) -> Decision:
        return judge(
            self._stages.compared(state),
            self._settings,
            last_stage=self._wider(state) is None,
            began_utc_ns=state.issued_utc_ns,
            now_utc_ns=self._utc_ns(),
        )

    def _following(self, state: ChannelState, decision: Decision | None) -> ChannelState | None:
        """The state to publish now, if any."""
        stamp, action = self._stamp(), Action.HOLD if decision is None else decision.action
        candidate, stable = state.candidate, state.stable
        if decision is None or candidate is None or stable is None or action is Action.HOLD:
            stale = stamp.issued_utc_ns - state.issued_utc_ns > self._settings.lifetime_s * 1e9 / 2
            return states.renewed(state, stamp) if stale else None
        if action is Action.PROMOTE:
            return states.promoted(state, candidate, decision.why, stamp)
        if action is Action.WITHDRAW:
            return states.withdrawn(state, f"policy {candidate.version} withdrawn: {decision.why}", stamp)
        if action is Action.ROLL_BACK:
            return states.rolled_back(state, stable, candidate, stamp, why=decision.why, immediate=decision.immediate)
        why = f"policy {candidate.version} on more robots: {decision.why}"
        return states.on_trial(state, candidate, self._robots(), stamp, num_canaries=self._wider(state) or 1, why=why)

    def _wider(self, state: ChannelState) -> int | None:
        """Canaries of the next stage; None when everybody comes next."""
        robots = len(self._robots())
        sizes = (self._settings.num_canaries(stage, robots) for stage in range(len(self._settings.shares)))
        return next((size for size in sizes if size > len(state.candidate_robots)), None)

    def _stamp(self) -> states.Stamp:
        now = self._utc_ns()
        return states.Stamp(now, now + int(self._settings.lifetime_s * 1e9))

    def _before(self, state: ChannelState) -> tuple[PolicyRef, PolicyRef]:
        """The policy that was stable before the one that is, and that one."""
        bad = self._require_stable(state)
        for sequence in range(state.sequence - 1, 0, -1):
            older = self._channel.read(sequence)
            if older is not None and older.stable not in (None, bad):
                found = self._require_stable(older)
                if found.manifest_hash not in state.banned:
                    return found, bad
        raise RunError(f"there is no policy before {bad.version} to go back to: promote another one")

    def _publish_rollback(
        self, state: ChannelState, to: PolicyRef, bad: PolicyRef, why: str, *, immediate: bool
    ) -> ChannelState:
        made = states.rolled_back(state, to, bad, self._stamp(), why=why, immediate=immediate)
        self._channel.publish(made)
        return made

    def _require_state(self) -> ChannelState:
        state = self._channel.newest()
        if state is None:
            raise RunError("nothing is promoted yet: `sop policy promote V` names the first policy")
        return state

    @staticmethod
    def _require_stable(state: ChannelState) -> PolicyRef:
        if state.stable is None:
            raise RunError(f"state {state.sequence} of {state.channel} names no policy")
        return state.stable
