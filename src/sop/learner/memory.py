"""Giving memory back after a start that needed more than the run does."""

import ctypes


def release_freed_memory() -> None:
    """Hand freed memory to the system now. Blocks for milliseconds; does nothing where the C library is not glibc.

    After the rows of a million episodes are read from segments, glibc keeps 180 MB of freed pieces for itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
