"""The live view of a run in the terminal: what every process does, and whether the policy gets better.

    with Live() as live:
        while running:
            live.update(monitor.poll(), elapsed_s)

On a terminal a panel that fits 100 x 30; elsewhere (a file, a pipe) one plain line every ten seconds.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sop.core.evaluation import EvaluationResult
from sop.core.events import ActorReported, LearnerReported
from sop.core.layout import BASE_ACTOR, before_fleet
from sop.metrics import percentile
from sop.monitor import RunView

DRAW_EVERY_S = 0.25
LINE_EVERY_S = 10.0
MAX_TASKS, MAX_ACTORS, MAX_NOTES = 9, 8, 2
"""Rows that are drawn, so that everything fits 30 lines; the others are counted."""
_WORD_FOR_NOTHING = "-"
_BUSY_STATES = ("acting", "resetting")


class Live:
    """Shows a run while it goes on. Use as a context manager; the last view stays on the screen.

    Args:
        console: where to draw; the terminal.
        clock: monotonic seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console() if console is None else console
        self._clock = clock
        self._panel: RichLive | None = None
        self._shown_at: float | None = None
        self._pending: tuple[RunView, float] | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._panel = RichLive(console=self._console, auto_refresh=False, transient=False)
            self._panel.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending is not None:
            self._show(*self._pending)
        if self._panel is not None:
            self._panel.stop()
            self._panel = None

    def update(self, view: RunView, elapsed_s: float) -> None:
        """Show the view, or remember it when the last one was shown a moment ago. Never blocks for long.

        Args:
            view: what is known now.
            elapsed_s: since the run started, seconds.
        """
        self._pending = (view, elapsed_s)
        every_s = LINE_EVERY_S if self._panel is None else DRAW_EVERY_S
        now = self._clock()
        if self._shown_at is None or now - self._shown_at >= every_s:
            self._shown_at = now
            self._show(view, elapsed_s)

    def _show(self, view: RunView, elapsed_s: float) -> None:
        self._pending = None
        if self._panel is not None:
            self._panel.update(render(view, elapsed_s), refresh=True)
        else:
            self._console.print(line(view, elapsed_s), soft_wrap=True, markup=False, highlight=False)


def render(view: RunView, elapsed_s: float) -> RenderableType:
    """The panel: at most 30 lines of 100 columns.

    Args:
        view: what is known now.
        elapsed_s: since the run started, seconds.
    """
    parts: list[RenderableType] = [_head(view, elapsed_s), _tasks(view)]
    if view.actors:
        parts.append(_actors(_on_duty(view)))
    parts.append(_learner(view))
    parts += [Text(f"! {note}", style="yellow", no_wrap=True, overflow="ellipsis") for note in view.notes[-MAX_NOTES:]]
    return Group(*parts)


def line(view: RunView, elapsed_s: float) -> str:
    """The essentials in one line of plain text."""
    parts = [_duration(elapsed_s), _phase(view)]
    actors = _on_duty(view)
    if actors:
        episodes, successes, corrections = (
            sum(getattr(actor, name) for actor in actors) for name in ("episodes", "successes", "interventions")
        )
        parts.append(f"{episodes} episodes, {successes} ok, {corrections} interventions")
    newest = _newest(view.evaluations.values(), view.run.fleet_tasks)
    base = _base(view.evaluations.values())
    if newest is not None:
        before = "" if base is None or base is newest else f", base {_success(base, view.run.fleet_tasks)}"
        parts.append(f"success {_success(newest, view.run.fleet_tasks)} (v{newest.version}{before})")
    if view.learner is not None:
        parts.append(_learner_facts(view.learner))
    parts.append(f"{view.published} published")
    if view.publish_to_swap_s:
        parts.append(f"publish to swap {percentile(view.publish_to_swap_s, 50):.1f} s")
    problems = [actor.actor_id for actor in actors if actor.problem]
    if problems:
        parts.append(f"problems: {', '.join(problems)}")
    if view.time_left_s is not None:
        parts.append(f"left ~{_duration(view.time_left_s)}")
    return " | ".join(parts)


def _on_duty(view: RunView) -> list[ActorReported]:
    """The fleet; before it starts, the actors of the base rollouts; before them, those that record demonstrations."""
    actors = sorted(view.actors.values(), key=lambda actor: actor.actor_id)
    fleet = [actor for actor in actors if not before_fleet(actor.actor_id)]
    return fleet or [actor for actor in actors if actor.actor_id.startswith(BASE_ACTOR)] or actors


def _head(view: RunView, elapsed_s: float) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    bar: RenderableType = ""
    if view.phase_progress is not None and view.phase_progress[1] > 0:
        done, total = view.phase_progress
        bar = ProgressBar(total=total, completed=min(done, total))
    left = "" if view.time_left_s is None else f", about {_duration(view.time_left_s)} left"
    grid.add_row(Text(f"{view.run.name}: {_phase(view)}", style="bold"), bar, f"{_duration(elapsed_s)}{left}")
    return grid


def _phase(view: RunView) -> str:
    if view.phase_progress is None:
        return view.phase
    return f"{view.phase} {view.phase_progress[0]}/{view.phase_progress[1]}"


def _table(*columns: str) -> Table:
    """A compact table; the first column is text, the others are numbers."""
    table = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    return table


def _tasks(view: RunView) -> RenderableType:
    """Per task: the newest evaluation beside the base's, and what the fleet and the sampler do with it."""
    table = _table("task", "success", "version", "base", "episodes", "interventions", "online share")
    learner, results = view.learner, list(view.evaluations.values())
    base = _base(results)
    tasks = view.run.fleet_tasks + view.run.held_out_tasks
    for task in tasks[:MAX_TASKS]:
        fleet = task in view.run.fleet_tasks
        newest = _newest(results, (task,))
        table.add_row(
            task if fleet else f"{task} (held out)",
            Text(_success(newest, (task,)), style="bold"),
            _WORD_FOR_NOTHING if newest is None else f"v{newest.version}",
            _success(base, (task,)),
            _count(learner.episodes.get(task) if learner and fleet else None),
            _count(learner.interventions.get(task) if learner and fleet else None),
            _percent(learner.online_share.get(task) if learner and fleet else None),
            style=None if fleet else "dim",
        )
    return Group(Rule(style="dim"), table, *_left_out(len(tasks) - MAX_TASKS, "tasks"))


def _actors(actors: list[ActorReported]) -> RenderableType:
    """Per actor, those with a problem first when there is no room for all."""
    table = _table("actor", "state", "task", "policy", "stale", "episodes", "ok", "spooled", "problem")
    table.columns[-1].justify = "left"
    table.columns[-1].ratio = 1
    table.columns[1].justify = table.columns[2].justify = "left"
    if len(actors) > MAX_ACTORS:
        actors = sorted(actors, key=lambda actor: (not actor.problem, actor.state in _BUSY_STATES))
    for actor in actors[:MAX_ACTORS]:
        version, newest = actor.policy_version, actor.newest_version
        stale = None if version is None or newest is None else newest - version
        table.add_row(
            actor.actor_id,
            Text(actor.state, style="green" if actor.state in _BUSY_STATES else "yellow"),
            actor.task,
            _WORD_FOR_NOTHING if version is None else f"v{version}",
            _count(stale),
            str(actor.episodes),
            str(actor.successes),
            str(actor.spooled),
            Text(actor.problem, style="red"),
        )
    return Group(Rule(style="dim"), table, *_left_out(len(actors) - MAX_ACTORS, "actors"))


def _left_out(number: int, what: str) -> Sequence[RenderableType]:
    return [Text(f"and {number} more {what}", style="dim")] if number > 0 else []


def _learner(view: RunView) -> RenderableType:
    learner = view.learner
    text = Text(no_wrap=True, overflow="ellipsis")
    if learner is None:
        text.append("learner ", style="dim").append("not heard of yet")
        return Group(Rule(style="dim"), text)
    text.append("learner ", style="dim").append(learner.state, style="bold").append(f"  {_learner_facts(learner)}")
    text.append(f", data {learner.online_episodes} online + {learner.offline_episodes} offline episodes")
    ways = Text(style="dim", no_wrap=True, overflow="ellipsis")
    newest = "" if learner.version < 0 else f", newest v{learner.version}"
    ways.append(f"published {view.published}{newest}   ")
    ways.append(f"episode to sampleable {learner.episode_to_sampleable_p50_s:.2f} s   ")
    if view.publish_to_swap_s:
        ways.append(f"publish to swap {percentile(view.publish_to_swap_s, 50):.1f} s   ")
    if learner.quarantined:
        ways.append(f"   {learner.quarantined} refused", style="red")
    return Group(Rule(style="dim"), text, ways)


def _learner_facts(learner: LearnerReported) -> str:
    return (
        f"step {learner.learner_step}, {learner.steps_per_s:.1f} steps/s, busy {_percent(learner.busy)}, "
        f"loss {learner.loss:.4f}"
    )


def _base(results: Iterable[EvaluationResult]) -> EvaluationResult | None:
    return next((result for result in results if result.name == "base"), None)


def _newest(results: Iterable[EvaluationResult], tasks: Sequence[str]) -> EvaluationResult | None:
    """The evaluation of the newest version that covers the tasks; of one version's, the one with more episodes."""
    best = None
    for result in results:
        if result.version is None or not tasks or not all(task in result.tasks for task in tasks):
            continue
        rank = (result.version, result.pooled(tuple(tasks)).episodes)
        if best is None or rank > best[0]:
            best = (rank, result)
    return None if best is None else best[1]


def _success(result: EvaluationResult | None, tasks: Sequence[str]) -> str:
    if result is None or not all(task in result.tasks for task in tasks):
        return _WORD_FOR_NOTHING
    pooled = result.pooled(tuple(tasks))
    return _percent(pooled.success if pooled.episodes else None)


def _percent(share: float | None) -> str:
    return _WORD_FOR_NOTHING if share is None else f"{100 * share:.0f} %"


def _count(number: int | None) -> str:
    return _WORD_FOR_NOTHING if number is None else str(number)


def _duration(seconds: float) -> str:
    """`0:07`, `12:34` or `1:02:03`."""
    whole = max(0, int(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
