"""`sop soak`: hours of robot time under random faults, then what was lost (0), what grew and whether success held."""

import argparse
from pathlib import Path


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sop soak`."""
    soak = commands.add_parser("soak", help="hours of robot time under random faults: nothing lost, nothing grows")
    soak.add_argument("--hours", type=float, default=36.0, help="robot time of the whole fleet (default 36)")
    soak.add_argument("--seed", type=int, default=0, help="of the run, of what is struck and when (default 0)")
    soak.add_argument("--quick", action="store_true", help="20 minutes of robot time, one of wall clock")
    soak.add_argument("--name", default="soak", help="folder under --runs (default: soak)")
    soak.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    soak.add_argument("--preset", default="debug", help="whose robots need no pacing (default: debug)")
    soak.add_argument("--base-from", metavar="RUN", help="take demonstrations and base policy of another run")
    soak.set_defaults(command=_soak)


def _soak(options: argparse.Namespace) -> int:
    """1 when a promise is broken, else 130 when it was stopped early, else 0."""
    from sop.chaos.soak import SoakPlan, start_soak
    from sop.chaos.soak_judge import judge
    from sop.processes import stop_on_signals
    from sop.runs import open_run

    plan = SoakPlan.quick(options.seed) if options.quick else SoakPlan(hours=options.hours, seed=options.seed)
    stop = stop_on_signals()
    base = None if options.base_from is None else open_run(options.base_from)
    soak = start_soak(options.preset, options.runs / options.name, plan, stop, _say, base=base)
    verdict = judge(soak)
    print(verdict.paragraph)
    print(f"Numbers: {soak.run.folder / 'summary.json'}   Picture: {soak.run.folder / 'soak.png'}")
    if verdict.broken:
        return 1
    return 130 if soak.interrupted else 0


def _say(line: str) -> None:
    print(line, flush=True)
