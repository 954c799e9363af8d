"""The index: who recorded what, and where windows may start. Memory only; rebuilt from the store.

    rows                 columns: 58 bytes per episode
    ids                  a set: 16 bytes per episode
    runs of starts       per task and buffer, 17 bytes per run
    who has which        per task and buffer, 20 to 27 bytes per episode

A window start costs nothing: it is found by its rank. With one million episodes and two million runs everything
together takes about 135 MB.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.buffer.columns import Columns
from sop.buffer.ids import IdSet
from sop.buffer.rows import COLUMNS, OUTCOMES, EpisodeRow, RowBlock, column_key, column_keys, row_values
from sop.buffer.runs import Ints, RunTables
from sop.buffer.shares import CellActors
from sop.core import layout
from sop.core.errors import InvalidRecord
from sop.core.experience import Source
from sop.core.layout import EpisodeKey

_SOURCES = len(Source)
_ROW = {name: dtype for name, dtype in COLUMNS.items() if name != "num_runs"}


class EpisodeIndex:
    """Online and offline buffer: rows in the order in which they were added, each episode once.

    An episode is known by its content hash, which covers actor and sequence number. Not thread-safe: the
    learner owns it. Rows are never removed or changed, so a row number stays valid for ever, and two indices
    that were given the same rows in the same order draw the same windows.

    Args:
        tasks: all task ids of the run; a task's number is its place here.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self.tasks = tuple(tasks)
        self._task_number = {task: number for number, task in enumerate(self.tasks)}
        self._rows = Columns(_ROW)
        self._ids = IdSet()
        self._actors: list[str] = []
        self._actor_number: dict[str, int] = {}
        self._fleet = Columns({"fleet": np.bool_})
        self._num_episodes = [0] * _SOURCES * len(self.tasks)
        self._runs = RunTables(len(self._num_episodes))
        self._shares = [CellActors() for _ in self._num_episodes]

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        """Whether the episode with this key is there."""
        try:
            return int(EpisodeKey.parse(key).episode_id, 16) in self._ids
        except InvalidRecord:
            return False

    @property
    def num_bytes(self) -> int:
        """Memory of the columns, spare room included, without the few names."""
        shares = sum(cell.num_bytes for cell in self._shares)
        return self._rows.num_bytes + 16 * len(self._ids) + self._runs.num_bytes + shares

    def key(self, number: int) -> str:
        """Key of the episode in a row.

        Raises:
            IndexError: there is no such row.
        """
        self._check(number)
        return column_key(self._rows, self._actors, number)

    def keys(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Keys of the episodes in these rows; about a microsecond each.

        Raises:
            IndexError: a row is not there.
        """
        return column_keys(self._rows, self._actors, rows)

    def keys_in(self, source: Source) -> list[str]:
        """Keys of the episodes in a buffer, in the order of the rows; about a microsecond each."""
        return self.keys(np.flatnonzero(self._rows["source"] == source))

    def row(self, number: int) -> EpisodeRow:
        """A row, made from the columns.

        Raises:
            IndexError: there is no such row.
        """
        self._check(number)
        value = {name: int(self._rows[name][number]) for name in _ROW}
        source, version = Source(value["source"]), value["policy_version"]
        _, runs = self._runs.between(_cell(value["task"], source), number, number + 1)
        return EpisodeRow(
            episode_id=f"{value['id_high']:016x}{value['id_low']:016x}",
            actor_id=self._actors[value["actor"]],
            sequence=value["sequence"],
            task=self.tasks[value["task"]],
            source=source,
            num_steps=value["num_steps"],
            human_steps=value["human_steps"],
            num_interventions=value["num_interventions"],
            policy_version=None if version < 0 else version,
            outcome=OUTCOMES[value["outcome"]],
            start_runs=tuple((int(first), int(count)) for first, count in runs),
            end_utc_ns=value["end_utc_ns"],
            indexed_utc_ns=value["indexed_utc_ns"],
        )

    def add(self, row: EpisodeRow) -> bool:
        """Add a row; False (and nothing happens) when its episode is there already.

        Raises:
            ValueError: the task is not a task of this run.
        """
        values = row_values(row)
        task = self._number_of_task(row.task)
        episode_id = int(row.episode_id, 16)
        if episode_id in self._ids:
            return False
        number, cell = len(self), _cell(task, row.source)
        actor = self._number_of_actor(row.actor_id)
        self._rows.append({**values, "task": task, "actor": actor})
        self._ids.add(episode_id)
        self._num_episodes[cell] += 1
        if row.start_runs:
            begin, count = self._runs.num_starts(cell), row.num_starts
            self._shares[cell].extend(np.asarray([actor]), np.asarray([begin]), np.asarray([count]))
        self._runs.extend(cell, np.full(len(row.start_runs), number), np.asarray(row.start_runs).reshape(-1, 2))
        return True

    def extend(self, *blocks: RowBlock) -> None:
        """Add all rows of the blocks, in their order; much faster than one by one.

        Raises:
            ValueError: an episode is there already or comes twice, or a task is not of this run. Nothing was added.
        """
        for block in blocks:
            for task in block.tasks:
                self._number_of_task(task)
        if not blocks:
            return
        high, low = (np.concatenate([block.columns[name] for block in blocks]) for name in ("id_high", "id_low"))
        self._ids.update(high, low, unique=True)
        self._rows.reserve(len(high))
        self._runs.reserve(sum(len(block.runs) for block in blocks))
        for block in blocks:
            self._extend(block)

    def block(self, start: int, stop: int) -> RowBlock:
        """A copy of the rows in [start, stop).

        Raises:
            IndexError: not all of them are there.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} of an index with {len(self)} rows")
        columns = {name: self._rows[name][start:stop].copy() for name in _ROW}
        actors, columns["actor"] = _renumber(columns["actor"])
        tasks, columns["task"] = _renumber(columns["task"])
        parts = [self._runs.between(cell, start, stop) for cell in range(len(self._num_episodes))]
        episode = np.concatenate([np.empty(0, np.int32), *(part for part, _ in parts)])
        runs = np.concatenate([np.empty((0, 2), np.int32), *(part for _, part in parts)])
        columns["num_runs"] = np.bincount(episode - start, minlength=stop - start).astype(np.int32)
        return RowBlock(
            actors=tuple(self._actors[number] for number in actors),
            tasks=tuple(self.tasks[number] for number in tasks),
            columns=columns,
            runs=runs[np.argsort(episode, kind="stable")],
        )

    def from_fleet(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the fleet recorded the episodes in these rows: neither demonstrations nor base rollouts."""
        return np.asarray(self._fleet["fleet"][self._rows["actor"][rows]])

    def num_episodes(self, source: Source, task: str | None = None) -> int:
        """Episodes in a buffer, of one task or of all."""
        tasks = range(len(self.tasks)) if task is None else (self._task_number[task],)
        return sum(self._num_episodes[_cell(number, source)] for number in tasks)

    def num_starts(self, task: int, source: Source) -> int:
        """Window starts of a task (by number) in a buffer."""
        return self._runs.num_starts(_cell(task, source))

    def starts_by_actor(self, task: int, source: Source) -> Ints:
        """[n] window starts of a task (by number) in a buffer, per actor (by number); not to be changed."""
        return self._shares[_cell(task, source)].starts

    def ranks_of(self, task: int, source: Source, actor: int, own: Ints) -> Ints:
        """Ranks for `locate` of some starts of one actor, each in [0, starts_by_actor(task, source)[actor])."""
        return self._shares[_cell(task, source)].ranks(actor, own)

    def actors_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Numbers of the actors that recorded the episodes in these rows."""
        found: npt.NDArray[np.int32] = self._rows["actor"][rows]
        return found

    def outcomes_by_actor(self, source: Source) -> Ints:
        """[tasks, actors, outcomes] episodes in a buffer; numbers of outcomes are places in `OUTCOMES`."""
        shape = (len(self.tasks), len(self._actors), len(OUTCOMES))
        names = ("task", "actor", "outcome")
        chosen = self._rows["source"] == source
        places = np.ravel_multi_index(tuple(self._rows[name][chosen].astype(np.int64) for name in names), shape)
        return np.bincount(places, minlength=int(np.prod(shape))).reshape(shape)

    @property
    def actors(self) -> Sequence[str]:
        """Ids of all actors; an actor's number is its place here."""
        return self._actors

    def locate(
        self, cells: Sequence[tuple[int, Source]], counts: Sequence[int], ranks: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Row and first step of window starts, given by their ranks, each in [0, num_starts(*its cell)).

        Args:
            cells: `(task number, buffer)` where the starts are.
            counts: how many of the ranks belong to each of these cells.
            ranks: those of the first cell, then those of the second, ...
        """
        return self._runs.locate([_cell(task, source) for task, source in cells], counts, ranks)

    def _extend(self, block: RowBlock) -> None:
        base, rows = len(self), len(block)
        actor = np.asarray([self._number_of_actor(actor_id) for actor_id in block.actors], np.int32)
        task = np.asarray([self._task_number[name] for name in block.tasks], np.int16)
        numbers = {"actor": actor[block.columns["actor"]], "task": task[block.columns["task"]]}
        self._rows.extend({**block.columns, **numbers}, rows)
        cell = numbers["task"].astype(np.int32) * _SOURCES + block.columns["source"]
        row_of_run = np.repeat(np.arange(rows), block.columns["num_runs"])
        cell_of_run = cell[row_of_run]
        for this in np.unique(cell).tolist():
            self._num_episodes[this] += int((cell == this).sum())
            chosen = cell_of_run == this
            self._extend_shares(this, numbers["actor"], row_of_run[chosen], block.runs[chosen, 1])
            self._runs.extend(this, base + row_of_run[chosen], block.runs[chosen])

    def _extend_shares(self, cell: int, actor: npt.NDArray[np.int32], row: Ints, count: npt.NDArray[np.int32]) -> None:
        """Note who has the new window starts of a cell: runs of these rows (ascending) of a block, and how many."""
        starts = np.bincount(row, weights=count, minlength=len(actor)).astype(np.int64)
        begin = self._runs.num_starts(cell) + np.cumsum(starts) - starts
        some = starts > 0
        self._shares[cell].extend(actor[some], begin[some], starts[some])

    def _check(self, number: int) -> None:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of an index with {len(self)} rows")

    def _number_of_task(self, task: str) -> int:
        number = self._task_number.get(task)
        if number is None:
            raise ValueError(f"task {task!r} is not a task of this run: {', '.join(self.tasks)}")
        return number

    def _number_of_actor(self, actor_id: str) -> int:
        number = self._actor_number.setdefault(actor_id, len(self._actors))
        if number == len(self._actors):
            self._actors.append(actor_id)
            self._fleet.append({"fleet": not layout.before_fleet(actor_id)})
        return number


def _cell(task: int, source: int) -> int:
    """Number of a task in a buffer."""
    return task * _SOURCES + source


def _renumber(numbers: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The numbers that occur, and the column counted in them."""
    found, places = np.unique(numbers, return_inverse=True)
    return found, places.astype(numbers.dtype)
