"""A sensor, a clock or a disk of the robot that does not do what it should: it holds, and nothing untrue is kept."""

import os
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import sop.actor.journal as journal_module
from sop.actor import EpisodeSpool, StepJournal, recover_interrupted
from sop.actor.gate_process import GateLoop
from sop.actor.gate_wire import ReportBlock
from sop.actor.latch import SafetyLatch
from sop.actor.recorder import EpisodeRecorder
from sop.actor.safety import SafetyGate
from sop.actor.watchdog import Watchdog
from sop.core.clock import SystemClock
from sop.core.codec import decode
from sop.core.embodiment import Observation
from sop.core.episode import Outcome
from sop.core.errors import RunError
from sop.robots.driver import Reading
from sop.testing.clock import FakeClock
from sop.testing.episodes import TOY_BODY
from test_actor_safety import BODY, at, limits


def test_the_watchdog_believes_no_stamp_of_another_clock() -> None:
    clock = FakeClock()
    dog = Watchdog(clock, 30.0, ("state",))
    dog.saw("state", clock.now_ns + 10**18)
    dog.acted(clock.now_ns)
    assert dog.problem() == "state is stamped 1e+09 s ahead: by another clock"
    dog.saw("state", clock.now_ns)
    assert dog.problem() == ""


def test_a_stop_that_cannot_be_written_down_holds_until_it_can_and_somebody_clears_it(tmp_path: Path) -> None:
    folder = tmp_path / "robot"
    folder.write_bytes(b"in the way")
    latch = SafetyLatch(FakeClock(), folder / "latch")
    latch.close("too fast")
    latch.refresh()
    assert latch.reason == "too fast"
    with pytest.raises(RunError, match="cannot be written"):
        latch.clear("anna")
    assert latch.reason == "too fast"
    folder.unlink()
    latch.refresh()
    assert SafetyLatch(FakeClock(), folder / "latch").reason == "too fast", "written as soon as it could be"
    latch.clear("anna")
    assert SafetyLatch(FakeClock(), folder / "latch").reason == ""


class Blind:
    """A machine whose joint cannot be measured yet; keeps what was written."""

    embodiment = BODY

    def __init__(self) -> None:
        self.state = at(q=np.nan)
        self.written: list[np.ndarray] = []

    def read(self) -> Reading:
        now_ns = time.monotonic_ns()
        images = {"front": np.zeros((16, 16, 3), np.uint8)}
        return Reading(state=self.state, state_ns=now_ns, images=images, images_ns={"front": now_ns})

    def write(self, action: np.ndarray, deadline_ns: int) -> None:
        assert deadline_ns > 0
        self.written.append(action)


def test_before_a_joint_is_measured_its_target_is_not_made_up() -> None:
    """A target of 0 would be motion; what is not written, the machine's own deadline stops."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    with mine, theirs:
        driver, block = Blind(), ReportBlock(os.memfd_create("test"), BODY)
        loop = GateLoop(driver, SafetyGate(BODY, limits()), block, theirs, SystemClock())  # type: ignore[arg-type]
        assert loop.step()
        assert driver.written == []
        driver.state = at(q=1.5)
        assert loop.step()
        assert [action[0] for action in driver.written] == [pytest.approx(1.5)]


def test_a_disk_that_is_too_slow_ends_the_journal_and_leaves_no_gap_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recovered are the first steps, never steps of two episodes or an outcome after a gap."""
    written, go_on = threading.Event(), threading.Event()
    write = journal_module._write

    def slow(file: int, item: object) -> None:
        written.set()
        assert go_on.wait(20)
        write(file, item)

    monkeypatch.setattr(journal_module, "_write", slow)
    monkeypatch.setattr(journal_module, "_MAX_WAITING", 2)
    spool, clock = EpisodeSpool(tmp_path, "episodes", "robot-0"), FakeClock(tick_ns=1000)
    journal, recorder = StepJournal(spool), EpisodeRecorder("robot-0", TOY_BODY, clock)
    recorder.begin("push", "push it", 7, None)
    journal.begin(0, recorder.facts)
    assert written.wait(20)
    for step in range(6):
        if step == 4:  # the disk is back in the middle of the episode
            go_on.set()
            while not journal._queue.empty():
                os.sched_yield()
        seen = Observation({"front": np.zeros((16, 16, 3), np.uint8)}, np.asarray([step, 0], np.float32))
        recorder.append(seen, np.asarray([0.1, 0.2], np.float32), None, None)
        journal.append(recorder.last_step())
    journal.end(recorder.finish(0, Outcome.SUCCESS, truncated=False))
    journal.close()
    assert journal.problem == "the disk is too slow for the step journal"
    again = EpisodeSpool(tmp_path, "episodes", "robot-0")
    (key,) = recover_interrupted(again, TOY_BODY)
    episode = decode(again.read(str(key)))
    assert (episode.outcome, episode.state[:, 0].tolist()) == (Outcome.ABORTED, [0.0, 1.0])
