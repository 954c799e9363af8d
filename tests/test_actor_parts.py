"""The parts of the actor: gate, playback, recorder, spool, uploader."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import sop.actor.spool as spool_module
from recovery_times import Recovery
from sop.actor import ChunkPlayback, EpisodeRecorder, EpisodeSpool, SafetyGate, SpoolWriter, Uploader
from sop.actor.lifecycle import ActorState, move
from sop.actor.spool import SpoolFull
from sop.actor.uploader import next_stored_sequence
from sop.core.codec import content_hash, decode
from sop.core.embodiment import Observation
from sop.core.episode import Controller, Intervention, Outcome
from sop.core.errors import InvalidRecord, RunError, StoreUnavailable
from sop.core.events import TOPIC_EPISODES, EpisodeCommitted, decode_event
from sop.core.layout import EpisodeKey
from sop.core.policy import Conditioning
from sop.testing.clock import FakeClock
from sop.testing.episodes import TOY_BODY, make_episode
from sop.testing.memory import MemoryBus, MemoryStore
from sop.testing.policy import FakePolicy


def command(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


def test_an_admissible_command_passes_unchanged() -> None:
    gated = SafetyGate(TOY_BODY).check(command(0.25, -1.0))
    assert gated.action.tolist() == [0.25, -1.0]
    assert gated.reason == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_command_that_is_not_finite_stops_motion_and_keeps_the_gripper(bad: float) -> None:
    gate = SafetyGate(TOY_BODY)
    gate.check(command(0.4, 0.9))
    held = gate.check(command(0.3, bad))
    np.testing.assert_allclose(held.action, [0.0, 0.9])
    assert "not finite" in held.reason
    again = gate.check(command(bad, 0.1))
    np.testing.assert_allclose(again.action, [0.0, 0.9])


def test_bounds_are_clipped_and_jumps_are_limited() -> None:
    gate = SafetyGate(TOY_BODY)
    first = gate.check(command(5.0, -3.0))
    np.testing.assert_allclose(first.action, [0.5, -1.0])
    second = gate.check(command(5.0, 1.0))
    np.testing.assert_allclose(second.action, [1.0, 1.0])
    third = gate.check(command(-1.0, 1.0))
    np.testing.assert_allclose(third.action, [0.5, 1.0])
    assert third.reason == "change limited"


def test_a_new_episode_starts_from_standstill() -> None:
    gate = SafetyGate(TOY_BODY)
    gate.check(command(0.5, 1.0))
    gate.check(command(1.0, 1.0))
    gate.reset()
    np.testing.assert_allclose(gate.check(command(1.0, 1.0)).action, [0.5, 1.0])


def test_a_wrong_shape_holds() -> None:
    assert "shape" in SafetyGate(TOY_BODY).check(command(1.0)).reason


def test_a_chunk_is_played_for_its_execution_horizon_and_planned_anew_after_a_drop() -> None:
    policy = FakePolicy(TOY_BODY, action_horizon=4, execution_horizon=3)
    playback = ChunkPlayback(policy, Conditioning())
    seen = Observation({}, np.zeros(2, np.float32))
    played = [tuple(playback.next(seen, "go")) for _ in range(4)]
    assert played == [tuple(policy.chunks[0][i]) for i in range(3)] + [tuple(policy.chunks[1][0])]
    playback.drop()
    assert playback.plans_next
    np.testing.assert_array_equal(playback.next(seen, "go"), policy.chunks[2][0])


def test_only_the_drawn_moves_of_an_actor_are_legal() -> None:
    state = ActorState.STARTING
    for to in (ActorState.WAITING, ActorState.RESETTING, ActorState.ACTING, ActorState.RESETTING, ActorState.HOLDING):
        state = move(state, to)
    with pytest.raises(RuntimeError, match="from holding to acting"):
        move(state, ActorState.ACTING)
    assert move(state, ActorState.STOPPED) is ActorState.STOPPED
    with pytest.raises(RuntimeError, match="from stopped"):
        move(ActorState.STOPPED, ActorState.RESETTING)


def test_the_recorder_keeps_proposal_and_execution_apart_and_marks_who_and_why() -> None:
    recorder = EpisodeRecorder("robot-1", TOY_BODY, FakeClock(tick_ns=10))
    recorder.begin("push", "push it", policy_version=4)
    for step, who in enumerate([None, ("anna", "stall"), ("anna", "stall"), None, ("bo", "deviation")]):
        seen = Observation({"front": np.full((16, 16, 3), step, np.uint8)}, np.asarray([step, 0], np.float32))
        proposal = None if step == 4 else np.asarray([0.1 * step, np.nan if step == 3 else 0.5], np.float32)
        recorder.append(seen, np.asarray([step, 1], np.float32), proposal, who)
    episode = recorder.finish(9, Outcome.SUCCESS, truncated=False)
    assert episode.sequence == 9
    assert episode.controller.tolist() == [0, 1, 1, 0, 1]
    assert episode.interventions == (Intervention(1, 3, "anna", "stall"), Intervention(4, 5, "bo", "deviation"))
    assert episode.action[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert episode.proposed.tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(episode.policy_action[:3, 0], [0, 0.1, 0.2], atol=1e-6)
    assert [int(frame.mean()) for frame in episode.images["front"]] == [0, 1, 2, 3, 4]
    assert (np.diff(episode.monotonic_ns) > 0).all()


def test_a_committed_episode_is_whole_and_in_the_journal(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    key = spool.commit(make_episode(sequence=5))
    assert spool.pending() == [str(key)]
    assert spool.recorded() == [str(key)]
    assert spool.next_sequence() == 6
    assert decode(spool.read(str(key))).sequence == 5
    spool.mark_uploaded(str(key))
    spool.mark_uploaded(str(key))
    assert spool.pending() == []
    assert EpisodeSpool(tmp_path, "episodes", "robot-0").next_sequence() == 6


@pytest.mark.parametrize("dies_at", ["write", "fsync", "rename", "journal"])
def test_episode_survives_or_is_absent_when_power_fails(tmp_path: Path, monkeypatch, dies_at: str) -> None:
    """Whenever the power fails: the episode is not there at all, or it is whole and in the journal."""

    class PowerLossError(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise PowerLossError

    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    with monkeypatch.context() as patched, pytest.raises(PowerLossError):
        if dies_at == "write":
            (tmp_path / "half.arrow.part").write_bytes(b"half")
            patched.setattr(spool_module, "write_durably", die)
        elif dies_at == "fsync":
            patched.setattr(spool_module.os, "fsync", die)
        elif dies_at == "rename":
            patched.setattr(Path, "replace", die)
        else:
            patched.setattr(EpisodeSpool, "_append_journal", die)
        spool.commit(make_episode(sequence=0))
    again = EpisodeSpool(tmp_path, "episodes", "robot-0")
    assert list(tmp_path.glob("*.part")) == []
    assert again.recorded() == again.pending()
    assert len(again.recorded()) == (1 if dies_at == "journal" else 0)
    for key in again.pending():
        assert decode(again.read(key)).num_steps == 4
    assert again.next_sequence() == len(again.recorded())


def test_a_journal_line_that_was_cut_is_dropped(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    first = spool.commit(make_episode(sequence=0))
    with (tmp_path / "journal").open("a") as journal:
        journal.write("episodes/robot-0/000000")
    assert EpisodeSpool(tmp_path, "episodes", "robot-0").recorded() == [str(first)]


def test_a_damaged_file_in_the_spool_is_named(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    key = str(spool.commit(make_episode()))
    path = next(tmp_path.glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidRecord, match="disk damaged it"):
        spool.read(key)


def test_a_full_disk_refuses_and_keeps_what_waits(tmp_path: Path, monkeypatch) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    spool.commit(make_episode(sequence=0))

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(spool_module, "write_durably", no_room)
        with pytest.raises(SpoolFull, match="free some room"):
            spool.commit(make_episode(sequence=1))
    assert len(spool.pending()) == 1
    small = EpisodeSpool(tmp_path, "episodes", "robot-0", max_bytes=100)
    with pytest.raises(SpoolFull, match="check the store"):
        small.commit(make_episode(sequence=1))


def test_the_writer_commits_in_order_and_hands_errors_to_its_owner(tmp_path: Path) -> None:
    committed: list[EpisodeKey] = []
    writer = SpoolWriter(EpisodeSpool(tmp_path, "episodes", "robot-0"), committed.append)
    for sequence in range(3):
        writer.submit(make_episode(sequence=sequence))
    writer.close()
    assert [key.sequence for key in committed] == [0, 1, 2]

    def broken(_: EpisodeKey) -> None:
        raise ZeroDivisionError

    failing = SpoolWriter(EpisodeSpool(tmp_path, "episodes", "robot-0"), broken)
    failing.submit(make_episode(sequence=3))
    with pytest.raises(ZeroDivisionError):
        failing.close()


def test_the_uploader_stores_then_announces_then_forgets(tmp_path: Path) -> None:
    order: list[str] = []
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    keys = [str(spool.commit(make_episode(sequence=number))) for number in range(2)]
    store = MemoryStore(before=lambda name, *rest: order.append(f"{name} {len(spool.pending())}"))
    bus = MemoryBus(before=lambda name, *rest: order.append(f"{name} {len(spool.pending())}"))
    assert Uploader(spool, store, bus, FakeClock()).upload_pending() == 2
    assert order == ["put 2", "publish 2", "put 1", "publish 1"]
    assert spool.pending() == []
    assert sorted(store.keys("")) == keys
    events = [decode_event(data, EpisodeCommitted) for _, data in bus.poll(TOPIC_EPISODES, None, 0)]
    assert [event.key for event in events] == keys
    assert all(event.spooled_utc_ns is not None for event in events)
    assert next_stored_sequence(store, "episodes", "robot-0") == 2
    assert next_stored_sequence(store, "episodes", "robot-1") == 0


@pytest.mark.parametrize("dies_before", ["put", "publish", "mark"])
def test_an_upload_killed_anywhere_ends_with_one_copy_and_one_event(
    tmp_path: Path, dies_before: str, recovery: Recovery
) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    key = str(spool.commit(make_episode()))
    store, bus = MemoryStore(), MemoryBus()
    data = spool.read(key)
    if dies_before in ("publish", "mark"):
        store.put(key, data)
    if dies_before == "mark":
        uploader = Uploader(spool, store, bus, FakeClock())
        uploader.upload_pending()
        (tmp_path / key.rsplit("/", 1)[1]).write_bytes(data)
    recovery.fault_is_over()
    Uploader(spool, store, bus, FakeClock()).upload_pending()
    recovery.whole("it is sent, announced and forgotten")
    assert list(store.keys("")) == [key]
    assert content_hash(store.get(key)) == EpisodeKey.parse(key).episode_id
    assert len(bus.poll(TOPIC_EPISODES, None, 0)) == 1
    assert spool.pending() == []


def test_the_announcement_says_since_when_an_episode_was_on_disk_also_after_a_restart(tmp_path: Path) -> None:
    key = str(EpisodeSpool(tmp_path, "episodes", "robot-0").commit(make_episode()))
    spooled_utc_ns = 1_700_000_001_500_000_000
    os.utime(tmp_path / key.rsplit("/", 1)[1], ns=(0, spooled_utc_ns))
    spool, bus = EpisodeSpool(tmp_path, "episodes", "robot-0"), MemoryBus()
    Uploader(spool, MemoryStore(), bus, FakeClock()).upload_pending()
    (event,) = (decode_event(data, EpisodeCommitted) for _, data in bus.poll(TOPIC_EPISODES, None, 0))
    assert event.spooled_utc_ns == spooled_utc_ns
    assert spool.spooled_utc_ns(key) is None


def test_other_bytes_under_the_same_key_are_never_taken_for_ours(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    key = str(spool.commit(make_episode()))
    store = MemoryStore()
    store.put(key, b"something else")
    good = str(spool.commit(make_episode(sequence=1)))
    uploader = Uploader(spool, store, MemoryBus(), FakeClock())
    assert uploader.upload_pending() == 1
    assert "other bytes" in uploader.refused
    assert key in uploader.refused
    assert spool.pending() == []
    assert list(store.keys("")) == [key, good]
    aside = tmp_path / (key.rsplit("/", 1)[1] + ".refused")
    assert content_hash(aside.read_bytes()) == EpisodeKey.parse(key).episode_id


def test_a_bus_that_is_away_does_not_hold_up_what_the_store_takes(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    key = str(spool.commit(make_episode()))

    def away(*_: object) -> None:
        raise StoreUnavailable("the bus is away")

    store = MemoryStore()
    assert Uploader(spool, store, MemoryBus(before=away), FakeClock()).upload_pending() == 1
    assert list(store.keys("")) == [key]
    assert spool.pending() == []


def test_a_spool_belongs_to_one_process_one_actor_and_one_folder(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    spool.commit(make_episode())
    with pytest.raises(RunError, match="take another actor id"):
        EpisodeSpool(tmp_path, "demonstrations", "robot-0")
    code = (
        "from pathlib import Path; from sop.actor import EpisodeSpool\n"
        f"EpisodeSpool(Path({str(tmp_path)!r}), 'episodes', 'robot-0')"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is actor 'robot-0' running already" in other.stderr
    assert spool.pending() != []


def test_a_journal_line_that_a_full_disk_cut_is_taken_back(tmp_path: Path, monkeypatch) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    first = str(spool.commit(make_episode(sequence=0)))
    synced = iter([None, None, None])

    def full(_: int) -> None:
        if next(synced, "full") == "full":
            raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(spool_module.os, "fsync", full)
        next(synced)
        with pytest.raises(SpoolFull):
            spool.commit(make_episode(sequence=1))
    assert (tmp_path / "journal").read_text() == first + "\n"
    assert spool.pending() == [first]


def test_the_uploader_tries_again_until_the_store_is_back(tmp_path: Path) -> None:
    spool = EpisodeSpool(tmp_path, "episodes", "robot-0")
    key = str(spool.commit(make_episode()))
    failures = iter([True, True])
    stored = threading.Event()

    def fail_twice(name: str, *_: object) -> None:
        if name == "put" and next(failures, False):
            raise StoreUnavailable("the link is down")

    bus = MemoryBus(before=lambda *_: stored.set())
    uploader = Uploader(spool, MemoryStore(before=fail_twice), bus, FakeClock())
    uploader.start()
    assert stored.wait(10)
    assert uploader.close() == 0
    assert [decode_event(data, EpisodeCommitted).key for _, data in bus.poll(TOPIC_EPISODES, None, 0)] == [key]


def test_controllers_are_what_the_learner_reads() -> None:
    assert (Controller.POLICY, Controller.HUMAN) == (0, 1)
