"""A person who demonstrates: drives from the first step to the last."""

from sop.core.embodiment import Observation
from sop.operators.base import Action, Oracle


class Demonstrator:
    """Drives every step with the oracle's action; the policy is never asked."""

    name = "demonstrator"
    reason = "demonstration"

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle

    def reset(self, task: str, seed: int) -> None:
        """Nothing to forget."""

    def correct(self, observation: Observation, proposed: Action | None) -> Action | None:  # noqa: ARG002
        """The oracle's action, [A]."""
        return self._oracle.expert_action()
