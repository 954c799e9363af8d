"""`sop experiment x-ind`: streams, then every arm in a process of its own, then the report.

    <out>/streams/seed1        recorded by `sop run`, when none are given
    <out>/seed1/<arm>/         one job each; tuned bases first, for the arms that start from them
    <out>/summary.json, table.md, x-ind.png

What is done is not done again: start it again to go on.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sop.core import layout
from sop.core.errors import RunError
from sop.core.settings import build_settings
from sop.evaluator import newest_version
from sop.experiments.arm import RESULT, SETUP, Setup, run_job
from sop.experiments.plan import ARMS, BASES, FULL, QUICK, Plan
from sop.experiments.report import describe, write_report
from sop.experiments.stream import open_stream
from sop.launcher import Launcher
from sop.places import is_run
from sop.presets import make_config
from sop.processes import Children, stop_on_signals, stop_with_parent
from sop.runs import create_run, open_run

POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Job:
    """One process."""

    name: str
    """As `seed1/plain-embed-warm`."""
    after: str | None = None
    """The job that has to be done before."""


def run_command(options: argparse.Namespace) -> int:
    """`sop experiment x-ind`; returns the exit code: 0, 1 when an arm failed, 130 when it was stopped.

    Raises:
        RunError, ValueError: it cannot be done, or the options do not go together.
    """
    stop, out = stop_on_signals(), Path(options.out)
    if options.arm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an arm leaves nothing that it has to bring to an end
        stop_with_parent()
        run_job(out, options.arm)
        return 0
    failed: dict[str, str] = {}
    if not options.report_only:
        if options.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {options.workers}")
        plan = chosen_plan(QUICK if options.quick else FULL, options.arms, options.set)
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else None
        if options.streams:
            streams = name_streams(options.streams, seeds)
        else:
            streams = record_streams(out, plan, seeds or ([1] if options.quick else [1, 2, 3]), stop)
        failed = run_experiment(out, plan, streams, workers=options.workers, stop=stop)
    if stop.is_set():
        print(f"Stopped. The same command goes on; --report-only shows what is in {out}.")
        return 130
    for name, problem in failed.items():
        print(f"FAILED {name}: {problem}", file=sys.stderr)
    print(describe(write_report(out)))
    print(f"Numbers: {out / 'summary.json'}   Table: {out / 'table.md'}   Picture: {out / 'x-ind.png'}")
    return 1 if failed else 0


def name_streams(places: Sequence[str], seeds: Sequence[int] | None) -> dict[str, str]:
    """`seed1` -> place; without seeds, each run's own.

    Raises:
        ValueError: not one seed per run, or two runs with the same seed.
    """
    if seeds is None:
        seeds = [open_run(place).config.seed for place in places]
    if len(seeds) != len(places) or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"--streams needs one run per seed, each of another seed: got {len(places)} runs, seeds {seeds}"
        )
    return {f"seed{seed}": str(Path(place).resolve()) for seed, place in zip(seeds, places, strict=True)}


def run_experiment(
    out: Path, plan: Plan, streams: Mapping[str, str], *, workers: int, stop: threading.Event
) -> dict[str, str]:
    """Do everything that is not done yet (blocking).

    Args:
        out: folder of the experiment.
        plan: numbers.
        streams: seed, e.g. `seed1` -> place of its run.
        workers: arms at a time.
        stop: ends it; what was done until then stays.

    Returns:
        Jobs that failed -> why, with the end of their logs.

    Raises:
        RunError: a stream cannot be used, or this folder holds an experiment with other numbers, or with another
            stream for one of these seeds. More seeds and other arms go well together with what is there.
    """
    setup = Setup(plan=plan, streams=dict(streams))
    if (out / SETUP).exists():
        before = Setup.read(out)
        if not setup.continues(before):
            raise RunError(f"{out} holds an experiment with another plan or other streams: choose another --out")
        setup = setup.joined(before)
    setup.save(out)
    for place in streams.values():
        open_stream(place, plan.episodes)
    return run_jobs(jobs(sorted(streams), plan.arms), out, workers, stop)


def chosen_plan(plan: Plan, arms: Sequence[str] | None, changes: Sequence[str]) -> Plan:
    """A plan with other arms and single values changed, e.g. `["episodes=200", "betas=[0, 1, 2]"]`.

    Raises:
        ValueError: no such arm or value, or one that does not fit; says which.
    """
    values = msgspec.to_builtins(plan)
    for change in changes:
        name, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"--set takes name=value, got {change!r}")
        try:
            values[name] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            values[name] = text
    return build_settings(Plan, values | ({"arms": arms} if arms else {}), "the plan of x-ind")


def jobs(seeds: Sequence[str], arms: Sequence[str]) -> list[Job]:
    """All jobs of an experiment, in the order in which they are started: seed by seed, the tuned bases that its arms
    need first."""
    needed = {ARMS[name].base for name in arms}
    plain_first = sorted(arms, key=lambda name: ARMS[name].tuned)
    found = []
    for seed in seeds:
        found += [Job(f"{seed}/{name}") for name in BASES if name in needed]
        found += [
            Job(f"{seed}/{name}", base and f"{seed}/{base}") for name in plain_first for base in [ARMS[name].base]
        ]
    return found


def run_jobs(todo: Sequence[Job], out: Path, workers: int, stop: threading.Event) -> dict[str, str]:
    """Run what has no result yet, `workers` at a time; one that fails does not stop the others (blocking)."""
    waiting = [job for job in todo if not (out / job.name / RESULT).exists()]
    total, failed = len(todo), dict[str, str]()
    running: dict[str, Children] = {}
    try:
        while (waiting or running) and not stop.is_set():
            for name, child in list(running.items()):
                problem = _ended(child, out, name)
                if problem is None:
                    continue
                del running[name]
                if problem:
                    failed[name] = problem
                left = len(waiting) + len(running)
                print(f"{total - left}/{total}  {name}  {'FAILED' if problem else 'done'}", flush=True)
            for job in list(waiting):
                if job.after in failed:
                    waiting.remove(job)
                    failed[job.name] = f"{job.after} failed"
                elif len(running) < workers and (job.after is None or (out / job.after / RESULT).exists()):
                    waiting.remove(job)
                    running[job.name] = _start(out, job.name)
            stop.wait(POLL_S)
    finally:
        for child in running.values():
            child.stop()
    return failed


def record_streams(out: Path, plan: Plan, seeds: Sequence[int], stop: threading.Event) -> dict[str, str]:
    """Record a stream per seed, one after the other, or finish those that were begun (blocking).

    Raises:
        RunError: a phase of a run failed, or it was stopped.
    """
    streams = {}
    for seed in seeds:
        folder = out / "streams" / f"seed{seed}"
        changes = ["algorithm=recap", f"seed={seed}", *plan.stream_changes]
        run = open_run(str(folder)) if is_run(folder) else create_run(folder, make_config(plan.preset, changes))
        if not _finished(str(folder)):
            Launcher(run, stop).run()
        if stop.is_set():
            raise RunError(f"{folder} was stopped: start the experiment again to go on")
        streams[f"seed{seed}"] = str(folder.resolve())
    return streams


def _finished(place: str) -> bool:
    """Whether a run has its final evaluation."""
    run = open_run(place)
    try:
        key = layout.evaluation(newest_version(run), "final")
    except RunError:
        return False
    return any(found == key for found in run.store.keys(key.rpartition("/")[0] + "/"))


def _start(out: Path, name: str) -> Children:
    child = Children(out / "logs")
    child.start(_log_name(name), ["experiment", "x-ind", "--out", str(out), "--arm", name])
    return child


def _ended(child: Children, out: Path, name: str) -> str | None:
    """None while it runs, else what went wrong, or nothing."""
    try:
        child.watch()
    except RunError as error:
        return str(error)
    if not child.finished(_log_name(name)):
        return None
    return "" if (out / name / RESULT).exists() else f"it ended without a result:\n{child.log_tail(_log_name(name))}"


def _log_name(name: str) -> str:
    return name.replace("/", "-")
