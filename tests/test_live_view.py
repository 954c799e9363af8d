"""What the terminal shows of a run, drawn to a recording console."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from run_directory import EMBODIMENT
from sop.core.evaluation import EvaluationResult, TaskResult
from sop.core.events import ActorReported, LearnerReported
from sop.core.run import RunManifest
from sop.live import Live, line, render
from sop.monitor import RunView


def make_view(
    fleet_tasks: tuple[str, ...] = ("open", "close"), held_out_tasks: tuple[str, ...] = ("slide",)
) -> RunView:
    run = RunManifest(
        name="demo-run",
        created_utc_ns=0,
        embodiment=EMBODIMENT,
        instructions={task: (task,) for task in fleet_tasks + held_out_tasks},
        fleet_tasks=fleet_tasks,
        held_out_tasks=held_out_tasks,
        config={},
    )
    return RunView(run)


def evaluation(name: str, version: int | None, **successes_of_20: int) -> EvaluationResult:
    return EvaluationResult(
        version=version,
        name=name,
        first_seed=0,
        tasks={task: TaskResult(episodes=20, successes=n, robot_s=1.0) for task, n in successes_of_20.items()},
        online_episodes=0,
        utc_ns=0,
        published_utc_ns=0,
    )


def actor(actor_id: str, **changes: object) -> ActorReported:
    facts: dict[str, object] = {
        "actor_id": actor_id,
        "state": "acting",
        "task": "open",
        "policy_version": 11,
        "newest_version": 14,
        "episodes": 21,
        "successes": 17,
        "interventions": 9,
        "human_steps": 100,
        "steps": 1000,
        "spooled": 2,
        "overruns": 0,
        "problem": "",
        "utc_ns": 0,
    }
    return ActorReported(**(facts | changes))  # type: ignore[arg-type]


def learner(version: int = 14) -> LearnerReported:
    return LearnerReported(
        state="training",
        learner_step=350,
        steps_per_s=8.25,
        busy=0.94,
        version=version,
        loss=0.0381,
        online_episodes=42,
        offline_episodes=60,
        quarantined=1,
        online_share={"open": 0.63, "slide": 0.0},
        episodes={"open": 22, "close": 20, "slide": 0},
        interventions={"open": 31, "close": 8, "slide": 0},
        episode_to_sampleable_p50_s=0.21,
        utc_ns=0,
    )


def busy_view() -> RunView:
    view = make_view()
    view.phase, view.phase_progress, view.time_left_s = "fleet", (42, 128), 185.0
    results = [
        evaluation("expert", None, open=20, close=19, slide=20),
        evaluation("base", 0, open=10, close=5, slide=16),
        evaluation("progress", 12, open=17, close=9),
        evaluation("progress", 4, open=1, close=1),
    ]
    view.evaluations = {str(number): result for number, result in enumerate(results)}
    view.actors = {"robot-1": actor("robot-1", problem="the store is away"), "robot-0": actor("robot-0")}
    view.learner = learner()
    view.published, view.publish_to_swap_s = 14, [1.0, 2.5, 9.0]
    view.notes = ["first note", "second note", "robot-1: the store is away"]
    return view


def drawn(view: RunView, elapsed_s: float = 754.0) -> list[str]:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(view, elapsed_s))
    return console.export_text().splitlines()


def row(lines: list[str], name: str) -> list[str]:
    return next(line for line in lines if line.startswith(name)).split()


def test_the_head_says_phase_progress_and_time() -> None:
    head = drawn(busy_view())[0]
    assert head.startswith("demo-run: fleet 42/128")
    assert head.rstrip().endswith("12:34, about 3:05 left")


def test_a_task_shows_the_newest_evaluation_beside_the_base() -> None:
    lines = drawn(busy_view())
    assert row(lines, "open ") == ["open", "85", "%", "v12", "50", "%", "22", "31", "63", "%"]
    assert row(lines, "close ") == ["close", "45", "%", "v12", "25", "%", "20", "8", "-"]
    assert row(lines, "slide ") == ["slide", "(held", "out)", "80", "%", "v0", "80", "%", "-", "-", "-"]


def test_an_actor_shows_how_far_behind_its_policy_is_and_what_is_wrong() -> None:
    lines = drawn(busy_view())
    assert row(lines, "robot-0") == ["robot-0", "acting", "open", "v11", "3", "21", "17", "2"]
    assert row(lines, "robot-1")[8:] == ["the", "store", "is", "away"]


def test_an_actor_without_a_policy_has_no_staleness() -> None:
    view = make_view()
    view.actors = {"robot-0": actor("robot-0", state="waiting", policy_version=None, newest_version=3)}
    assert row(drawn(view), "robot-0")[3:5] == ["-", "-"]


def test_the_learner_shows_speed_loss_and_freshness() -> None:
    text = "\n".join(drawn(busy_view()))
    assert "training  step 350, 8.2 steps/s, busy 94 %, loss 0.0381" in text
    assert "published 14, newest v14" in text
    assert "episode to sampleable 0.21 s" in text
    assert "publish to swap 2.5 s" in text
    assert "1 refused" in text


def test_only_the_last_notes_are_drawn() -> None:
    text = "\n".join(drawn(busy_view()))
    assert "! second note" in text
    assert "first note" not in text


def test_a_view_without_anything_yet_can_be_drawn() -> None:
    lines = drawn(make_view(), 0.0)
    assert lines[0].startswith("demo-run: starting")
    assert row(lines, "open ") == ["open", "-", "-", "-", "-", "-", "-"]
    assert "learner not heard of yet" in lines


def test_pretraining_has_no_version_yet() -> None:
    view = make_view()
    view.learner = learner(version=-1)
    assert "v-1" not in "\n".join(drawn(view))


def test_a_large_fleet_fits_thirty_lines_and_shows_trouble_first() -> None:
    view = busy_view()
    view.run = make_view(tuple(f"task-{n:02d}" for n in range(20))).run
    view.actors = {f"robot-{n:03d}": actor(f"robot-{n:03d}") for n in range(100)}
    view.actors["robot-077"] = actor("robot-077", state="holding", problem="disk is full")
    lines = drawn(view)
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    assert "and 92 more actors" in [line.strip() for line in lines]
    assert "and 12 more tasks" in [line.strip() for line in lines]
    assert row(lines, "robot-")[0] == "robot-077"


def test_lab_actors_are_gone_once_the_fleet_is_there() -> None:
    view = make_view()
    view.actors = {"lab-0": actor("lab-0")}
    assert row(drawn(view), "lab-0")[0] == "lab-0"
    view.actors["robot-0"] = actor("robot-0")
    assert not [line for line in drawn(view) if line.startswith("lab-0")]
    assert "21 episodes" in line(view, 0.0)


def test_the_line_has_the_essentials() -> None:
    assert line(busy_view(), 3723.0) == (
        "1:02:03 | fleet 42/128 | 42 episodes, 34 ok, 18 interventions | success 65 % (v12, base 38 %) | "
        "step 350, 8.2 steps/s, busy 94 %, loss 0.0381 | 14 published | publish to swap 2.5 s | problems: robot-1 | "
        "left ~3:05"
    )


def test_text_from_outside_is_not_read_as_markup() -> None:
    view = busy_view()
    view.notes = ["[bold]odd[/bold] [/] note"]
    assert any("[bold]odd[/bold] [/] note" in line for line in drawn(view))


@pytest.fixture
def clock() -> Callable[[], float]:
    """A clock that the test sets: `clock.now = 3.0`."""

    def read() -> float:
        return read.now  # type: ignore[attr-defined, no-any-return]

    read.now = 0.0  # type: ignore[attr-defined]
    return read


def test_without_a_terminal_there_is_one_line_every_ten_seconds_and_a_last_one(clock: Callable[[], float]) -> None:
    console = Console(width=40, file=io.StringIO(), record=True)
    with Live(console, clock) as live:
        for now in (0.0, 1.0, 9.9, 10.0, 12.0):
            clock.now = now  # type: ignore[attr-defined]
            live.update(make_view(), now)
    lines = console.export_text().splitlines()
    assert [text.split(" | ")[0] for text in lines] == ["0:00", "0:10", "0:12"]


def test_nothing_is_shown_twice_at_the_end(clock: Callable[[], float]) -> None:
    console = Console(file=io.StringIO(), record=True)
    with Live(console, clock) as live:
        live.update(make_view(), 1.0)
    assert len(console.export_text().splitlines()) == 1


def test_on_a_terminal_the_panel_is_drawn_four_times_a_second_at_most(clock: Callable[[], float]) -> None:
    screen = io.StringIO()
    view = make_view()
    with Live(Console(width=100, file=screen, force_terminal=True), clock) as live:
        for number, now in enumerate((0.0, 0.1, 0.2, 0.25, 0.3)):
            clock.now = now  # type: ignore[attr-defined]
            view.phase = f"phase-{number}"
            live.update(view, now)
        shown_while_running = screen.getvalue()
    assert [f"phase-{number}" in shown_while_running for number in range(5)] == [True, False, False, True, False]
    assert "phase-4" in screen.getvalue()
