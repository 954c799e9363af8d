"""The delta codec, when it is needed: its kernels are compiled on import, and numba is an extra."""

from types import ModuleType

from sop.core.errors import RunError


def load_codec() -> ModuleType:
    """`sop.broadcast.delta`. Blocks for ten seconds the first time on a machine, 0.2 s the first time in a process.

    Raises:
        RunError: numba is not installed; says what to do.
    """
    try:
        from sop.broadcast import delta
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        raise RunError(
            "policies that are packed for a link need numba: pip install -e '.[link]', "
            "or have the learner publish whole files (learner.publish_encoding=full)"
        ) from error
    return delta
