"""The next state of the `prod` channel for everything that can happen to it: pure functions.

A state replaces the one before as a whole and has the next sequence number; robots never go back to a lower one. So a
rollback is one more state, that names an older policy and bans the newer one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sop.core.channel import PROD, ChannelState, PolicyRef
from sop.core.codec import content_hash
from sop.core.errors import PolicyRefused, RunError

MAX_REASON = 300
"""Characters of a reason that are kept: all bans of a run have to fit into one state."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """When a state is made, and until when it is fresh."""

    issued_utc_ns: int
    expires_utc_ns: int


def first_state(run: str, stable: PolicyRef, reason: str, stamp: Stamp) -> ChannelState:
    """The channel's first state: every robot runs `stable`."""
    return ChannelState(
        run=run,
        channel=PROD,
        sequence=1,
        stable=stable,
        reason=reason[:MAX_REASON],
        issued_utc_ns=stamp.issued_utc_ns,
        expires_utc_ns=stamp.expires_utc_ns,
    )


def renewed(state: ChannelState, stamp: Stamp) -> ChannelState:
    """The same again, so that robots see that nobody holds newer states back."""
    return replace(
        state, sequence=state.sequence + 1, issued_utc_ns=stamp.issued_utc_ns, expires_utc_ns=stamp.expires_utc_ns
    )


def promoted(state: ChannelState, policy: PolicyRef, why: str, stamp: Stamp) -> ChannelState:
    """Every robot runs `policy`; a trial that is under way ends.

    Raises:
        PolicyRefused: it is banned.
    """
    refuse_banned(state, policy)
    return _following(state, stamp, stable=policy, reason=f"policy {policy.version} promoted: {why}")


def on_trial(
    state: ChannelState,
    candidate: PolicyRef,
    robots: Sequence[str],
    stamp: Stamp,
    *,
    num_canaries: int,
    why: str,
) -> ChannelState:
    """`num_canaries` of the robots run the candidate, as many others are compared with them.

    Who is a canary already stays one; the others come in an order that depends on the candidate, so that it is not
    always the same robots that take the risk, and on nothing that they have done.

    Raises:
        PolicyRefused: the candidate is banned, or is what the robots run anyway.
        RunError: there are not enough robots for two arms.
    """
    refuse_banned(state, candidate)
    if candidate == state.stable:
        raise PolicyRefused(f"policy {candidate.version} is what the robots run already")
    kept = [robot for robot in state.candidate_robots if robot in robots and state.candidate == candidate]
    order = sorted(set(robots) - set(kept), key=lambda robot: _place(candidate, robot))
    needed = max(0, num_canaries - len(kept))
    canaries, others = (*kept, *order[:needed]), order[needed:]
    if not canaries or len(others) < len(canaries):
        raise RunError(
            f"{num_canaries} canaries and as many robots to compare with are needed, there are {len(robots)} robots: "
            "connect more, or `sop policy promote` without a trial"
        )
    return _following(
        state,
        stamp,
        candidate=candidate,
        candidate_robots=tuple(sorted(canaries)),
        control_robots=tuple(sorted(others[: len(canaries)])),
        reason=why,
    )


def withdrawn(state: ChannelState, why: str, stamp: Stamp) -> ChannelState:
    """The trial ends without a verdict: every robot runs `stable`."""
    return _following(state, stamp, reason=why)


def rolled_back(
    state: ChannelState, to: PolicyRef, bad: PolicyRef, stamp: Stamp, *, why: str, immediate: bool
) -> ChannelState:
    """Every robot runs `to`, and none ever `bad`.

    Raises:
        PolicyRefused: `to` is banned.
    """
    refuse_banned(state, to)
    return _following(
        state,
        stamp,
        stable=to,
        banned={**state.banned, bad.manifest_hash: why[:MAX_REASON]},
        immediate=immediate,
        reason=f"policy {bad.version} rolled back: {why}",
    )


def banning(state: ChannelState, policy: PolicyRef, why: str, stamp: Stamp) -> ChannelState:
    """No robot ever runs `policy`; what they run and try goes on."""
    return replace(
        state,
        sequence=state.sequence + 1,
        banned={**state.banned, policy.manifest_hash: why[:MAX_REASON]},
        reason=f"policy {policy.version} banned: {why}"[:MAX_REASON],
        issued_utc_ns=stamp.issued_utc_ns,
        expires_utc_ns=stamp.expires_utc_ns,
    )


def refuse_banned(state: ChannelState, policy: PolicyRef) -> None:
    """Make sure that a policy is not banned.

    Raises:
        PolicyRefused: it is; says why.
    """
    if policy.manifest_hash in state.banned:
        raise PolicyRefused(f"policy {policy.version} is banned: {state.banned[policy.manifest_hash]}")


def _following(state: ChannelState, stamp: Stamp, **changes: Any) -> ChannelState:
    """`stable` and `banned` as they were; no trial and nothing immediate unless `changes` says so."""
    trial: dict[str, Any] = {"candidate": None, "candidate_robots": (), "control_robots": (), "immediate": False}
    changes["reason"] = str(changes["reason"])[:MAX_REASON]
    return replace(
        state,
        sequence=state.sequence + 1,
        issued_utc_ns=stamp.issued_utc_ns,
        expires_utc_ns=stamp.expires_utc_ns,
        **(trial | changes),
    )


def _place(candidate: PolicyRef, robot: str) -> str:
    return content_hash(f"{candidate.manifest_hash}/{robot}".encode())
