"""Compiled entropy coder whose probabilities depend on a weight that both sides know.

A zigzag difference z of 16 bits is coded as a symbol and, where it is large, raw bits:

    z < 32    symbol z
    z >= 32   with e = floor(log2 z): symbol 32 + 8 (e - 5) + the 3 bits below the leading one, then e - 3 raw bits

Symbols are coded by rANS (Duda, arXiv:1311.2540; interleaved as by Giesen, arXiv:1402.3392): 32-bit states, 16-bit
words, probabilities of 12 bits. Element i belongs to state i mod LANES; all states share one stream of words, so that
the processor has LANES independent chains to work on. The probabilities depend on the old weight's exponent (the 8 bits
below its sign), which both sides know: an update of the same size is many steps of a small weight and a fraction of a
step of a large one. Exponents that are rare share a context.

What comes from outside is checked inside: whatever the bytes, no kernel reads or writes out of bounds, a status says
that they were wrong. See `kernels` for what importing this costs.
"""

import numpy as np
from numba import types

from sop.broadcast.kernels import IN, OUT, U8, U16, U32, U64, compiled

LANES = 16
"""States that take turns. More hide more latency; each costs 4 bytes per block."""
MAX_CONTEXTS = 32
DIRECT = 32
"""Symbols below are zigzag values themselves and have no raw bits."""
PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
LOWEST_STATE = 1 << 16
"""Where every state starts in the encoder, and must end in the decoder."""
_PIECE = 4096
"""Elements whose large values are gathered at once: their list stays in the nearest cache."""
ROW = 128
"""Symbols of one context in a table, padded to a power of two."""


@compiled(types.int64, IN[16], IN[16], IN[8], OUT[16], OUT[32], OUT[32])
def symbols_of(  # noqa: PLR0917 - kernels take arrays
    new: U16, old: U16, symbol_of: U8, indices: U16, counts: U32, raw: U32
) -> np.int64:
    """Everything that the coder needs of the differences, piece by piece, so that each stays in the nearest cache.

    z = zigzag(monotonic(new[i]) - monotonic(old[i])); indices[i] = exponent of old[i] * ROW + symbol of z. The large
    values of a piece are gathered without a branch: which ones they are is not predictable. (All in one loop takes
    longer: the first of these three loops works on 32 elements at once.)

    Args:
        new: [n].
        old: [n].
        symbol_of: [65536].
        indices: [n], out.
        counts: [2 * 256 * ROW], how often each index occurs is added: at even places, then at odd ones; equal
            neighbours need not wait for each other.
        raw: out, the raw bits of all z of DIRECT or more, in order, lowest bit first; at most 12 each, as 32-bit
            words. Half as many words as elements, and one more, always suffice.

    Returns:
        Words of raw bits.
    """
    zigzag, large = np.empty(_PIECE, np.uint16), np.empty(_PIECE, np.uint16)
    held, num_held, position = np.uint64(0), np.uint64(0), np.uint64(0)
    for begin in range(0, new.size, _PIECE):
        size = min(_PIECE, new.size - begin)
        news, olds, indexes = new[begin : begin + size], old[begin : begin + size], indices[begin : begin + size]
        for i in range(size):
            a, b = np.int16(news[i]), np.int16(olds[i])
            a ^= (a >> 15) & np.int16(0x7FFF)
            b ^= (b >> 15) & np.int16(0x7FFF)
            d = np.int16(a - b)
            zigzag[i] = np.uint16((d << 1) ^ (d >> 15))
        for i in range(size):
            index = np.uint64((olds[i] >> 7) & 255) * np.uint64(ROW) + np.uint64(symbol_of[zigzag[i]])
            indexes[i] = np.uint16(index)
            counts[np.uint64((i & 1) << 15) + index] += np.uint32(1)
        count = np.uint64(0)
        for i in range(size):
            large[count] = zigzag[i]
            count += np.uint64(zigzag[i] >= DIRECT)
        for k in range(count):
            z = np.uint64(large[np.uint64(k)])
            length = np.uint64(2)
            for octave in range(6, 16):
                length += np.uint64((z >> np.uint64(octave)) != np.uint64(0))
            held |= (z & ((np.uint64(1) << length) - np.uint64(1))) << num_held
            num_held += length
            raw[position] = np.uint32(held)
            full = num_held >> np.uint64(5)
            position += full
            held >>= full << np.uint64(5)
            num_held &= np.uint64(31)
    if num_held:
        raw[position] = np.uint32(held)
        position += np.uint64(1)
    return np.int64(position)


@compiled(types.void, IN[64], OUT[16])
def normalize(counts: U64, frequencies: U16) -> None:
    """Frequencies that add up to TOTAL, in proportion to the counts (not all 0); what occurs at all has 1 or more."""
    total, left, largest = np.int64(counts.sum()), np.int64(TOTAL), 0
    for symbol in range(counts.size):
        count = np.int64(counts[symbol])
        share = max(np.int64(count > 0), (count * TOTAL + total // 2) // total)
        frequencies[symbol] = share
        left -= share
        if counts[symbol] > counts[largest]:
            largest = symbol
    while left < 0:
        highest = 0
        for symbol in range(counts.size):
            if frequencies[symbol] > frequencies[highest]:
                highest = symbol
        frequencies[highest] -= 1
        left += 1
    frequencies[largest] += left


@compiled(types.int64, IN[64], types.int64, OUT[8], OUT[16])
def merge_contexts(counts: U64, smallest: int, context_of: U8, frequencies: U16) -> int:
    """Join neighbouring exponents, from the largest down, until each context has `smallest` elements; what is left at
    the end joins the last one.

    Args:
        counts: [256 * ROW], at least one element.
        smallest: 1 or more.
        context_of: [256], out: context of an exponent.
        frequencies: [MAX_CONTEXTS * ROW], out: `normalize` of each context.

    Returns:
        Number of contexts; 0 if MAX_CONTEXTS are not enough (nothing is valid then: take a larger `smallest`).
    """
    members = np.zeros(ROW, np.uint64)
    rest = np.int64(counts.sum())
    context, above = 0, 255
    for exponent in range(255, -1, -1):
        for symbol in range(ROW):
            members[symbol] += counts[exponent * ROW + symbol]
            rest -= np.int64(counts[exponent * ROW + symbol])
        if exponent > 0 and (np.int64(members.sum()) < smallest or rest < smallest):
            continue
        if context == MAX_CONTEXTS:
            return 0
        context_of[exponent : above + 1] = context
        normalize(members, frequencies[context * ROW : (context + 1) * ROW])
        members[:] = 0
        above, context = exponent - 1, context + 1
    return context


@compiled(types.void, IN[16], OUT[64], OUT[32])
def encoder_tables(frequencies: U16, reciprocals: U64, rows: U32) -> None:
    """For each (context, symbol) of frequency f: ceil(2^44 / f), and f | (start of the symbol) << 16.

    The encoder needs x // f for x < f * 2^20. With r = ceil(2^44 / f) = (2^44 + e) / f, e < f <= 2^12:
    x * r / 2^44 = x / f + x * e / (f * 2^44), the error is below 2^20 * 2^12 / 2^44 = 2^-12 <= 1 / f: exact; and
    x * r <= (2^20 - 1 / f) * 2^44 + e * 2^20 < 2^64: no overflow.
    """
    start = np.uint64(0)
    for k in range(frequencies.size):
        if k % ROW == 0:
            start = np.uint64(0)
        f = np.uint64(frequencies[k])
        rows[k] = np.uint32(f | start << np.uint64(16))
        reciprocals[k] = ((np.uint64(1) << np.uint64(44)) + f - np.uint64(1)) // max(f, np.uint64(1))
        start += f


@compiled(types.int64, IN[16], IN[64], IN[32], OUT[32], OUT[16])
def encode_symbols(indices: U16, reciprocals: U64, rows: U32, states: U32, words: U16) -> np.int64:
    """Code all symbols, the last first, into the end of `words`.

    Args:
        indices: [n], of each symbol (and its context) in the tables.
        reciprocals: see `encoder_tables`.
        rows: the same.
        states: [LANES], LOWEST_STATE each; out: what the decoder starts from.
        words: [n], which always suffices; out.

    Returns:
        Index in `words` where the code begins.
    """
    position = np.uint64(words.size)
    for i in range(indices.size - 1, -1, -1):
        lane = np.uint64(i & (LANES - 1))
        k = np.uint64(indices[i])
        row = np.uint64(rows[k])
        frequency = row & np.uint64(0xFFFF)
        x = np.uint64(states[lane])
        full = np.uint64(x >= (frequency << np.uint64(32 - PROBABILITY_BITS)))
        words[position - np.uint64(1)] = np.uint16(x)
        position -= full
        x >>= full << np.uint64(4)
        quotient = (x * reciprocals[k]) >> np.uint64(44)
        x += (row >> np.uint64(16)) + quotient * (np.uint64(TOTAL) - frequency)
        states[lane] = np.uint32(x)
    return np.int64(position)


@compiled(types.void, IN[16], OUT[32])
def decoder_table(frequencies: U16, table: U32) -> None:
    """table[context * TOTAL + slot] = symbol | (slot - start of symbol) << 8 | (frequency - 1) << 20.
    Each context's frequencies must add up to TOTAL."""
    slot = 0
    for k in range(frequencies.size):
        f = np.uint32(frequencies[k])
        for offset in range(f):
            table[slot] = np.uint32(k % ROW) | np.uint32(offset) << np.uint32(8) | (f - np.uint32(1)) << np.uint32(20)
            slot += 1


@compiled(types.boolean, IN[16], IN[16], IN[8], IN[32], OUT[32], OUT[16])
def decode_symbols(  # noqa: PLR0917 - kernels take arrays
    words: U16, old: U16, context_of: U8, table: U32, states: U32, symbols: U16
) -> np.bool_:
    """Inverse of `encode_symbols`. `context_of` must point into `table`; words and states may be anything.

    Args:
        words: followed by LANES zeros, which are not part of the code.

    Returns:
        True if the code ends exactly where and as it should; else the symbols are wrong.
    """
    position, end = np.uint64(0), np.uint64(words.size - LANES)
    for begin in range(0, symbols.size, LANES):
        if position > end:
            return np.bool_(False)
        for i in range(begin, min(begin + LANES, symbols.size)):
            lane = np.uint64(i - begin)
            context = np.uint64(context_of[np.uint64((old[np.uint64(i)] >> 7) & 255)])
            x = states[lane]
            entry = table[(context << np.uint64(PROBABILITY_BITS)) | np.uint64(x & np.uint32(TOTAL - 1))]
            symbols[np.uint64(i)] = np.uint16(entry & np.uint32(255))
            high = x >> np.uint32(PROBABILITY_BITS)
            x = (entry >> np.uint32(20)) * high + high + ((entry >> np.uint32(8)) & np.uint32(TOTAL - 1))
            more = x < np.uint32(LOWEST_STATE)
            refilled = (x << np.uint32(16)) | np.uint32(words[position])
            states[lane] = refilled if more else x
            position += np.uint64(more)
    return np.bool_(position == end and (states == LOWEST_STATE).all())


@compiled(types.boolean, OUT[16], IN[32])
def read_raw_bits(symbols: U16, raw: U32) -> np.bool_:
    """In place: symbols (below ROW) become zigzag values.

    Args:
        raw: followed by one word that is not part of the code.

    Returns:
        False if the raw bits do not suffice or some are left over; the values are wrong then.
    """
    large = np.empty(_PIECE, np.uint64)
    held, num_held, position, end = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(raw.size - 1)
    for begin in range(0, symbols.size, _PIECE):
        count = np.uint64(0)
        for i in range(begin, min(begin + _PIECE, symbols.size)):
            large[count] = np.uint64(i)
            count += np.uint64(symbols[np.uint64(i)] >= DIRECT)
        for k in range(count):
            i = large[np.uint64(k)]
            symbol = np.uint64(symbols[i])
            length = ((symbol - np.uint64(DIRECT)) >> np.uint64(3)) + np.uint64(2)
            short = np.uint64(num_held < length)
            held |= (np.uint64(raw[position]) * short) << num_held
            position += short
            num_held += short << np.uint64(5)
            if position > end:
                return np.bool_(False)
            leading = (np.uint64(8) | (symbol & np.uint64(7))) << length
            symbols[i] = np.uint16(leading | (held & ((np.uint64(1) << length) - np.uint64(1))))
            held >>= length
            num_held -= length
    return np.bool_(position == end)
