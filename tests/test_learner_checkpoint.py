"""A checkpoint and the rows of the index: named before it exists, kept as long as it is, never fatal when damaged."""

import pytest
import torch

from sop.buffer import EpisodeIndex, EpisodeRow, IndexSegments
from sop.core import layout
from sop.core.codec import content_hash
from sop.core.episode import Outcome
from sop.core.errors import StoreUnavailable
from sop.core.experience import Source
from sop.learner import Checkpoint, CheckpointStore
from sop.testing.memory import MemoryStore

WEIGHTS = {"w": torch.ones(2)}


def grow(index: EpisodeIndex, count: int) -> None:
    for number in range(len(index), len(index) + count):
        row = EpisodeRow(
            episode_id=content_hash(str(number).encode()),
            actor_id="robot-0",
            sequence=number,
            task="door",
            source=Source.ONLINE,
            num_steps=50,
            human_steps=0,
            num_interventions=1,
            policy_version=1,
            outcome=Outcome.SUCCESS,
            start_runs=((0, 10),),
            end_utc_ns=number,
            indexed_utc_ns=number,
        )
        assert index.add(row)


def open_checkpoints(store: MemoryStore) -> CheckpointStore:
    segments = IndexSegments(store, "a" * 32, rows_per_segment=4)
    return CheckpointStore(store, segments, keep=2, pause=lambda _: None)


def save(checkpoints: CheckpointStore, step: int, index: EpisodeIndex) -> None:
    checkpoints.save(Checkpoint(step, WEIGHTS, {}, checkpoints.segments.cut(index)))
    checkpoints.wait()


def segments_in(store: MemoryStore) -> list[str]:
    return [key.split("/")[2][:16] for key in store.keys(f"{layout.INDEX}/")]


def keys_of(checkpoint: Checkpoint | None) -> list[str]:
    assert checkpoint is not None
    assert checkpoint.rows is not None
    return [key for block in checkpoint.rows.blocks for key in block.episode_keys()]


def test_a_checkpoint_gives_back_its_rows_in_order() -> None:
    store, index = MemoryStore(), EpisodeIndex(("door",))
    checkpoints = open_checkpoints(store)
    for step in (1, 2, 3):
        grow(index, 3)
        save(checkpoints, step, index)
    newest = open_checkpoints(store).newest()
    assert keys_of(newest) == [index.key(number) for number in range(9)]


def test_the_state_is_written_after_everything_that_it_names() -> None:
    written: list[str] = []
    store = MemoryStore(before=lambda operation, key: written.append(key) if operation == "put" else None)
    index = EpisodeIndex(("door",))
    grow(index, 6)
    checkpoints = open_checkpoints(store)
    save(checkpoints, 1, index)
    folders = [key.split("/")[0] for key in written]
    assert sorted(folders) == ["checkpoints", "checkpoints", "index", "index"]
    assert written[-1] == f"{layout.checkpoint_folder(1)}/state.json"


def test_tails_go_with_the_last_checkpoint_that_names_them_and_full_segments_stay() -> None:
    store, index = MemoryStore(), EpisodeIndex(("door",))
    checkpoints = open_checkpoints(store)
    found = []
    for step in (1, 2, 3):
        grow(index, 3)
        save(checkpoints, step, index)
        found.append(segments_in(store))
    full_0, full_4 = "0000000000-00004", "0000000004-00004"
    assert found[0] == ["0000000000-00003"]
    assert found[1] == ["0000000000-00003", full_0, "0000000004-00002"]
    assert found[2] == [full_0, "0000000004-00002", full_4, "0000000008-00001"]
    state = f"{layout.checkpoint_folder(3)}/state.json"
    store.tamper(state, b"{")
    assert keys_of(open_checkpoints(store).newest()) == [index.key(number) for number in range(6)]


def test_nothing_is_collected_while_a_checkpoint_cannot_tell_what_it_names(caplog: pytest.LogCaptureFixture) -> None:
    store, index = MemoryStore(), EpisodeIndex(("door",))
    checkpoints = open_checkpoints(store)
    for step in (1, 2):
        grow(index, 3)
        save(checkpoints, step, index)
    store.tamper(f"{layout.checkpoint_folder(2)}/state.json", b"{")
    before = segments_in(store)
    grow(index, 3)
    save(checkpoints, 3, index)
    assert set(before) <= set(segments_in(store))
    assert "not collected" in caplog.text


def test_a_store_that_is_away_while_old_checkpoints_are_collected_costs_no_checkpoint() -> None:
    store, index = MemoryStore(), EpisodeIndex(("door",))
    checkpoints = open_checkpoints(store)

    def fail(operation: str, place: str) -> None:
        if operation == "keys":
            raise StoreUnavailable("away")

    for step in (1, 2, 3):
        grow(index, 3)
        store.before = fail if step == 3 else lambda operation, place: None
        save(checkpoints, step, index)
    store.before = lambda operation, place: None
    assert len(keys_of(open_checkpoints(store).newest())) == 9
    save(checkpoints, 4, index)
    assert sorted({layout.version_of(key) for key in store.keys("checkpoints/")}) == [3, 4]


@pytest.mark.parametrize("damage", ["tampered", "gone"])
def test_weights_survive_a_segment_that_does_not(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store, index = MemoryStore(), EpisodeIndex(("door",))
    grow(index, 6)
    save(open_checkpoints(store), 7, index)
    key = next(iter(store.keys(f"{layout.INDEX}/")))
    if damage == "gone":
        store.delete(key)
    else:
        store.tamper(key, b"x")
    newest = open_checkpoints(store).newest()
    assert newest is not None
    assert (newest.learner_step, newest.rows, newest.tensors["w"].tolist()) == (7, None, [1.0, 1.0])
    assert "no usable rows of the index" in caplog.text


@pytest.mark.parametrize("folder", [layout.INDEX, layout.CHECKPOINTS])
def test_a_store_that_does_not_answer_is_waited_for_and_not_taken_for_damage(folder: str) -> None:
    store, index = MemoryStore(), EpisodeIndex(("door",))
    grow(index, 6)
    save(open_checkpoints(store), 7, index)
    failures = 3

    def fail(operation: str, place: str) -> None:
        nonlocal failures
        if operation == "get" and place.startswith(folder) and failures:
            failures -= 1
            raise StoreUnavailable("away")

    store.before = fail
    assert len(keys_of(open_checkpoints(store).newest())) == 6
    failures = 1000
    with pytest.raises(StoreUnavailable):
        open_checkpoints(store).newest()
