"""Runs of window starts, addressed by rank: which episode and step is start number 12,345,678 of a buffer?

A *cell* is one task in one buffer. Its runs lie in chunks of 16, all cells in one arena:

    cell 0   chunks: first start, place     0 -> #0     1,310 -> #2     2,702 -> #3
    cell 1                                  0 -> #1
    arena    #0 [16 runs: episode, first step, starts before it]   #1 [16 runs]   #2 ...

A draw searches the chunks of each cell, which stay in the processor's cache, and then one chunk per window, for
all cells at once: 256 windows out of 2 million runs touch memory about a thousand times.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.buffer.columns import Columns

Ints = npt.NDArray[np.int64]
CHUNK = 16
_UNUSED = np.iinfo(np.int64).max
"""Starts before a run that is not there: beyond every rank."""


class RunTables:
    """Runs `(episode, first, count)` of every cell, in the order in which they came. Not thread-safe.

    Args:
        num_cells: number of cells.
    """

    def __init__(self, num_cells: int) -> None:
        self._arena = Columns({"begin": np.int64, "episode": np.int32, "first": np.int32})
        self._chunks = [Columns({"begin": np.int64, "episode": np.int32, "place": np.int32}) for _ in range(num_cells)]
        self._guides = [(chunks["begin"], chunks["place"]) for chunks in self._chunks]
        self._num_runs = [0] * num_cells
        self._num_starts = [0] * num_cells

    @property
    def num_bytes(self) -> int:
        """Memory of the tables, spare room included."""
        return self._arena.num_bytes + sum(chunks.num_bytes for chunks in self._chunks)

    def num_starts(self, cell: int) -> int:
        """Window starts in a cell."""
        return self._num_starts[cell]

    def reserve(self, num_runs: int) -> None:
        """Make room for so many more runs at once."""
        self._arena.reserve(num_runs + CHUNK * len(self._chunks))

    def extend(self, cell: int, episode: npt.NDArray[Any], runs: npt.NDArray[Any]) -> None:
        """Add runs `(first, count)` [R, 2] with count >= 1, of these episodes [R], which ascend and have none yet."""
        if not len(runs):
            return
        chunks, before = self._chunks[cell], self._num_runs[cell]
        end = self._num_starts[cell] + np.cumsum(runs[:, 1], dtype=np.int64)
        begin = end - runs[:, 1]
        number = np.arange(before, before + len(runs))
        opens = number % CHUNK == 0
        new, size = int(opens.sum()), len(self._arena)
        self._arena.extend({"begin": _UNUSED, "episode": 0, "first": 0}, new * CHUNK)
        places = np.arange(size // CHUNK, size // CHUNK + new)
        chunks.extend({"begin": begin[opens], "episode": episode[opens], "place": places}, new)
        self._guides[cell] = (chunks["begin"], chunks["place"])
        slot = chunks["place"][number // CHUNK].astype(np.int64) * CHUNK + number % CHUNK
        for name, values in (("begin", begin), ("episode", episode), ("first", runs[:, 0])):
            self._arena[name][slot] = values
        self._num_runs[cell] += len(runs)
        self._num_starts[cell] = int(end[-1])

    def locate(self, cells: Sequence[int], counts: Sequence[int], ranks: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
        """Episode and first step of window starts, given by their ranks, each in [0, num_starts(its cell)).

        Args:
            cells: where the starts are.
            counts: how many of the ranks belong to each of these cells.
            ranks: those of the first cell, then those of the second, ...
        """
        place = np.empty(len(ranks), np.int64)
        done = 0
        for cell, count in zip(cells, counts, strict=True):
            part, (first_starts, places) = slice(done, done + count), self._guides[cell]
            place[part] = places[first_starts.searchsorted(ranks[part], "right") - 1]
            done += count
        begin = self._arena["begin"]
        starts_later = begin.reshape(-1, CHUNK).take(place, axis=0) > ranks[:, None]
        slot = place * CHUNK + (starts_later.argmax(axis=1) - 1) % CHUNK  # the first run never does: 0 says none does
        return self._arena["episode"].take(slot), self._arena["first"].take(slot) + (ranks - begin.take(slot))

    def between(self, cell: int, start: int, stop: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Runs of a cell whose episodes are in [start, stop): their episodes [R], and `(first, count)` [R, 2]."""
        chunks = self._chunks[cell]
        low, high = chunks["episode"].searchsorted(np.asarray([start, stop], np.int32)).tolist()
        places = chunks["place"][max(0, low - 1) : high]
        begin, episode, first = (
            self._arena[name].reshape(-1, CHUNK)[places].reshape(-1) for name in ("begin", "episode", "first")
        )
        after = int(chunks["begin"][high]) if high < len(chunks) else self._num_starts[cell]
        used = int((begin != _UNUSED).sum())
        count = np.diff(begin[:used], append=after)
        chosen = (episode[:used] >= start) & (episode[:used] < stop)
        runs = np.stack([first[:used], count], axis=1).astype(np.int32)
        return episode[:used][chosen], runs[chosen]
