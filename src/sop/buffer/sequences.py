"""Which sequence numbers of an actor are known: a few runs of numbers, however many episodes there are.

0 ... next_sequence        known without a gap; listings start after its last key
      next_sequence ...    runs that came early: [5, 8), [12, 13), ...; what lies between them is missing
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from sop.buffer.rows import FOLDERS, RowBlock
from sop.core.experience import Source

MAX_RUNS = 1000
"""Early runs that are remembered per actor. What is forgotten beyond is found again by a listing."""


class Run(NamedTuple):
    """Known sequence numbers [first, stop)."""

    first: int
    stop: int
    last_key: str | None
    """Key of the episode with the last number; None in an empty run."""


class SequenceProgress:
    """Up to where the sequence numbers of one actor are complete, and what came early. Bounded memory."""

    def __init__(self) -> None:
        self.next_sequence = 0
        """First sequence number that is missing."""
        self.last_key: str | None = None
        """Key of the episode before it; listings start after it."""
        self._early: tuple[Run, ...] = ()

    @property
    def has_gaps(self) -> bool:
        """Whether a number is missing although a later one is known."""
        return bool(self._early)

    def __contains__(self, sequence: int) -> bool:
        """Whether the episode with this number is known."""
        return sequence < self.next_sequence or any(run.first <= sequence < run.stop for run in self._early)

    def add(self, sequence: int, key: str) -> None:
        """Note that an episode is known; idempotent, any order."""
        self.extend([Run(sequence, sequence + 1, key)])

    def extend(self, runs: Iterable[Run]) -> None:
        """Note runs of known episodes; idempotent, any order."""
        joined = [Run(0, self.next_sequence, self.last_key)]
        for run in sorted((*self._early, *runs)):
            last = joined[-1]
            if run.first > last.stop:
                joined.append(run)
            elif run.stop > last.stop:
                joined[-1] = Run(last.first, run.stop, run.last_key)
        self.next_sequence, self.last_key = joined[0].stop, joined[0].last_key
        self._early = tuple(joined[1 : MAX_RUNS + 1])

    def missing(self) -> list[range]:
        """Sequence numbers that are missing although later ones are known, ascending, as ranges."""
        early = self._early
        stops = (self.next_sequence, *(run.stop for run in early))
        return [range(stop, run.first) for stop, run in zip(stops, early, strict=False) if stop < run.first]


def known_runs(blocks: Sequence[RowBlock]) -> dict[tuple[str, str], list[Run]]:
    """Runs of sequence numbers of every (folder, actor) in rows of the index, ascending, at most MAX_RUNS + 1 each."""
    numbers: dict[tuple[str, str], int] = {}
    groups = [_groups(block, numbers) for block in blocks]
    offsets = [0, *accumulate(map(len, blocks))]
    group = np.concatenate([np.empty(0, np.int64), *groups])
    sequence = np.concatenate([np.empty(0, np.int32), *(block.columns["sequence"] for block in blocks)])
    order = np.lexsort((sequence, group))
    group, sequence = group[order], sequence[order]
    breaks = np.ones(len(order), np.bool_)
    breaks[1:] = (group[1:] != group[:-1]) | (sequence[1:] > sequence[:-1] + 1)
    firsts = np.flatnonzero(breaks)
    lasts = np.append(firsts, len(order))[1:] - 1
    names = list(numbers)
    runs: dict[tuple[str, str], list[Run]] = {}
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        found = runs.setdefault(names[group[first]], [])
        if len(found) <= MAX_RUNS:
            row = int(order[last])
            place = bisect_right(offsets, row) - 1
            key = blocks[place].key(row - offsets[place])
            found.append(Run(int(sequence[first]), int(sequence[last]) + 1, key))
    return runs


def _groups(block: RowBlock, numbers: dict[tuple[str, str], int]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """[n] number of each row's (folder, actor); new ones are added to `numbers`."""
    table = np.empty((len(block.actors), len(Source)), np.int64)
    for place, actor_id in enumerate(block.actors):
        for source in Source:
            table[place, source] = numbers.setdefault((FOLDERS[source], actor_id), len(numbers))
    found: np.ndarray[tuple[int], np.dtype[np.int64]] = table[block.columns["actor"], block.columns["source"]]
    return found
