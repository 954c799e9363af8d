"""People who correct, and stand-ins for them. `make_operator` makes the one that a configuration names.

To add an operator: write a class with the four members of `sop.operators.base.Operator`, add a function from
`OperatorConfig` and oracle to operator below, and run `sop.testing.contracts.operator` over it.
"""

from collections.abc import Callable

from sop.config import OperatorConfig
from sop.core.settings import suggestion
from sop.operators.base import Nobody, Operator, Oracle
from sop.operators.demonstrator import Demonstrator
from sop.operators.stand_in import StandIn

__all__ = ["OPERATORS", "Demonstrator", "Nobody", "Operator", "Oracle", "StandIn", "check_operator", "make_operator"]


def _nobody(config: OperatorConfig, oracle: Oracle) -> Operator:  # noqa: ARG001
    return Nobody()


OPERATORS: dict[str, Callable[[OperatorConfig, Oracle], Operator]] = {"stand_in": StandIn, "none": _nobody}
"""Name in the configuration -> how to make the operator of one robot."""


def check_operator(kind: str) -> None:
    """Make sure that there is an operator of this name.

    Raises:
        ValueError: there is none; suggests the nearest.
    """
    if kind not in OPERATORS:
        raise ValueError(f"operator.kind: {kind!r} is not an operator. {suggestion(kind, OPERATORS)}")


def make_operator(config: OperatorConfig, oracle: Oracle) -> Operator:
    """The operator of one robot.

    Args:
        config: which one, and its settings.
        oracle: the simulated robot itself; who needs no privileged knowledge ignores it.

    Raises:
        ValueError: no operator has this name, or a setting is out of range.
    """
    check_operator(config.kind)
    return OPERATORS[config.kind](config, oracle)
