"""`sop fleet` as an administrator types it; nothing that it says is a secret."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleet_examples import BUS, STORE, secrets_of
from sop.core.errors import RunError
from sop.fleet.command import add_commands


def _sop(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    options = parser.parse_args(["fleet", *map(str, words)])
    return int(options.command(options))


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    assert _sop("init", tmp_path / "lab", "--name", "lab", "--store", STORE, "--bus", BUS) == 0
    return tmp_path / "lab"


def test_a_fleet_from_beginning_to_end_without_a_secret_on_the_screen(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _sop("enroll", lab, "robot-1", "--out", tmp_path / "handed" / "robot-1") == 0
    assert _sop("enroll", lab, "brain", "--role", "learner", "--days", 7) == 0
    secrets = secrets_of(lab, tmp_path / "handed")
    assert _sop("list", lab) == 0
    assert _sop("revoke", lab, "robot-1", "--why", "stolen", "--from-sequence", 12) == 1, "no server of ours runs here"
    assert _sop("renew", lab, "brain", "--days", 30) == 0
    assert _sop("renew", lab, "servers") == 0
    assert _sop("configs", lab, "--listen", "192.0.2.1") == 0
    assert _sop("enroll", lab, "robot-1", "--again") == 0
    assert _sop("list", lab, "--json") == 0
    said = "".join(capsys.readouterr())
    assert "kill -HUP" in said
    assert "done   robot-1 is revoked" in said
    assert not [secret for secret in secrets | secrets_of(lab) if secret in said]


def test_the_list_says_who_belongs_until_when_and_who_does_no_more(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _sop("enroll", lab, "robot-1", "--days", 5)
    _sop("enroll", lab, "robot-2")
    _sop("revoke", lab, "robot-2", "--why", "left the building")
    capsys.readouterr()
    _sop("list", lab, "--json")
    found = json.loads(capsys.readouterr().out)
    states = {entry["name"]: entry["state"] for entry in found["entries"]}
    assert states == {
        "release": "active",
        "robot-1": "ends soon",
        "robot-2": "revoked",
        "nats.pem": "active",
        "s3.pem": "active",
        "trust.json": "active",
        "ca.pem": "active",
    }
    _sop("list", lab)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["release", "robot-1", "robot-2"]
    assert lines[3].endswith("left the building")


def test_an_expired_certificate_is_called_so(lab: Path) -> None:
    from sop.fleet import Fleet
    from sop.fleet.listing import entries

    day = 24 * 3600 * 10**9
    now = Fleet(lab).now_utc_ns()
    later = Fleet(lab, clock=lambda: now + 400 * day)
    states = {entry.name: entry.state for entry in entries(later)}
    assert states["release"] == states["nats.pem"] == states["trust.json"] == "expired"
    assert states["ca.pem"] == "active"


def test_half_of_a_given_authority_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given together"):
        _sop("init", tmp_path / "lab", "--name", "lab", "--store", STORE, "--bus", BUS, "--ca-cert", tmp_path / "x")
    assert not (tmp_path / "lab").exists()


def test_servers_elsewhere_are_named_by_their_whole_path_and_not_signalled_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("init", tmp_path / "lab", "--name", "lab", "--store", STORE, "--bus", BUS, "--servers")
    with pytest.raises(ValueError, match="the whole path"):
        _sop(*words, "etc/sop")
    assert _sop(*words, "/etc/sop") == 0
    conf = (tmp_path / "lab" / "servers" / "nats.conf").read_text()
    assert 'cert_file: "/etc/sop/nats.pem"' in conf
    assert str(tmp_path) not in conf
    assert f"bring the files of {tmp_path}/lab/servers into that folder" in capsys.readouterr().out


def test_what_cannot_be_done_is_said_in_words(lab: Path) -> None:
    with pytest.raises(RunError, match="nobody in fleet lab is called 'robot-9'"):
        _sop("revoke", lab, "robot-9", "--why", "x")


def test_parsing_loads_nothing_heavy() -> None:
    heavy = "{'cryptography', 'obstore', 'nats', 'torch'}"
    code = f"import sop.fleet.command, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
