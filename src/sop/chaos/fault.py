"""What is said about one fault."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault or a bad input, what is required of the system, and what shows it."""

    number: int
    """1 to 50: the number in the list that reviewers of such systems work through (docs/reliability.md)."""
    title: str
    required: str
    """What happens: the tests execute it."""
    tests: tuple[str, ...] = ()
    """pytest node ids from the root of the source tree; one without parameters stands for all of them."""
    why_not: str = ""
    """Why no test covers it; empty when one does."""
    command: str = ""
    """A command that does it to a whole run."""
    lost: str = "0"
    """Episodes or policies that are lost; more than 0 only where physics leaves no choice."""
    recovery: str = ""
    """What ends it, and how long that takes at most."""


def tests(module: str, *names: str) -> tuple[str, ...]:
    """Node ids of functions of a test module below `tests/`."""
    return tuple(f"tests/{module}.py::{name}" for name in names)
