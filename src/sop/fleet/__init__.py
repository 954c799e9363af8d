"""IDENTITY: who belongs to a fleet, what each may do, and how somebody stops belonging to it.

    administrator    Fleet.create -> enroll -> identity folder, handed to a robot, a learner, ...
                     revoke, renew -> register, configurations of the servers, trust roots
    servers          read their configurations: TLS in both directions, subjects per nkey, prefixes per access key

The folder of the fleet is the administrator's secret; `fleet.json` in it holds none. Names are imported when they are
used: the command line is parsed without the libraries of certificates and stores.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sop.fleet.fleet import Fleet
    from sop.fleet.register import Member, Register, Revocation, load_register
    from sop.fleet.store_admins import STORE_ADMINS, Steps, StoreAdmin

__all__ = [
    "STORE_ADMINS",
    "Fleet",
    "Member",
    "Register",
    "Revocation",
    "Steps",
    "StoreAdmin",
    "load_register",
]
_WHERE = {
    "STORE_ADMINS": "store_admins",
    "Fleet": "fleet",
    "Member": "register",
    "Register": "register",
    "Revocation": "register",
    "Steps": "store_admins",
    "StoreAdmin": "store_admins",
    "load_register": "register",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
