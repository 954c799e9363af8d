"""`sop store`: what is done to a store as a whole. Backup and restore are one command, with the URLs swapped."""

import argparse


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sop store copy`."""
    store = commands.add_parser("store", help="copy a run's store: backup and restore")
    what = store.add_subparsers(required=True, metavar="WHAT")
    copy = what.add_parser("copy", help="copy all objects; can be repeated until it is complete")
    copy.add_argument("source", metavar="SRC", help="folder of a run, or folder or URL of a store")
    copy.add_argument("target", metavar="DST", help="folder or URL of a store; objects that are there are not touched")
    copy.add_argument("--verify", action="store_true", help="read every object again at both places and compare")
    copy.set_defaults(command=_copy)


def _copy(options: argparse.Namespace) -> int:
    from pathlib import Path

    from sop.backup import copy_store
    from sop.places import find_place, is_run
    from sop.transport import open_store

    source = find_place(options.source).store if is_run(Path(options.source)) else options.source
    copied = copy_store(open_store(source), open_store(options.target), verify=options.verify)
    checked = f", {copied.verified} compared" if options.verify else ""
    print(f"{copied.copied} objects copied ({copied.num_bytes} bytes), {copied.there} were there{checked}")
    return 0
