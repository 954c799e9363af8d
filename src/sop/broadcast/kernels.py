"""Compiled loops of the weight codec: integer differences of floats, and byte planes. `rans` has the entropy coder.

A float's bits become an integer in the order of the values (monotonic: the bits below the sign are inverted when it is
set), so that one step of training is a small difference d = new - old (modulo 2^bits), and zigzag (0, -1, 1, -2, ...)
makes it small and unsigned. Every pattern has exactly one, nothing is rounded.

Kernels release the interpreter lock. Their types are fixed, so importing this module compiles them (all of the codec:
about ten seconds) or loads them from numba's cache, which lies beside this file, or in the user's cache folder where
that is read-only (NUMBA_CACHE_DIR names another): import it before a control loop starts.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit, types

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_F = TypeVar("_F", bound=Callable[..., Any])
IN = {bits: types.Array(getattr(types, f"uint{bits}"), 1, "C", readonly=True) for bits in (8, 16, 32, 64)}
"""Type of an argument that is only read, by bits of its unsigned elements."""
OUT = {bits: types.Array(getattr(types, f"uint{bits}"), 1, "C") for bits in (8, 16, 32, 64)}
"""Type of an argument that is written."""


def compiled(result: Any, *arguments: Any) -> Callable[[_F], _F]:
    """Compile now, with these types; from the cache if there is one. A computer without any writable folder for the
    cache compiles in every process."""

    def decorate(function: _F) -> _F:
        options = {"nogil": True, "error_model": "numpy"}
        try:
            kernel: _F = njit(result(*arguments), cache=True, **options)(function)
        except Exception:  # noqa: BLE001 - no folder, no room, or a cache that a power cut tore: numba raises anything
            kernel = njit(result(*arguments), **options)(function)
        return kernel

    return decorate


@compiled(types.void, OUT[16], IN[16])
def undo_zigzag16(values: U16, old: U16) -> None:
    """In place: zigzag values (of monotonic(new) - monotonic(old)) become the new bits."""
    for i in range(values.size):
        z = values[i]
        b = np.int16(old[i])
        b ^= (b >> 15) & np.int16(0x7FFF)
        a = np.int16(b + (np.int16(z >> 1) ^ np.int16(-np.int16(z & 1))))
        a ^= (a >> 15) & np.int16(0x7FFF)
        values[i] = np.uint16(a)


@compiled(types.void, IN[32], IN[32], OUT[32])
def zigzag32(new: U32, old: U32, zigzag: U32) -> None:
    """zigzag[i] = zigzag(monotonic(new[i]) - monotonic(old[i])) of 32-bit floats, all of one length."""
    for i in range(new.size):
        a = np.int32(new[i])
        b = np.int32(old[i])
        a ^= (a >> 31) & np.int32(0x7FFFFFFF)
        b ^= (b >> 31) & np.int32(0x7FFFFFFF)
        d = np.int32(a - b)
        zigzag[i] = np.uint32((d << 1) ^ (d >> 31))


@compiled(types.void, OUT[32], IN[32])
def undo_zigzag32(values: U32, old: U32) -> None:
    """In place: zigzag values become the new bits."""
    for i in range(values.size):
        z = values[i]
        b = np.int32(old[i])
        b ^= (b >> 31) & np.int32(0x7FFFFFFF)
        a = np.int32(b + (np.int32(z >> 1) ^ np.int32(-np.int32(z & 1))))
        a ^= (a >> 31) & np.int32(0x7FFFFFFF)
        values[i] = np.uint32(a)


@compiled(types.void, IN[8], types.Array(types.uint8, 2, "C"))
def split_planes(data: U8, planes: U8) -> None:
    """planes[k, i] = data[i * number of planes + k]."""
    num_planes = planes.shape[0]
    for k in range(num_planes):
        for i in range(planes.shape[1]):
            planes[k, i] = data[i * num_planes + k]


@compiled(types.void, types.Array(types.uint8, 2, "C", readonly=True), OUT[8])
def join_planes(planes: U8, data: U8) -> None:
    """Inverse of `split_planes`."""
    num_planes = planes.shape[0]
    for k in range(num_planes):
        for i in range(planes.shape[1]):
            data[i * num_planes + k] = planes[k, i]


@compiled(types.void, IN[16], OUT[16], OUT[8], OUT[64])
def split_exponents(bits: U16, exponents: U16, fractions: U8, counts: U64) -> None:
    """16-bit floats as exponents (the 8 bits below the sign) and the rest: sign (bit 0) and mantissa (bits 1-7).

    Args:
        bits: [n].
        exponents: [n], out.
        fractions: [n], out.
        counts: [512], zeros, out: how often each exponent occurs at even places, and at odd ones.
    """
    for i in range(bits.size):
        exponents[i] = (bits[i] >> 7) & 255
        fractions[i] = (bits[i] << 1 | bits[i] >> 15) & 255
    for i in range(bits.size):
        counts[np.uint64((i & 1) << 8) | np.uint64(exponents[i])] += np.uint64(1)


@compiled(types.void, OUT[16], IN[8], IN[8])
def join_exponents(ranks: U16, exponent_of: U8, fractions: U8) -> None:
    """In place: ranks (below 256) become 16-bit floats of these exponents, signs (bit 0) and mantissas (bits 1-7).

    Args:
        ranks: [n].
        exponent_of: [256].
        fractions: [n].
    """
    for i in range(ranks.size):
        fraction = np.uint16(fractions[i])
        exponent = np.uint16(exponent_of[np.uint64(ranks[i] & 255)])
        ranks[i] = (fraction & 1) << 15 | exponent << 7 | fraction >> 1
