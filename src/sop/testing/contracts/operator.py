"""The contract of `sop.operators.base.Operator`: each rule takes a function from oracle to operator."""

from collections.abc import Callable

import numpy as np

from sop.core.embodiment import Observation
from sop.operators.base import Action, Operator, Oracle
from sop.testing.contracts import require, require_equal


def an_operator_says_why_exactly_while_it_has_control(make_operator: Callable[[Oracle], Operator]) -> None:
    """Its action is one float32 [A]; the proposal is left alone; there is no reason while the policy drives."""
    oracle = _Ramp()
    operator = make_operator(oracle)
    require(bool(operator.name), "an operator has no name")
    operator.reset("task", 0)
    proposed = np.full(3, -1.0, np.float32)
    for _ in range(200):
        action = operator.correct(_NOTHING_SEEN, proposed)
        require_equal(bool(operator.reason), action is not None, "a reason is given, and control is taken")
        if action is not None:
            require_equal((action.dtype, action.shape), (np.dtype(np.float32), (3,)), "type of a correction")
    require_equal(proposed.tolist(), [-1.0] * 3, "the proposal after 200 steps")


def an_operator_forgets_the_last_episode(make_operator: Callable[[Oracle], Operator]) -> None:
    """After `reset` the same episode gets the same corrections."""
    oracle = _Ramp()
    operator = make_operator(oracle)
    episodes = []
    for _ in range(2):
        oracle.asked = 0
        operator.reset("task", 0)
        episodes.append([operator.correct(_NOTHING_SEEN, np.zeros(3, np.float32)) is None for _ in range(150)])
    require_equal(episodes[1], episodes[0], "who drives in a repeated episode")


_NOTHING_SEEN = Observation({}, np.zeros(0, np.float32))


class _Ramp:
    """An oracle whose progress grows for 30 steps out of 100, and whose expert always goes right."""

    num_displacements = 2

    def __init__(self) -> None:
        self.asked = 0

    def expert_action(self) -> Action:
        return np.array([1.0, 0.0, 1.0], np.float32)

    def progress(self) -> float:
        self.asked += 1
        return 0.1 * min(self.asked % 100, 30)


OPERATOR_RULES: tuple[Callable[[Callable[[Oracle], Operator]], None], ...] = (
    an_operator_says_why_exactly_while_it_has_control,
    an_operator_forgets_the_last_episode,
)
"""Every rule an operator keeps."""
