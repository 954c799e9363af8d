"""Faults on the robot: power, disk, memory, a policy that must be left. Nothing recorded is lost, nothing is doubled.

Faults 2 and 3 (a power failure around the upload) are in test_actor_parts.py: an upload killed anywhere.
"""

import errno
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sop.actor.journal as journal_module
from actor_examples import SPEC, Bench, CountingRobot, ScriptedOperator, policy
from recovery_times import Recovery
from sop.actor import EpisodeSpool, StepJournal, recover_interrupted
from sop.actor.limits import ElementLimits, RobotLimits
from sop.actor.recorder import EpisodeRecorder
from sop.actor.safety import SafetyGate
from sop.core.codec import decode
from sop.core.embodiment import Observation
from sop.core.episode import Episode, Intervention, Outcome, PolicyTimes, SafetyCounts
from sop.core.policy import Conditioning
from sop.testing.clock import FakeClock
from sop.testing.episodes import TOY_BODY
from sop.testing.policy import FakePolicy


def record(folder: Path, steps: int, *, end: Outcome | None = None) -> tuple[EpisodeRecorder, Episode | None]:
    """Steps of episode 0 in the journal of a spool, as an actor writes them; step 1 and 2 are a person's."""
    spool, clock = EpisodeSpool(folder, "episodes", "robot-0"), FakeClock(tick_ns=1000)
    journal, recorder = StepJournal(spool), EpisodeRecorder("robot-0", TOY_BODY, clock)
    times = PolicyTimes(published_utc_ns=1, staged_utc_ns=2, swapped_utc_ns=3)
    recorder.begin("push", "push it", 7, times)
    journal.begin(0, recorder.facts)
    for step in range(steps):
        clock.advance(0.1)
        seen = Observation({"front": np.full((16, 16, 3), 10 * step, np.uint8)}, np.asarray([step, 0], np.float32))
        proposal = None if step == 0 else np.asarray([0.5, step / 10], np.float32)
        who = ("anna", "because") if step in (1, 2) else None
        recorder.append(seen, np.asarray([0.1, step / 10], np.float32), proposal, who)
        journal.append(recorder.last_step())
    episode = None
    if end is not None:
        episode = recorder.finish(0, end, truncated=False, safety=SafetyCounts(clamped=2))
        journal.end(episode)
    journal.close()
    assert journal.problem == ""
    return recorder, episode


def reopened(folder: Path) -> EpisodeSpool:
    """The spool of the next start; the lock of this process does not hold against itself."""
    return EpisodeSpool(folder, "episodes", "robot-0")


def assert_same(one: Episode, other: Episode) -> None:
    for name in ("state", "action", "policy_action", "proposed", "controller", "monotonic_ns"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("sequence", "task", "instruction", "policy_version", "policy_times", "interventions", "start_utc_ns"):
        assert getattr(one, name) == getattr(other, name)
    assert np.abs(one.images["front"].astype(int) - other.images["front"]).max() <= 4, "JPEG twice"


def test_fault_1_an_episode_cut_by_a_power_failure_is_stored_as_aborted(tmp_path: Path) -> None:
    recorder, _ = record(tmp_path, 5)
    spool = reopened(tmp_path)
    (key,) = recover_interrupted(spool, TOY_BODY)
    episode = decode(spool.read(str(key)))
    assert (episode.outcome, episode.truncated, episode.num_steps) == (Outcome.ABORTED, False, 5)
    assert_same(episode, recorder.finish(0, Outcome.ABORTED, truncated=False))
    assert episode.interventions == (Intervention(1, 3, "anna", "because"),)
    assert episode.end_utc_ns - episode.start_utc_ns == pytest.approx(0.4e9, rel=0.01)
    assert spool.next_sequence() == 1
    assert recover_interrupted(spool, TOY_BODY) == [], "once"
    assert spool.interrupted() == []


def test_an_episode_that_had_ended_keeps_its_outcome_when_the_power_fails_before_its_commit(tmp_path: Path) -> None:
    _, written = record(tmp_path, 4, end=Outcome.SUCCESS)
    spool = reopened(tmp_path)
    recover_interrupted(spool, TOY_BODY)
    episode = decode(spool.read(spool.pending()[0]))
    assert written is not None
    assert (episode.outcome, episode.safety, episode.end_utc_ns) == (
        Outcome.SUCCESS,
        SafetyCounts(clamped=2),
        written.end_utc_ns,
    )
    assert_same(episode, written)


def test_a_committed_episode_is_not_recovered_again(tmp_path: Path) -> None:
    _, written = record(tmp_path, 4, end=Outcome.SUCCESS)
    assert written is not None
    spool = reopened(tmp_path)
    left = spool.running(0).read_bytes()
    spool.commit(written)
    assert not spool.running(0).exists()
    spool.running(0).write_bytes(left)  # the power failed between the two
    assert recover_interrupted(spool, TOY_BODY) == []
    assert not spool.running(0).exists()
    assert len(spool.recorded()) == 1


def test_a_journal_cut_or_damaged_anywhere_gives_the_steps_before_it(tmp_path: Path) -> None:
    record(tmp_path / "whole", 4)
    whole = (tmp_path / "whole" / "running-00000000").read_bytes()
    generator = np.random.default_rng(0)
    found = set()
    for number, length in enumerate(generator.integers(0, len(whole), 40)):
        spool = reopened(tmp_path / str(number))
        data = bytearray(whole if number % 2 else whole[:length])
        if number % 2:
            data[length] ^= 0x55
        spool.running(0).write_bytes(data)
        recover_interrupted(spool, TOY_BODY)
        kept = [decode(spool.read(key)) for key in spool.pending()]
        assert len(kept) + (tmp_path / str(number) / "running-00000000.refused").exists() <= 1
        assert spool.interrupted() == []
        found |= {episode.num_steps for episode in kept}
        assert all(e.outcome is Outcome.ABORTED and e.state[:, 0].tolist() == list(range(e.num_steps)) for e in kept)
    assert found >= {1, 2, 3}


def test_a_journal_without_a_step_leaves_nothing_behind(tmp_path: Path) -> None:
    record(tmp_path, 0)
    spool = reopened(tmp_path)
    assert len(spool.interrupted()) == 1
    assert recover_interrupted(spool, TOY_BODY) == []
    assert list(tmp_path.glob("running*")) == []


def test_steps_of_another_robot_are_kept_aside(tmp_path: Path) -> None:
    record(tmp_path, 3)
    spool = reopened(tmp_path)
    other = type(TOY_BODY)(**{name: getattr(TOY_BODY, name) for name in TOY_BODY.__slots__} | {"name": "other"})
    assert recover_interrupted(spool, other) == []
    assert (tmp_path / "running-00000000.refused").exists()


@pytest.mark.slow
def test_fault_1_an_actor_killed_in_mid_episode_leaves_its_steps(tmp_path: Path, recovery: Recovery) -> None:
    """kill -9 in the 30th step of a real process: at most the steps in the queue are missing."""
    code = (
        "import os, sys, signal; from pathlib import Path; from actor_examples import *; from sop.actor import *\n"
        "def on_step(step):\n"
        "    if step == 30:\n"
        "        while bench.actor._journal._queue.qsize(): threading.Event().wait(0.001)\n"
        "        threading.Event().wait(0.05); os.kill(os.getpid(), signal.SIGKILL)\n"
        "bench = Bench(Path(sys.argv[1]), CountingRobot(50, on_step), ScriptedOperator((3,)), policy=policy())\n"
        "bench.actor._journal = StepJournal(bench.spool)\n"
        "bench.run()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert result.returncode == -9
    recovery.fault_is_over()
    spool = reopened(tmp_path)
    assert spool.next_sequence() == 0
    recover_interrupted(spool, TOY_BODY)
    recovery.whole("the episode is among those to be sent")
    episode = decode(spool.read(spool.pending()[0]))
    assert (episode.outcome, episode.num_steps) == (Outcome.ABORTED, 29)
    assert episode.state[:, 0].tolist() == list(range(29))
    assert spool.next_sequence() == 1


def test_a_journal_on_a_full_disk_says_so_and_the_recording_goes_on(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=policy())
    journal = bench.actor._journal = StepJournal(bench.spool)
    monkeypatch.setattr(journal_module, "_write", full)
    episodes = bench.run()
    journal.close()
    assert "cannot be written" in journal.problem
    assert [episode.outcome for episode in episodes] == [Outcome.SUCCESS] * 3


def test_an_actors_journal_is_gone_when_all_its_episodes_are_committed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator((2,)), policy=policy())
    journal = bench.actor._journal = StepJournal(bench.spool)
    assert len(bench.run()) == 3
    journal.close()
    assert bench.spool.interrupted() == []


def test_fault_5_when_the_spools_disk_is_full_the_robot_idles_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recovery: Recovery
) -> None:
    """The episode that meets the full disk waits in memory; what is on disk is not touched; then all are there."""
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=policy())
    real, full, stop = os.fsync, threading.Event(), threading.Event()

    def fsync(file: int) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "no space")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)

    def on_step(step: int) -> None:
        if len(bench.robot.actions) == 2 and step == 1:
            full.set()
        for _ in range(2000 if len(bench.robot.actions) == 3 else 0):
            if bench.writer.full or not full.is_set():
                return
            stop.wait(0.01)

    bench.robot.on_step = on_step
    bench.actor.settings = replace(bench.actor.settings, end_sequence=5)
    thread = threading.Thread(target=bench.actor.run, args=(stop,))
    thread.start()
    for _ in range(2000):
        if "disk" in bench.actor.problem:
            break
        stop.wait(0.01)
    assert "is full: free some room" in bench.actor.problem
    assert bench.actor.state == "holding"
    resets, kept = len(bench.robot.resets), bench.spool.recorded()
    stop.wait(0.5)
    assert len(bench.robot.resets) == resets, "nothing moves that cannot be recorded"
    assert bench.spool.recorded() == kept
    assert "recording stops" in caplog.text
    full.clear()
    recovery.fault_is_over()
    thread.join(20)
    recovery.whole("the next episodes were recorded")
    assert [episode.sequence for episode in bench.finish()] == [0, 1, 2, 3, 4]


def test_fault_46_a_policy_that_does_not_fit_the_memory_is_refused_and_the_old_one_acts_on(tmp_path, recovery) -> None:
    def too_large(weights: Any, version: int) -> None:
        raise MemoryError

    def on_step(step: int) -> None:
        subscriber = bench.subscriber
        assert subscriber is not None
        if step == 2 and bench.publisher.last_published == 0:
            bench.policies.append(policy())
            bench.policies[0].load = too_large  # type: ignore[method-assign]
            bench.publish()
            with subscriber._changed:
                assert subscriber._changed.wait_for(lambda: 1 in subscriber.refusals, 30)
        if step == 2 and len(bench.robot.actions) == 3:
            recovery.fault_is_over()
            bench.wait_until_staged(bench.publish())
            recovery.whole("the next version was ready")

    bench = Bench(tmp_path, CountingRobot(on_step=on_step), ScriptedOperator(), policy=policy())
    episodes = bench.run()
    assert {episode.policy_version for episode in episodes} == {0}
    assert "memory" in bench.actor.refusal


class Leaving:
    """A source whose first policy must be left at a given moment; the second is there from then on, or later."""

    def __init__(self, bench: Bench) -> None:
        self._inner = bench.subscriber
        self.must_leave = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_policy_that_must_be_left_is_left_at_once_and_the_reason_is_kept(tmp_path: Path) -> None:
    def on_step(step: int) -> None:
        if len(bench.robot.actions) == 1 and step == 3:
            source.must_leave = "banned: worse in the canary"

    bench = Bench(tmp_path, CountingRobot(on_step=on_step), ScriptedOperator(), policy=policy())
    source = Leaving(bench)
    bench.actor._subscriber = source  # type: ignore[assignment]
    stop = threading.Event()
    thread = threading.Thread(target=bench.actor.run, args=(stop,))
    thread.start()
    for _ in range(2000):
        if bench.actor.problem:
            break
        stop.wait(0.01)
    assert bench.actor.problem == "policy 0 may not act any more: banned: worse in the canary"
    assert len(bench.robot.actions) == 1, "the robot holds until there is another policy"
    bench.wait_until_staged(bench.publish())
    source.must_leave = ""
    thread.join(20)
    episodes = bench.finish()
    assert [(e.outcome, e.policy_version, e.num_steps) for e in episodes] == [
        (Outcome.ABORTED, 0, 4),
        (Outcome.SUCCESS, 1, 6),
        (Outcome.SUCCESS, 1, 6),
    ]
    assert episodes[0].action[3, 0] == 0.0, "the step after the order holds"
    assert bench.actor.aborted == "banned: worse in the canary"


def test_what_the_gate_did_is_counted_per_episode_and_by_the_actor(tmp_path: Path) -> None:
    """Chunk 0 is nan: the four steps of it hold. Chunk i jumps to i: the third episode's chunk is within bounds."""
    plans = FakePolicy(TOY_BODY, action_horizon=8, execution_horizon=4, bad_chunk=0)
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=plans)
    episodes = bench.run()
    assert [episode.safety for episode in episodes] == [SafetyCounts(nonfinite=4, clamped=2)] * 3
    assert (bench.actor.counts.nonfinite, bench.actor.counts.clamped, bench.actor.counts.stops) == (12, 6, 0)


def test_an_inference_that_takes_longer_than_its_chunk_lasts_is_late(tmp_path: Path) -> None:
    class Slow(FakePolicy):
        def infer(self, observation: Observation, instruction: str, conditioning: Conditioning) -> Any:
            bench.clock.advance(0.41 if len(bench.robot.actions[-1]) == 4 else 0.39)  # 4 steps at 10 Hz
            return super().infer(observation, instruction, conditioning)

    slow = Slow(TOY_BODY, action_horizon=SPEC.action_horizon, execution_horizon=SPEC.execution_horizon)
    bench = Bench(tmp_path, CountingRobot(), ScriptedOperator(), policy=slow)
    episodes = bench.run()
    assert [episode.safety.late for episode in episodes if episode.safety] == [1, 1, 1]
    assert bench.actor.counts.late == 3


def test_an_actor_with_limits_stops_and_holds_until_the_latch_is_cleared(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CountingRobot(steps=12), ScriptedOperator(), policy=policy())
    displacement = ElementLimits(kind="displacement", velocity=0.1)
    limits = RobotLimits(robot="test-robot", elements={"dx": displacement, "gripper": ElementLimits(kind="force")})
    gate = bench.actor._gate = SafetyGate(TOY_BODY, limits)
    stop = threading.Event()
    thread = threading.Thread(target=bench.actor.run, args=(stop,))
    thread.start()
    for _ in range(2000):
        if bench.actor.problem:
            break
        stop.wait(0.01)
    assert "stopped for safety, until a person clears it" in bench.actor.problem
    assert len(bench.robot.actions) == 1
    gate.latch.clear("anna")
    for _ in range(2000):
        if len(bench.robot.actions) == 2:
            break
        stop.wait(0.01)
    stop.set()
    thread.join(20)
    episode = bench.finish()[0]
    assert (episode.outcome, episode.safety) == (Outcome.ABORTED, SafetyCounts(clamped=3, stops=1))
    assert episode.action[-1, 0] == 0.0
