"""What an administrator does with a fleet's folder: enroll, revoke, renew, and what goes wrong."""

import json
import os
import stat
from pathlib import Path

import pytest

from fleet_examples import DAY, NOW, STORE, make_fleet
from sop.core.errors import RunError
from sop.fleet import Fleet, Register, load_register
from sop.fleet.authority import expires_utc_ns, public_of
from sop.fleet.identities import StoreKeys, read_store_keys
from sop.transport import load_identity
from sop.trust import CANDIDATE, RELEASE, ROOT, SigningKey, TrustRoot


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return make_fleet(tmp_path / "lab")


def _root(fleet: Fleet) -> TrustRoot:
    return TrustRoot.load(max((fleet.folder / "trust").glob("*.json")))


def test_an_identity_folder_is_complete_and_its_secrets_are_for_its_owner(fleet: Fleet) -> None:
    fleet.enroll("brain", "learner")
    folder = fleet.folder / "identities" / "brain"
    identity = load_identity(folder)
    assert (identity.record.fleet, identity.record.name, identity.record.role) == ("lab", "brain", "learner")
    assert (identity.record.store, identity.record.bus) == (fleet.register.store, fleet.register.bus)
    assert identity.record.access_key == fleet.register.member("brain").access_key
    assert len(identity.store_secret()) == 60
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        **dict.fromkeys(("identity.json", "ca.pem", "certificate.pem", "trust.json"), 0o644),
        **dict.fromkeys(("key.pem", "nats.nk", "store_secret", "signing.pem"), 0o600),
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert SigningKey.load(identity.signing_key).public == fleet.register.member("brain").signing_key
    fleet.enroll("robot-1", "robot")
    assert not (fleet.folder / "identities" / "robot-1" / "signing.pem").exists(), "a robot signs nothing"


def test_the_folder_is_private_and_refused_when_others_can_enter(fleet: Fleet) -> None:
    assert stat.S_IMODE(fleet.folder.stat().st_mode) == 0o700
    secret = [path for path in fleet.folder.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert len(secret) == 6, "authority, root, bus, store, and two of the member release"
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
    for mode in (0o750, 0o705, 0o701):
        fleet.folder.chmod(mode)
        with pytest.raises(RunError, match="chmod 700"):
            Fleet(fleet.folder)
    fleet.folder.chmod(0o700)
    (fleet.folder / "ca.key").chmod(0o640)
    with pytest.raises(RunError, match="chmod 600"):
        fleet.enroll("robot-1", "robot")


def test_the_register_holds_no_secret(fleet: Fleet) -> None:
    fleet.enroll("brain", "learner")
    identity = load_identity(fleet.folder / "identities" / "brain")
    text = (fleet.folder / "fleet.json").read_text()
    assert identity.store_secret() not in text
    assert identity.bus_seed.read_text() not in text
    assert "PRIVATE" not in text


def test_names_are_enrolled_once_and_again_only_when_it_is_said(fleet: Fleet) -> None:
    fleet.enroll("robot-1", "robot")
    first = load_identity(fleet.folder / "identities" / "robot-1")
    before = (first.store_secret(), first.bus_seed.read_text(), first.key.read_text())
    with pytest.raises(RunError, match="robot-1 is enrolled as robot"):
        fleet.enroll("robot-1", "robot", again=True)
    fleet.revoke("robot-1", "lost", from_sequence=17)
    with pytest.raises(RunError, match=r"was revoked \(lost\): --again"):
        fleet.enroll("robot-1", "robot")
    fleet.enroll("robot-1", "robot", again=True)
    second = load_identity(fleet.folder / "identities" / "robot-1")
    after = (second.store_secret(), second.bus_seed.read_text(), second.key.read_text())
    assert all(old != new for old, new in zip(before, after, strict=True))
    register = load_register(fleet.folder)
    assert register.member("robot-1").revoked is None
    assert [(old.name, old.revoked and old.revoked.from_sequence) for old in register.former] == [("robot-1", 17)]


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a b", "*", ">", "a" * 64, "anyone", "servers", "trust", "é"])
def test_names_that_mean_something_to_a_server_are_refused(fleet: Fleet, name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        fleet.enroll(name, "robot")


def test_unknown_names_roles_and_days_are_refused_in_words(fleet: Fleet, tmp_path: Path) -> None:
    for action, why in [
        (lambda: fleet.revoke("robot-9", "x"), "nobody in fleet lab is called 'robot-9'; there are: release"),
        (lambda: fleet.renew("robot-9"), "nobody in fleet lab is called 'robot-9'"),
        (lambda: Fleet(tmp_path / "nowhere"), "is not the folder of a fleet"),
        (lambda: make_fleet(fleet.folder), "exists: a fleet's folder is made new"),
        (lambda: fleet.enroll("robot-1", "robot", out=tmp_path), "exists: name a new folder"),
    ]:
        with pytest.raises(RunError, match=why):
            action()
    with pytest.raises(ValueError, match="role 'boss' is none of"):
        fleet.enroll("robot-1", "boss")
    for days in (0, -1, 3651):
        with pytest.raises(ValueError, match="days must be in"):
            fleet.enroll("robot-1", "robot", days=days)
    assert sorted(load_register(fleet.folder).members) == ["release"]


@pytest.mark.parametrize(
    ("store", "bus", "why"),
    [
        ("file:///tmp/x", "tls://a:1/r", "a folder knows no identities"),
        ("s3://b/run?endpoint=http://example.org:1", "tls://a:1/r", "http"),
        ("s3://bucket/ru*n", "tls://a:1/r", "characters other than"),
        (STORE, "nats://127.0.0.1:4222/run", "tls://host:port/namespace"),
        (STORE, "tls://example.org/run", "tls://host:port/namespace"),
        (STORE, "tls://example.org:4222/a.b", "namespace"),
        (STORE, "tls://user:hunter2@example.org:4222/run", "without a password"),
        ("s3://key:hunter2@b/run", "tls://a:1/r", "must not carry credentials"),
    ],
)
def test_urls_that_cannot_be_a_fleets_are_refused_without_repeating_a_password(
    tmp_path: Path, store: str, bus: str, why: str
) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        make_fleet(tmp_path / "lab", store=store, bus=bus)
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "lab").exists()


def test_who_signs_is_in_the_trust_root_until_it_is_revoked(fleet: Fleet) -> None:
    first = _root(fleet)
    releaser = fleet.register.member("release").signing_key
    assert releaser is not None
    assert first.roles[RELEASE].key_ids == (releaser.key_id,)
    assert first.roles[CANDIDATE] == first.roles[ROOT], "nobody learns yet: the role is the root key's"
    fleet.enroll("robot-1", "robot")
    assert _root(fleet) == first, "a robot signs nothing"
    fleet.enroll("brain", "learner")
    second, brain = _root(fleet), fleet.register.member("brain").signing_key
    assert brain is not None
    assert (second.version, second.roles[CANDIDATE].key_ids) == (first.version + 1, (brain.key_id,))
    assert first.successor((fleet.folder / "trust" / f"{second.version:08d}.json").read_bytes()) == second
    assert TrustRoot.load(fleet.folder / "identities" / "brain" / "trust.json") == second
    fleet.revoke("robot-1", "x")
    assert _root(fleet) == second
    fleet.revoke("brain", "x")
    third = _root(fleet)
    assert third.version == second.version + 1
    assert brain.key_id not in third.keys
    assert third.roles[CANDIDATE] == first.roles[ROOT]


def test_a_revocation_holds_although_the_root_key_is_away(fleet: Fleet) -> None:
    fleet.enroll("brain", "learner")
    before = _root(fleet)
    (fleet.folder / "keys" / "root.pem").rename(fleet.folder.parent / "stick.pem")
    steps = fleet.revoke("brain", "stolen")
    assert any("what brain signs still counts" in text for text in steps.todo)
    assert load_register(fleet.folder).member("brain").revoked is not None
    assert _root(fleet) == before
    (fleet.folder.parent / "stick.pem").rename(fleet.folder / "keys" / "root.pem")
    fleet.apply()
    assert _root(fleet).version == before.version + 1, "apply makes up for it"


def test_renewing_keeps_the_key_and_moves_the_end(fleet: Fleet) -> None:
    fleet.enroll("robot-1", "robot", days=5)
    folder = fleet.folder / "identities" / "robot-1"
    before = (folder / "certificate.pem").read_bytes()
    later = Fleet(fleet.folder, clock=lambda: NOW + 4 * DAY)
    later.renew("robot-1")
    after = (folder / "certificate.pem").read_bytes()
    assert public_of(after).public_numbers() == public_of(before).public_numbers()
    assert expires_utc_ns(after) == NOW + 94 * DAY == load_register(fleet.folder).member("robot-1").expires_utc_ns
    servers = dict(later.server_certificates())
    later.renew("servers", days=30)
    for name, pem in later.server_certificates().items():
        assert public_of(pem).public_numbers() == public_of(servers[name]).public_numbers()
        assert expires_utc_ns(pem) == NOW + 34 * DAY
    version = _root(fleet).version
    later.renew("trust", days=700)
    assert (_root(fleet).version, _root(fleet).expires_utc_ns) == (version + 1, NOW + 704 * DAY)
    later.revoke("robot-1", "x")
    with pytest.raises(RunError, match="robot-1 is revoked"):
        later.renew("robot-1")


def test_a_crash_while_enrolling_is_repaired_by_enrolling_again(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("hand_out", "save_register"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sop.fleet.fleet.{name}", crash)
            with pytest.raises(KeyboardInterrupt):
                fleet.enroll("brain", "learner")
        assert "brain" not in load_register(fleet.folder).members
    fleet.enroll("brain", "learner")
    identity = load_identity(fleet.folder / "identities" / "brain")
    assert [path.name for path in (fleet.folder / "identities").iterdir() if path.name.startswith(".")] == []
    assert _root(fleet).roles[CANDIDATE].key_ids == (SigningKey.load(identity.signing_key).key_id,)
    secrets = json.loads((fleet.folder / "store_secrets.json").read_bytes())
    assert secrets["brain"] == identity.store_secret()


def test_one_administrator_at_a_time(fleet: Fleet) -> None:
    from sop.fleet.files import alone

    with alone(fleet.folder), pytest.raises(RunError, match="another `sop fleet` works in"):
        fleet.enroll("robot-1", "robot")
    fleet.enroll("robot-1", "robot")


def test_registers_of_another_format_or_damaged_are_refused(fleet: Fleet) -> None:
    path = fleet.folder / "fleet.json"
    good = json.loads(path.read_bytes())
    for text, why in [
        (json.dumps({**good, "schema_version": 2}), "has format 2, this version of sop knows 1"),
        ("{", "is damaged"),
        (json.dumps({**good, "members": 3}), "is damaged"),
    ]:
        path.write_text(text)
        with pytest.raises(RunError, match=why):
            Fleet(fleet.folder)


def test_a_register_is_replaced_whole(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (fleet.folder / "fleet.json").read_bytes()

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        fleet.revoke("release", "x")
    assert (fleet.folder / "fleet.json").read_bytes() == before
    assert not list(fleet.folder.glob(".fleet.json.*"))


def test_a_store_of_others_makes_the_credentials_itself(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "lab", store="s3://bucket/run", store_admin="manual")
    assert fleet.register.member("release").access_key == ""
    file = tmp_path / "robot-1.keys"
    file.write_text("AKIAEXAMPLE\nvery-secret\n")
    keys = read_store_keys(file)
    assert "very-secret" not in repr(keys)
    fleet.enroll("robot-1", "robot", store_keys=keys)
    identity = load_identity(fleet.folder / "identities" / "robot-1")
    assert (identity.record.access_key, identity.store_secret()) == ("AKIAEXAMPLE", "very-secret")
    assert "very-secret" not in (fleet.folder / "store_secrets.json").read_text()
    file.write_text("only-one-very-secret-word")
    with pytest.raises(RunError, match="must have two lines") as caught:
        read_store_keys(file)
    assert "very-secret" not in str(caught.value)
    ours = make_fleet(tmp_path / "own")
    with pytest.raises(RunError, match="makes the store's credentials itself"):
        ours.enroll("robot-1", "robot", store_keys=StoreKeys())


def test_an_unknown_kind_of_store_is_refused(tmp_path: Path) -> None:
    register = Register(fleet="lab", store=STORE, bus="tls://a:1/r", store_admin="magic", servers="/x", days=90)
    with pytest.raises(ValueError, match="store admin 'magic' is none of manual, seaweedfs"):
        Fleet.create(tmp_path / "lab", register)
