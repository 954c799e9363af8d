"""Segments of the index: written once, shared by checkpoints, read back exactly, refused when anything is odd."""

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from sop.buffer import EpisodeIndex, EpisodeRow, IndexSegments, RowBlock, labels_id
from sop.buffer import segments as module
from sop.buffer.rows import COLUMNS
from sop.buffer.segments import decode_segment, encode_segment
from sop.core import layout
from sop.core.codec import content_hash
from sop.core.episode import Outcome
from sop.core.errors import InvalidRecord, NotFound
from sop.core.experience import Source
from sop.core.layout import SegmentKey
from sop.testing.memory import MemoryStore

LABELS = "a" * 32
TASKS = ("door", "drawer")


def make_row(number: int) -> EpisodeRow:
    return EpisodeRow(
        episode_id=content_hash(str(number).encode()),
        actor_id=f"robot-{number % 3}",
        sequence=number // 3,
        task=TASKS[number % 2],
        source=Source(number % 2),
        num_steps=50,
        human_steps=number,
        num_interventions=1,
        policy_version=number - 1 if number else None,
        outcome=Outcome.SUCCESS,
        start_runs=((0, 10), (20, 5))[: number % 3],
        end_utc_ns=number,
        indexed_utc_ns=number + 1,
    )


def make_index(count: int) -> EpisodeIndex:
    index = EpisodeIndex(TASKS)
    for number in range(count):
        index.add(make_row(number))
    return index


def make_segments(store: MemoryStore, labels: str = LABELS) -> IndexSegments:
    return IndexSegments(store, labels, rows_per_segment=4)


def counts(keys: tuple[str, ...] | list[str]) -> list[tuple[int, int]]:
    return [(key.first, key.count) for key in map(SegmentKey.parse, keys)]


def test_saved_rows_come_back_in_order_from_another_process() -> None:
    store = MemoryStore()
    segments = make_segments(store)
    keys = segments.save(segments.cut(make_index(10)))
    assert counts(keys) == [(0, 4), (4, 4), (8, 2)]
    again = EpisodeIndex(TASKS)
    again.extend(*make_segments(store).load(keys).blocks)
    assert [again.row(number) for number in range(10)] == [make_row(number) for number in range(10)]


def test_full_segments_are_written_and_copied_once_and_only_the_tail_again() -> None:
    written: list[str] = []
    store = MemoryStore(before=lambda operation, key: written.append(key) if operation == "put" else None)
    segments, index = make_segments(store), make_index(6)
    first = segments.save(segments.cut(index))
    for number in range(6, 9):
        index.add(make_row(number))
    cut = segments.cut(index)
    assert (cut.saved, [len(block) for block in cut.blocks]) == (first[:1], [4, 1])
    second = segments.save(cut)
    assert (counts(first), counts(second)) == ([(0, 4), (4, 2)], [(0, 4), (4, 4), (8, 1)])
    assert second[0] == first[0]
    assert written == [*first, *second[1:]]


def test_a_cut_does_not_see_what_is_indexed_after_it() -> None:
    store = MemoryStore()
    segments, index = make_segments(store), make_index(5)
    cut = segments.cut(index)
    index.add(make_row(5))
    assert counts(segments.save(cut)) == [(0, 4), (4, 1)]


def test_a_learner_that_resumed_names_the_old_segments_again() -> None:
    written: list[str] = []
    store = MemoryStore(before=lambda operation, key: written.append(key) if operation == "put" else None)
    first = make_segments(store)
    keys = first.save(first.cut(make_index(10)))
    second, resumed = make_segments(store), EpisodeIndex(TASKS)
    resumed.extend(*second.load(keys).blocks)
    assert second.save(second.cut(resumed)) == keys
    assert written == list(keys)


def test_an_index_without_rows_has_no_segments() -> None:
    store = MemoryStore()
    segments = make_segments(store)
    assert segments.save(segments.cut(make_index(0))) == ()
    assert segments.load([]).blocks == ()


def test_segments_that_no_checkpoint_names_are_collected_those_of_other_labels_too() -> None:
    store = MemoryStore()
    other = make_segments(store, "b" * 32)
    other.save(other.cut(make_index(3)))
    segments, index = make_segments(store), make_index(6)
    old = segments.save(segments.cut(index))
    index.add(make_row(6))
    new = segments.save(segments.cut(index))
    assert segments.collect([*old, *new]) == 1
    assert segments.collect(new) == 1
    assert set(store.keys(f"{layout.INDEX}/")) == set(new)
    index.add(make_row(7))
    assert counts(segments.save(segments.cut(index))) == [(0, 4), (4, 4)]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "labels", "order", "gap", "no key"])
def test_segments_that_are_not_whole_are_refused(damage: str) -> None:
    store = MemoryStore()
    segments = make_segments(store)
    keys = list(segments.save(segments.cut(make_index(10))))
    data = store.get(keys[1])
    if damage == "flipped":
        store.tamper(keys[1], data[:900] + bytes([data[900] ^ 1]) + data[901:])
    elif damage == "truncated":
        store.tamper(keys[1], data[:-20])
    elif damage == "gone":
        store.delete(keys[1])
    elif damage == "labels":
        segments = make_segments(store, "b" * 32)
    elif damage == "order":
        keys.reverse()
    elif damage == "gap":
        del keys[1]
    else:
        keys[1] = "run.json"
    with pytest.raises(NotFound if damage == "gone" else InvalidRecord):
        segments.load(keys)


def tampered(**changes: object) -> bytes:
    """A segment with other columns than the block's: `name=value` sets the first element."""
    block = RowBlock.from_rows([make_row(number) for number in range(4)])
    for name, value in changes.items():
        (block.runs if name == "runs" else block.columns[name])[0] = value
    return encode_segment(block)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"actor": 3}, "actor"),
        ({"actor": -1}, "actor"),
        ({"task": 2}, "task"),
        ({"source": 2}, "source"),
        ({"outcome": 3}, "outcome"),
        ({"sequence": 10**8}, "sequence"),
        ({"policy_version": -2}, "policy_version"),
        ({"num_steps": -5}, "num_steps"),
        ({"indexed_utc_ns": -1}, "indexed_utc_ns"),
        ({"runs": (0, 0)}, "start_runs"),
        ({"runs": (-1, 3)}, "start_runs"),
        ({"runs": (45, 6)}, "start_runs"),
        ({"runs": (2**31 - 1, 2**31 - 1)}, "start_runs"),
    ],
)
def test_values_that_no_index_holds_are_refused_with_their_column(changes: dict[str, object], field: str) -> None:
    decode_segment(tampered())
    with pytest.raises(InvalidRecord, match=field):
        decode_segment(tampered(**changes))


def test_containers_that_are_no_segments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = encode_segment(RowBlock.from_rows([make_row(number) for number in range(4)]))
    with pa.ipc.open_file(pa.BufferReader(good)) as reader:
        batch = reader.get_batch(0)

    def write(batch: pa.RecordBatch, **header: object) -> bytes:
        old = msgspec.json.decode(batch.schema.metadata[b"sop.index"])
        batch = batch.replace_schema_metadata({b"sop.index": msgspec.json.encode(old | header)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return bytes(sink.getvalue().to_pybytes())

    decode_segment(write(batch))
    nulls = pa.array([None, 1, 2, 3], pa.int32())
    lists = pa.array([[], [0], [0, 1], []], pa.list_(pa.int32()))
    place = batch.schema.get_field_index
    bad = {
        "not bytes of arrow": b"PK\x03\x04",
        "empty": b"",
        "version": write(batch, segment_version=9),
        "unknown field": write(batch, more=1),
        "actor name": write(batch, actors=["../x", "a", "b"]),
        "a column less": write(batch.drop_columns(["task"])),
        "other type": write(batch.set_column(place("task"), "task", batch.column("task").cast(pa.int64()))),
        "null": write(batch.set_column(place("actor"), "actor", nulls)),
        "odd runs": write(batch.set_column(place("start_runs"), "start_runs", lists)),
    }
    for name, data in bad.items():
        with pytest.raises(InvalidRecord):
            decode_segment(data)
            pytest.fail(name)
    monkeypatch.setattr(module, "MAX_SEGMENT_BYTES", len(good) - 1)
    with pytest.raises(InvalidRecord, match="at most"):
        decode_segment(good)


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_gets_through_as_an_odd_value(seed: int) -> None:
    """Whatever bit flips: refused, or still rows that an index can hold."""
    good = encode_segment(RowBlock.from_rows([make_row(number) for number in range(20)]))
    rng = np.random.default_rng(seed)
    for _ in range(150):
        data = bytearray(good)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        try:
            block = decode_segment(bytes(data))
        except InvalidRecord:
            continue
        assert set(block.columns) == set(COLUMNS)
        index = EpisodeIndex(TASKS)
        try:
            index.extend(block)
        except ValueError:  # an id twice, or the name of a task
            continue
        assert [index.row(number).num_starts for number in range(len(index))] == block.num_starts().tolist()


def test_labels_change_with_all_that_decides_where_windows_may_start() -> None:
    one = labels_id("hg_dagger", {"handover_s": 0.3, "mode": "iwr"}, 8)
    assert one == labels_id("hg_dagger", {"mode": "iwr", "handover_s": 0.3}, 8)
    others = [
        labels_id("bc", {"handover_s": 0.3, "mode": "iwr"}, 8),
        labels_id("hg_dagger", {"handover_s": 0.4, "mode": "iwr"}, 8),
        labels_id("hg_dagger", {"handover_s": 0.3, "mode": "iwr"}, 9),
    ]
    assert len({one, *others}) == 4
    key = SegmentKey(one, 8192, 713, "0" * 32)
    assert SegmentKey.parse(str(key)) == key
