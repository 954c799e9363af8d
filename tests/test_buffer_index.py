"""The columnar index: gives back what was added, one by one or in blocks, and finds every start by its rank."""

from itertools import pairwise

import numpy as np
import pytest

from sop.buffer import EpisodeIndex, EpisodeRow, RowBlock
from sop.buffer.columns import Columns
from sop.buffer.ids import RECENT, IdSet
from sop.buffer.runs import CHUNK, RunTables
from sop.core.episode import Outcome
from sop.core.experience import Source
from sop.core.layout import EpisodeKey

TASKS = ("door", "drawer", "window")


def make_rows(count: int, seed: int = 0) -> list[EpisodeRow]:
    """Rows with every field random, 0 to 3 runs each."""
    rng = np.random.default_rng(seed)
    return [
        EpisodeRow(
            episode_id=rng.bytes(16).hex(),
            actor_id=str(rng.choice(["lab-0", "robot-0", "robot-1", "lab.rat"])),
            sequence=number,
            task=str(rng.choice(TASKS)),
            source=Source(int(rng.integers(2))),
            num_steps=int(rng.integers(300, 400)),
            human_steps=int(rng.integers(100)),
            num_interventions=int(rng.integers(40_000)),
            policy_version=None if rng.random() < 0.3 else int(rng.integers(10**8)),
            outcome=Outcome(rng.choice([outcome.value for outcome in Outcome])),
            start_runs=tuple((100 * run, int(rng.integers(1, 90))) for run in range(int(rng.integers(4)))),
            end_utc_ns=int(rng.integers(1 << 62)),
            indexed_utc_ns=int(rng.integers(1 << 62)),
        )
        for number in range(count)
    ]


def one_by_one(rows: list[EpisodeRow]) -> EpisodeIndex:
    index = EpisodeIndex(TASKS)
    assert all(index.add(row) for row in rows)
    return index


def all_starts(index: EpisodeIndex) -> dict[tuple[int, Source], list[tuple[int, int]]]:
    """Every window start of every cell, in the order of ranks."""
    found = {}
    for cell in [(task, source) for task in range(len(TASKS)) for source in Source]:
        starts = index.num_starts(*cell)
        episode, first = index.locate([cell], [starts], np.arange(starts))
        found[cell] = list(zip(episode.tolist(), first.tolist(), strict=True))
    return found


def expected_starts(rows: list[EpisodeRow]) -> dict[tuple[int, Source], list[tuple[int, int]]]:
    found: dict[tuple[int, Source], list[tuple[int, int]]] = {
        (task, source): [] for task in range(len(TASKS)) for source in Source
    }
    for number, row in enumerate(rows):
        for first, count in row.start_runs:
            found[TASKS.index(row.task), row.source] += [(number, first + step) for step in range(count)]
    return found


def test_a_row_comes_back_as_it_was_added() -> None:
    rows = make_rows(500)
    index = one_by_one(rows)
    assert len(index) == 500
    assert [index.row(number) for number in range(500)] == rows
    assert [index.key(number) for number in range(500)] == [row.key for row in rows]
    assert index.keys(np.asarray([7, 0, 7])) == [rows[number].key for number in (7, 0, 7)]
    assert EpisodeKey.parse(rows[7].key).episode_id == rows[7].episode_id
    for number in (-1, 500):
        with pytest.raises(IndexError, match="500 rows"):
            index.row(number)


def test_each_episode_is_added_once() -> None:
    rows = make_rows(3)
    index = one_by_one(rows[:2])
    assert not index.add(rows[0])
    assert len(index) == 2
    assert [row.key in index for row in rows] == [True, True, False]
    assert "run.json" not in index
    with pytest.raises(ValueError, match="not a task of this run"):
        EpisodeIndex(("other",)).add(rows[0])


def test_a_row_that_does_not_fit_leaves_no_trace() -> None:
    row = make_rows(1)[0]
    index = EpisodeIndex(TASKS)
    big = EpisodeRow(**{name: getattr(row, name) for name in row.__slots__} | {"human_steps": 1 << 40})
    with pytest.raises(OverflowError):
        index.add(big)
    assert len(index) == 0
    assert index.add(row)
    assert index.row(0) == row


def test_every_start_is_found_by_its_rank() -> None:
    rows = make_rows(400, seed=1)
    assert all_starts(one_by_one(rows)) == expected_starts(rows)


def test_many_cells_are_located_at_once() -> None:
    rows = make_rows(200, seed=2)
    index, expected = one_by_one(rows), expected_starts(rows)
    rng = np.random.default_rng(0)
    cells = [cell for cell, starts in expected.items() if starts]
    counts = [int(rng.integers(0, 30)) for _ in cells]
    ranks = [rng.integers(0, len(expected[cell]), count) for cell, count in zip(cells, counts, strict=True)]
    episode, first = index.locate(cells, counts, np.concatenate(ranks))
    wanted = [expected[cell][rank] for cell, mine in zip(cells, ranks, strict=True) for rank in mine]
    assert list(zip(episode.tolist(), first.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("cuts", [(0, 300), (0, 1, 2, 150, 150, 299, 300), (0, 64, 128, 300)])
def test_blocks_rebuild_the_same_index(cuts: tuple[int, ...]) -> None:
    rows = make_rows(300, seed=3)
    first, second = one_by_one(rows), EpisodeIndex(TASKS)
    second.extend(*(first.block(start, stop) for start, stop in pairwise(cuts)))
    assert [second.row(number) for number in range(300)] == rows
    assert all_starts(second) == all_starts(first)
    for source in Source:
        assert second.num_episodes(source) == sum(row.source is source for row in rows)
        for task in TASKS:
            assert second.num_episodes(source, task) == first.num_episodes(source, task)
    more = make_rows(10, seed=4)
    assert [second.add(row) for row in more] == [first.add(row) for row in more] == [True] * 10
    assert all_starts(second) == all_starts(first)


def test_a_block_is_a_copy_and_stands_alone() -> None:
    rows = make_rows(50, seed=5)
    index = one_by_one(rows)
    block = index.block(10, 20)
    assert block.episode_keys() == [row.key for row in rows[10:20]]
    assert set(block.actors) == {row.actor_id for row in rows[10:20]}
    assert block.num_starts().tolist() == [row.num_starts for row in rows[10:20]]
    assert block.from_fleet().tolist() == [not row.actor_id.startswith("lab-") for row in rows[10:20]]
    block.columns["sequence"][:] = 7
    assert index.row(10) == rows[10]
    same = RowBlock.from_rows(rows[10:20])
    other = EpisodeIndex(reversed(TASKS))
    other.extend(same)
    assert [other.row(number) for number in range(10)] == rows[10:20]
    with pytest.raises(IndexError, match="rows 40 to 51"):
        index.block(40, 51)


def test_an_index_without_rows_has_an_empty_block() -> None:
    index = EpisodeIndex(TASKS)
    assert len(index.block(0, 0)) == 0
    index.extend()
    index.extend(index.block(0, 0))
    assert len(index) == 0


@pytest.mark.parametrize("problem", ["there", "twice", "task"])
def test_blocks_that_do_not_fit_are_refused_as_a_whole(problem: str) -> None:
    rows = make_rows(20, seed=6)
    index = one_by_one(rows[:5])
    before = all_starts(index)
    blocks = [RowBlock.from_rows(rows[5:10]), RowBlock.from_rows(rows[10:15])]
    if problem == "there":
        blocks.append(RowBlock.from_rows(rows[4:5]))
    elif problem == "twice":
        blocks.append(RowBlock.from_rows([rows[16], rows[12]]))
    else:
        odd = EpisodeRow(**{name: getattr(rows[15], name) for name in rows[15].__slots__} | {"task": "fly"})
        blocks.append(RowBlock.from_rows([odd]))
    with pytest.raises(ValueError, match="more than once" if problem != "task" else "not a task"):
        index.extend(*blocks)
    assert len(index) == 5
    assert all_starts(index) == before
    index.extend(*blocks[:2])
    assert [index.row(number) for number in range(15)] == rows[:15]


def test_who_recorded_a_row_is_known_for_many_at_once() -> None:
    rows = make_rows(40, seed=7)
    picked = np.asarray([3, 3, 39, 0])
    expected = [not rows[number].actor_id.startswith("lab-") for number in picked]
    assert one_by_one(rows).from_fleet(picked).tolist() == expected


def test_ids_are_compared_to_the_last_bit() -> None:
    ids, high = IdSet(), 7 << 64
    numbers = [high | low for low in (1, 2, 1 << 63, (1 << 64) - 1)]
    halves = (
        np.asarray([number >> 64 for number in numbers], np.uint64),
        np.asarray([number & ((1 << 64) - 1) for number in numbers], np.uint64),
    )
    assert ids.update(*halves) == 4
    assert ids.update(*halves) == 0
    assert all(number in ids for number in numbers)
    assert not any(number in ids for number in (high, high | 3, 1, 2, 8 << 64 | 1, (1 << 128) - 1, 0))
    assert not ids.add(numbers[2])
    assert ids.add(high)
    assert (len(ids), high in ids) == (5, True)


def test_a_set_of_ids_is_a_set() -> None:
    rng = np.random.default_rng(0)
    ids, known = IdSet(), set()
    for _ in range(6):
        words = rng.integers(0, 50, (2, 400), np.uint64)
        many = {int(high) << 64 | int(low) for high, low in words.T}
        assert ids.update(*words) == len(many - known)
        known |= many
        for _ in range(RECENT // 4):
            number = int.from_bytes(rng.bytes(16)) if rng.random() < 0.9 else next(iter(known))
            assert ids.add(number) == (number not in known)
            known.add(number)
    assert len(ids) == len(known)
    assert all(number in ids for number in known)


def test_memory_grows_by_an_eighth_and_not_by_doubling() -> None:
    columns, most = Columns({"a": np.int64, "b": np.uint8}), 0.0
    for number in range(20_000):
        columns.append({"a": number, "b": number % 256})
        if number > 1000:
            most = max(most, columns.num_bytes / (9 * len(columns)))
    assert columns["a"].tolist() == list(range(20_000))
    assert most < 1.14


def test_runs_cost_little_more_than_their_numbers() -> None:
    tables = RunTables(2)
    rng = np.random.default_rng(0)
    for episode in range(3000):
        tables.extend(episode % 2, np.full(2, episode), np.stack([np.arange(2), rng.integers(1, 9, 2)], axis=1))
    assert tables.num_bytes < 6000 * (16 + 16 / CHUNK) * 1.14 + 4000
    episodes, runs = tables.between(1, 100, 104)
    assert (episodes.tolist(), runs[:, 0].tolist()) == ([101, 101, 103, 103], [0, 1, 0, 1])
