"""Configurations of the servers: who may connect, and what each may do. Written whole, read by the servers.

    servers/
        ca.pem                        whom they believe
        nats.conf, nats.pem, nats.key the bus: TLS in both directions, one nkey and its subjects per member
        s3.json, s3.pem, s3.key       the store, where it is a server of ours (SeaweedFS): keys and prefixes per member
        aws/<name>.json               the store, where it is S3 of others: an IAM policy per member

A revoked member stays in `s3.json`, without keys and rights: SeaweedFS takes what a reloaded file says about a name and
forgets no name that the file does not have.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nkeys

from sop.fleet.authority import Authority, make_key, private_pem, public_of
from sop.fleet.files import PUBLIC, read_file, write_file
from sop.fleet.grants import Grants, grants_of
from sop.fleet.places import StorePlace, bus_place, store_place
from sop.fleet.register import Member, Register
from sop.transport.nats_subjects import subjects_of

SERVER_DAYS = 365
"""For which the servers' certificates hold."""
MAX_PAYLOAD_BYTES = 256 << 10
"""Of one message on the bus: it carries keys, never data."""
MAX_CONNECTIONS = 4096
_ALLOW_ALL = "*"


def write_servers(
    servers: Path, register: Register, authority: Authority, now_utc_ns: int, renew_days: int | None
) -> None:
    """Write `ca.pem`, `nats.conf` and the servers' certificates; those that are there stay.

    Args:
        servers: folder for them.
        register: of the fleet.
        authority: that issues certificates.
        now_utc_ns: the time.
        renew_days: for how many days certificates that are there are issued again, for the same keys; None: not.
    """
    write_file(servers / "ca.pem", authority.pem, PUBLIC)
    store = store_place(register.store)
    hosts = {"nats": bus_place(register.bus).host} | ({"s3": store.host} if store.tls else {})
    for name, host in hosts.items():
        certificate, key = servers / f"{name}.pem", servers / f"{name}.key"
        if not certificate.exists() or not key.exists():
            private = make_key()
            write_file(key, private_pem(private))
            public = private.public_key()
        elif renew_days is not None:
            public = public_of(read_file(certificate))
        else:
            continue
        issued = authority.issue_server(host, public, now_utc_ns, renew_days or SERVER_DAYS)
        write_file(certificate, issued.pem, PUBLIC)
    write_file(servers / "nats.conf", nats_configuration(register))


def nats_configuration(register: Register) -> bytes:
    """`nats.conf`."""
    bus = bus_place(register.bus)
    folder = Path(register.servers)
    users = [_nats_user(bus.namespace, member) for member in register.active()] or [_nats_nobody()]
    lines = [
        f"# Fleet {register.fleet}, register {register.version}. Written by `sop fleet`; changes here are lost.",
        f"listen: {_quoted(_joined(register.listen, bus.port))}",
        f"server_name: {_quoted(f'{register.fleet}-bus')}",
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        f"max_connections: {MAX_CONNECTIONS}",
        "jetstream {",
        f"  store_dir: {_quoted(str(folder / 'nats-data'))}",
        "  sync_interval: always",
        "}",
        "tls {",
        f"  cert_file: {_quoted(str(folder / 'nats.pem'))}",
        f"  key_file: {_quoted(str(folder / 'nats.key'))}",
        f"  ca_file: {_quoted(str(folder / 'ca.pem'))}",
        "  verify: true",
        '  min_version: "1.3"',
        "  timeout: 10",
        "}",
        "authorization {",
        "  timeout: 10",
        "  users: [",
        *(f"    {user}" for user in users),
        "  ]",
        "}",
    ]
    return ("\n".join(lines) + "\n").encode()


def s3_configuration(register: Register, secrets: Mapping[str, str]) -> bytes:
    """`s3.json` of SeaweedFS.

    Args:
        register: of the fleet.
        secrets: name of a member -> secret half of its credentials.
    """
    place = store_place(register.store)
    identities = [_s3_identity(place, member, secrets) for _, member in sorted(register.members.items())]
    return json.dumps({"identities": identities}, indent=2).encode()


def aws_policy(register: Register, member: Member) -> bytes:
    """IAM policy of a member, for S3 itself and stores that read the same; a revoked one may do nothing."""
    place = store_place(register.store)
    statements: list[dict[str, Any]] = []
    if member.revoked is not None:
        statements.append({"Effect": "Deny", "Action": "*", "Resource": "*"})
    else:
        grants = grants_of(member.role, member.name)
        statements.append(_aws_allow(place, "s3:GetObject", grants.read))
        statements.append(_aws_list(place, grants))
        if grants.write:
            statements.append(_aws_allow(place, "s3:PutObject", grants.write))
            statements.append(_aws_create_only(place, grants))
        if grants.delete:
            statements.append(_aws_allow(place, "s3:DeleteObject", grants.write))
    return json.dumps({"Version": "2012-10-17", "Statement": statements}, indent=2).encode()


def _nats_user(namespace: str, member: Member) -> str:
    allowed = subjects_of(namespace, member.role, member.name)
    permissions = {"publish": {"allow": allowed.publish}, "subscribe": {"allow": allowed.subscribe}}
    return json.dumps({"nkey": member.bus_key, "permissions": permissions})


def _nats_nobody() -> str:
    """A user whose key nobody has: a list without users would let everybody in."""
    lost = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)).public_key.decode()
    return json.dumps({"nkey": lost, "permissions": {"publish": {"deny": ">"}, "subscribe": {"deny": ">"}}})


def _s3_identity(place: StorePlace, member: Member, secrets: Mapping[str, str]) -> dict[str, Any]:
    if member.revoked is not None:
        return {"name": member.name, "credentials": [], "actions": [], "disabled": True}
    grants = grants_of(member.role, member.name)
    rights = (("Read", grants.read), ("List", grants.listed), ("Write", grants.write))
    actions = [f"{verb}:{place.key(key) + _ALLOW_ALL}" for verb, keys in rights for key in keys]
    credentials = [{"accessKey": member.access_key, "secretKey": secrets[member.name]}]
    return {"name": member.name, "credentials": credentials, "actions": actions}


def _aws_allow(place: StorePlace, action: str, keys: tuple[str, ...]) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": [_arn(place, key) for key in keys]}


def _aws_create_only(place: StorePlace, grants: Grants) -> dict[str, Any]:
    """Nobody replaces an object, whatever the client asks for: AWS's enforcement of conditional writes."""
    return {
        "Effect": "Deny",
        "Action": "s3:PutObject",
        "Resource": [_arn(place, key) for key in grants.write],
        "Condition": {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}},
    }


def _aws_list(place: StorePlace, grants: Grants) -> dict[str, Any]:
    prefixes = [f"{place.prefix}{key}{_ALLOW_ALL}" for key in grants.listed]
    return {
        "Effect": "Allow",
        "Action": "s3:ListBucket",
        "Resource": f"arn:aws:s3:::{place.bucket}",
        "Condition": {"StringLike": {"s3:prefix": prefixes}},
    }


def _arn(place: StorePlace, key: str) -> str:
    return f"arn:aws:s3:::{place.key(key)}" + (_ALLOW_ALL if key.endswith("/") or not key else "")


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _quoted(text: str) -> str:
    return json.dumps(text)
