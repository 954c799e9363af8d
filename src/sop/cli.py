"""The `sop` command. Parses first; imports what a subcommand needs afterwards, so that `--help` is quick."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sop.core.errors import SopError
from sop.presets import ALGORITHM_NAMES, FROM_OWN_ACTIONS

if TYPE_CHECKING:
    from sop.config import RunConfig
    from sop.runs import Run

EPILOG = """\
A run is a folder (runs/<name>) with a store of episodes and policies. Two terminals make a fleet:
  sop learner runs/demo
  sop actor runs/demo --id robot-7
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. 2: wrong usage, 1: it could not be done, 130: interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (SopError, ValueError) as error:
        print(f"sop {options.name_of_command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sop",
        description="Scalable online post-training of vision-language-action policies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--log-level", default="WARNING", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name_of_command")
    _add_run(commands)
    _add_processes(commands)
    report = commands.add_parser("report", help="write report.html, curve.png and summary.json of a run again")
    report.add_argument("run", help="folder of the run")
    report.set_defaults(command=_report)
    inspect = commands.add_parser("inspect", help="what a run holds, what trained a version, who learned")
    inspect.add_argument("run", help="folder of the run, or URL of its store")
    inspect.add_argument("--episodes", type=int, default=20, metavar="N", help="show the last N episodes (default 20)")
    what = inspect.add_mutually_exclusive_group()
    what.add_argument("--version", type=int, metavar="V", help="which episodes, and whose corrections, trained it")
    what.add_argument("--episode", metavar="ID", help="which version acted in it, and which versions learned from it")
    inspect.set_defaults(command=_inspect)
    replay = commands.add_parser("replay-batch", help="draw the batch of a learner step again, and compare its hash")
    replay.add_argument("run", help="folder of the run, or URL of its store")
    replay.add_argument("--step", type=int, required=True, metavar="K", help="learner step, 1 is the first")
    replay.add_argument("--version", type=int, metavar="V", help="the version that learned in it (0: pretraining)")
    replay.add_argument("--out", type=Path, metavar="FILE", help="write the batch as safetensors")
    replay.set_defaults(command=_replay_batch)
    _add_experiment(commands)
    return parser


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = commands.add_parser("run", help="start a whole run on this machine: fleet, learner, operators, evaluation")
    run.add_argument("preset", help="metaworld (the demo, seven minutes) or debug (half a minute, no simulator)")
    run.add_argument("--name", help="folder under --runs (default: PRESET-ALGORITHM-seedN)")
    run.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")
    run.add_argument("--resume", action="store_true", help="go on with the run of this name, or the newest one")
    run.add_argument("--again", action="store_true", help="if it exists, make NAME-2, NAME-3, ... with the same base")
    run.add_argument("--base-from", metavar="RUN", help="take demonstrations, base policy and rollouts of another run")
    run.add_argument("--seed", type=int, help="of everything: demonstrations, weights, scenes, sampling (default 0)")
    run.add_argument("--algorithm", help=f"{', '.join(ALGORITHM_NAMES)} (default {ALGORITHM_NAMES[0]})")
    run.add_argument("--operators", help="who corrects: stand_in (default) or none")
    run.add_argument(
        "--exploration",
        help="what the fleet tries by itself: none, or offset, a random shift of whole chunks of actions "
        f"(default: offset with --operators none and one of {', '.join(FROM_OWN_ACTIONS)}, else none)",
    )
    run.add_argument("--actors", type=int, help="robots in the fleet")
    run.add_argument("--episodes", type=int, help="episodes that the fleet collects")
    run.add_argument("--minutes", type=float, help="stop collecting after this time")
    run.add_argument("--speed", type=float, help="robot seconds per second, 1 is real time, 0 as fast as possible")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting: learner.lr=1e-4"
    )
    run.set_defaults(command=_run)


def _add_processes(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    actor = commands.add_parser("actor", help="one robot's process")
    actor.add_argument("run", help="folder of the run, or URL of its store")
    actor.add_argument("--bus", help="URL of the bus (default: beside the store)")
    actor.add_argument("--id", required=True, help="unique in the run, e.g. robot-7")
    instead = actor.add_mutually_exclusive_group()
    instead.add_argument("--demonstrate", action="store_true", help="the expert drives, in the lab")
    instead.add_argument("--rollout", action="store_true", help="the base policy drives, nobody corrects (id: base-N)")
    actor.add_argument("--speed", type=float, help="robot seconds per second (default: the run's)")
    actor.add_argument("--end", type=int, metavar="N", help="stop when N episodes are recorded in all")
    actor.set_defaults(command=_actor)
    learner = commands.add_parser("learner", help="the learner's process; resumes from the last checkpoint")
    learner.add_argument("run", help="folder of the run, or URL of its store")
    learner.add_argument("--bus", help="URL of the bus (default: beside the store)")
    before = learner.add_mutually_exclusive_group()
    before.add_argument("--pretrain", action="store_true", help="make the base policy (version 0) and end")
    before.add_argument("--warmup", action="store_true", help="get the algorithm ready (version 1) and end")
    learner.set_defaults(command=_learner)
    evaluate = commands.add_parser("evaluate", help="judge a published policy on held-out seeds")
    evaluate.add_argument("run", help="folder of the run, or URL of its store")
    evaluate.add_argument("--version", type=int, help="policy version (default: the newest)")
    evaluate.add_argument("--name", default="final", help="base, final, progress or expert (default final)")
    evaluate.add_argument("--ask", help="good, bad or nothing, instead of what the policy's manifest says (RECAP)")
    evaluate.add_argument("--guidance", type=float, default=1.0, help="beta of what is asked for (default 1)")
    evaluate.add_argument("--workers", type=int, default=1, help="processes")
    evaluate.add_argument("--part", metavar="I/N", help="evaluate every N-th episode and print the result as JSON")
    evaluate.add_argument("--follow", action="store_true", help="evaluate each newest version until stopped")
    evaluate.set_defaults(command=_evaluate)


def _run(options: argparse.Namespace) -> int:
    from sop.launcher import Launcher
    from sop.presets import explores_by_default, make_config
    from sop.processes import stop_on_signals

    shortcuts = {
        "seed": options.seed,
        "algorithm": options.algorithm,
        "operator.kind": options.operators,
        "exploration.kind": options.exploration,
        "fleet.num_actors": options.actors,
        "fleet.episodes": options.episodes,
        "fleet.minutes": options.minutes,
        "fleet.speed": options.speed,
    }
    changes = [f"{name}={value}" for name, value in shortcuts.items() if value is not None]
    changes += options.set
    config = make_config(options.preset, changes)
    chosen = any(change.startswith(("exploration=", "exploration.kind=")) for change in changes)
    if not options.resume and not chosen and explores_by_default(config):
        config = make_config(options.preset, [*changes, "exploration.kind=offset"])
        print(f"Nobody corrects, so the fleet explores: {config.algorithm} learns from what it tries.", end=" ")
        print("--exploration none turns that off.")
    stop = stop_on_signals()
    run = _choose_run(options, config)
    print(Launcher(run, stop).run())
    print(f"Report: {run.folder / 'report.html'}   Numbers: {run.folder / 'summary.json'}")
    if stop.is_set():
        print(f"Go on with: sop run {options.preset} --runs {run.folder.parent} --name {run.folder.name} --resume")
    return 130 if stop.is_set() else 0


def _choose_run(options: argparse.Namespace, config: "RunConfig") -> "Run":
    """Resume a run, or make a new one, perhaps with the base policy of another."""
    from sop.runs import create_run, newest_run, open_run, take_base

    runs = Path(options.runs)
    folder = runs / (options.name or f"{config.preset}-{config.algorithm}-seed{config.seed}")
    if options.resume:
        return open_run(str(folder)) if options.name else newest_run(runs, config.preset)
    first, number = folder, 1
    while (folder / "store").exists():
        if not options.again:
            raise ValueError(f"{folder} exists: --resume goes on with it, --again makes a new run beside it")
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    run = create_run(folder, config)
    if options.base_from:
        take_base(run, open_run(options.base_from))
    elif number > 1:
        try:
            take_base(run, open_run(str(first)))
        except SopError as error:
            print(f"{folder} makes its own base policy: {error}", file=sys.stderr)
    return run


def _actor(options: argparse.Namespace) -> int:
    from sop.processes import stop_on_signals, stop_with_parent
    from sop.runs import open_run
    from sop.system import ActorOptions, run_actor

    stop = stop_on_signals()
    stop_with_parent()
    who = ActorOptions(
        actor_id=options.id,
        demonstrate=options.demonstrate,
        rollout=options.rollout,
        speed=options.speed,
        end_sequence=options.end,
    )
    run_actor(open_run(options.run, options.bus), who, stop)
    return 0


def _learner(options: argparse.Namespace) -> int:
    from sop import system
    from sop.processes import stop_on_signals, stop_with_parent
    from sop.runs import open_run

    stop = stop_on_signals()
    stop_with_parent()
    run = open_run(options.run, options.bus)
    if options.pretrain:
        system.run_pretraining(run, stop)
    elif options.warmup:
        system.run_warmup(run, stop)
    else:
        system.run_learner(run, stop)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from sop.evaluator import asking, evaluate, evaluate_part, follow, make_request, newest_version
    from sop.processes import stop_on_signals, stop_with_parent
    from sop.runs import open_run

    stop = stop_on_signals()
    stop_with_parent()
    run = open_run(options.run)
    if options.follow:
        follow(run, stop)
        return 0
    version = newest_version(run) if options.version is None else options.version
    request = make_request(run, options.name, version)
    if options.ask is not None:
        request = asking(request, options.ask, options.guidance)
    if options.part:
        part, _, parts = options.part.partition("/")
        print(evaluate_part(run, request, int(part), int(parts)).to_json().decode())
        return 0
    result = evaluate(run, request, workers=options.workers, stop=stop)
    for task, outcome in result.tasks.items():
        low, high = outcome.interval
        print(f"{task:24s} {outcome.success:5.2f}  [{low:.2f}, {high:.2f}]  {outcome.episodes} episodes")
    return 0


def _report(options: argparse.Namespace) -> int:
    from sop.report import describe, summarise, write_report
    from sop.runs import open_run

    open_run(options.run)
    path = write_report(Path(options.run))
    print(describe(summarise(Path(options.run))))
    print(f"Report: {path}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from sop.inspection import print_run
    from sop.tracing import print_episode, print_version

    if options.version is not None:
        print_version(options.run, options.version, num_episodes=options.episodes)
    elif options.episode is not None:
        print_episode(options.run, options.episode)
    else:
        print_run(options.run, num_episodes=options.episodes)
    return 0


def _replay_batch(options: argparse.Namespace) -> int:
    from sop.replay import print_replay

    same = print_replay(options.run, options.step, version=options.version, out=options.out)
    return 0 if same else 1


def _add_experiment(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    experiment = commands.add_parser("experiment", help="many trainings on the same recorded data, compared")
    experiment.add_argument("name", choices=["x-ind"], help="x-ind: RECAP on a base that never saw an indicator")
    experiment.add_argument("--quick", action="store_true", help="a handful of everything, on the toy robot")
    experiment.add_argument("--seeds", help="of the streams, e.g. 1,2,3 (default; with --quick 1)")
    experiment.add_argument("--streams", nargs="+", metavar="RUN", help="finished runs of recap, one per seed")
    experiment.add_argument("--out", type=Path, default=Path("runs/x-ind"), help="default: runs/x-ind")
    experiment.add_argument("--workers", type=int, default=2, help="arms at a time (default 2)")
    what = experiment.add_mutually_exclusive_group()
    what.add_argument("--report-only", action="store_true", help="write summary, table and picture of what is there")
    what.add_argument("--arm", metavar="SEED/ARM", help="one arm in this process, e.g. seed1/plain-embed-warm")
    experiment.set_defaults(command=_experiment)


def _experiment(options: argparse.Namespace) -> int:
    from sop.experiments.x_ind import run_command

    return run_command(options)
