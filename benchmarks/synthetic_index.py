"""A synthetic index of any size: what a fleet records, as rows, without the episodes.

rows(1_000_000, seed=0)   1,000 actors x 1,000 episodes of about 300 steps, 1 to 3 runs of window starts each
"""

from collections.abc import Iterator

import numpy as np

from sop.buffer import RowBlock
from sop.buffer.rows import COLUMNS
from sop.core.experience import Source

TASKS = tuple(f"task-{number}" for number in range(8))
ROWS_PER_BLOCK = 4096
LAB_SHARE = 0.05
"""Of the actors, at least one, are the lab's: they recorded demonstrations."""
START_UTC_NS = 1_700_000_000_000_000_000


def rows(count: int, seed: int, *, actors: int | None = None) -> Iterator[RowBlock]:
    """`count` rows in blocks, in the order in which a fleet would have recorded them.

    Args:
        count: rows; sequence numbers of an actor have no gap.
        seed: the same seed gives the same rows.
        actors: number of actors; None takes one for every 1,000 rows, at least 20.
    """
    rng = np.random.default_rng(seed)
    actors = max(20, count // 1000) if actors is None else actors
    for first in range(0, count, ROWS_PER_BLOCK):
        yield _block(np.arange(first, min(first + ROWS_PER_BLOCK, count)), actors, rng)


def actor_names(actors: int) -> tuple[str, ...]:
    """Ids of all actors, the lab's first."""
    lab = max(1, int(actors * LAB_SHARE))
    return tuple(f"lab-{number:04d}" if number < lab else f"robot-{number:04d}" for number in range(actors))


def _block(number: np.ndarray, actors: int, rng: np.random.Generator) -> RowBlock:
    size = len(number)
    names = actor_names(actors)
    actor = number % actors
    demonstration = np.asarray([name.startswith("lab-") for name in names])[actor]
    steps = rng.integers(200, 401, size)
    human = np.where(demonstration, steps, rng.integers(0, 100, size))
    num_runs = rng.integers(1, 4, size)
    end_ns = START_UTC_NS + number * 10_000_000
    values = {
        "id_high": rng.integers(0, 1 << 64, size, np.uint64),
        "id_low": rng.integers(0, 1 << 64, size, np.uint64),
        "actor": actor,
        "sequence": number // actors,
        "num_steps": steps,
        "task": rng.integers(0, len(TASKS), size),
        "source": np.where(demonstration, Source.OFFLINE, Source.ONLINE),
        "outcome": rng.choice(3, size, p=[0.7, 0.25, 0.05]),
        "policy_version": np.where(demonstration, -1, number // 5000),
        "human_steps": human,
        "num_interventions": np.where(demonstration, 1, num_runs),
        "num_runs": num_runs,
        "end_utc_ns": end_ns,
        "indexed_utc_ns": end_ns + 300_000_000,
    }
    columns = {name: values[name].astype(dtype) for name, dtype in COLUMNS.items()}
    return RowBlock(actors=names, tasks=TASKS, columns=columns, runs=_runs(steps, num_runs, rng))


def _runs(steps: np.ndarray, num_runs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[R, 2] runs `(first, count)`: each in its own part of the episode."""
    row = np.repeat(np.arange(len(steps)), num_runs)
    place = np.arange(len(row)) - np.repeat(np.cumsum(num_runs) - num_runs, num_runs)
    length = steps[row] // num_runs[row]
    first = place * length + rng.integers(0, length // 4)
    return np.stack([first, rng.integers(10, length // 2)], axis=1).astype(np.int32)
