"""`sop policy` on a run with a signed channel: orders from the first promotion to a ban."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sop.commands.policy import add_commands
from sop.core import layout
from sop.core.channel import PROD
from sop.core.errors import RunError
from sop.presets import make_config
from sop.runs import Run, create_run
from sop.transport.identity import IdentityRecord
from sop.trust import Role, SigningKey, TrustRoot
from sop.trust.root import ROLES

Order = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with three published manifests, and the identity of a release manager."""
    made = create_run(tmp_path / "run", make_config("debug"))
    for version in range(3):
        made.store.put(layout.policy_manifest(version), b"manifest %d" % version)
    folder = tmp_path / "identity"
    folder.mkdir(mode=0o700)
    key = SigningKey.generate()
    key.save(folder / "signing.pem")
    roles = dict.fromkeys(ROLES, Role(key_ids=(key.key_id,), threshold=1))
    root = TrustRoot(
        fleet="f", version=1, expires_utc_ns=time.time_ns() + 10**15, keys={key.key_id: key.public}, roles=roles
    )
    (folder / "trust.json").write_bytes(root.sealed([key]))
    record = IdentityRecord(fleet="f", name="ada", role="release", store=str(tmp_path), bus="")
    (folder / "identity.json").write_bytes(msgspec.json.encode(record))
    for name in ("ca.pem", "certificate.pem", "key.pem"):
        (folder / name).touch(mode=0o600)
    monkeypatch.setenv("SOP_IDENTITY", str(folder))
    return made


def order(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    options = parser.parse_args(["policy", *words])
    done: int = options.command(options)
    return done


def test_a_promotion_a_rollback_and_a_ban_leave_three_signed_states(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(run.folder)
    assert order("promote", place, "0") == 0
    assert order("promote", place, "1", "--why", "better on Monday") == 0
    assert order("rollback", place, "--why", "worse on Tuesday") == 0
    assert order("ban", place, "2", "--why", "wrong data") == 0
    assert len(list(run.store.keys(f"{layout.CHANNELS}/{PROD}/"))) == 4
    capsys.readouterr()
    order("list", place)
    zero, one, two = capsys.readouterr().out.splitlines()
    assert zero.endswith("stable")
    assert one.endswith("banned: worse on Tuesday")
    assert two.endswith("banned: wrong data")
    order("status", place)
    assert capsys.readouterr().out.startswith("state 4: policy 0; policy 2 banned: wrong data")


def test_a_canary_needs_recorded_episodes_and_robots(run: Run) -> None:
    place = str(run.folder)
    order("promote", place, "0")
    with pytest.raises(RunError, match="as many robots to compare with"):
        order("canary", place, "1")
    with pytest.raises(Exception, match="stays in the lab: there is no recorded episode to replay"):
        order("canary", place, "1", "--robots", "r1,r2")
    with pytest.raises(ValueError, match="name a version"):
        order("canary", place)


def test_orders_that_cannot_be_carried_out_say_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(run.folder)
    with pytest.raises(RunError, match="policy 9 is not published"):
        order("promote", place, "9")
    with pytest.raises(ValueError, match="name a run, or a robot's folder"):
        order("rollback")
    with pytest.raises(RunError, match="no folder"):
        order("rollback", "--robot", place + "-missing")
    with pytest.raises(RunError, match="keeps no policy to go back to"):
        order("rollback", "--robot", place)
    monkeypatch.delenv("SOP_IDENTITY")
    with pytest.raises(RunError, match="orders are signed"):
        order("promote", place, "0")


def test_who_cannot_sign_can_look_but_not_order(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order("promote", str(run.folder), "0")
    (tmp_path / "identity" / "signing.pem").unlink()
    assert order("status", str(run.folder)) == 0
    with pytest.raises(RunError, match="signs no channels"):
        order("promote", str(run.folder), "1")
