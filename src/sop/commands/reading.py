"""`sop report`, `sop inspect`, `sop replay-batch`: what a run holds, read afterwards or meanwhile."""

import argparse
from pathlib import Path


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sop report`, `sop inspect` and `sop replay-batch`."""
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
