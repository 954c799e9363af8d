"""A set of 128-bit ids in 16 bytes each: which episodes are known.

    recent   Python set, at most RECENT ids          <- add, one at a time
    bulk     two sorted columns, high and low words  <- recent, merged when it is full; update, many at once

The ids are content hashes, and the comparison is exact: all 128 bits.
"""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

RECENT = 8192
"""Ids outside of the sorted columns; an id costs about 100 bytes there, and a merge copies the columns."""
_LOW = (1 << 64) - 1


class IdSet:
    """Ids as whole numbers in [0, 2^128). Only grows. Not thread-safe."""

    def __init__(self) -> None:
        self._high: Words = np.empty(0, np.uint64)
        self._low: Words = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._high) + len(self._recent)

    def __contains__(self, number: int) -> bool:
        if number in self._recent:
            return True
        high, low = np.uint64(number >> 64), np.uint64(number & _LOW)
        start, stop = self._high.searchsorted(high, "left"), self._high.searchsorted(high, "right")
        return bool((self._low[start:stop] == low).any())

    def add(self, number: int) -> bool:
        """Add an id; False (and nothing happens) when it is there already. Amortised constant time."""
        if number in self:
            return False
        self._recent.add(number)
        if len(self._recent) >= RECENT:
            self._merge()
        return True

    def update(self, high: Words, low: Words, *, unique: bool = False) -> int:
        """Add many ids, each as two words [n], [n]; returns how many were not there.

        Args:
            high: upper 64 bits.
            low: lower 64 bits.
            unique: refuse ids that are there already or come twice.

        Raises:
            ValueError: `unique` and an id is not; nothing was changed.
        """
        self._merge()
        order = np.lexsort((low, high))
        high, low = high[order], low[order]
        new = ~self._holds(high, low)
        new[1:] &= (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        if unique and not new.all():
            place = int(np.flatnonzero(~new)[0])
            raise ValueError(f"id {int(high[place]):016x}{int(low[place]):016x} is there more than once")
        self._insert(high[new], low[new])
        return int(new.sum())

    def _merge(self) -> None:
        ordered = sorted(self._recent)
        high = np.fromiter((number >> 64 for number in ordered), np.uint64, len(ordered))
        low = np.fromiter((number & _LOW for number in ordered), np.uint64, len(ordered))
        self._insert(high, low)
        self._recent.clear()

    def _insert(self, high: Words, low: Words) -> None:
        """Put sorted ids, none of which is there, into the columns."""
        if len(high):
            places = self._high.searchsorted(high)
            self._high = np.insert(self._high, places, high)
            self._low = np.insert(self._low, places, low)

    def _holds(self, high: Words, low: Words) -> npt.NDArray[np.bool_]:
        """Which of these ids are in the columns."""
        found = np.zeros(len(high), np.bool_)
        start = self._high.searchsorted(high, "left")
        stop = self._high.searchsorted(high, "right")
        some = np.flatnonzero(stop > start)
        found[some] = self._low[start[some]] == low[some]
        for place in np.flatnonzero(stop > start + 1):  # equal upper words: about never
            found[place] = low[place] in self._low[start[place] : stop[place]]
        return found
