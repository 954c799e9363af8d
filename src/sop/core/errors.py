"""Everything that can go wrong, as one short tree.

    SopError
    |-- InvalidRecord       bytes or values that break a record's contract; names the field and the step
    |-- StoreError
    |   |-- AlreadyExists   the key is taken: objects are created once and never replaced
    |   |-- NotFound        no object under this key
    |   |-- Forbidden       the store knows us and says no, or does not know us; trying again does not help
    |   `-- StoreUnavailable  the store did not answer; the same call may work later
    |-- PolicyRefused       a published policy that this robot must not run; the old one stays
    |   `-- Untrusted         nobody whom this robot believes vouches for it
    `-- RunError            the run cannot go on; says what to do

A wrong argument or configuration value is a plain `ValueError`. A message says what, which id, what to do.
"""


class SopError(Exception):
    """Root of all errors that this package raises on purpose."""


class InvalidRecord(SopError):
    """A record (episode, manifest, event) breaks its contract.

    Args:
        field: the field that is wrong, as it is named in the record.
        problem: what is wrong with it, with the value that was found.
        step: the step of the episode at which it goes wrong, None when no single step is to blame.
    """

    def __init__(self, field: str, problem: str, step: int | None = None) -> None:
        self.field = field
        self.step = step
        at = "" if step is None else f" at step {step}"
        super().__init__(f"{field}{at}: {problem}")


class StoreError(SopError):
    """An object store could not do what was asked."""


class AlreadyExists(StoreError):
    """`put` found the key taken; the stored object is untouched."""


class NotFound(StoreError):
    """No object is stored under the key."""


class Forbidden(StoreError):
    """The credentials are unknown, revoked, or not good for this key; an administrator has to change that."""


class StoreUnavailable(StoreError):
    """The store did not answer or ran out of room; trying again later is safe."""


class PolicyRefused(SopError):
    """A published policy failed a check of the robot (hash, completeness, embodiment); nothing was changed."""


class Untrusted(PolicyRefused):
    """A policy, an order or a trust root without the signatures that it needs, or one that says the opposite of what
    was said and signed before (rollback, replay, foreign run); nothing was changed."""


class RunError(SopError):
    """A run cannot start or go on; the message names the place and what to do."""
