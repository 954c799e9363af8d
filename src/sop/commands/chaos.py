"""`sop chaos`: strike a run and count what it lost; the fifty faults, their tests, and the last results."""

import argparse
from pathlib import Path

RUNS = Path("runs/chaos")
"""Runs that `--start` makes, and `faults.json`."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sop chaos`."""
    chaos = commands.add_parser("chaos", help="strike a running run at random, then count what was lost (0)")
    chaos.add_argument("run", nargs="?", help="folder of a run that runs on this machine, or URL of its store")
    what = chaos.add_mutually_exclusive_group()
    what.add_argument("--start", metavar="PRESET", help="start a run of its own and strike it, e.g. debug")
    what.add_argument("--count", action="store_true", help="strike nothing: check the history of RUN as it is")
    what.add_argument("--list", action="store_true", help="every fault, the tests that cover it, the last result")
    what.add_argument("--check", action="store_true", help="run the tests of the faults and keep their results")
    chaos.add_argument("--kills", type=int, default=20, metavar="N", help="strikes that have to hit (default 20)")
    chaos.add_argument("--seed", type=int, default=0, help="of what is struck and when (default 0)")
    chaos.add_argument("--nemeses", default="", metavar="A,B", help="only these (default: all that can strike the run)")
    chaos.add_argument("--every", type=float, default=3.0, metavar="S", help="seconds between strikes (default 3)")
    chaos.add_argument("--fault", type=int, nargs="+", default=[], metavar="N", help="with --check: only these")
    chaos.add_argument("--fast", action="store_true", help="with --check: leave out the tests that take long")
    form = chaos.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="with --list: as JSON")
    form.add_argument("--markdown", action="store_true", help="with --list: the table of docs/reliability.md")
    chaos.set_defaults(command=_chaos)


def _chaos(options: argparse.Namespace) -> int:
    if options.list:
        return _list(options)
    if options.check:
        return _check(options)
    if options.start is None and options.run is None:
        raise ValueError("name a run, or take --start debug, --list or --check")
    return _count(options) if options.count else _strike(options)


def _strike(options: argparse.Namespace) -> int:
    from sop.chaos.recovery import recovery_words
    from sop.chaos.strikes import attack_new, attack_running

    names = tuple(name for name in options.nemeses.split(",") if name)
    if options.start is not None:
        attack = attack_new(
            options.start,
            RUNS,
            strikes=options.kills,
            seed=options.seed,
            names=names,
            every_s=options.every,
            say=_say,
        )
    else:
        attack = attack_running(
            options.run, strikes=options.kills, seed=options.seed, names=names, every_s=options.every, say=_say
        )
    print(f"seed {attack.seed}, {len(attack.strikes)} strikes, exit code of the run: {attack.exit_code}")
    for line in recovery_words(attack.strikes):
        print(line)
    _print_history(attack.history.counts(), attack.history.words())
    if len(attack.strikes) < options.kills:
        print(f"only {len(attack.strikes)} of {options.kills} strikes hit before the run ended")
    return 0 if attack.survived else 1


def _say(line: str) -> None:
    print(line, flush=True)


def _count(options: argparse.Namespace) -> int:
    from sop.chaos.history import check_history
    from sop.runs import open_run

    history = check_history(open_run(options.run))
    _print_history(history.counts(), history.words())
    return 1 if history.violations() else 0


def _print_history(counts: dict[str, int], words: list[str]) -> None:
    print("  ".join(f"{name} {number}" for name, number in counts.items()))
    for word in words:
        print(f"  {word}")
    print("nothing lost, nothing doubled, nothing unsent, nothing mixed" if not words else f"{len(words)} violations")


def _list(options: argparse.Namespace) -> int:
    from sop.chaos.drill import as_json, as_markdown, as_text, read_results

    results = read_results(RUNS)
    form = as_json if options.json else as_markdown if options.markdown else as_text
    print(form(results))
    return 0


def _check(options: argparse.Namespace) -> int:
    from sop.chaos.drill import check_faults

    results = check_faults(RUNS, numbers=tuple(options.fault), fast=options.fast)
    for number, result in sorted(results.items()):
        print(f"{number:3d}  {result.result:8s} {result.seconds:7.1f} s  {result.title}")
    failed = sorted(number for number, result in results.items() if result.result == "failed")
    print(f"{len(results)} faults checked, {len(failed)} failed{': ' + str(failed) if failed else ''}")
    return 1 if failed or not results else 0
