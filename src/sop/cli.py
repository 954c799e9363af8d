"""The `sop` command. Parses first; imports what a subcommand needs afterwards, so that `--help` is quick.

commands/run.py         run
commands/processes.py   actor, learner, evaluate
commands/reading.py     report, inspect, replay-batch
commands/experiment.py  experiment
commands/chaos.py       chaos
commands/soak.py        soak
commands/store.py       store
fleet/command.py        fleet
commands/policy.py      policy
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from sop.commands import chaos, experiment, policy, processes, reading, run, soak, store
from sop.core.errors import SopError
from sop.fleet import command as fleet
from sop.processes import exit_code

EPILOG = """\
A run is a folder (runs/<name>) with a store of episodes and policies. Two terminals make a fleet:
  sop learner runs/demo
  sop actor runs/demo --id robot-7
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code. 1: could not be done, 2: wrong usage, 3: refused, 130: interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (SopError, ValueError) as error:
        print(f"sop {options.name_of_command}: {error}", file=sys.stderr)
        return exit_code(error)
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
    for group in (run, processes, reading, experiment, chaos, soak, store, fleet, policy):
        group.add_commands(commands)
    return parser
