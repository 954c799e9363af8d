"""`sop inspect --version` and `--episode`: from a version to what it learned from, from an episode to who learned.

Reads the store alone. A version's answer takes one small object per ancestor; an episode's, one per version.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sop.broadcast import PolicyManifest, fetch_manifest, published_versions
from sop.core import layout
from sop.core.codec import EncodedEpisode
from sop.core.errors import InvalidRecord, NotFound, RunError
from sop.core.layout import EpisodeKey
from sop.core.lineage import LearnedEpisode, Lineage
from sop.lineage import learned_by, read_lineage
from sop.runs import Run, open_run
from sop.transport import ObjectStore

_log = logging.getLogger(__name__)
PLAIN_WIDTH = 140
"""Columns when the output is not a terminal but a file or a pipe."""


def make_console() -> Console:
    """A console as wide as the terminal, or wide enough for our tables."""
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


@dataclass(slots=True)
class VersionTrace:
    """What a version learned from, its ancestors' learning included."""

    manifest: PolicyManifest
    ancestors: int = 0
    """Versions between it and the base, the base included."""
    learned: dict[str, LearnedEpisode] = field(default_factory=dict)
    """Episode key -> the first time that it was learned from, oldest first."""
    windows: Counter[str] = field(default_factory=Counter)
    """Episode key -> windows drawn from it."""
    steps: int = 0


def trace_version(store: ObjectStore, version: int) -> VersionTrace:
    """Everything that trained a version (blocking).

    Raises:
        NotFound: it, or an ancestor of it, is not published.
        InvalidRecord: the lineage of an ancestor is damaged.
    """
    trace: VersionTrace | None = None
    first: list[tuple[LearnedEpisode, ...]] = []
    for manifest, lineage in learned_by(store, version):  # newest first; draws are counted and dropped
        trace = VersionTrace(manifest) if trace is None else trace
        trace.ancestors += manifest.version != version
        trace.steps += len(lineage.draws)
        first.append(lineage.learned)
        for draw in lineage.draws:
            trace.windows.update(draw.keys)
    if trace is None:
        raise RunError(f"policy {version} has no manifest")
    for episodes in reversed(first):
        for episode in episodes:
            trace.learned.setdefault(episode.key, episode)
    return trace


def print_version(place: str, version: int, *, num_episodes: int) -> None:
    """Print a version's parent, code and configuration, and the episodes (and whose corrections) that trained it.

    Raises:
        RunError: there is no run, or it has no such version.
    """
    run, console = open_run(place), make_console()
    try:
        trace = trace_version(run.store, version)
    except NotFound as error:
        newest = max(published_versions(run.store), default=None)
        raise RunError(f"{place} has no policy {version} (newest: {newest}): {error}") from error
    _print_facts(console, trace)
    _print_teachers(run, console, trace)
    table = Table(title=f"the last {min(num_episodes, len(trace.learned))} of {len(trace.learned)} episodes")
    for column in ("episode", "actor", "number", "task", "acted", "human steps", "first learned in step", "windows"):
        table.add_column(column)
    for episode in list(trace.learned.values())[-num_episodes:] if num_episodes else []:
        name = EpisodeKey.parse(episode.key)
        acted = "demonstration" if episode.policy_version is None else f"version {episode.policy_version}"
        identity = (name.episode_id[:12], name.actor_id, str(name.sequence), episode.task, acted)
        counts = (episode.human_steps, episode.learner_step, trace.windows[episode.key])
        table.add_row(*identity, *map(str, counts))
    console.print(table)


def _print_facts(console: Console, trace: VersionTrace) -> None:
    manifest = trace.manifest
    parent = "none" if manifest.parent_version is None else f"version {manifest.parent_version}"
    console.print(
        f"[bold]version {manifest.version}[/bold]: learner step {manifest.learner_step}, algorithm "
        f"{manifest.algorithm}, parent {parent}, {trace.ancestors} ancestors"
    )
    console.print(f"code {manifest.code_version}, configuration {manifest.config_hash}")
    console.print(f"{trace.steps} steps drew {trace.windows.total()} windows from {len(trace.learned)} episodes")


def _print_teachers(run: Run, console: Console, trace: VersionTrace) -> None:
    """Whose corrections: steps per operator; the lab's demonstrations are one line."""
    episodes: Counter[str] = Counter()
    windows: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for key, episode in trace.learned.items():
        operators = _operators(run.store, episode)
        for name, human_steps in operators.items() if operators else {"(nobody)": 0}.items():
            episodes[name] += 1
            windows[name] += trace.windows[key]
            steps[name] += human_steps
    table = Table(title="whose corrections and demonstrations")
    for column in ("operator", "episodes", "their steps", "windows drawn from these episodes"):
        table.add_column(column)
    for name, count in episodes.most_common():
        table.add_row(name, str(count), str(steps[name]), str(windows[name]))
    console.print(table)


def _operators(store: ObjectStore, episode: LearnedEpisode) -> dict[str, int]:
    """Operator -> steps. The lineage says who; the episode is opened only when there were several, or it does not."""
    operators = episode.operators
    if operators is not None and len(operators) <= 1:
        return dict.fromkeys(operators, episode.human_steps)
    found: Counter[str] = Counter()
    for mark in EncodedEpisode(store.get(episode.key)).interventions:
        found[mark.operator] += mark.stop - mark.start
    return dict(found)


def find_episode(store: ObjectStore, name: str) -> str:
    """The key of an episode by its id (the beginning is enough), its key, or `actor/number` (blocking: lists).

    Raises:
        RunError: none or several fit; names some.
    """
    actor, _, number = name.partition("/")
    found = []
    for folder in (layout.EPISODES, layout.DEMONSTRATIONS):
        for key in store.keys(f"{folder}/"):
            try:
                episode = EpisodeKey.parse(key)
            except InvalidRecord:  # quarantined at ingest
                continue
            numbered = number.isdecimal() and (episode.actor_id, episode.sequence) == (actor, int(number))
            if key == name or numbered or (name and episode.episode_id.startswith(name)):
                found.append(key)
    if len(found) != 1:
        some = f": {', '.join(found[:3])}" if found else "; `sop inspect` lists episodes"
        raise RunError(f"{len(found)} episodes are called {name!r}{some}")
    return found[0]


@dataclass(frozen=True, slots=True)
class _Lesson:
    """A version that learned from the episode."""

    manifest: PolicyManifest
    windows: int
    steps: tuple[int, int]
    first: LearnedEpisode | None


def print_episode(place: str, name: str) -> None:
    """Print who acted in an episode, who corrected, which versions learned from it, and its way there.

    Raises:
        RunError: there is no run, or no single such episode.
    """
    run, console = open_run(place), make_console()
    key = find_episode(run.store, name)
    episode = EncodedEpisode(run.store.get(key))
    header = episode.header
    acted = "demonstration" if header.policy_version is None else f"version {header.policy_version} acted"
    console.print(f"[bold]{EpisodeKey.parse(key).episode_id}[/bold]  {key}")
    console.print(
        f"{header.task}: {header.outcome} after {episode.num_steps} steps; {acted}; {escape(repr(header.instruction))}"
    )
    for mark in header.interventions:
        console.print(f"  steps {mark.start} to {mark.stop}: {escape(mark.operator)} corrected ({escape(mark.reason)})")
    lessons = list(_lessons(run.store, key))
    if not lessons:
        console.print("no published version has learned from it (yet)")
        return
    table = Table(title=f"{len(lessons)} versions drew from it; every version after the first descends from one")
    for column in ("version", "parent", "learner steps", "windows"):
        table.add_column(column)
    for lesson in lessons:
        parent = "-" if lesson.manifest.parent_version is None else str(lesson.manifest.parent_version)
        steps = f"{lesson.steps[0]} to {lesson.steps[1]}"
        table.add_row(str(lesson.manifest.version), parent, steps, str(lesson.windows))
    console.print(table)
    first = next((lesson for lesson in lessons if lesson.first is not None), None)
    if first is not None and first.first is not None:
        _print_way(console, first.first, first.manifest)


def _lessons(store: ObjectStore, key: str) -> Sequence[_Lesson]:
    found = []
    for version in published_versions(store):
        try:
            manifest = fetch_manifest(store, version)
            lineage: Lineage = read_lineage(store, manifest)
        except InvalidRecord as error:
            _log.warning("policy %d is passed over: %s", version, error)
            continue
        steps = [draw.learner_step for draw in lineage.draws if key in draw.keys]
        if steps:
            first = next((episode for episode in lineage.learned if episode.key == key), None)
            found.append(_Lesson(manifest, lineage.draws_of(key), (steps[0], steps[-1]), first))
    return found


def _print_way(console: Console, episode: LearnedEpisode, manifest: PolicyManifest) -> None:
    """Seconds after the end of the episode."""
    stamps = {
        "durable on the robot": episode.spooled_utc_ns,
        "in the store": episode.uploaded_utc_ns,
        "in the index": episode.indexed_utc_ns,
        "first drawn": episode.sampled_utc_ns,
        f"in the weights of version {manifest.version}": manifest.created_utc_ns,
    }
    known = {place: stamp for place, stamp in stamps.items() if stamp is not None}
    words = [f"{place} +{(stamp - episode.recorded_utc_ns) / 1e9:.2f} s" for place, stamp in known.items()]
    console.print(f"recorded, then {', '.join(words)}")
