"""Rows of the index, one by one and in blocks of columns.

    EpisodeRow   what the index knows of one episode, made on demand
    RowBlock     many rows as columns, on their own: names of actors and tasks included

In columns an episode costs 62 bytes and its runs of window starts 8 bytes each (16 in the index).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sop.core import layout
from sop.core.episode import Outcome
from sop.core.experience import Source
from sop.core.layout import EpisodeKey

COLUMNS: Mapping[str, type[np.generic]] = {
    "id_high": np.uint64,  # upper and lower word of the content hash
    "id_low": np.uint64,
    "actor": np.int32,  # place in `actors`
    "sequence": np.int32,
    "num_steps": np.int32,
    "task": np.int16,  # place in `tasks`
    "source": np.uint8,
    "outcome": np.uint8,  # place in OUTCOMES
    "policy_version": np.int32,  # -1: None
    "human_steps": np.int32,
    "num_interventions": np.int32,
    "num_runs": np.int32,
    "end_utc_ns": np.int64,
    "indexed_utc_ns": np.int64,
}
"""What is kept of every row. The order is that of a segment's columns."""
OUTCOMES = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.ABORTED)
"""Stored as numbers: add at the end only."""
FOLDERS = {Source.ONLINE: layout.EPISODES, Source.OFFLINE: layout.DEMONSTRATIONS}
"""Where the episodes of a buffer are stored."""
_FOLDER_OF = tuple(FOLDERS[source] for source in Source)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRow:
    """What the index knows of an episode."""

    episode_id: str
    """Content hash: 32 hexadecimal digits."""
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
    def key(self) -> str:
        """Where the episode is stored."""
        return str(EpisodeKey(FOLDERS[self.source], self.actor_id, self.sequence, self.num_steps, self.episode_id))

    @property
    def num_starts(self) -> int:
        """Number of window starts."""
        return sum(count for _, count in self.start_runs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowBlock:
    """n rows in order, as columns; holds everything that `EpisodeIndex.extend` needs.

    Raises:
        ValueError: on construction, when the columns do not belong together.
    """

    actors: tuple[str, ...]
    """Actor ids that the column `actor` counts."""
    tasks: tuple[str, ...]
    """Task ids that the column `task` counts."""
    columns: Mapping[str, npt.NDArray[Any]]
    """The columns of `COLUMNS`, [n] each."""
    runs: npt.NDArray[np.int32]
    """[R, 2] window starts as runs `(first, count)`: `num_runs` of each row, one row after the other."""

    def __post_init__(self) -> None:
        rows = len(self)
        for name, dtype in COLUMNS.items():
            column = self.columns[name]
            if column.dtype != dtype or column.shape != (rows,):
                raise ValueError(f"column {name} must be {np.dtype(dtype)} [{rows}], got {column.dtype} {column.shape}")
        if self.runs.shape != (int(self.columns["num_runs"].sum()), 2):
            raise ValueError(f"the rows have {self.columns['num_runs'].sum()} runs, got {self.runs.shape}")

    @classmethod
    def from_rows(cls, rows: Sequence[EpisodeRow]) -> "RowBlock":
        """Columns of these rows, in their order."""
        actors = tuple(dict.fromkeys(row.actor_id for row in rows))
        tasks = tuple(dict.fromkeys(row.task for row in rows))
        actor_of, task_of = ({name: place for place, name in enumerate(names)} for names in (actors, tasks))
        values = [{**row_values(row), "actor": actor_of[row.actor_id], "task": task_of[row.task]} for row in rows]
        columns = {name: np.asarray([value[name] for value in values], dtype) for name, dtype in COLUMNS.items()}
        runs = np.asarray([run for row in rows for run in row.start_runs], np.int32).reshape(-1, 2)
        return cls(actors=actors, tasks=tasks, columns=columns, runs=runs)

    def __len__(self) -> int:
        return len(self.columns["id_high"])

    def episode_keys(self) -> list[str]:
        """Keys of the episodes, in the order of the rows."""
        return column_keys(self.columns, self.actors, np.arange(len(self)))

    def key(self, place: int) -> str:
        """Key of the episode in row `place` of the block."""
        return column_key(self.columns, self.actors, place)

    def from_fleet(self) -> npt.NDArray[np.bool_]:
        """[n] whether the fleet recorded the episode: it is neither a lab's demonstration nor a base rollout."""
        fleet = [not layout.before_fleet(actor_id) for actor_id in self.actors]
        return np.asarray(np.asarray(fleet, np.bool_)[self.columns["actor"]])

    def num_starts(self) -> npt.NDArray[np.int64]:
        """[n] window starts of each row."""
        row = np.repeat(np.arange(len(self)), self.columns["num_runs"])
        return np.bincount(row, weights=self.runs[:, 1], minlength=len(self)).astype(np.int64)


class _NamedColumns(Protocol):
    def __getitem__(self, name: str, /) -> npt.NDArray[Any]: ...


def column_key(columns: _NamedColumns, actors: Sequence[str], row: int) -> str:
    """Key of the episode in one row of columns whose `actor` counts `actors`."""
    high, low = columns["id_high"].item(row), columns["id_low"].item(row)
    return str(
        EpisodeKey(
            _FOLDER_OF[columns["source"].item(row)],
            actors[columns["actor"].item(row)],
            columns["sequence"].item(row),
            columns["num_steps"].item(row),
            f"{high:016x}{low:016x}",
        )
    )


def column_keys(columns: _NamedColumns, actors: Sequence[str], rows: npt.NDArray[np.integer[Any]]) -> list[str]:
    """Keys of the episodes in some rows of columns whose `actor` counts `actors`."""
    names = ("source", "actor", "sequence", "num_steps", "id_high", "id_low")
    picked = (columns[name].take(rows).tolist() for name in names)
    return [
        str(EpisodeKey(_FOLDER_OF[source], actors[actor], sequence, num_steps, f"{high:016x}{low:016x}"))
        for source, actor, sequence, num_steps, high, low in zip(*picked, strict=True)
    ]


def row_values(row: EpisodeRow) -> dict[str, int]:
    """A row as numbers of `COLUMNS`, without `actor` and `task`, which depend on the table that they count."""
    return {
        "id_high": int(row.episode_id[:16], 16),
        "id_low": int(row.episode_id[16:], 16),
        "sequence": row.sequence,
        "num_steps": row.num_steps,
        "source": int(row.source),
        "outcome": OUTCOMES.index(row.outcome),
        "policy_version": -1 if row.policy_version is None else row.policy_version,
        "human_steps": row.human_steps,
        "num_interventions": row.num_interventions,
        "num_runs": len(row.start_runs),
        "end_utc_ns": row.end_utc_ns,
        "indexed_utc_ns": row.indexed_utc_ns,
    }
