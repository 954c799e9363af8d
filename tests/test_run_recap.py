"""A run whose algorithm asks for rollouts of the base policy and a warm-up: in which order, and what resumes."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

import sop.launcher
import sop.runs
from sop.algorithms import make_algorithm
from sop.core import layout
from sop.core.codec import EncodedEpisode, Header
from sop.core.episode import Outcome
from sop.core.errors import RunError
from sop.core.events import TOPIC_ACTORS, TOPIC_EPISODES, EpisodeCommitted, PolicySwapped, encode_event
from sop.launcher import Launcher
from sop.monitor import Monitor
from sop.presets import make_config
from sop.runs import Run, create_run, take_base
from sop.testing.memory import MemoryBus
from sop.transport import open_store
from test_live_view import actor, drawn

PHASES = ["demonstrations", "pretraining", "base evaluation", "base rollouts", "warm-up", "fleet", "final evaluation"]
QUICK = (
    "pretrain.steps=20",
    "learner.cooldown_steps=5",
    "learner.decode_workers=0",
    "evaluation.episodes_per_task=4",
    "evaluation.progress_episodes_per_task=0",
)
ROLLOUT = f"demonstrations/base-0/00000000-00005-{'0' * 32}.arrow"


@pytest.fixture
def asks_for_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every algorithm asks."""

    def changed(name: str, settings: dict[str, object], control_hz: float) -> SimpleNamespace:
        return SimpleNamespace(
            needs_rollouts=True, warm_up=None, collection=make_algorithm(name, settings, control_hz).collection
        )

    monkeypatch.setattr(sop.runs, "make_algorithm", changed)
    monkeypatch.setattr(sop.launcher, "make_algorithm", changed)


class MemorySink:
    """Keeps the steps of what is logged."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep the step."""
        self.steps.append(step)

    def close(self) -> None:
        """Nothing to close."""


class Commands:
    """Keeps the command lines of children that end at once."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []

    def start(self, _name: str, arguments: list[str], **_options: object) -> None:
        """Keep a command line."""
        self.started.append(arguments)

    def stop(self, *_names: str) -> None:
        """Nothing to stop."""

    def log_tail(self, _name: str) -> str:
        """Of every child."""
        return "not a single failure"


def make_run(folder: Path, *changes: str) -> Run:
    return create_run(folder, make_config("debug", changes))


def launcher_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[Launcher, Commands]:
    launcher, commands = Launcher(run, Event()), Commands()
    monkeypatch.setattr(launcher, "_children", commands)
    monkeypatch.setattr(launcher, "_watch", lambda _look: None)
    launcher._monitor = SimpleNamespace(view=SimpleNamespace(learner=None))  # type: ignore[assignment]
    return launcher, commands


@pytest.mark.usefixtures("asks_for_rollouts")
def test_rollouts_and_warm_up_lie_between_base_evaluation_and_fleet(tmp_path: Path) -> None:
    assert list(Launcher(make_run(tmp_path / "a"), Event())._phases) == PHASES


def test_rollouts_that_could_not_be_explored_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has the action elements 0 to \d+, got \[99\]"):
        make_run(tmp_path / "a", "algorithm=recap", "exploration.elements=[99]")
    assert not (tmp_path / "a").exists()
    make_run(tmp_path / "b", "exploration.elements=[99]")


def test_who_does_not_ask_for_rollouts_gets_none(tmp_path: Path) -> None:
    assert list(Launcher(make_run(tmp_path / "a"), Event())._phases) == [*PHASES[:3], *PHASES[5:]]


@pytest.mark.usefixtures("asks_for_rollouts")
def test_every_fleet_task_gets_exactly_its_rollouts_and_what_is_stored_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "a", "rollouts.episodes_per_task=5", "rollouts.workers=3")
    launcher, commands = launcher_of(run, monkeypatch)
    launcher._base_rollouts()
    assert [(line[3], line[4:]) for line in commands.started] == [
        ("base-0", ["--rollout", "--speed", "0", "--end", "6"]),
        ("base-1", ["--rollout", "--speed", "0", "--end", "2"]),
        ("base-2", ["--rollout", "--speed", "0", "--end", "2"]),
    ]
    commands.started.clear()
    for number in range(10):
        run.store.put(f"demonstrations/base-{number % 3}/{number}", b"")
    launcher._base_rollouts()
    assert commands.started == []


@pytest.mark.usefixtures("asks_for_rollouts")
def test_a_warm_up_is_started_until_it_has_published_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a")
    run.store.put(layout.policy_manifest(0), b"{}")
    run.store.put(f"{layout.checkpoint_folder(10)}/state.json", b"{}")  # killed between checkpoint and version 1
    launcher, commands = launcher_of(run, monkeypatch)
    with pytest.raises(RunError, match=r"the warm-up ended without a policy; its log ends so:\nnot a single failure"):
        launcher._warm_up()
    assert [line[2:] for line in commands.started] == [["--warmup"]]
    run.store.put(layout.policy_manifest(1), b"{}")
    launcher._warm_up()
    assert len(commands.started) == 1


@pytest.mark.usefixtures("asks_for_rollouts")
def test_a_base_comes_with_its_rollouts_when_the_other_run_recorded_the_same(tmp_path: Path) -> None:
    source = make_run(tmp_path / "source")
    key = "demonstrations/base-0/one"
    source.store.put(key, b"rollout")
    source.store.put("demonstrations/lab-0/one", b"demonstration")
    for name, changes, copied in (
        ("same", (), True),
        ("fading", ("exploration.over_episodes=4",), True),
        ("fewer", ("rollouts.episodes_per_task=2",), False),
        ("still", ("rollouts.explore=false",), False),
        ("longer", ("fleet.time_factor=2",), False),
    ):
        run = make_run(tmp_path / name, *changes)
        take_base(run, source)
        assert list(run.store.keys("demonstrations/")) == [*([key] if copied else []), "demonstrations/lab-0/one"], name


def test_a_base_comes_without_rollouts_where_nobody_asks_for_them(tmp_path: Path) -> None:
    source, run = make_run(tmp_path / "source"), make_run(tmp_path / "run")
    source.store.put("demonstrations/base-0/one", b"rollout")
    take_base(run, source)
    assert list(run.store.keys("demonstrations/")) == []


def test_base_actors_are_shown_before_the_fleet_and_counted_for_none(tmp_path: Path) -> None:
    run, bus, logged = make_run(tmp_path / "a"), MemoryBus(), MemorySink()
    monitor = Monitor(run.store, bus, run.manifest, logged)

    def polled(*actor_ids: str) -> str:
        for actor_id in actor_ids:
            bus.publish(TOPIC_ACTORS, encode_event(actor(actor_id)), event_id=actor_id)
        return "\n".join(drawn(monitor.poll()))

    assert "lab-0" in polled("lab-0")
    shown = polled("base-0")
    assert "base-0" in shown
    assert "lab-0" not in shown
    assert logged.steps == []
    run.store.put(ROLLOUT, b"an episode")
    event = EpisodeCommitted(key=ROLLOUT, outcome=Outcome.SUCCESS, ended_utc_ns=1, spooled_utc_ns=1, committed_utc_ns=2)
    bus.publish(TOPIC_EPISODES, encode_event(event), event_id="1")
    assert "base-0" not in polled("robot-0")
    assert monitor.view.collected == 0


def test_a_policy_that_waited_for_the_fleet_says_nothing_about_freshness(tmp_path: Path) -> None:
    run, bus = make_run(tmp_path / "a"), MemoryBus()
    monitor = Monitor(run.store, bus, run.manifest, MemorySink())

    def swap(version: int) -> None:
        now = time.time_ns()
        event = PolicySwapped(
            actor_id="robot-0", version=version, published_utc_ns=now, staged_utc_ns=now, swapped_utc_ns=now + 5
        )
        bus.publish(TOPIC_ACTORS, encode_event(event), event_id=str(version))

    swap(1)
    monitor.begin_fleet()
    swap(2)
    assert monitor.poll().publish_to_swap_s == [5e-9]


def sop_run(folder: Path, name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "sop", "run", "debug", "--runs", str(folder), "--name", name, *arguments]
    command += [part for setting in QUICK for part in ("--set", setting)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280, check=False)
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


def headers(folder: Path, prefix: str) -> list[Header]:
    store = open_store(str(folder / "store"))
    return [EncodedEpisode(store.get(key)).header for key in store.keys(prefix)]


def written_once(folder: Path) -> set[str]:
    store = open_store(str(folder / "store"))
    return {key for prefix in ("demonstrations/", "policies/", "checkpoints/") for key in store.keys(prefix)}


def check_result(folder: Path) -> None:
    assert list(json.loads((folder / "timing.json").read_text())["wall_s"]) == PHASES
    fleet = headers(folder, "episodes/")
    assert len(fleet) >= 8
    assert min(episode.policy_version or 0 for episode in fleet) >= 1, "the fleet starts from the warm policy"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["lost_episodes"] == summary["duplicate_episodes"] == summary["quarantined"] == 0
    assert summary["final"]["success"] is not None


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run of RECAP without operators printed, and its folder."""
    runs = tmp_path_factory.mktemp("recap")
    return sop_run(runs, "alone", "--algorithm", "recap", "--operators", "none", "--episodes", "8"), runs / "alone"


@pytest.mark.slow
def test_recap_without_operators_runs_from_base_rollouts_to_the_report_and_resumes(alone: tuple[str, Path]) -> None:
    text, folder = alone
    assert "recap learns from what the fleet tries, so by default: exploration.kind=noise" in text
    check_result(folder)
    rollouts = headers(folder, "demonstrations/base-")
    assert sorted(rollout.task for rollout in rollouts) == ["touch-green"] * 6 + ["touch-red"] * 6
    assert {(rollout.policy_version, len(rollout.interventions)) for rollout in rollouts} == {(0, 0)}
    assert {rollout.outcome for rollout in rollouts} <= {Outcome.SUCCESS, Outcome.FAILURE}
    assert not any(episode.interventions for episode in headers(folder, "episodes/"))
    before = written_once(folder)
    sop_run(folder.parent, "alone", "--resume")
    assert written_once(folder) == before, "a second start has nothing left to do"


@pytest.mark.slow
def test_recap_with_operators_starts_from_the_rollouts_of_another_run(alone: tuple[str, Path]) -> None:
    base = alone[1]
    same = ("--exploration", "noise", "--base-from", str(base))  # rollouts are taken when they would be the same
    text = sop_run(base.parent, "helped", "--algorithm", "recap", "--episodes", "8", *same)
    assert "explores" not in text
    folder = base.with_name("helped")
    check_result(folder)
    stored = open_store(str(folder / "store")), open_store(str(base / "store"))
    mine, theirs = (list(store.keys("demonstrations/base-")) for store in stored)
    assert mine == theirs
    assert len(mine) == 12
    assert any(episode.interventions for episode in headers(folder, "episodes/"))
