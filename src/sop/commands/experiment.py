"""`sop experiment`: many trainings or many promotions, compared."""

import argparse
from pathlib import Path

_WHAT = "x-ind: RECAP on a base that never saw an indicator; canary: bad policies are caught, good ones are not"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sop experiment`."""
    experiment = commands.add_parser("experiment", help="many trainings on the same recorded data, compared")
    experiment.add_argument("name", choices=["x-ind", "canary"], help=_WHAT)
    experiment.add_argument("--quick", action="store_true", help="a handful of everything, on the toy robot")
    experiment.add_argument("--seeds", help="of the streams, e.g. 1,2,3 (default; with --quick 1)")
    experiment.add_argument("--streams", nargs="+", metavar="RUN", help="finished runs of recap, one per seed")
    experiment.add_argument("--arms", nargs="+", metavar="ARM", help="some of x-ind's arms (default: all)")
    experiment.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another number of x-ind's plan: episodes=200"
    )
    experiment.add_argument("--out", type=Path, help="default: runs/NAME")
    experiment.add_argument("--workers", type=int, default=2, help="arms at a time (default 2)")
    what = experiment.add_mutually_exclusive_group()
    what.add_argument("--report-only", action="store_true", help="write summary, table and picture of what is there")
    what.add_argument("--arm", metavar="SEED/ARM", help="one arm in this process, e.g. seed1/plain-embed-warm")
    experiment.set_defaults(command=_experiment)


def _experiment(options: argparse.Namespace) -> int:
    if options.out is None:
        options.out = Path("runs") / options.name
    if options.name == "canary":
        from sop.experiments.canary import run_command as canary

        return canary(options)
    from sop.experiments.x_ind import run_command as x_ind

    return x_ind(options)
