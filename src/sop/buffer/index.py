"""The index: who recorded what, and where windows may start. Memory only; rebuilt from the store.

A window start costs nothing: starts are kept as runs, per task and buffer, with cumulative counts, so a
draw is a binary search (64 starts out of 10 million runs take tens of microseconds).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sop.core.episode import Outcome
from sop.core.experience import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRow:
    """What the index knows of an episode."""

    key: str
    actor_id: str
    sequence: int
    task: str
    source: Source
    num_steps: int
    human_steps: int
    num_interventions: int
    policy_version: int | None
    outcome: Outcome
    start_runs: tuple[tuple[int, int], ...]
    """Window starts as runs `(first, count)`."""
    end_utc_ns: int
    indexed_utc_ns: int

    @property
    def num_starts(self) -> int:
        """Number of window starts."""
        return sum(count for _, count in self.start_runs)


class RunTable:
    """Runs of window starts `(episode, first, count)`, addressed by rank: start number 0, 1, 2, ..."""

    def __init__(self) -> None:
        self._size = 0
        self._episode = np.empty(64, np.int64)
        self._first = np.empty(64, np.int32)
        self._end = np.empty(64, np.int64)

    @property
    def num_starts(self) -> int:
        """Number of window starts in all runs."""
        return int(self._end[self._size - 1]) if self._size else 0

    def append(self, episode: int, first: int, count: int) -> None:
        """Add a run of `count` >= 1 starts; amortised constant time."""
        if self._size == len(self._episode):
            for name in ("_episode", "_first", "_end"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate((old, np.empty_like(old))))
        self._episode[self._size] = episode
        self._first[self._size] = first
        self._end[self._size] = self.num_starts + count
        self._size += 1

    def locate(self, ranks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Episode and first step of the starts with these ranks, each in [0, num_starts)."""
        run = np.searchsorted(self._end[: self._size], ranks, side="right")
        before = np.where(run > 0, self._end[run - 1], 0)
        return self._episode[run], (self._first[run] + (ranks - before)).astype(np.int32)


class EpisodeIndex:
    """Online and offline buffer: rows in the order in which they were added, each key once.

    Not thread-safe: the learner owns it. Rows are never removed, so a row number stays valid for ever,
    and two indices that were given the same rows in the same order draw the same windows.

    Args:
        tasks: all task ids of the run; a task's number is its place here.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self.tasks = tuple(tasks)
        self.rows: list[EpisodeRow] = []
        self._task_number = {task: number for number, task in enumerate(self.tasks)}
        self._row_of_key: dict[str, int] = {}
        self._runs = {(number, source): RunTable() for number in range(len(self.tasks)) for source in Source}
        self._num_episodes = {(number, source): 0 for number in range(len(self.tasks)) for source in Source}

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, key: str) -> bool:
        return key in self._row_of_key

    def add(self, row: EpisodeRow) -> bool:
        """Add a row; False (and nothing happens) when its key is there already."""
        if row.key in self._row_of_key:
            return False
        if row.task not in self._task_number:
            raise ValueError(f"task {row.task!r} is not a task of this run: {', '.join(self.tasks)}")
        number = len(self.rows)
        cell = (self._task_number[row.task], row.source)
        self.rows.append(row)
        self._row_of_key[row.key] = number
        self._num_episodes[cell] += 1
        for first, count in row.start_runs:
            self._runs[cell].append(number, first, count)
        return True

    def num_episodes(self, source: Source, task: str | None = None) -> int:
        """Episodes in a buffer, of one task or of all."""
        tasks = range(len(self.tasks)) if task is None else (self._task_number[task],)
        return sum(self._num_episodes[number, source] for number in tasks)

    def num_starts(self, task: int, source: Source) -> int:
        """Window starts of a task (by number) in a buffer."""
        return self._runs[task, source].num_starts

    def locate(
        self, task: int, source: Source, ranks: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Row and first step of the window starts with these ranks in [0, num_starts(task, source))."""
        return self._runs[task, source].locate(ranks)
