"""The end of the fleet phase: who is told to end, in which order, and that nobody is told too early."""

from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from msgspec.structs import replace

from sop.core.events import ALL_LEARNED, TOPIC_LEARNER, encode_event
from sop.launcher import LEARNER_END_S, Launcher
from sop.monitor import Monitor, RunView
from sop.presets import make_config
from sop.runs import create_run
from sop.testing.memory import MemoryBus, MemoryStore
from test_live_view import learner
from test_monitor import Nowhere

ROBOTS = ("robot-0", "robot-1")
HOME = ("stop", *ROBOTS)
LAST = [("stop", *ROBOTS, "evaluator"), ("stop", "learner", LEARNER_END_S)]
"""Whoever is left at the end of the phase."""


class Household:
    """Children that only write down what is asked of them; the learner has finished when it was asked to."""

    def __init__(self) -> None:
        self.started: dict[str, tuple[str, ...]] = {}
        self.told: list[tuple[Any, ...]] = []
        self.obeys = True

    def start(self, name: str, arguments: Iterable[object], **_options: object) -> None:
        """Write it down."""
        self.started[name] = tuple(str(argument) for argument in arguments)

    def stop(self, *names: str, timeout_s: float | None = None) -> None:
        """Write it down."""
        self.told.append(("stop", *names) if timeout_s is None else ("stop", *names, timeout_s))

    def ask_to_finish(self, name: str) -> None:
        """Write it down."""
        self.told.append(("ask", name))

    def finished(self, name: str) -> bool:
        """Whether it was told to end."""
        return self.obeys and any(name in words for words in self.told)


class Fleet:
    """The fleet phase of a run of two robots and 10 episodes, looked at when a test says so."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> None:
        run = create_run(folder, make_config("debug", ("fleet.num_actors=2", "fleet.episodes=10", *changes)))
        self.bus, self.house, self.launcher = MemoryBus(), Household(), Launcher(run, Event())
        self._number = 0
        self._script: Callable[[Callable[[], bool]], None]
        monitor = Monitor(MemoryStore(), self.bus, run.manifest, Nowhere())
        monkeypatch.setattr(self.launcher, "_monitor", monitor, raising=False)
        monkeypatch.setattr(self.launcher, "_children", self.house)

        def watch(look: Callable[[RunView], bool]) -> None:
            self._script(lambda: look(monitor.poll()))

        monkeypatch.setattr(self.launcher, "_watch", watch)

    def learner_says(self, state: str, episodes: int) -> None:
        """The learner reports."""
        report = replace(learner(), state=state, episodes={"touch-red": episodes})
        self._number += 1
        self.bus.publish(TOPIC_LEARNER, encode_event(report), event_id=str(self._number))

    def play(self, script: Callable[[Callable[[], bool]], None]) -> list[tuple[Any, ...]]:
        """Run the phase; `script` looks as the launcher does. Returns what the children were told."""
        self._script = script
        self.launcher._fleet()
        return self.house.told


def test_the_robots_go_home_first_and_the_learner_ends_when_it_has_learned_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path / "run", monkeypatch)

    def script(look: Callable[[], bool]) -> None:
        fleet.learner_says("training", 9)
        assert look()
        assert fleet.house.told == []
        fleet.learner_says("training", 10)
        assert look()
        assert fleet.house.told == [HOME]
        assert look(), "it cools down"
        fleet.learner_says(ALL_LEARNED, 10)
        assert not look()

    assert fleet.play(script) == [HOME, ("ask", "learner"), *LAST]
    assert fleet.house.started["learner"][-1] == "--stay", "it does not end before it is asked"


def test_a_learner_that_fails_at_its_end_is_asked_again_when_its_successor_says_so_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path / "run", monkeypatch)
    fleet.house.obeys = False

    def script(look: Callable[[], bool]) -> None:
        fleet.learner_says(ALL_LEARNED, 10)
        assert look()
        assert look()
        assert fleet.house.told == [HOME, ("ask", "learner")], "a process that starts is not told to end"
        fleet.learner_says("training", 10)
        assert look()
        fleet.learner_says(ALL_LEARNED, 10)
        assert look()

    assert fleet.play(script)[1:3] == [("ask", "learner")] * 2


def test_what_an_earlier_learner_said_does_not_end_the_one_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path / "run", monkeypatch)
    fleet.learner_says(ALL_LEARNED, 10)

    def script(look: Callable[[], bool]) -> None:
        assert look()
        assert fleet.house.told == []

    fleet.play(script)


def test_when_the_time_is_over_the_learner_ends_after_the_robots_whatever_is_left_to_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path / "run", monkeypatch, "fleet.minutes=1e-9")

    def script(look: Callable[[], bool]) -> None:
        fleet.learner_says("training", 3)
        assert not look()

    assert fleet.play(script) == [HOME, ("stop", "learner", LEARNER_END_S), *LAST]


def test_where_the_robots_belong_to_others_the_learner_still_cools_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without robots of its own the launcher has nobody to send home."""
    fleet = Fleet(tmp_path / "run", monkeypatch, "fleet.num_actors=0")

    def script(look: Callable[[], bool]) -> None:
        fleet.learner_says("training", 10)
        assert look()
        assert fleet.house.told == [("stop",)]
        fleet.learner_says(ALL_LEARNED, 10)
        assert not look()

    assert fleet.play(script) == [("stop",), ("ask", "learner"), ("stop", "evaluator"), LAST[1]]
