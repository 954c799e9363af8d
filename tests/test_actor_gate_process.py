"""The gate in a process of its own: what the arm does when the actor, the network or the gate itself fails.

The simulated machine is a file: speed at any time is what was written last, and after its deadline its own stop.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sop.actor import Actor, ActorSettings, EpisodeSpool, GatedRobot, SafetyLatch, SpoolWriter
from sop.actor.gate_wire import FLOOD, Command, CommandFilter, CommandKind, ReportBlock, decode_command, encode_command
from sop.core.clock import SystemClock
from sop.core.codec import decode
from sop.core.episode import Outcome
from sop.core.errors import InvalidRecord, RunError
from sop.testing.clock import FakeClock
from sop.testing.driver import ARM, HARDWARE_DECELERATION, Moment, moments, write_limits

PERIOD_S = 1 / ARM.control_hz
PATIENCE_S = 3 * PERIOD_S
BRAKING_S = 0.4 / 4.0
"""From 0.4 m/s (0.8 units) with the 4 m/s^2 of the limits."""
SLACK_S = 0.15
"""What two shared cores may add; a machine that obeys only its own deadline would take 0.06 + 0.08 s as well."""


def encoded(sequence: int, now_ns: int = 0, values: tuple[float, ...] = (0.5, 0.0)) -> bytes:
    action = np.asarray(values, np.float32)
    return encode_command(Command(sequence=sequence, monotonic_ns=now_ns, action=action))


def test_a_command_comes_back_as_it_went_and_anything_else_is_refused() -> None:
    data = encoded(7, 99, (0.25, np.nan))
    command = decode_command(data, 2)
    assert (command.sequence, command.monotonic_ns, command.kind) == (7, 99, CommandKind.ACT)
    np.testing.assert_array_equal(command.action, np.asarray([0.25, np.nan], np.float32))
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(InvalidRecord):
            decode_command(bytes(damaged), 2)
    for wrong in (b"", data[:-1], data + b"x", b"\x80\x04." * 10):
        with pytest.raises(InvalidRecord, match="bytes, expected"):
            decode_command(wrong, 2)
    with pytest.raises(InvalidRecord):
        decode_command(data, 3)


def test_repeated_overtaken_old_and_flooding_commands_are_dropped_and_the_robot_holds() -> None:
    """Fault 38."""
    now_ns = 10_000_000_000
    chooser = CommandFilter(2, max_age_ns=60_000_000)
    chosen = chooser.choose([encoded(1, now_ns), encoded(2, now_ns)], now_ns)
    assert chosen is not None
    assert (chosen.sequence, chooser.dropped) == (2, 0)
    assert chooser.choose([encoded(2, now_ns)], now_ns) is None, "a replay"
    assert chooser.choose([encoded(1, now_ns)], now_ns) is None, "overtaken"
    assert chooser.choose([encoded(3, now_ns - 61_000_000)], now_ns) is None, "old"
    assert chooser.choose([encoded(3, now_ns + 61_000_000)], now_ns) is None, "from the future"
    assert (chooser.dropped, chooser.newest) == (4, 2)
    assert chooser.choose([encoded(3 + i, now_ns) for i in range(FLOOD + 1)], now_ns) is None
    assert "flood" in chooser.problem
    after = chooser.choose([encoded(3, now_ns)], now_ns)
    assert after is not None, "the flood has not used up the numbers"


def test_a_report_is_read_whole_or_not_at_all() -> None:
    memory = os.memfd_create("test")
    writer, reader = ReportBlock(memory, ARM), ReportBlock(memory, ARM)
    os.close(memory)
    assert reader.read() is None
    writer.write(command=1, state=np.asarray([1, 2], np.float32), problem="x" * 500)
    writer.write(command=2, problem="short", **{"image.front": np.full((16, 16, 3), 9, np.uint8)})
    report = reader.read()
    assert (report["tick"], report["command"], report["problem"]) == (2, 2, b"short")
    assert report["image.front"].min() == 9
    writer._slots[0]["tick"] = 0  # as in the middle of a write
    assert reader.read() is None


class Client:
    """An actor's process that drives the arm, and the machine's file."""

    def __init__(self, folder: Path, attack: str = "") -> None:
        self.arm = folder / "arm"
        script = Path(__file__).with_name("gate_client.py")
        command = [sys.executable, str(script), str(folder), attack]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"moving\n"
        self.gate_pid = int((folder / "gate.pid").read_text())

    def rest(self, since_ns: int, timeout_s: float = 5.0) -> float:
        """Seconds from `since_ns` until the arm was at rest for good, looked at for half a second more."""
        clock, deadline_ns = SystemClock(), time.monotonic_ns() + int(timeout_s * 1e9)
        last_moving_ns, seen = since_ns, threading.Event()
        while (now_ns := clock.monotonic_ns()) < deadline_ns and now_ns - last_moving_ns < 500_000_000:
            if np.linalg.norm(moments(self.arm)[-1].at(now_ns)[1]) > 1e-3:
                last_moving_ns = now_ns
            seen.wait(0.003)
        return (last_moving_ns - since_ns) / 1e9

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for _ in range(500):
            if not Path(f"/proc/{self.gate_pid}").exists():
                return
            threading.Event().wait(0.01)
        os.kill(self.gate_pid, signal.SIGKILL)


@pytest.fixture
def client(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    made = Client(tmp_path, getattr(request, "param", ""))
    yield made
    made.end()


def check_deceleration(past: list[Moment]) -> None:
    """Written speeds change by at most the 4 m/s^2 of the limits per period, give or take a float."""
    speeds = np.asarray([moment.speed[0] for moment in past if not moment.stopped])
    assert speeds.max() == pytest.approx(0.4, rel=1e-5)
    assert np.abs(np.diff(speeds)).max() <= 4.0 * PERIOD_S + 1e-5


@pytest.mark.slow
def test_when_the_actor_is_killed_the_arm_decelerates_and_holds(client: Client) -> None:
    killed_ns = time.monotonic_ns()
    client.process.kill()
    assert client.rest(killed_ns) <= PATIENCE_S + BRAKING_S + SLACK_S
    past = moments(client.arm)
    check_deceleration(past)
    assert past[-1].stopped, "the gate's process told the machine to stop, and ended"


@pytest.mark.slow
def test_when_the_actor_is_paused_the_arm_decelerates_and_goes_on_when_it_wakes(client: Client) -> None:
    paused_ns = time.monotonic_ns()
    client.process.send_signal(signal.SIGSTOP)
    assert client.rest(paused_ns) <= PATIENCE_S + BRAKING_S + SLACK_S
    check_deceleration(moments(client.arm))
    client.process.send_signal(signal.SIGCONT)
    for _ in range(500):
        if moments(client.arm)[-1].speed[0] > 0.39:
            break
        threading.Event().wait(0.01)
    past = moments(client.arm)
    assert past[-1].speed[0] == pytest.approx(0.4, rel=1e-5), "the old command was dropped, the next ones count"
    assert client.process.poll() is None


@pytest.mark.slow
def test_when_the_gate_is_killed_the_machine_stops_by_itself(client: Client) -> None:
    killed_ns = time.monotonic_ns()
    os.kill(client.gate_pid, signal.SIGKILL)
    assert client.rest(killed_ns) <= PATIENCE_S + 0.4 / HARDWARE_DECELERATION + 2 * PERIOD_S
    last = moments(client.arm)[-1]
    assert not last.stopped
    assert last.speed[0] > 0.3, "nobody wrote a slower speed: the machine's own deadline did it"
    assert client.process.wait(5) != 0, "the actor says that its gate is gone, and ends"


@pytest.mark.slow
@pytest.mark.parametrize("client", ["garbage", "flood"], indirect=True)
def test_garbage_replays_and_floods_make_the_arm_hold(client: Client) -> None:
    """Fault 38, with a real process on the channel."""
    assert client.rest(time.monotonic_ns()) <= PATIENCE_S + BRAKING_S + SLACK_S + PERIOD_S
    check_deceleration(moments(client.arm))
    assert Path(f"/proc/{client.gate_pid}").exists()


class Straight:
    """Moves to the right at a constant command; beyond the limits from a given step of the first episode on."""

    def __init__(self, wild_from: int = 10**6) -> None:
        self.count, self.episodes, self.wild_from = 0, 0, wild_from
        self.name, self.reason = "anna", "demonstration"

    def reset(self, task: str, seed: int) -> None:
        self.count = 0
        self.episodes += 1

    def correct(self, observation: object, proposed: object) -> np.ndarray:
        self.count += 1
        return np.asarray([1.0 if self.episodes == 1 and self.count >= self.wild_from else 0.1, 0.0], np.float32)


def drive(folder: Path, robot: GatedRobot, operator: Straight, episodes: int) -> tuple[Actor, EpisodeSpool]:
    spool = EpisodeSpool(folder / "spool", "demonstrations", "lab-0")
    writer = SpoolWriter(spool, lambda _: None)
    settings = ActorSettings(
        actor_id="lab-0", tasks=("t",), instructions={"t": ("do it",)}, seed=0, speed=0.0, end_sequence=episodes
    )
    actor = Actor(
        settings,
        robot,
        ARM,
        operator,
        writer,
        next_sequence=0,
        clock=SystemClock(),
        subscriber=None,
        gate=robot.gate,
    )
    actor.run(threading.Event())
    writer.close()
    return actor, spool


@pytest.mark.slow
def test_an_actor_acts_and_records_what_the_gate_executed(tmp_path: Path) -> None:
    limits, arm = write_limits(tmp_path / "limits.json"), tmp_path / "arm"
    robot = GatedRobot(
        ARM, "sop.testing.driver:make", {"path": str(arm)}, limits=limits, success=lambda seen: seen["state"][0] > 0.01
    )
    assert robot.priority
    try:
        _, spool = drive(tmp_path, robot, Straight(), 1)
    finally:
        robot.close()
    episode = decode(spool.read(spool.pending()[0]))
    assert episode.outcome is Outcome.SUCCESS
    np.testing.assert_allclose(episode.action[:, 0], 0.1, rtol=1e-6)
    assert (np.diff(episode.state[:, 0]) >= 0).all()
    assert episode.safety is not None
    assert (episode.safety.clamped, episode.safety.stops) == (0, 0)
    assert robot.process.returncode == 0


@pytest.mark.slow
def test_a_controlled_stop_ends_the_episode_and_the_actor_holds_until_a_person_clears_the_latch(tmp_path: Path) -> None:
    limits, record = write_limits(tmp_path / "limits.json"), tmp_path / "latch"
    robot = GatedRobot(
        ARM,
        "sop.testing.driver:make",
        {"path": str(tmp_path / "arm")},
        limits=limits,
        latch=record,
        success=lambda seen: seen["state"][0] > 0.03,
    )
    journal, seen = tmp_path / "spool" / "journal", []

    def clear() -> None:
        for _ in range(2000):
            if journal.exists():
                break
            threading.Event().wait(0.01)
        seen.append(len(robot.gate.closed) > 0)
        SafetyLatch(FakeClock(), record).clear("anna")

    person = threading.Thread(target=clear)
    person.start()
    try:
        actor, spool = drive(tmp_path, robot, Straight(wild_from=10), 2)
    finally:
        person.join()
        robot.close()
    assert seen == [True]
    assert decode(spool.read(spool.pending()[1])).outcome is Outcome.SUCCESS, "after a person has cleared it"
    assert [entry.operator for entry in SafetyLatch(FakeClock(), record).entries] == ["", "anna"]
    episode = decode(spool.read(spool.pending()[0]))
    assert episode.outcome is Outcome.ABORTED
    assert episode.safety is not None
    assert (episode.safety.clamped, episode.safety.stops) == (3, 1)
    assert "3 commands clamped within 1 s" in actor.aborted
    assert np.abs(np.diff(episode.action[:, 0])).max() <= 0.16 + 1e-5
    assert episode.action[-1, 0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_a_camera_that_stands_still_makes_the_robot_hold(tmp_path: Path) -> None:
    settings = {"path": str(tmp_path / "arm"), "camera_stops_after_s": 0.0}
    robot = GatedRobot(ARM, "sop.testing.driver:make", settings)
    try:
        robot.reset(options={})
        infos = [robot.step(np.asarray([0.2, 0.0], np.float32))[4] for _ in range(30)]
    finally:
        robot.close()
    np.testing.assert_array_equal(infos[-1]["executed"], 0.0)
    assert "front is" in robot.problem


@pytest.mark.slow
def test_a_machine_that_fails_and_a_driver_that_is_none_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="the gate's process ended"):
        GatedRobot(ARM, "sop.testing.driver:no_such", {})
    robot = GatedRobot(ARM, "sop.testing.driver:make", {"path": str(tmp_path / "arm"), "fails_after": 20})
    try:
        with pytest.raises(RunError, match="the gate's process"):
            for _ in range(100):
                robot.reset(options={})
    finally:
        robot.close()
    assert moments(tmp_path / "arm")[-1].stopped
    assert "the arm does not answer" in capfd.readouterr().err
