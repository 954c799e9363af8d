"""`sop run`: a whole run on this machine."""

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from sop.core.errors import SopError
from sop.presets import ALGORITHM_NAMES, FROM_OWN_ACTIONS

IDENTITIES = "identities"
"""Folder of a fleet with the identities that it handed out."""

if TYPE_CHECKING:
    from sop.config import RunConfig
    from sop.runs import Run


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sop run`."""
    run = commands.add_parser("run", help="start a whole run on this machine: fleet, learner, operators, evaluation")
    run.add_argument("preset", help="metaworld (the demo, seven minutes) or debug (half a minute, no simulator)")
    run.add_argument("--name", help="folder under --runs (default: PRESET-ALGORITHM-seedN)")
    run.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")
    run.add_argument("--store", metavar="URL", help="s3://..., gs://..., az://... (default: a folder of the run)")
    run.add_argument("--bus", metavar="URL", help="nats://..., tls://... (default: beside the store)")
    run.add_argument("--fleet", metavar="FOLDER", help="who everybody is: the folder that `sop fleet init` made")
    run.add_argument("--on", metavar="CLUSTER", help="ray, or ray://head:10001: where robots and evaluations run")
    run.add_argument("--resume", action="store_true", help="go on with the run of this name, or the newest one")
    run.add_argument("--again", action="store_true", help="if it exists, make NAME-2, NAME-3, ... with the same base")
    run.add_argument("--base-from", metavar="RUN", help="take demonstrations, base policy and rollouts of another run")
    run.add_argument("--seed", type=int, help="of everything: demonstrations, weights, scenes, sampling (default 0)")
    run.add_argument("--algorithm", help=f"{', '.join(ALGORITHM_NAMES)} (default {ALGORITHM_NAMES[0]})")
    run.add_argument("--operators", help="who corrects: stand_in (default) or none")
    run.add_argument(
        "--exploration",
        help="what the fleet tries by itself: none; noise, one of the policy's own ways for a whole episode; or "
        "offset, a random shift of whole chunks of actions "
        f"(default: noise with --operators none and one of {', '.join(FROM_OWN_ACTIONS)}, and in metaworld with recap; "
        "else none)",
    )
    run.add_argument("--actors", type=int, help="robots in the fleet")
    run.add_argument("--episodes", type=int, help="episodes that the fleet collects")
    run.add_argument("--minutes", type=float, help="stop collecting after this time")
    run.add_argument("--speed", type=float, help="robot seconds per second, 1 is real time, 0 as fast as possible")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting: learner.lr=1e-4"
    )
    run.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from sop.cluster import on_cluster
    from sop.launcher import Launcher
    from sop.presets import make_config, vetted_changes
    from sop.processes import spawn_here, stop_on_signals

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
    vetted = vetted_changes(config, changes)
    if vetted and not options.resume:
        config = make_config(options.preset, [*vetted, *changes])
        print(f"{config.algorithm} learns from what the fleet tries, so by default: {' '.join(vetted)}")
    stop = stop_on_signals()
    with ExitStack() as stack:
        identities = _take_identity(options)
        run = _choose_run(options, config)
        spawn = spawn_here if options.on is None else stack.enter_context(on_cluster(options.on))
        print(Launcher(run, stop, identities=identities, spawn=spawn).run())
    print(f"Report: {run.folder / 'report.html'}   Numbers: {run.folder / 'summary.json'}")
    if stop.is_set():
        print(f"Go on with: sop run {options.preset} --runs {run.folder.parent} --name {run.folder.name} --resume")
    return 130 if stop.is_set() else 0


def _take_identity(options: argparse.Namespace) -> Path | None:
    """Be the learner of a fleet, and take store and bus from it when they are not named; returns its identities."""
    if options.fleet is None:
        return None
    from sop.transport.identity import VARIABLE, load_identity

    identities = Path(options.fleet) / IDENTITIES
    own = load_identity(identities / "learner")
    os.environ[VARIABLE] = str(own.folder)
    options.store, options.bus = options.store or own.record.store, options.bus or own.record.bus
    return identities


def _choose_run(options: argparse.Namespace, config: "RunConfig") -> "Run":
    """Resume a run, or make a new one, perhaps with the base policy of another."""
    from sop.places import Place, is_run
    from sop.runs import create_run, newest_run, open_run, take_base

    runs = Path(options.runs)
    folder = runs / (options.name or f"{config.preset}-{config.algorithm}-seed{config.seed}")
    if options.resume:
        return open_run(str(folder)) if options.name else newest_run(runs, config.preset)
    first, number = folder, 1
    while is_run(folder):
        if not options.again:
            raise ValueError(f"{folder} exists: --resume goes on with it, --again makes a new run beside it")
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    if options.store is not None and options.bus is None:
        raise ValueError(f"--store {options.store} has no bus beside it: name one with --bus")
    place = None if options.store is None else Place(store=options.store, bus=options.bus)
    run = create_run(folder, config, place)
    if options.base_from:
        take_base(run, open_run(options.base_from))
    elif number > 1:
        try:
            take_base(run, open_run(str(first)))
        except SopError as error:
            print(f"{folder} makes its own base policy: {error}", file=sys.stderr)
    return run
