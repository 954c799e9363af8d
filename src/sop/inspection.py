"""`sop inspect`: what a store holds, as tables; reads the store alone, so it works on a run of any age."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from sop.broadcast import fetch_manifest, published_versions
from sop.core import layout
from sop.core.codec import EncodedEpisode
from sop.core.errors import InvalidRecord
from sop.core.evaluation import EvaluationResult
from sop.core.layout import EpisodeKey
from sop.runs import Run, open_run

PLAIN_WIDTH = 140
"""Columns when the output is not a terminal but a file or a pipe."""


def print_run(place: str, *, num_episodes: int) -> None:
    """Print what is in a run's store: the run, its episodes (the last ones in full), its policy versions.

    Raises:
        RunError: there is no run.
    """
    run, console = open_run(place), Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    manifest = run.manifest
    console.print(
        f"[bold]{manifest.name}[/bold]: {manifest.embodiment.name}, {run.config.algorithm}, seed {run.config.seed}"
    )
    console.print(
        f"fleet tasks: {', '.join(manifest.fleet_tasks)}; held out: {', '.join(manifest.held_out_tasks) or 'none'}"
    )
    acted = _print_episodes(run, console, num_episodes)
    _print_versions(run, console, acted)
    for key in run.store.keys(f"{layout.QUARANTINE}/"):
        console.print(f"[red]quarantined[/red] {run.store.get(key).decode()}")


def _print_episodes(run: Run, console: Console, num_episodes: int) -> Counter[int | None]:
    """Totals of all episodes, rows of the last ones; returns how many episodes each version acted in."""
    acted: Counter[int | None] = Counter()
    rows = []
    for folder in (layout.DEMONSTRATIONS, layout.EPISODES):
        for key in run.store.keys(f"{folder}/"):
            try:
                episode = EncodedEpisode(run.store.get(key))
            except InvalidRecord as error:
                console.print(f"[red]unreadable[/red] {key}: {error}")
                continue
            acted[episode.policy_version] += 1
            rows.append((episode.header.end_utc_ns, EpisodeKey.parse(key), episode))
    rows.sort(key=lambda row: row[0])
    table = Table(title=f"{len(rows)} episodes, the last {min(num_episodes, len(rows))}")
    for column in ("episode", "actor", "number", "task", "version", "outcome", "steps", "human", "interventions"):
        table.add_column(column)
    for _, name, episode in rows[-num_episodes:] if num_episodes else []:
        version = "demonstration" if episode.policy_version is None else str(episode.policy_version)
        marks = "; ".join(f"{mark.start}-{mark.stop} {mark.reason} ({mark.operator})" for mark in episode.interventions)
        human = f"{episode.controller.mean():.0%}"
        facts = (name.episode_id[:12], name.actor_id, str(name.sequence), episode.header.task, version, episode.outcome)
        table.add_row(*facts, str(episode.num_steps), human, marks)
    console.print(table)
    return acted


def _print_versions(run: Run, console: Console, acted: Counter[int | None]) -> None:
    table = Table(title="policy versions (those that acted, were judged, or are the newest)")
    for column in ("version", "parent", "learner step", "trained on", "episodes acted", "evaluations"):
        table.add_column(column)
    results: dict[int, list[str]] = {}
    for key in run.store.keys(f"{layout.EVALUATIONS}/"):
        result = EvaluationResult.from_json(run.store.get(key))
        pooled = result.pooled(tuple(task for task in run.manifest.fleet_tasks if task in result.tasks))
        results.setdefault(layout.version_of(key), []).append(
            f"{result.name} {pooled.success:.2f} of {pooled.episodes}"
        )
    versions = list(published_versions(run.store))
    for version in versions:
        if version not in acted and version not in results and version != versions[-1]:
            continue
        manifest = fetch_manifest(run.store, version)
        parent = "-" if manifest.parent_version is None else str(manifest.parent_version)
        data = f"{manifest.online_episodes} online, {manifest.offline_episodes} offline"
        judged = "; ".join(results.get(version, []))
        table.add_row(str(version), parent, str(manifest.learner_step), data, str(acted[version]), judged)
    console.print(table)
