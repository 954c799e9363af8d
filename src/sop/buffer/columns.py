"""Columns of numbers that grow together, at the end only."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

SPARE = 8
"""A full column grows by an eighth: at most 12.5 % of its memory is unused, and a row is copied 9 times in all."""


class Columns:
    """Named columns of the same length, in one array each.

    Args:
        dtypes: name -> element type.
    """

    def __init__(self, dtypes: Mapping[str, type[np.generic]]) -> None:
        self._size = 0
        self._arrays: dict[str, npt.NDArray[Any]] = {name: np.empty(0, dtype) for name, dtype in dtypes.items()}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """The column as it is now, [n]: a view, not to be kept, because a column that grows moves."""
        return self._arrays[name][: self._size]

    @property
    def num_bytes(self) -> int:
        """Memory of the columns, spare room included."""
        return sum(array.nbytes for array in self._arrays.values())

    def append(self, values: Mapping[str, int]) -> None:
        """Add one row; amortised constant time.

        Raises:
            OverflowError: a value does not fit its column; nothing was added.
        """
        self._reserve(1, spare=True)
        for name, array in self._arrays.items():
            array[self._size] = values[name]
        self._size += 1

    def extend(self, values: Mapping[str, npt.NDArray[Any] | int], count: int) -> None:
        """Add `count` rows, given as columns of that length or as one value for all."""
        self._reserve(count, spare=True)
        for name, array in self._arrays.items():
            array[self._size : self._size + count] = values[name]
        self._size += count

    def reserve(self, count: int) -> None:
        """Make room for `count` more rows at once."""
        self._reserve(count, spare=False)

    def _reserve(self, count: int, *, spare: bool) -> None:
        needed = self._size + count
        for name, array in self._arrays.items():
            if needed > len(array):
                grown = np.empty(max(64, needed + needed // SPARE if spare else needed), array.dtype)
                grown[: self._size] = array[: self._size]
                self._arrays[name] = grown
