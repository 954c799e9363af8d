"""16-bit floats as bytes, near their entropy given the old exponent, or, without an old weight, that of the exponent.

    payload:  header | tables, packed | states (LANES x u32) | words (u16) | rest
    tables:   256 bytes `of` | per context the frequencies of all symbols (low bytes, then high bytes)

                 symbol                         `of`                       rest
    delta        of new - old, see `rans`       context of an exponent     raw bits
    exponents    rank of the exponent           exponent of a rank         sign and mantissa of each element, packed

An exponent here is the 8 bits below the sign, also of F16. See `kernels` and `rans`.
"""

import struct
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sop.broadcast import kernels, rans
from sop.broadcast.kernels import U8, U16
from sop.broadcast.planes import pack_bytes, unpack_bytes
from sop.broadcast.rans import LANES, MAX_CONTEXTS, ROW, TOTAL

_HEADER = struct.Struct("<HHIII")
"""Number of contexts, 0, bytes of the packed tables, words, bytes of the rest."""
_SMALLEST_SHARE = 512
"""A context has at least this part of the elements (and 64): fewer do not pay for their table."""
_SMALLEST_CONTEXT = 64
_T = TypeVar("_T", bound=np.generic)
_held = threading.local()
"""Scratch arrays of each thread, up to 9 MB."""


def encode_delta(new: U16, old: U16) -> bytes:
    """The payload that makes `new` out of `old` (bits [n], n of 1 or more)."""
    raw = _scratch("raw", np.uint32, new.size // 2 + 1)
    counts = np.zeros((2, 256 * ROW), np.uint32)
    indices = _scratch("indices", np.uint16, new.size)
    raw = raw[: rans.symbols_of(new, old, _symbol_of(), indices, counts.reshape(-1), raw)]
    context_of, frequencies = _contexts(counts.sum(0, np.uint64), new.size)
    rows = (context_of[:, None] * np.int64(ROW) + np.arange(ROW)).reshape(-1)
    return _encode(indices, rows, frequencies, context_of, raw.data)


def decode_delta(payload: memoryview, old: U16, out: U16) -> None:
    """Inverse of `encode_delta`, into `out` [n]. Allocates a few hundred KB and a copy of the payload.

    Raises:
        ValueError: the payload is not one of this many elements over this old array (as far as can be seen).
    """
    streams = _read(payload, out.size)
    _decode(streams, old, streams.of, out)
    if len(streams.rest) % 4 or len(streams.rest) > 2 * out.nbytes:
        raise ValueError("has raw bits that do not fit")
    raw = np.zeros(len(streams.rest) // 4 + 1, np.uint32)
    raw[:-1] = np.frombuffer(streams.rest, np.uint32)
    if not rans.read_raw_bits(out, raw):
        raise ValueError("has the wrong number of raw bits")
    kernels.undo_zigzag16(out, old)


def encode_exponents(new: U16) -> bytes | None:
    """The payload of `new` (bits [n], n of 1 or more) alone; None if it has more than ROW different exponents."""
    exponents = _scratch("indices", np.uint16, new.size)
    fractions = _scratch("fractions", np.uint8, new.size)
    twice = np.zeros(512, np.uint64)
    kernels.split_exponents(new, exponents, fractions, twice)
    counts = twice[:256] + twice[256:]
    found = np.flatnonzero(counts)
    if found.size > ROW:
        return None
    exponent_of, rank_of = np.zeros(256, np.uint8), np.zeros(256, np.uint16)
    exponent_of[: found.size], rank_of[found] = found, np.arange(found.size)
    frequencies = np.zeros(ROW, np.uint16)
    rans.normalize(np.resize(counts[found], ROW) * (np.arange(ROW) < found.size), frequencies)
    return _encode(exponents, rank_of, frequencies, exponent_of, pack_bytes(fractions.data))


def decode_exponents(payload: memoryview, out: U16) -> None:
    """Inverse of `encode_exponents`, into `out` [n].

    Raises:
        ValueError: the payload is not one of this many elements.
    """
    streams = _read(payload, out.size)
    if streams.frequencies.size != ROW:
        raise ValueError("has more than one context")
    fractions = np.frombuffer(unpack_bytes(streams.rest, out.size), np.uint8)
    _decode(streams, np.zeros(out.size, np.uint16), np.zeros(256, np.uint8), out)
    kernels.join_exponents(out, streams.of, fractions)


@dataclass(frozen=True, slots=True)
class _Streams:
    """A payload taken apart: lengths and tables are checked, words and rest are not."""

    of: U8
    frequencies: U16
    states: kernels.U32
    words: U16
    rest: memoryview


def _encode(indices: U16, rows: npt.NDArray[Any], frequencies: U16, of: U8, rest: memoryview | bytes) -> bytes:
    """The payload of symbols: element i is that of frequencies[rows[indices[i]]]."""
    reciprocals = np.empty(frequencies.size, np.uint64)
    shares = np.empty(frequencies.size, np.uint32)
    rans.encoder_tables(frequencies, reciprocals, shares)
    states = np.full(LANES, rans.LOWEST_STATE, np.uint32)
    words = _scratch("words", np.uint16, indices.size)
    words = words[rans.encode_symbols(indices, reciprocals[rows], shares[rows], states, words) :]
    low_high = ((frequencies & 255).astype(np.uint8).tobytes(), (frequencies >> 8).astype(np.uint8).tobytes())
    tables = pack_bytes(b"".join((of.tobytes(), *low_high)))
    rest = memoryview(rest).cast("B")
    header = _HEADER.pack(frequencies.size // ROW, 0, len(tables), words.size, len(rest))
    return b"".join((header, tables, states.data, words.data, rest))


def _read(payload: memoryview, num_elements: int) -> _Streams:
    if len(payload) < _HEADER.size:
        raise ValueError("is cut short")
    num_contexts, zero, num_tables, num_words, num_rest = _HEADER.unpack(payload[: _HEADER.size])
    states_at = _HEADER.size + num_tables
    words_at = states_at + 4 * LANES
    rest_at = words_at + 2 * num_words
    if not 1 <= num_contexts <= MAX_CONTEXTS or zero or rest_at + num_rest != len(payload) or num_words > num_elements:
        raise ValueError("has streams that do not fit")
    tables = np.frombuffer(unpack_bytes(payload[_HEADER.size : states_at], 256 + 2 * num_contexts * ROW), np.uint8)
    low, high = tables[256:].reshape(2, -1)
    words = np.zeros(num_words + LANES, np.uint16)
    words[:num_words] = np.frombuffer(payload[words_at:rest_at], np.uint16)
    frequencies = (low | high.astype(np.uint16) << 8).astype(np.uint16)
    if (frequencies.reshape(-1, ROW).sum(1, np.int64) != TOTAL).any():
        raise ValueError("has probabilities that do not add up")
    states = np.frombuffer(payload[states_at:words_at], np.uint32).copy()
    return _Streams(tables[:256].copy(), frequencies, states, words, payload[rest_at:])


def _decode(streams: _Streams, old: U16, context_of: U8, out: U16) -> None:
    if int(context_of.max()) * ROW >= streams.frequencies.size:
        raise ValueError("has an unknown context")
    table = np.empty(streams.frequencies.size // ROW * TOTAL, np.uint32)
    rans.decoder_table(streams.frequencies, table)
    if not rans.decode_symbols(streams.words, old, context_of, table, streams.states, out):
        raise ValueError("does not decode")


def _contexts(counts: kernels.U64, num_elements: int) -> tuple[U8, U16]:
    """(context of each exponent, frequencies of all contexts)."""
    context_of = np.zeros(256, np.uint8)
    frequencies = np.zeros(MAX_CONTEXTS * ROW, np.uint16)
    smallest = max(_SMALLEST_CONTEXT, num_elements // _SMALLEST_SHARE)
    while True:
        num_contexts = rans.merge_contexts(counts, smallest, context_of, frequencies)
        if num_contexts:
            return context_of, frequencies[: num_contexts * ROW]
        smallest *= 2


def _scratch(name: str, dtype: type[_T], size: int) -> npt.NDArray[_T]:
    """This thread's array of that name, of any content: touching fresh memory costs as much as the coding itself."""
    num_bytes = size * np.dtype(dtype).itemsize
    held: npt.NDArray[np.uint8] | None = getattr(_held, name, None)
    if held is None or held.size < num_bytes:
        held = np.empty(num_bytes, np.uint8)
        setattr(_held, name, held)
    return held[:num_bytes].view(dtype)


@cache
def _symbol_of() -> U8:
    """[65536] symbol of a zigzag difference."""
    value = np.arange(1 << 16)
    octave = np.maximum(np.frexp(value)[1] - 1, 5)
    large = rans.DIRECT + 8 * (octave - 5) + ((value >> (octave - 3)) & 7)
    return np.where(value < rans.DIRECT, value, large).astype(np.uint8)
