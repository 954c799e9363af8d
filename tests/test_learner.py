"""The learner: resumes to the bit, publishes in time, never publishes what is not finite."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import SETTINGS
from recovery_times import Recovery
from sop import system
from sop.broadcast import fetch_policy, published_versions
from sop.buffer import EpisodeIndex, IndexSegments, RowBlock
from sop.core import layout
from sop.core.errors import RunError
from sop.core.events import ALL_LEARNED
from sop.core.experience import Collection, Library, Source
from sop.core.lineage import Lineage
from sop.learner import Checkpoint, CheckpointStore, Learner, Optimization
from sop.learner.learner import LearnerParts
from sop.learner.optimization import constant_after_warmup
from sop.learner.pretrain import cosine_after_warmup
from sop.learner.stopwatch import Stopwatch
from sop.presets import make_config
from sop.runs import Run, create_run, take_base
from sop.system import make_learner_policy, run_learner
from sop.testing.memory import MemoryStore
from sop.wiring import learner_parts


def checkpoint_store(store: MemoryStore) -> CheckpointStore:
    return CheckpointStore(store, IndexSegments(store, "0" * 32), keep=2)


class Session:
    """A learner over the episodes in the store, as in `run_learner` but without a fleet beside it."""

    def __init__(self, run: Run, parts: LearnerParts, steps: int) -> None:
        self.parts = parts
        config = replace(run.config.learner, offline_steps=steps, checkpoint_every=10**6, publish_every=10**6)
        parts.algorithm.collection = Collection.NOTHING
        self.learner = Learner(parts, config, target_episodes=None)

    def weights(self) -> dict[str, np.ndarray]:
        return self.parts.policy.export(self.parts.optimization.averaged())


def open_session(run: Run, steps: int, resume: Checkpoint | None = None) -> Iterator[Session]:
    policy, algorithm = make_learner_policy(run)
    with learner_parts(run, policy, algorithm, run.config.learner) as parts:
        session = Session(run, parts, steps)
        if resume is None:
            keys = [*run.store.keys("demonstrations/"), *run.store.keys("episodes/")]
            parts.books.index(parts.ingest.take(keys))
        else:
            session.learner.restore(resume)
        yield session


def train(run: Run, steps: int, resume: Checkpoint | None = None) -> tuple[dict[str, np.ndarray], Checkpoint]:
    for session in open_session(run, steps, resume):
        session.learner.train(threading.Event())
        checkpoint = session.learner.checkpoint()
        copied = {name: tensor.detach().clone() for name, tensor in checkpoint.tensors.items()}
        return session.weights(), Checkpoint(checkpoint.learner_step, copied, checkpoint.state, checkpoint.rows)
    raise AssertionError


def keys_of(checkpoint: Checkpoint) -> list[str]:
    assert checkpoint.rows is not None
    assert checkpoint.rows.saved == ()
    return [key for block in checkpoint.rows.blocks for key in block.episode_keys()]


def first_rows(block: RowBlock, count: int) -> RowBlock:
    index = EpisodeIndex(block.tasks)
    index.extend(block)
    return index.block(0, count)


def test_a_resumed_learner_is_equal_to_one_that_never_stopped_to_the_bit(finished_base: Run) -> None:
    uninterrupted, end = train(finished_base, 9)
    _, middle = train(finished_base, 4)
    store = checkpoint_store(MemoryStore())
    store.save(middle)
    store.wait()
    saved = store.newest()
    store.close()
    assert saved is not None
    resumed, resumed_end = train(finished_base, 9, resume=saved)
    assert resumed_end.learner_step == end.learner_step == 9
    branches = [dict(point.state).pop("branch") for point in (end, resumed_end)]
    assert branches == [None, (0, 0)], "a resumed training knows what it goes on from"
    assert {**resumed_end.state, "branch": None} == end.state
    assert keys_of(resumed_end) == keys_of(end) == keys_of(middle)
    for name, value in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    assert end.tensors.keys() == resumed_end.tensors.keys()
    for name, tensor in end.tensors.items():
        if name != "draws/lineage":  # holds times
            assert torch.equal(tensor, resumed_end.tensors[name]), name
    lineage, again = (Lineage.decode(point.tensors["draws/lineage"].numpy().tobytes()) for point in (end, resumed_end))
    assert [(draw.learner_step, draw.keys, draw.starts.tolist(), draw.batch_hash) for draw in again.draws] == [
        (draw.learner_step, draw.keys, draw.starts.tolist(), draw.batch_hash) for draw in lineage.draws
    ]
    assert [draw.learner_step for draw in again.draws] == list(range(1, 10))
    assert [episode.key for episode in again.learned] == [episode.key for episode in lineage.learned]


@pytest.mark.parametrize("damage", ["tampered", "other labels", "twice"])
def test_without_its_rows_a_learner_rebuilds_the_index_and_loses_nothing(
    finished_base: Run, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    uninterrupted, middle = train(finished_base, 4)
    store = MemoryStore()
    checkpoints = checkpoint_store(store)
    checkpoints.save(middle)
    checkpoints.close()
    if damage == "tampered":
        store.tamper(next(iter(store.keys("index/"))), b"x")
    elif damage == "other labels":
        checkpoints = CheckpointStore(store, IndexSegments(store, "1" * 32))
    saved = checkpoints.newest()
    assert saved is not None
    if damage == "twice":
        assert saved.rows is not None
        saved = replace(saved, rows=replace(saved.rows, blocks=saved.rows.blocks * 2))
    else:
        assert saved.rows is None
    for session in open_session(finished_base, 6, saved):
        parts = session.parts
        listed = [*finished_base.store.keys("episodes/"), *finished_base.store.keys("demonstrations/")]
        assert [parts.index.key(row) for row in range(len(parts.index))] == listed
        assert parts.loader.pending() == []
        assert (session.learner.step, parts.books.collected) == (4, 6)
        for name, value in session.weights().items():
            np.testing.assert_array_equal(uninterrupted[name], value, err_msg=name)
        assert parts.ingest.reconcile() == 0
        session.learner.train(threading.Event())
        assert session.learner.step == 6
    assert "the index is rebuilt from all episodes" in caplog.text


def test_a_learner_with_its_rows_fetches_no_episode_and_finds_what_is_newer(finished_base: Run) -> None:
    _, middle = train(finished_base, 2)
    assert middle.rows is not None
    rows = replace(middle.rows, blocks=(first_rows(middle.rows.blocks[0], 15),))
    fresh = Checkpoint(middle.learner_step, middle.tensors, {**middle.state, "pending": []}, rows)
    for session in open_session(finished_base, 2, fresh):
        parts = session.parts
        assert len(parts.index) == 15
        taken = parts.ingest.everything()
        assert [str(episode.key) for episode in taken] == keys_of(middle)[15:]


def test_training_changes_the_weights_and_the_seed_decides_how(finished_base: Run) -> None:
    base = dict(fetch_policy(finished_base.store, 0)[1])
    first, _ = train(finished_base, 3)
    again, _ = train(finished_base, 3)
    assert any(not np.array_equal(first[name], base[name]) for name in base)
    for name in base:
        np.testing.assert_array_equal(first[name], again[name])


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(caplog: pytest.LogCaptureFixture, recovery) -> None:
    store = MemoryStore()
    checkpoints = checkpoint_store(store)
    for step in (10, 20):
        checkpoints.save(Checkpoint(step, {"w": torch.full((2,), float(step))}, {"note": step}))
    checkpoints.close()
    key = f"{layout.checkpoint_folder(20)}/tensors.safetensors"
    store.tamper(key, store.get(key)[:-1] + b"\x07")
    recovery.fault_is_over()
    newest = checkpoint_store(store).newest()
    recovery.whole("a started learner has read the one before")
    assert newest is not None
    assert (newest.learner_step, newest.state["note"], newest.tensors["w"].tolist()) == (10, 10, [10.0, 10.0])
    assert "00000020 is damaged" in caplog.text


def test_a_checkpoint_without_its_state_does_not_exist_and_can_be_written_again() -> None:
    store = MemoryStore()
    store.put(f"{layout.checkpoint_folder(5)}/tensors.safetensors", b"left by a killed learner")
    checkpoints = checkpoint_store(store)
    assert checkpoints.newest() is None
    checkpoints.save(Checkpoint(5, {"w": torch.ones(1)}, {}))
    checkpoints.wait()
    newest = checkpoints.newest()
    checkpoints.close()
    assert newest is not None
    assert newest.learner_step == 5


def test_only_the_newest_checkpoints_are_kept() -> None:
    store = MemoryStore()
    checkpoints = checkpoint_store(store)
    for step in (1, 2, 3, 4):
        checkpoints.save(Checkpoint(step, {"w": torch.ones(1)}, {}))
    checkpoints.close()
    assert sorted({layout.version_of(key) for key in store.keys("checkpoints/")}) == [3, 4]


def optimization(ema: float = 0.5) -> tuple[torch.nn.Linear, Optimization]:
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 1)
    config = replace(make_config("debug").learner, lr=0.1, ema=ema, weight_decay=0.0, max_skipped_steps=3)
    return module, Optimization(module, config, constant_after_warmup(0))


def test_the_published_weights_are_the_moving_average() -> None:
    module, steps = optimization(ema=0.75)
    expected = module.weight.detach().clone()
    for number in range(3):
        steps.step(module(torch.ones(4, 2)).squeeze(1) * (number + 1))
        expected = 0.75 * expected + 0.25 * module.weight.detach()
        torch.testing.assert_close(steps.averaged()["weight"], expected)


def test_a_loss_that_is_not_finite_changes_nothing_and_three_in_a_row_stop_the_learner(recovery: Recovery) -> None:
    module, steps = optimization()
    before = {name: tensor.clone() for name, tensor in steps.tensors().items()}
    bad = module(torch.full((2, 2), float("nan"))).squeeze(1)
    assert steps.step(bad).skipped
    for name, tensor in steps.tensors().items():
        assert torch.equal(tensor, before[name])
    recovery.fault_is_over()
    assert not steps.step(module(torch.ones(2, 2)).squeeze(1)).skipped
    recovery.whole("the next step was taken, after a single one")
    for _ in range(2):
        assert steps.step(module(torch.full((2, 2), float("nan"))).squeeze(1)).skipped
    with pytest.raises(RunError, match="3 times in a row"):
        steps.step(module(torch.full((2, 2), float("nan"))).squeeze(1))


def test_schedules_begin_warm_and_end_at_zero() -> None:
    warm = constant_after_warmup(4)
    assert [warm(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = cosine_after_warmup(100)
    assert cosine(0) == pytest.approx(0.05)
    assert cosine(50) == pytest.approx(0.5)
    assert cosine(100) == pytest.approx(0.0)


def test_pausing_is_not_waiting() -> None:
    now = [0.0]
    watch = Stopwatch(lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    with watch.waiting():
        spend(1)
    spend(3)
    with watch.pausing():
        spend(6)
    assert watch.lap(8, every_s=20) is None
    lap = watch.lap(8, every_s=10)
    assert lap is not None
    assert (lap.steps_per_s, lap.busy, lap.worked_s) == pytest.approx((0.8, 0.75, 4.0))


def test_the_loop_publishes_on_its_beat_and_ends_when_all_is_learned(finished_base: Run) -> None:
    """Six episodes are there; one step sees them, 5 cool down; a policy every 4 steps and at the end."""
    run = finished_base
    before = list(published_versions(run.store))
    policy, algorithm = make_learner_policy(run)
    config = replace(run.config.learner, publish_every=4, cooldown_steps=5, checkpoint_every=2)
    with learner_parts(run, policy, algorithm, config) as parts:
        learner = Learner(parts, config, target_episodes=6)
        parts.books.index(parts.ingest.take(sorted(run.store.keys("demonstrations/"))))
        parts.ingest.reconcile()
        learner.run(threading.Event())
        assert parts.books.collected == 6
        assert learner.step == 1 + 5
    new = [version for version in published_versions(run.store) if version not in before]
    manifests = [fetch_policy(run.store, version)[0] for version in new]
    assert [manifest.learner_step for manifest in manifests] == [4, 6]
    assert [manifest.online_episodes for manifest in manifests] == [6, 6]
    assert manifests[0].parent_version == before[-1]
    newest = parts.checkpoints.newest()
    assert newest is not None
    assert newest.learner_step == 6
    assert len(set(keys_of(newest))) == len(keys_of(newest)) == 12 + 6


def test_a_learner_that_stays_takes_no_further_step_and_indexes_what_robots_send_on_their_way_home(
    finished_base: Run,
) -> None:
    run = finished_base
    last = max(run.store.keys("episodes/"))
    late = run.store.get(last)
    policy, algorithm = make_learner_policy(run)
    config = replace(run.config.learner, cooldown_steps=3)
    with learner_parts(run, policy, algorithm, config) as parts:
        learner = Learner(parts, config, target_episodes=5, stays=True)
        parts.books.index(parts.ingest.take([*run.store.keys("demonstrations/"), *run.store.keys("episodes/")][:-1]))
        (run.folder / "store" / last).unlink()
        said, stop = [], threading.Event()

        def hear(state: str, learner_step: int, **_: object) -> None:
            said.append((state, learner_step, parts.books.collected))
            if state == ALL_LEARNED and (learner_step, parts.books.collected) == (3, 5):
                run.store.put(last, late)
                parts.ingest.reconcile()
            elif state == ALL_LEARNED:
                stop.set()

        parts.books.report = hear
        learner.run(stop)
        assert [entry for entry in said if entry[0] != "training"] == [
            (ALL_LEARNED, 3, 5),
            (ALL_LEARNED, 3, 6),
            ("done", 3, 6),
        ]
        newest = parts.checkpoints.newest()
    assert newest is not None
    assert last in keys_of(newest)


def test_what_an_algorithm_has_learned_travels_with_the_checkpoint(finished_base: Run) -> None:
    """As JSON values and as arrays, through the store."""
    for session in open_session(finished_base, 1):
        algorithm = session.parts.algorithm
        loaded: dict[str, object] = {}
        algorithm.state_dict = lambda: {"values": np.arange(3.0), "note": "a"}
        algorithm.load_state_dict = loaded.update
        store = checkpoint_store(MemoryStore())
        store.save(session.learner.checkpoint())
        store.wait()
        saved = store.newest()
        store.close()
        assert saved is not None
        session.learner.restore(saved)
        assert loaded["note"] == "a"
        np.testing.assert_array_equal(loaded["values"], [0.0, 1.0, 2.0])


def test_an_algorithm_is_prepared_with_the_demonstrations_before_the_first_step(
    finished_base: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = create_run(tmp_path / "prepared", make_config("debug", SETTINGS))
    take_base(run, finished_base)
    policy, algorithm = make_learner_policy(run)
    prepared: list[str] = []

    def prepare(library: Library, trained: object) -> None:
        assert trained is policy
        prepared.extend(library.get(key).actor_id for key in library.keys(Source.OFFLINE))
        assert list(library.keys(Source.ONLINE)) == []

    algorithm.prepare = prepare
    monkeypatch.setattr(system, "make_learner_policy", lambda _: (policy, algorithm))
    stop = threading.Event()
    stop.set()
    run_learner(run, stop)
    assert prepared == ["lab-0"] * 12
    run_learner(run, stop)
    assert prepared == ["lab-0"] * 12, "a resumed learner restores instead"


def test_what_is_frozen_is_neither_copied_nor_stored_again(finished_base: Run) -> None:
    run = finished_base
    policy, algorithm = make_learner_policy(run)
    config = replace(run.config.learner, freeze="prefix", publish_every=1, cooldown_steps=1)
    with learner_parts(run, policy, algorithm, config) as parts:
        learner = Learner(parts, config, target_episodes=6)
        exported = learner.weights()
        frozen = {name for name, value in policy.module.named_parameters() if not value.requires_grad}
        assert frozen
        assert frozen.isdisjoint(exported)
        assert len(frozen) + len(exported) == len(policy.module.state_dict())
        parts.books.index(parts.ingest.take(sorted(run.store.keys("demonstrations/"))))
        parts.ingest.reconcile()
        learner.run(threading.Event())
    newest = list(published_versions(run.store))[-1]
    manifest, weights = fetch_policy(run.store, newest)
    assert {name for name, entry in manifest.tensors.items() if entry.origin == 0} >= frozen
    _, base = fetch_policy(run.store, 0)
    for name in frozen:
        np.testing.assert_array_equal(weights[name], base[name])
    assert weights.keys() == base.keys()
