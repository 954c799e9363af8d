"""How a store learns who may do what: one class per kind of store.

Add a kind: write a class with the two methods of `StoreAdmin` and name it in `STORE_ADMINS`.
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sop.fleet.files import PUBLIC, write_file
from sop.fleet.places import store_place
from sop.fleet.register import Register
from sop.fleet.servers import aws_policy, s3_configuration


@dataclass(frozen=True, slots=True)
class Steps:
    """What was done, and what a person still has to do, as sentences."""

    done: tuple[str, ...] = ()
    todo: tuple[str, ...] = ()

    def __add__(self, other: "Steps") -> "Steps":
        return Steps(self.done + other.done, self.todo + other.todo)


class StoreAdmin(Protocol):
    """A kind of store.

    admin.write(folder / "servers", register, secrets)       # files that say who may do what
    steps = admin.apply(folder / "servers", register)        # the store does as they say, or a person is told how
    """

    makes_keys: bool
    """Whether we make the credentials of members; else their cloud does."""

    def write(self, servers: Path, register: Register, secrets: Mapping[str, str]) -> None:
        """Write the files. Idempotent.

        Args:
            servers: folder for them.
            register: of the fleet.
            secrets: name of a member -> secret half of its credentials.
        """
        ...

    def apply(self, servers: Path, register: Register) -> Steps:
        """Make the store do what the files say, as far as that can be done from here. Idempotent."""
        ...


class SeaweedFS:
    """A server of ours that reads `s3.json` (`weed server -s3.config=...`, `weed s3 -config=...`), again at SIGHUP.

    Identities of that file cannot be deleted with `weed shell`; a reload takes their rights at once.
    """

    makes_keys = True

    def write(self, servers: Path, register: Register, secrets: Mapping[str, str]) -> None:
        """See `StoreAdmin.write`: `s3.json`."""
        write_file(servers / "s3.json", s3_configuration(register, secrets))

    def apply(self, servers: Path, register: Register) -> Steps:
        """See `StoreAdmin.apply`: signals the server that runs here, if one does."""
        return reload("weed", servers, "s3.json", register)


class Manual:
    """A store of others (AWS, Google, Azure, MinIO, ...): policies are written, a person puts them in force."""

    makes_keys = False

    def write(self, servers: Path, register: Register, secrets: Mapping[str, str]) -> None:  # noqa: ARG002
        """See `StoreAdmin.write`: one IAM policy per member for `s3://`; for other schemes nothing."""
        if store_place(register.store).scheme == "s3":
            (servers / "aws").mkdir(mode=0o700, exist_ok=True)
            for member in register.members.values():
                write_file(servers / "aws" / f"{member.name}.json", aws_policy(register, member), PUBLIC)

    def apply(self, servers: Path, register: Register) -> Steps:
        """See `StoreAdmin.apply`: says what to do."""
        if store_place(register.store).scheme != "s3":
            gone = ", ".join(sorted(member.name for member in register.members.values() if member.revoked is not None))
            text = "in your cloud's console let every member do what `sop fleet list` says of its role"
            return Steps(todo=(f"{text}; take all rights from: {gone}" if gone else text,))
        put = "aws iam put-user-policy --policy-name sop --user-name"
        return Steps(
            todo=tuple(
                f"{put} {name} --policy-document file://{servers}/aws/{name}.json" for name in sorted(register.members)
            )
        )


STORE_ADMINS: Mapping[str, StoreAdmin] = {"seaweedfs": SeaweedFS(), "manual": Manual()}
"""Kind of store -> how it learns who may do what."""


def reload(program: str, servers: Path, configuration: str, register: Register) -> Steps:
    """Have the server of this machine that was started with a configuration read it again (SIGHUP).

    Args:
        program: name of its executable.
        servers: folder where the configuration was written.
        configuration: its name there.
        register: of the fleet; says where the configuration belongs.

    Returns:
        What was done, or how a person does it where the server runs.
    """
    place = Path(register.servers) / configuration
    signalled = []
    for pid in running_with(program, place) if place.resolve() == (servers / configuration).resolve() else []:
        try:
            os.kill(pid, signal.SIGHUP)
            signalled.append(str(pid))
        except (ProcessLookupError, PermissionError):
            continue
    if signalled:
        return Steps(done=(f"{program} (process {', '.join(signalled)}) has read {place} again",))
    where = f"{program} does not run here with {place}: where it runs, bring the files of {servers} into that folder"
    return Steps(todo=(f"{where} and send it SIGHUP (kill -HUP <pid of {program}>), or start it",))


def running_with(program: str, configuration: Path) -> list[int]:
    """Processes of this machine that run a program with a configuration file among its arguments."""
    wanted, found = configuration.resolve(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = [os.fsdecode(word) for word in (folder / "cmdline").read_bytes().split(b"\0")]
            if Path(words[0]).name != program:
                continue
            home = (folder / "cwd").readlink()
        except OSError:
            continue
        if any((home / word.rpartition("=")[2]).resolve() == wanted for word in words[1:] if word):
            found.append(int(folder.name))
    return sorted(found)
