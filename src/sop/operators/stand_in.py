"""A stand-in for a person who watches a robot, takes over late, corrects for a while and hands back.

    WATCHING --- deviation for reaction_steps, or no progress for stall_steps ---> CORRECTING
       ^                                                                            |    (FINISHING instead, once
       |                                                                            |     max_hand_backs are used up:
       |                                                                            |     control to the end)
       `-- after min_steps: progress grew by recovery since the takeover, --------- '
           or max_steps have passed

All counts are control steps, and all numbers come from `OperatorConfig`:

  deviation  |policy - expert| over the displacement elements (Euclidean norm) plus half of the absolute
             differences of the gripper elements. The call that sees the reaction_steps-th step in a row above
             the limit takes over; a proposal that is not finite counts as above it.
  stall      the call that is stall_steps after the one that saw the best progress so far takes over.
  hand-back  is decided before the step: a correction has exactly min_steps steps when the recovery came early.

After a hand-back both counters start again, and the progress at that moment is the one to beat.
"""

from enum import Enum

import numpy as np

from sop.config import OperatorConfig
from sop.core.embodiment import Observation
from sop.operators.base import Action, Oracle

DEVIATION = "deviation"
"""Reason of a takeover: the policy did something else than the expert would."""
STALL = "stall"
"""Reason of a takeover: the task made no progress."""


class _Mode(Enum):
    WATCHING = "watching"
    CORRECTING = "correcting"
    FINISHING = "finishing"


class StandIn:
    """The gate of the module's picture around an oracle's actions. Deterministic: two equal episodes get equal
    corrections, whatever the seed.

    Args:
        config: when to take over and when to hand back.
        oracle: knows the current state of the robot that is watched.

    Raises:
        ValueError: a setting makes the gate meaningless; names it.
    """

    name = "stand-in"

    def __init__(self, config: OperatorConfig, oracle: Oracle) -> None:
        _check(config)
        self._config = config
        self._oracle = oracle
        self._mode = _Mode.WATCHING
        self._reason = ""
        self._hand_backs = 0
        self._human_steps = 0
        self._takeover_progress = 0.0
        self._deviating = 0
        self._stalled = 0
        self._best: float | None = None

    @property
    def reason(self) -> str:
        """`deviation` or `stall` while the stand-in has control, else empty."""
        return self._reason

    def reset(self, task: str, seed: int) -> None:  # noqa: ARG002
        """Watch a new episode, with all hand-backs available."""
        self._mode = _Mode.WATCHING
        self._reason = ""
        self._hand_backs = 0
        self._forget(None)

    def correct(self, observation: Observation, proposed: Action | None) -> Action | None:  # noqa: ARG002
        """One step of the state machine; takes as long as one call of the oracle's expert."""
        progress = self._oracle.progress()
        if self._mode is _Mode.CORRECTING and self._may_hand_back(progress):
            self._hand_back(progress)
            return None
        expert = self._oracle.expert_action()
        if self._mode is _Mode.WATCHING:
            reason = self._alarm(proposed, expert, progress)
            if reason is None:
                return None
            self._take_over(reason, progress)
        self._human_steps += 1
        return expert

    def _alarm(self, proposed: Action | None, expert: Action, progress: float) -> str | None:
        deviates = proposed is not None and not self._distance(proposed, expert) <= self._config.deviation
        self._deviating = self._deviating + 1 if deviates else 0
        if self._best is None or progress > self._best:
            self._best = progress
            self._stalled = 0
        else:
            self._stalled += 1
        if self._deviating >= self._config.reaction_steps:
            return DEVIATION
        return STALL if self._stalled >= self._config.stall_steps else None

    def _distance(self, proposed: Action, expert: Action) -> float:
        difference = np.asarray(proposed, np.float64) - expert
        moved, gripped = np.split(difference, [self._oracle.num_displacements])
        return float(np.linalg.norm(moved) + 0.5 * np.abs(gripped).sum())

    def _take_over(self, reason: str, progress: float) -> None:
        final = self._hand_backs >= self._config.max_hand_backs
        self._mode = _Mode.FINISHING if final else _Mode.CORRECTING
        self._reason = reason
        self._human_steps = 0
        self._takeover_progress = progress

    def _may_hand_back(self, progress: float) -> bool:
        if self._human_steps < self._config.min_steps:
            return False
        recovered = progress - self._takeover_progress >= self._config.recovery
        return recovered or self._human_steps >= self._config.max_steps

    def _hand_back(self, progress: float) -> None:
        self._mode = _Mode.WATCHING
        self._reason = ""
        self._hand_backs += 1
        self._forget(progress)

    def _forget(self, best: float | None) -> None:
        self._deviating = 0
        self._stalled = 0
        self._best = best


def _check(config: OperatorConfig) -> None:
    for name in ("reaction_steps", "stall_steps", "min_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"operator.{name} must be at least 1, got {getattr(config, name)}")
    if config.max_steps < config.min_steps:
        raise ValueError(
            f"operator.max_steps must be at least min_steps, got {config.max_steps} below {config.min_steps}"
        )
    if config.max_hand_backs < 0:
        raise ValueError(f"operator.max_hand_backs must be 0 or more, got {config.max_hand_backs}")
    if not config.deviation > 0:
        raise ValueError(f"operator.deviation must be positive, got {config.deviation}")
