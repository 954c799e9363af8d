"""`sop fleet`: who belongs to a fleet, on the administrator's machine."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sop.transport.identity import ROLES

if TYPE_CHECKING:
    from sop.fleet.fleet import Fleet
    from sop.fleet.store_admins import Steps

_DAYS = 90
"""For which a member's certificate holds, unless it is said."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`sop fleet` and what it can do."""
    fleet = commands.add_parser("fleet", help="who belongs to a fleet: make it, enroll, revoke, renew")
    verbs = fleet.add_subparsers(required=True, metavar="VERB")
    init = verbs.add_parser("init", help="make a fleet: its authority, its keys, configurations of its servers")
    init.add_argument("folder", type=Path, help="new; the administrator's secret")
    init.add_argument("--name", required=True, help="of the fleet")
    init.add_argument("--store", required=True, metavar="URL", help="s3://bucket/run?endpoint=https://host:port, ...")
    init.add_argument("--bus", required=True, metavar="URL", help="tls://host:port/namespace")
    init.add_argument("--ca-cert", type=Path, metavar="FILE", help="PEM of an authority you have (default: a new one)")
    init.add_argument("--ca-key", type=Path, metavar="FILE", help="PEM of its key, without a password")
    init.add_argument("--days", type=int, default=_DAYS, help=f"a member's certificate holds (default {_DAYS})")
    init.add_argument(
        "--store-admin",
        choices=("seaweedfs", "manual"),
        help="how the store learns who may do what (default: seaweedfs for an endpoint, else manual)",
    )
    init.add_argument(
        "--listen", default="127.0.0.1", metavar="ADDRESS", help="of the bus (default: this machine only)"
    )
    init.add_argument(
        "--servers", type=Path, metavar="DIR", help="where servers/ lies on their machine (default: FOLDER/servers)"
    )
    init.set_defaults(command=_init)
    _add_member_commands(verbs)
    configs = verbs.add_parser("configs", help="write the configurations of the servers again")
    configs.add_argument("folder", type=Path)
    configs.add_argument("--listen", metavar="ADDRESS", help="of the bus, from now on")
    configs.set_defaults(command=_configs)
    apply = verbs.add_parser("apply", help="make servers and store do what the register says; repeat at will")
    apply.add_argument("folder", type=Path)
    apply.set_defaults(command=_apply)


def _add_member_commands(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    enroll = verbs.add_parser("enroll", help="make a member and the identity folder that is handed to it")
    enroll.add_argument("folder", type=Path)
    enroll.add_argument("name", help="of a robot: its actor id")
    enroll.add_argument("--role", default="robot", choices=ROLES)
    enroll.add_argument("--days", type=int, help="its certificate holds (default: the fleet's)")
    enroll.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: FOLDER/identities/NAME)")
    enroll.add_argument("--again", action="store_true", help="it was revoked: new keys for the same name")
    enroll.add_argument(
        "--store-keys", type=Path, metavar="FILE", help="access key and secret that your cloud made for it, one a line"
    )
    enroll.set_defaults(command=_enroll)
    revoke = verbs.add_parser("revoke", help="let a member be none any more, now")
    revoke.add_argument("folder", type=Path)
    revoke.add_argument("name")
    revoke.add_argument("--why", required=True, metavar="TEXT", help="for people")
    revoke.add_argument("--from-sequence", type=int, metavar="N", help="do not believe its episodes from this one on")
    revoke.set_defaults(command=_revoke)
    renew = verbs.add_parser("renew", help="a new certificate for the same key")
    renew.add_argument("folder", type=Path)
    renew.add_argument("name", help="of a member; `servers`: their certificates; `trust`: the end of trust.json")
    renew.add_argument("--days", type=int, help="it holds (default: the fleet's; a year for servers and trust)")
    renew.set_defaults(command=_renew)
    show = verbs.add_parser("list", help="who belongs to it, until when, and who does no more")
    show.add_argument("folder", type=Path)
    show.add_argument("--json", action="store_true")
    show.set_defaults(command=_list)


def _init(options: argparse.Namespace) -> int:
    from sop.fleet.fleet import Fleet
    from sop.fleet.places import store_place
    from sop.fleet.register import Register

    if (options.ca_cert is None) != (options.ca_key is None):
        raise ValueError("--ca-cert and --ca-key are given together")
    if options.servers is not None and not options.servers.is_absolute():
        raise ValueError(f"--servers {options.servers}: the whole path on the servers' machine, from / on")
    register = Register(
        fleet=options.name,
        store=options.store,
        bus=options.bus,
        store_admin=options.store_admin or ("seaweedfs" if store_place(options.store).host else "manual"),
        listen=options.listen,
        servers=str(options.servers or options.folder.absolute() / "servers"),
        days=options.days,
    )
    given = None if options.ca_cert is None else (options.ca_cert, options.ca_key)
    fleet, steps = Fleet.create(options.folder, register, given=given)
    print(f"{fleet.folder} is fleet {options.name}. It holds the keys to everything: back it up, show it to nobody.")
    _print(steps)
    return 0


def _enroll(options: argparse.Namespace) -> int:
    from sop.fleet.identities import read_store_keys

    keys = None if options.store_keys is None else read_store_keys(options.store_keys)
    rest = {"days": options.days, "out": options.out, "again": options.again, "store_keys": keys}
    _print(_open(options).enroll(options.name, options.role, **rest))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    steps = _open(options).revoke(options.name, options.why, from_sequence=options.from_sequence)
    return _code(steps)


def _renew(options: argparse.Namespace) -> int:
    _print(_open(options).renew(options.name, days=options.days))
    return 0


def _configs(options: argparse.Namespace) -> int:
    _print(_open(options).configure(options.listen))
    return 0


def _apply(options: argparse.Namespace) -> int:
    return _code(_open(options).apply())


def _list(options: argparse.Namespace) -> int:
    from sop.fleet.listing import as_json, as_text

    fleet = _open(options)
    print(as_json(fleet).decode() if options.json else as_text(fleet))
    return 0


def _open(options: argparse.Namespace) -> "Fleet":
    from sop.fleet.fleet import Fleet

    return Fleet(options.folder)


def _print(steps: "Steps") -> None:
    """What was done, and what a person still has to do."""
    for text in steps.done:
        print(f"done   {text}")
    for text in steps.todo:
        print(f"TO DO  {text}")


def _code(steps: "Steps") -> int:
    """1 when something is still to do: a script that revokes must notice."""
    _print(steps)
    return 1 if steps.todo else 0
