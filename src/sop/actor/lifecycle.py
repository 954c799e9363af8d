"""The states of an actor and the moves between them.

STARTING -> WAITING --policy--> RESETTING -> ACTING -> RESETTING -> ...
                                 ^    |
                                 |    v
                                HOLDING      (spool full, or too far behind the newest policy)
any of them -> STOPPED
"""

from enum import StrEnum


class ActorState(StrEnum):
    """What an actor is doing."""

    STARTING = "starting"
    WAITING = "waiting"
    """For the first policy."""
    RESETTING = "resetting"
    """Between two episodes; the only state in which a policy is swapped."""
    ACTING = "acting"
    HOLDING = "holding"
    """The robot stands still until the reason is gone."""
    STOPPED = "stopped"


_MOVES = {
    ActorState.STARTING: {ActorState.WAITING, ActorState.RESETTING},
    ActorState.WAITING: {ActorState.RESETTING},
    ActorState.RESETTING: {ActorState.ACTING, ActorState.HOLDING},
    ActorState.ACTING: {ActorState.RESETTING},
    ActorState.HOLDING: {ActorState.RESETTING},
    ActorState.STOPPED: set(),
}


def move(state: ActorState, to: ActorState) -> ActorState:
    """The next state.

    Raises:
        RuntimeError: the picture above has no such arrow.
    """
    if to is not ActorState.STOPPED and to not in _MOVES[state]:
        raise RuntimeError(f"an actor cannot go from {state} to {to}")
    return to
