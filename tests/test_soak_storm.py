"""The storm: struck by the robots' clock, calm before the end, and said so when something does not come back."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from run_directory import START_UTC_S, RunDirectory, make_episode
from sop.chaos import soak as module
from sop.chaos.nemesis import Nemesis
from sop.chaos.soak import Soak, SoakPlan, start_soak
from sop.chaos.soak_watch import Watch
from sop.chaos.target import Target
from sop.core.errors import RunError, StoreUnavailable
from sop.runs import Run, create_run

LONG = "P" * 400
"""21 robot seconds with the reset."""


class FakeFleet:
    """Instead of processes: every watch, each robot records an episode and the learner says something."""

    def __init__(self, folder: Path) -> None:
        self.directory = RunDirectory(folder)
        self.log: list[str] = []
        self.silent: set[str] = set()
        self.dies_at = 10**9
        self.watched = 0
        self._running: set[str] = set()

    def __call__(self, log_folder: Path, *, on_restart: Callable[[str], None]) -> "FakeFleet":
        return self

    def start(self, name: str, arguments: list[str], *, restart: bool = False) -> None:
        self.log.append(f"start {' '.join(arguments[:1] + arguments[2:])}")
        self._running.add(name)

    def watch(self) -> None:
        self.watched += 1
        if self.watched >= self.dies_at:
            raise RunError("robot-1 ended with code 1")
        for name in sorted(self._running - self.silent):
            if name == "learner":
                self.directory.log("learner", 1e10 - START_UTC_S, self.watched, {"learner/version": 1.0})
            else:
                self.directory.record(make_episode(LONG, actor_id=name, sequence=self.watched), upload=False)

    def stop(self, *names: str, timeout_s: float = 20.0) -> None:
        for name in names:
            self.log.append(f"stop {name}")
            self._running.discard(name)

    def stop_all(self) -> None:
        self.stop(*sorted(self._running))


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFleet:
    """A fleet for a run in `tmp_path / "run"` whose base policy is there already."""
    fleet = FakeFleet(tmp_path / "elsewhere")

    def take_base(run: Run, base: Run) -> None:
        fleet.directory.folder = run.folder

    monkeypatch.setattr(module, "Children", fleet)
    monkeypatch.setattr(module, "take_base", take_base)
    monkeypatch.setattr(module, "_STEP_S", 0.001)
    struck(fleet, monkeypatch, lambda: "")
    return fleet


def struck(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch, strike: Callable[[], str]) -> None:
    nemesis = Nemesis(does="", touches="", strike=lambda target, rng: strike())
    monkeypatch.setattr(module, "available", lambda target: {"blow": nemesis})


def soaked(tmp_path: Path, plan: SoakPlan, stop: Event | None = None, lines: list[str] | None = None) -> Soak:
    base = create_run(tmp_path / "base", module.soak_config("debug", plan.seed))
    say = (lines if lines is not None else []).append
    return start_soak("debug", tmp_path / "run", plan, stop or Event(), say, base=base)


PLAN = SoakPlan(hours=0.2, strike_every_s=60.0, look_every_s=0.0)


def test_robots_work_as_long_as_planned_and_end_before_the_learner(fleet: FakeFleet, tmp_path: Path) -> None:
    soak = soaked(tmp_path, SoakPlan(hours=0.2, strike_every_s=1e9, look_every_s=0.0))
    assert fleet.log == [
        "start learner", "start actor --id robot-0", "start actor --id robot-1",
        "stop robot-0", "stop robot-1", "stop learner",
    ]  # fmt: skip
    assert soak.watch.looks[-1].robot_s >= 720
    assert (soak.failure, soak.interrupted, soak.strikes) == ("", False, [])
    assert soak.settled_s is not None


def test_strikes_come_by_the_robots_clock_and_are_told(
    fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough, lines = Event(), list[str]()

    def strike() -> str:
        if len(strikes) == 4:
            enough.set()
        strikes.append("x")
        return f"hit {len(strikes)}"

    strikes: list[str] = []
    struck(fleet, monkeypatch, strike)
    soak = soaked(tmp_path, SoakPlan(hours=1e6, strike_every_s=60.0, look_every_s=0.0), enough, lines)
    assert [hit.what for hit in soak.strikes][:5] == [f"hit {number}" for number in range(1, 6)]
    assert soak.struck_at_h == sorted(soak.struck_at_h)
    assert soak.struck_at_h[0] > 0
    assert soak.interrupted
    assert soak.failure == ""
    assert any("blow: hit 5" in line for line in lines)


def test_nobody_is_killed_in_the_second_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(tmp_path / "run", module.soak_config("debug", 0))
    soak = Soak(run=run, plan=SoakPlan(hours=2.0, strike_every_s=1e-3), watch=Watch(Target(run)))
    calm = Event()

    def look(robot_s: float) -> None:
        soak.watch.looks.append(SimpleNamespace(robot_s=robot_s))  # type: ignore[arg-type]

    def work(name: str) -> str:
        robot_s = soak.watch.looks[-1].robot_s + 30.0
        look(robot_s)
        if robot_s > 7200.0:
            calm.set()
        return name

    kills = Nemesis(does="", touches="", strike=lambda target, rng: work("killed"), deadly=True)
    hurts = Nemesis(does="", touches="", strike=lambda target, rng: work("hurt"))
    waits = Nemesis(does="", touches="", strike=lambda target, rng: work(""))
    monkeypatch.setattr(module, "available", lambda target: {"kill": kills, "hurt": hurts, "wait": waits})
    monkeypatch.setattr(module, "_STEP_S", 0.001)
    look(1.0)
    module._strike_until(soak, calm, lambda line: None)
    found = [(hit.what, at_h < 1.0) for hit, at_h in zip(soak.strikes, soak.struck_at_h, strict=True)]
    assert set(found) == {("killed", True), ("hurt", True), ("hurt", False)}


def test_what_cannot_be_struck_is_no_strike_and_ends_no_storm(
    fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough, tried = Event(), list[str]()

    def strike() -> str:
        tried.append("x")
        if len(tried) == 3:
            enough.set()
        if len(tried) == 1:
            raise StoreUnavailable("away")
        if len(tried) == 2:
            raise OSError("gone")
        return ""

    struck(fleet, monkeypatch, strike)
    soak = soaked(tmp_path, SoakPlan(hours=1e6, strike_every_s=60.0, look_every_s=0.0), enough)
    assert len(tried) >= 3
    assert soak.strikes == []


def test_a_storm_that_breaks_off_is_no_kept_promise(
    fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = Event()

    def strike() -> str:
        enough.set()
        return str(1 // 0)

    struck(fleet, monkeypatch, strike)
    soak = soaked(tmp_path, SoakPlan(hours=1e6, strike_every_s=60.0, look_every_s=0.0), enough)
    assert soak.failure == "the strikes broke off: ZeroDivisionError('integer division or modulo by zero')"


def test_a_robot_that_does_not_come_back_is_named(
    fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLE_S", -1.0)
    fleet.silent = {"robot-1"}
    soak = soaked(tmp_path, SoakPlan(hours=0.1, strike_every_s=1e9, look_every_s=0.0))
    assert "robot-1" in soak.failure
    assert "did not come back" in soak.failure
    assert soak.settled_s is None
    assert fleet.log[-1] == "stop learner"


def test_a_process_that_dies_again_and_again_ends_the_soak_and_is_named(fleet: FakeFleet, tmp_path: Path) -> None:
    fleet.dies_at = 5
    soak = soaked(tmp_path, PLAN)
    assert soak.failure == "robot-1 ended with code 1"
    assert soak.settled_s is None
    assert fleet.log[-3:] == ["stop robot-0", "stop robot-1", "stop learner"]


def test_a_base_policy_is_made_when_none_is_given(
    fleet: FakeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeFleet, "finished", lambda self, name: True, raising=False)
    monkeypatch.setattr(FakeFleet, "log_tail", lambda self, name: "out of disk", raising=False)
    with pytest.raises(RunError, match="there is no base policy:\nout of disk"):
        start_soak("debug", tmp_path / "run", PLAN, Event(), lambda line: None)
    assert fleet.log == [
        "start actor --id lab-0 --demonstrate --speed 0 --end 18", "stop lab-0",
        "start learner --pretrain", "stop pretraining",
    ]  # fmt: skip


def test_looks_are_kept_in_order(fleet: FakeFleet, tmp_path: Path) -> None:
    soak = soaked(tmp_path, SoakPlan(hours=0.05, strike_every_s=1e9, look_every_s=0.0))
    assert isinstance(soak.watch, Watch)
    worked = [look.robot_s for look in soak.watch.looks]
    assert worked == sorted(worked)
    assert len(set(worked)) >= 3
