"""Every nemesis strikes its own run alone, says what it hit, and undoes itself."""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from run_directory import RunDirectory, make_episode
from sop.chaos import nemesis, storage
from sop.chaos.nemesis import NEMESES, available
from sop.chaos.target import ACTOR, EVALUATOR, LEARNER, Target, Victim
from sop.core import layout
from sop.core.errors import StoreUnavailable
from sop.core.events import TOPIC_EPISODES
from sop.core.run import RunManifest
from sop.presets import make_config
from sop.runs import Run
from sop.transport import DirectoryStore, open_bus

RNG = random.Random(0)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.write_run()
    return directory


@pytest.fixture
def target(directory: RunDirectory) -> Target:
    folder = directory.folder
    store = DirectoryStore(folder / "store")
    manifest = RunManifest.from_json(store.get(layout.RUN))
    return Target(Run(str(folder), folder, store, f"sqlite://{folder / 'bus.sqlite'}", manifest, make_config("debug")))


class FakeLink:
    def __init__(self) -> None:
        self.log: list[str] = []

    def cut(self) -> None:
        self.log.append("cut")

    def delay(self, seconds: float) -> None:
        self.log.append("delay")

    def heal(self) -> None:
        self.log.append("heal")


def with_learner(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend that a learner runs; returns what happens to it."""
    log: list[str] = []

    @contextmanager
    def asleep(self: Target, role: str) -> Iterator[bool]:
        log.append("sleeps")
        try:
            yield True
        finally:
            log.append("wakes")

    monkeypatch.setattr(Target, "asleep", asleep)
    monkeypatch.setattr(Target, "victims", lambda self, role: [Victim(role, "x", 0, 99.0)])
    return log


def test_every_nemesis_says_what_it_does_and_touches_and_why_it_cannot(target: Target) -> None:
    for name, entry in NEMESES.items():
        assert entry.does, name
        assert entry.touches, name
    assert set(NEMESES) - set(available(target)) == {"slow", "cut", "disk-full"}
    with pytest.raises(ValueError, match="no nemesis is called 'flood'"):
        available(target, ("flood",))
    with pytest.raises(ValueError, match="slow cannot strike this run: its way to the store"):
        available(target, ("slow",))


def test_only_processes_of_the_run_are_found(target: Target, tmp_path: Path) -> None:
    program = "import time; print(flush=True); time.sleep(60)"
    here, there = str(target.run.folder), str(tmp_path / "other")
    commands = [
        ["actor", here, "--id", "robot-3"],
        ["actor", there, "--id", "robot-4"],
        ["learner", here, "--pretrain"],
    ]
    fake = tmp_path / "sop.py"
    fake.write_text(program)
    started = [
        subprocess.Popen([sys.executable, "-m", "sop", *command], cwd=tmp_path, stdout=subprocess.PIPE)
        for command in commands
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        assert [(victim.role, victim.name) for victim in target.processes()] == [("", "learner"), ("actor", "robot-3")]
        seed = next(seed for seed in range(99) if random.Random(seed).choice((ACTOR, LEARNER, EVALUATOR)) == ACTOR)
        assert nemesis.kill(target, random.Random(seed)) == "killed robot-3"
        assert started[0].wait(10) == -9
        assert started[1].poll() is None
        assert started[2].poll() is None
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_process_that_keeps_dying_young_is_spared(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    shot: list[str] = []
    monkeypatch.setattr(Victim, "signal", lambda self, number: not shot.append(self.name))
    young, old = Victim(LEARNER, "learner", 0, 1.0), Victim(LEARNER, "learner", 0, 100.0)
    assert [target.shoot(victim) for victim in (young, young, old, young)] == [True, False, True, True]
    assert len(shot) == 3


def test_the_store_comes_back(target: Target, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    key = directory.record(make_episode("PP"))
    there: list[bool] = []
    monkeypatch.setattr(storage.time, "sleep", lambda _: there.append((target.run.folder / "store").exists()))
    assert "was away" in storage.store_away(target, RNG)
    assert there == [False]
    assert target.run.store.get(key)


@pytest.mark.parametrize("strike", [storage.flip, storage.truncate])
def test_an_episode_is_damaged_before_the_learner_sees_it_and_made_whole(
    target: Target, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, strike: nemesis.Callable
) -> None:
    log = with_learner(target, monkeypatch)
    directory.record(make_episode("PP", sequence=0))
    made: list[str] = []
    damaged: list[bytes] = []

    def pause(_: float) -> None:
        if not made:
            made.append(directory.record(make_episode("PPP", sequence=1)))
            whole.append(target.run.store.get(made[0]))
        elif log[-1] == "wakes" and not damaged:
            damaged.append(target.run.store.get(made[0]))
            directory.quarantine(made[0])

    whole: list[bytes] = []
    monkeypatch.setattr(storage.time, "sleep", pause)
    said = strike(target, random.Random(3))
    assert made[0] in said
    assert "refused by the learner; made whole again" in said
    assert log == ["sleeps", "wakes"]
    assert damaged != whole
    assert target.run.store.get(made[0]) == whole[0]
    assert target.damaged == {made[0]}


def test_old_events_come_again_and_the_bus_can_vanish(target: Target) -> None:
    bus = open_bus(target.run.bus_url)
    for number in range(3):
        bus.publish(TOPIC_EPISODES, f"{number}".encode(), event_id=f"{number}")
    assert nemesis.events_again(target, RNG) == "50 old events came again, shuffled"
    events = [event for _, event in bus.poll(TOPIC_EPISODES, None, 0)]
    assert len(events) == 53
    assert set(events) == {b"0", b"1", b"2"}
    assert events[3:] != sorted(events[3:])
    assert "deleted" in nemesis.bus_wiped(target, RNG)
    assert nemesis.bus_wiped(target, RNG) == ""
    bus.close()


def test_announcements_vanish_while_the_learner_sleeps(
    target: Target, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_learner(target, monkeypatch)
    bus = open_bus(target.run.bus_url)
    bus.publish(TOPIC_EPISODES, b"old", event_id="old")

    def robot(_: float) -> None:
        key = directory.record(make_episode("PP", sequence=robot.number))
        bus.publish(TOPIC_EPISODES, key.encode(), event_id=key)
        robot.number += 1

    robot.number = 0
    monkeypatch.setattr(storage.time, "sleep", robot)
    assert "announcements were lost" in nemesis.events_lost(target, RNG)
    assert [event for _, event in bus.poll(TOPIC_EPISODES, None, 0)] == [b"old"]
    bus.close()


@pytest.mark.parametrize("left", [None, b""])
def test_a_bus_that_was_taken_away_cannot_lose_announcements_and_that_is_said(
    target: Target, monkeypatch: pytest.MonkeyPatch, left: bytes | None
) -> None:
    log = with_learner(target, monkeypatch)
    open_bus(target.run.bus_url).close()
    nemesis.bus_wiped(target, RNG)
    assert target.bus_file is not None
    if left is not None:
        target.bus_file.write_bytes(left)
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        nemesis.events_lost(target, RNG)
    assert log == ["sleeps", "wakes"]
    assert target.bus_file.exists() == (left is not None), "a nemesis makes no bus"


@pytest.mark.parametrize(("strike", "first"), [(nemesis.slow, "delay"), (nemesis.cut, "cut")])
def test_a_link_is_healed(
    target: Target, monkeypatch: pytest.MonkeyPatch, strike: nemesis.Callable, first: str
) -> None:
    link = target.link = FakeLink()
    monkeypatch.setattr(nemesis.time, "sleep", lambda _: link.log.append("waits"))
    assert strike(target, RNG)
    assert link.log == [first, "waits", "heal"]


def test_a_power_cut_takes_what_was_not_synced_and_nothing_else(
    target: Target, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Target, "victims", lambda self, role: [Victim(role, "robot-0" if role == "actor" else role, 0, 99.0)]
    )
    monkeypatch.setattr(Victim, "signal", lambda self, number: True)
    key = directory.record(make_episode("PP"), spool=True)
    spool = directory.folder / "actors" / "robot-0" / "spool"
    before = {path.name: path.read_bytes() for path in spool.iterdir()}
    (spool / "running-00000001").write_bytes(bytes(100_000))
    store = directory.store
    for name in (
        "policies/00000001/weights.safetensors",
        "policies/00000001/manifest.json",
        "policies/00000002/x.packed",
    ):
        store.put(name, b"x")
    assert "cut the power of robot-0, learner; 1 journals torn, 1 unsynced objects gone" in storage.power_cut(
        target, RNG
    )
    assert (spool / "running-00000001").stat().st_size < 100_000
    assert {path.name: path.read_bytes() for path in spool.iterdir() if path.name != "running-00000001"} == before
    left = set(store.keys("policies/"))
    assert left == {"policies/00000001/weights.safetensors", "policies/00000001/manifest.json"}
    assert store.get(key)
