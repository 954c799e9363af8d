"""`sop inspect`: what a store holds, as tables; reads the store alone, so it works on a run of any age."""

from collections import Counter
from contextlib import closing

from rich.console import Console
from rich.table import Table

from sop.broadcast import fetch_manifest, published_versions
from sop.buffer.index import EpisodeIndex
from sop.buffer.influence import ActorInfluence, Influence
from sop.buffer.screening import MAX_NOTE_BYTES, decode_note
from sop.buffer.segments import IndexSegments, labels_id
from sop.core import freshness, layout
from sop.core.codec import EncodedEpisode
from sop.core.errors import InvalidRecord, NotFound
from sop.core.evaluation import EvaluationResult
from sop.core.layout import EpisodeKey
from sop.freshness import Swap, hop_samples
from sop.learner.checkpoint import CheckpointStore
from sop.lineage import learned_by
from sop.runs import Run, open_run
from sop.tracing import make_console


def print_run(place: str, *, num_episodes: int) -> None:
    """Print what is in a run's store: the run, its episodes (the last ones in full), its policy versions.

    Raises:
        RunError: there is no run.
    """
    run, console = open_run(place), make_console()
    manifest = run.manifest
    console.print(
        f"[bold]{manifest.name}[/bold]: {manifest.embodiment.name}, {run.config.algorithm}, seed {run.config.seed}"
    )
    console.print(
        f"fleet tasks: {', '.join(manifest.fleet_tasks)}; held out: {', '.join(manifest.held_out_tasks) or 'none'}"
    )
    acted, swaps = _print_episodes(run, console, num_episodes)
    _print_versions(run, console, acted)
    _print_sidecars(run, console)
    _print_freshness(run, console, swaps)
    _print_robots(run, console)
    _print_flagged(run, console)
    for key in run.store.keys(f"{layout.QUARANTINE}/"):
        console.print(f"[red]quarantined[/red] {run.store.get(key).decode()}")


def _print_episodes(run: Run, console: Console, num_episodes: int) -> tuple[Counter[int | None], list[Swap]]:
    """Totals of all episodes, rows of the last ones; returns how many each version acted in, and who swapped when."""
    acted: Counter[int | None] = Counter()
    swaps: list[Swap] = []
    rows = []
    for folder in (layout.DEMONSTRATIONS, layout.EPISODES):
        for key in run.store.keys(f"{folder}/"):
            try:
                episode = EncodedEpisode(run.store.get(key))
            except InvalidRecord as error:
                console.print(f"[red]unreadable[/red] {key}: {error}")
                continue
            acted[episode.policy_version] += 1
            if episode.policy_version is not None and episode.header.policy_times is not None:
                swaps.append(Swap(episode.header.actor_id, episode.policy_version, episode.header.policy_times))
            rows.append((episode.header.end_utc_ns, EpisodeKey.parse(key), episode))
    rows.sort(key=lambda row: row[0])
    table = Table(title=f"{len(rows)} episodes, the last {min(num_episodes, len(rows))}")
    for column in ("episode", "actor", "number", "task", "version", "outcome", "steps", "human", "interventions"):
        table.add_column(column)
    for _, name, episode in rows[-num_episodes:] if num_episodes else []:
        version = "demonstration" if episode.policy_version is None else str(episode.policy_version)
        if name.actor_id.startswith(layout.BASE_ACTOR):
            version = f"{version} (base rollout)"
        marks = "; ".join(f"{mark.start}-{mark.stop} {mark.reason} ({mark.operator})" for mark in episode.interventions)
        human = f"{episode.controller.mean():.0%}"
        facts = (name.episode_id[:12], name.actor_id, str(name.sequence), episode.header.task, version, episode.outcome)
        table.add_row(*facts, str(episode.num_steps), human, marks)
    console.print(table)
    return acted, swaps


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
        try:
            manifest = fetch_manifest(run.store, version)
        except InvalidRecord as error:
            console.print(f"[red]unreadable[/red] policy {version}: {error}")
            continue
        parent = "-" if manifest.parent_version is None else str(manifest.parent_version)
        data = f"{manifest.online_episodes} online, {manifest.offline_episodes} offline"
        judged = "; ".join(results.get(version, []))
        table.add_row(str(version), parent, str(manifest.learner_step), data, str(acted[version]), judged)
    console.print(table)


def _print_sidecars(run: Run, console: Console) -> None:
    """How many episodes each version of an algorithm's model gave an opinion on."""
    found = Counter(tuple(key.split("/")[1:3]) for key in run.store.keys(f"{layout.LABELS}/"))
    for (algorithm, version), count in sorted(found.items()):
        console.print(f"sidecars of {algorithm}, model version {int(version)}: {count} episodes")


def _print_freshness(run: Run, console: Console, swaps: list[Swap]) -> None:
    """Seconds of every hop, for all, per task and per robot: median and 99 %."""
    versions = list(published_versions(run.store))
    if not versions:
        return
    try:
        rollouts = next(iter(run.store.keys(f"{layout.DEMONSTRATIONS}/{layout.BASE_ACTOR}")), None)
        waited_for_the_fleet = 0 if rollouts is None else 1  # the base, or what a warm-up made of it
        learned = learned_by(run.store, versions[-1])
        samples = hop_samples(learned, swaps, base_version=waited_for_the_fleet)
    except (InvalidRecord, NotFound) as error:
        console.print(f"[red]no freshness[/red]: {error}")
        return
    overall = freshness.summary(samples)
    if not overall:
        return
    table = Table(title="freshness: seconds, median / 99 %")
    for column in ("", *(hop.replace("_", " ") for hop in overall)):
        table.add_column(column)
    groups = {"all": overall, **freshness.by_task(samples), **freshness.by_actor(samples)}
    for group, hops in groups.items():
        cells = (hops.get(hop) for hop in overall)
        table.add_row(group, *("-" if cell is None else f"{cell.p50:.2f} / {cell.p99:.2f}" for cell in cells))
    console.print(table)


def robots_of(run: Run) -> tuple[ActorInfluence, ...]:
    """What each robot's data weighed in what was learned until the newest checkpoint, the most suspicious first;
    empty when there is none yet (blocking).

    Raises:
        StoreUnavailable: the store does not answer.
    """
    versions = published_versions(run.store)
    if not versions:
        return ()
    horizon = fetch_manifest(run.store, max(versions)).spec.action_horizon
    labels = labels_id(run.config.algorithm, run.config.algorithm_settings, horizon)
    with closing(CheckpointStore(run.store, IndexSegments(run.store, labels))) as checkpoints:
        checkpoint = checkpoints.newest()
    if checkpoint is None or checkpoint.rows is None:
        return ()
    index = EpisodeIndex(run.config.robot.all_tasks)
    index.extend(*checkpoint.rows.blocks)
    influence = Influence(index)
    influence.load_state_dict(checkpoint.state.get("sampler", {}).get("influence", {}))
    return influence.report()


def _print_flagged(run: Run, console: Console) -> None:
    """What is stored and indexed, but not learned from, and why."""
    for key in run.store.keys(f"{layout.SCREENED}/"):
        try:
            episode, flags = decode_note(run.store.get(key, slice(0, MAX_NOTE_BYTES + 1)))
        except InvalidRecord as error:
            console.print(f"[red]unreadable[/red] {key}: {error}")
            continue
        reasons = "; ".join(f"{flag.rule}: {flag.detail}" for flag in flags)
        console.print(f"[red]not learned from[/red] {episode}: {reasons}")


def _print_robots(run: Run, console: Console) -> None:
    robots = robots_of(run)
    if not robots:
        return
    table = Table(title="robots in what was learned, as of the newest checkpoint")
    columns = ("robot", "episodes", "success", "the others there", "share of draws", "relative loss", "suspicion")
    for column in columns:
        table.add_column(column)
    for robot in robots:
        rates = (robot.success, robot.expected_success, robot.draw_share)
        cells = ("-" if rate is None else f"{rate:.0%}" for rate in rates)
        loss = "-" if robot.loss_ratio is None else f"{robot.loss_ratio:.2f}"
        suspicion = f"[red]{robot.suspicion:.1f}: look at its data[/red]" if robot.named else f"{robot.suspicion:.1f}"
        table.add_row(robot.actor_id, str(robot.episodes), *cells, loss, suspicion)
    console.print(table)
