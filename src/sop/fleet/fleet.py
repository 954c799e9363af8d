"""The folder of a fleet: what an administrator does with it. The folder is the administrator's secret.

    FLEET/                 0700
        fleet.json         who belongs to it (`register`); no secret
        ca.pem, ca.key     authority (`authority`)
        keys/, trust/      root key, every `trust.json` (`roots`)
        store_secrets.json secret halves of the store's credentials, for the server's configuration
        certificates/      newest certificate of every member: `renew` needs no more
        identities/        identity folders, until they are handed out
        servers/           configurations of the servers (`servers`)

Every change is made in an order in which a crash leaves something that the same command repairs.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sop.core.errors import RunError, SopError
from sop.fleet.authority import CERTIFICATE, KEY, Authority, public_of
from sop.fleet.files import PUBLIC, alone, check_private, make_private, read_file, write_file
from sop.fleet.identities import Order, StoreKeys, hand_out, make_identity, make_store_keys, unfinished, uri_of
from sop.fleet.places import bus_place, is_loopback, store_place
from sop.fleet.register import (
    Member,
    Register,
    Revocation,
    check_days,
    check_member,
    check_name,
    load_register,
    save_register,
)
from sop.fleet.roots import SIGNS, Roots, put_once, trust_key
from sop.fleet.secrets_file import StoreSecrets
from sop.fleet.servers import SERVER_DAYS, write_servers
from sop.fleet.store_admins import STORE_ADMINS, Steps, reload
from sop.transport import load_identity, open_store
from sop.trust import PublicKey

RELEASER = "release"
"""The member that `create` enrolls: it writes channels, and `apply` uses it to put `trust.json` into the store."""
TRUST_DAYS = 365
_DAY_NS = 24 * 3600 * 10**9


class Fleet:
    """The folder of a fleet, for one administrator at a time.

    Args:
        folder: that `create` made.
        clock: nanoseconds since the epoch.

    Raises:
        RunError: it is none, it is damaged, or others can read it.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], int] = time.time_ns) -> None:
        self.folder = folder.absolute()
        self._clock = clock
        if self.folder.is_dir():
            check_private(self.folder)
        self.register = load_register(self.folder)
        self._servers = self.folder / "servers"
        self._roots = Roots(self.folder)
        self._secrets = StoreSecrets(self.folder)

    @classmethod
    def create(
        cls,
        folder: Path,
        register: Register,
        *,
        given: tuple[Path, Path] | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> tuple["Fleet", Steps]:
        """Make the folder: authority, root key, the member `release`, configurations of the servers.

        Args:
            folder: new.
            register: names and URLs; without members.
            given: certificate and key of an authority that exists; None makes one.
            clock: nanoseconds since the epoch.

        Raises:
            RunError: the folder exists, or the given authority is unfit.
            ValueError: a name or URL that cannot be a fleet's.
        """
        check_name(register.fleet)
        if register.store_admin not in STORE_ADMINS:
            raise ValueError(f"store admin {register.store_admin!r} is none of {', '.join(sorted(STORE_ADMINS))}")
        check_days(register.days)
        store_place(register.store)
        bus_place(register.bus)
        if folder.exists():
            raise RunError(f"{folder} exists: a fleet's folder is made new")
        now = clock()
        authority = Authority.load(*given, now) if given else Authority.make(register.fleet, now)
        make_private(folder)
        for name in ("certificates", "identities", "servers"):
            make_private(folder / name)
        authority.save(folder)
        Roots(folder).start(register.fleet, now + TRUST_DAYS * _DAY_NS)
        StoreSecrets(folder).start()
        save_register(folder, register)
        fleet = cls(folder, clock=clock)
        return fleet, fleet.enroll(RELEASER, "release")

    def enroll(
        self,
        name: str,
        role: str,
        *,
        days: int | None = None,
        out: Path | None = None,
        again: bool = False,
        store_keys: StoreKeys | None = None,
    ) -> Steps:
        """Make a member with new keys, and the folder that is handed to it.

        Args:
            name: of the member; of a robot its actor id.
            role: one of `ROLES`.
            days: for which its certificate holds; None takes the fleet's.
            out: folder to write; must not exist. None: `identities/<name>`.
            again: the name was revoked; it comes back with new keys.
            store_keys: credentials that the store's owner made for it; None makes some where the store is ours.

        Raises:
            RunError: the name is taken or was revoked, the folder exists, or something cannot be written.
            ValueError: not a name, not a role, or days that make no sense.
        """
        check_member(name, role)
        days = self.register.days if days is None else days
        check_days(days)
        with alone(self.folder):
            self._reload_register()
            self.register.require_free(name, again=again)
            folder = self.folder / "identities" / name if out is None else out.absolute()
            if out is not None and folder.exists():
                raise RunError(f"{folder} exists: name a new folder")
            register = self._make_member(name, role, folder, days, store_keys)
            self.register = save_register(self.folder, register)
            self._write_servers()
            made = Steps(done=(f"{name} is a {role} of fleet {register.fleet}: hand {folder} to it",))
            return made + self._reload() + self._waiting_trust()

    def revoke(self, name: str, why: str, *, from_sequence: int | None = None) -> Steps:
        """Let a member be none any more: bus and store refuse it as soon as they have read their configurations.

        Args:
            name: of the member.
            why: for people.
            from_sequence: its episodes from this sequence number on are not to be believed.

        Raises:
            RunError: no such member, or revoked before.
        """
        with alone(self.folder):
            self._reload_register()
            member = self.register.member(name)
            if member.revoked is not None:
                raise RunError(f"{name} was revoked before ({member.revoked.why}): `sop fleet apply` repeats it")
            revoked = Revocation(utc_ns=self._clock(), why=why, from_sequence=from_sequence)
            self.register = save_register(self.folder, self.register.with_member(replace(member, revoked=revoked)))
            self._secrets.keep(name, "")
            self._write_servers()
            steps = Steps(done=(f"{name} is revoked",)) + self._reload()
            return steps if member.signing_key is None else steps + self._distrust(member)

    def renew(self, name: str, *, days: int | None = None) -> Steps:
        """A new certificate for the same key: only `certificate.pem` has to travel, and it is no secret.

        Args:
            name: of a member, or `servers` (their certificates) or `trust` (the end of `trust.json`).
            days: for which it holds; None takes the fleet's, and a year for servers and trust.

        Raises:
            RunError: no such member, or a revoked one.
            ValueError: days that make no sense.
        """
        check_days(1 if days is None else days)
        with alone(self.folder):
            self._reload_register()
            if name == "servers":
                self._write_servers(days or SERVER_DAYS)
                return Steps(done=("the servers have new certificates",)) + self._reload()
            if name == "trust":
                return self._sync_trust(days or TRUST_DAYS, prolong=True) + self._put_trust()
            return self._renew_member(self.register.member(name), days or self.register.days)

    def configure(self, listen: str | None = None) -> Steps:
        """Write the configurations of the servers (again).

        Args:
            listen: address on which the bus listens from now on; None keeps what was said before.
        """
        with alone(self.folder):
            self._reload_register()
            if listen is not None and listen != self.register.listen:
                self.register = save_register(self.folder, replace(self.register, listen=listen))
            self._write_servers()
            steps = Steps(done=(f"{self._servers} says what register {self.register.version} says",))
            host = bus_place(self.register.bus).host
            if is_loopback(self.register.listen) and not is_loopback(host):
                listens = f"the bus listens on {self.register.listen} alone, but is called {host}: --listen ADDRESS"
                steps += Steps(todo=(listens,))
            return steps + self._waiting_trust()

    def apply(self) -> Steps:
        """Make servers and store do what the register says, as far as that can be done from here. Idempotent."""
        with alone(self.folder):
            self._reload_register()
            self._write_servers()
            return self._reload() + self._sync_trust(TRUST_DAYS) + self._put_trust()

    def now_utc_ns(self) -> int:
        """The time, as everything here reckons it."""
        return self._clock()

    def authority_pem(self) -> bytes:
        """Certificate of the authority."""
        return read_file(self.folder / CERTIFICATE)

    def trust_expires_utc_ns(self) -> int:
        """When `trust.json` ends."""
        return self._roots.newest().expires_utc_ns

    def server_certificates(self) -> dict[str, bytes]:
        """Certificates of the servers, PEM, by the name of their file."""
        return {path.name: read_file(path) for path in sorted(self._servers.glob("*.pem")) if path.name != CERTIFICATE}

    def _make_member(self, name: str, role: str, folder: Path, days: int, given: StoreKeys | None) -> Register:
        """Write what a new member needs; returns the register with it."""
        ours = STORE_ADMINS[self.register.store_admin].makes_keys
        if given is not None and ours:
            raise RunError("this fleet makes the store's credentials itself: leave the given ones out")
        keys = given or (make_store_keys() if ours else StoreKeys())
        now = self._clock()
        part = unfinished(folder)
        order = Order(
            register=self.register,
            name=name,
            role=role,
            store_keys=keys,
            signs=role in SIGNS,
            days=days,
            now_utc_ns=now,
        )
        made = make_identity(part, order, self._authority())
        member = Member(
            name=name,
            role=role,
            serial=made.certificate.serial,
            enrolled_utc_ns=now,
            expires_utc_ns=made.certificate.expires_utc_ns,
            bus_key=made.bus_key,
            access_key=keys.access,
            signing_key=made.signing_key,
        )
        register = self.register.with_member(member)
        version = self._roots.sync(_signers(register), now + TRUST_DAYS * _DAY_NS)
        write_file(part / "trust.json", self._roots.envelope(version), PUBLIC)
        write_file(self.folder / "certificates" / f"{name}.pem", made.certificate.pem, PUBLIC)
        if ours:
            self._secrets.keep(name, keys.secret)
        hand_out(part, folder)
        return register

    def _renew_member(self, member: Member, days: int) -> Steps:
        if member.revoked is not None:
            raise RunError(f"{member.name} is revoked: `sop fleet enroll {member.name} --again` gives it new keys")
        kept = self.folder / "certificates" / f"{member.name}.pem"
        uri = uri_of(self.register.fleet, member.role, member.name)
        issued = self._authority().issue_client(member.name, uri, public_of(read_file(kept)), self._clock(), days)
        write_file(kept, issued.pem, PUBLIC)
        renewed = replace(member, serial=issued.serial, expires_utc_ns=issued.expires_utc_ns)
        self.register = save_register(self.folder, self.register.with_member(renewed))
        folder = self.folder / "identities" / member.name
        if folder.is_dir():
            write_file(folder / "certificate.pem", issued.pem, PUBLIC)
        text = f"bring {kept} to {member.name} as certificate.pem of its identity (no secret), and start it again"
        return Steps(done=(f"{member.name} has a new certificate for the same key",), todo=(text,))

    def _write_servers(self, renew_days: int | None = None) -> None:
        """All files under `servers/`; new certificates where there are none, or when it is said for how many days."""
        write_servers(self._servers, self.register, self._authority(), self._clock(), renew_days)
        STORE_ADMINS[self.register.store_admin].write(self._servers, self.register, self._secrets.all())

    def _reload(self) -> Steps:
        """Bus and store read their configurations again."""
        admin = STORE_ADMINS[self.register.store_admin]
        bus = reload("nats-server", self._servers, "nats.conf", self.register)
        return bus + admin.apply(self._servers, self.register)

    def _sync_trust(self, days: int, *, prolong: bool = False) -> Steps:
        before = self._roots.newest().version
        version = self._roots.sync(_signers(self.register), self._clock() + days * _DAY_NS, prolong=prolong)
        return Steps() if version == before else Steps(done=(f"trust.json has version {version}",))

    def _waiting_trust(self) -> Steps:
        newest = self._roots.versions()[-1]
        if newest <= self.register.trust_stored:
            return Steps()
        text = f"robots do not know trust.json {newest} yet: `sop fleet apply {self.folder}` puts it into the store"
        return Steps(todo=(text,))

    def _distrust(self, member: Member) -> Steps:
        """What a member signed counts no more; its own troubles must not undo that it is revoked."""
        try:
            return self._sync_trust(TRUST_DAYS) + self._put_trust()
        except SopError as error:
            text = f"what {member.name} signs still counts, trust.json has no new version: {error}"
            return Steps(todo=(f"{text}; then run `sop fleet apply {self.folder}`",))

    def _put_trust(self) -> Steps:
        """Put the versions of `trust.json` into the store that it lacks; robots take them from there."""
        missing = [version for version in self._roots.versions() if version > self.register.trust_stored]
        if not missing:
            return Steps()
        folder = self.folder / "identities" / RELEASER
        try:
            store = open_store(self.register.store, load_identity(folder))
            for version in missing:
                put_once(store, trust_key(version), self._roots.envelope(version))
        except (SopError, ValueError) as error:
            text = f"the store lacks trust.json {missing[0]} to {missing[-1]}: run `sop fleet apply {self.folder}` when"
            return Steps(todo=(f"{text} it can be written with {folder} ({error})",))
        self.register = save_register(self.folder, replace(self.register, trust_stored=missing[-1]))
        return Steps(done=(f"the store has trust.json {missing[-1]}: robots take it from there",))

    def _authority(self) -> Authority:
        return Authority.load(self.folder / CERTIFICATE, self.folder / KEY, self._clock())

    def _reload_register(self) -> None:
        self.register = load_register(self.folder)


def _signers(register: Register) -> dict[str, list[PublicKey]]:
    """Role of the trust root -> keys of the members that speak for it."""
    found: dict[str, list[PublicKey]] = {}
    for member in register.active():
        if member.signing_key is not None:
            found.setdefault(SIGNS[member.role], []).append(member.signing_key)
    return found
