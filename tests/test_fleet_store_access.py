"""A real SeaweedFS over TLS with the configuration that a fleet writes: each role does what it may, nobody more."""

import http.client
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fleet_examples import make_fleet, secrets_of, until
from recovery_times import Recovery
from sop.core.errors import Forbidden, StoreUnavailable
from sop.fleet import Fleet
from sop.fleet.register import save_register
from sop.testing.servers.s3 import S3Server
from sop.transport import ObjectStore, load_identity, open_store
from sop.trust import TrustRoot

pytestmark = pytest.mark.slow
MEMBERS = {"robot-1": "robot", "robot-10": "robot", "lab-0": "robot", "brain": "learner", "judge": "evaluator"}


class Place(SimpleNamespace):
    """A fleet, its store, and a way to be one of its members."""

    fleet: Fleet
    server: S3Server
    url: str

    def store(self, name: str, url: str | None = None) -> ObjectStore:
        return open_store(url or self.url, load_identity(self.fleet.folder / "identities" / name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("f")
    made = make_fleet(folder / "lab", clock=time.time_ns)
    for name, role in {**MEMBERS, "eye": "observer"}.items():
        made.enroll(name, role)
    servers = made.folder / "servers"
    with S3Server(
        folder / "s3", identities=servers / "s3.json", certificate=servers / "s3.pem", key=servers / "s3.key"
    ) as server:
        url = server.url("fleet", "run")
        save_register(made.folder, replace(made.register, store=url))
        fleet = Fleet(made.folder)
        assert server.url("fleet", "run-2")
        brain = open_store(url, load_identity(fleet.folder / "identities" / "brain"))
        for key in ("run.json", "policies/00000000/manifest.json"):
            brain.put(key, b"{}")
        release = open_store(url, load_identity(fleet.folder / "identities" / "release"))
        release.put("channels/train/00000001.json", b"{}")
        for robot in ("robot-1", "robot-10"):
            member = open_store(url, load_identity(fleet.folder / "identities" / robot))
            member.put(f"episodes/{robot}/first", b"recorded")
        yield Place(fleet=fleet, server=server, url=url)


def _refused(action: Callable[[], object]) -> bool:
    try:
        action()
    except Forbidden:
        return True
    return False


def test_a_robot_writes_its_own_episodes_reads_policies_and_nothing_else(place: Place) -> None:
    robot = place.store("robot-1")
    robot.put("episodes/robot-1/second", b"x")
    assert list(robot.keys("episodes/robot-1/")) == ["episodes/robot-1/first", "episodes/robot-1/second"]
    assert robot.get("run.json") == b"{}"
    assert list(robot.keys("policies/")) == ["policies/00000000/manifest.json"]
    assert robot.get("policies/00000000/manifest.json") == b"{}"
    assert robot.get("channels/train/00000001.json") == b"{}"
    for key in (
        "episodes/robot-10/second",
        "episodes/robot-2/second",
        "episodes/stray",
        "demonstrations/robot-1/x",
        "policies/00000001/manifest.json",
        "channels/train/00000002.json",
        "evaluations/00000000/final.json",
        "channels/root/00000009.json",
        "run-2.json",
    ):
        assert _refused(lambda key=key: robot.put(key, b"evil")), key
    assert robot.get("episodes/robot-1/first") == b"recorded"  # to settle an upload whose answer was lost
    for key in ("episodes/robot-10/first", "evaluations/x", "checkpoints/x"):
        assert _refused(lambda key=key: robot.get(key)), key
    for prefix in ("", "episodes/", "episodes/robot-10/", "demonstrations/"):
        assert _refused(lambda prefix=prefix: list(robot.keys(prefix))), prefix
    for key in ("episodes/robot-10/first", "policies/00000000/manifest.json"):
        assert _refused(lambda key=key: robot.delete(key)), key
        assert place.store("brain").get(key)


def test_a_lab_actor_writes_demonstrations_and_no_episodes(place: Place) -> None:
    lab = place.store("lab-0")
    lab.put("demonstrations/lab-0/first", b"x")
    assert _refused(lambda: lab.put("episodes/lab-0/first", b"x"))


def test_the_other_roles_write_what_is_theirs_and_stay_in_their_run(place: Place) -> None:
    writes = {
        "judge": "evaluations/00000000/final.json",
        "release": "channels/prod/00000001.json",
        "brain": "policies/00000001/manifest.json",
        "eye": None,
    }
    for name, own in writes.items():
        store = place.store(name)
        assert store.get("episodes/robot-1/first") == b"recorded", name
        if own is not None:
            store.put(own, b"{}")
        for other in set(writes.values()) - {own, None}:
            evaluates = name == "brain" and other.startswith("evaluations/")
            assert evaluates or _refused(lambda store=store, other=other: store.put(f"{other}.x", b"")), (name, other)
        if name != "brain":
            assert _refused(lambda store=store: store.delete("policies/00000000/manifest.json")), name
        assert _refused(lambda store=store: store.put("episodes/robot-1/forged", b"")), name
        beside = place.store(name, place.url.replace("/run?", "/run-2?"))
        assert _refused(lambda beside=beside: beside.put("run.json", b"")), name
        assert _refused(lambda beside=beside: list(beside.keys(""))), name


def test_strangers_and_wrong_secrets_are_refused(place: Place, tmp_path: Path) -> None:
    unsigned = http.client.HTTPSConnection(
        "127.0.0.1", place.server.port, context=ssl.create_default_context(cafile=str(place.fleet.folder / "ca.pem"))
    )
    unsigned.request("GET", "/fleet/run/run.json")
    assert unsigned.getresponse().status == 403
    unsigned.close()
    stranger = make_fleet(tmp_path / "other", clock=time.time_ns)
    stranger.enroll("robot-1", "robot")
    forged = stranger.folder / "identities" / "robot-1"
    (forged / "ca.pem").write_bytes(place.fleet.authority_pem())
    assert _refused(lambda: open_store(place.url, load_identity(forged)).put("episodes/robot-1/forged", b"x"))


def test_a_member_refuses_a_server_of_another_authority_and_one_without_tls(place: Place, tmp_path: Path) -> None:
    stranger = make_fleet(tmp_path / "other", clock=time.time_ns)
    with pytest.raises(StoreUnavailable, match="its certificate is"):
        open_store(place.url, load_identity(stranger.folder / "identities" / "release")).get("run.json")
    with pytest.raises(StoreUnavailable):
        place.store("brain", place.url.replace("https://", "http://")).get("run.json")


def test_a_revoked_robot_is_refused_while_the_others_go_on_and_comes_back_with_new_keys_alone(
    place: Place, recovery: Recovery
) -> None:
    fleet = place.fleet
    fleet.enroll("robot-3", "robot")
    old = place.store("robot-3")
    until(lambda: not _refused(lambda: old.put("episodes/robot-3/first", b"x")), "the server has read of robot-3")
    recovery.fault_is_over()
    steps = fleet.revoke("robot-3", "stolen from the truck", from_sequence=1)
    assert any("weed" in text for text in steps.done)
    until(lambda: _refused(lambda: old.put("episodes/robot-3/second", b"x")), "robot-3 is refused")
    recovery.whole("the store refuses it")
    assert _refused(lambda: old.get("policies/00000000/manifest.json"))
    assert _refused(lambda: list(old.keys("episodes/robot-3/")))
    place.store("robot-1").put("episodes/robot-1/meanwhile", b"x")
    (fleet.folder / "identities" / "robot-3").rename(fleet.folder / "identities" / "kept-by-a-thief")
    fleet.enroll("robot-3", "robot", again=True)
    until(lambda: not _refused(lambda: place.store("robot-3").put("episodes/robot-3/third", b"x")), "it is back")
    thief = open_store(place.url, load_identity(fleet.folder / "identities" / "kept-by-a-thief"))
    assert _refused(lambda: thief.put("episodes/robot-3/fourth", b"x"))
    fleet.revoke("robot-3", "again")
    until(lambda: _refused(lambda: place.store("robot-3").put("episodes/robot-3/fifth", b"x")), "revoked twice")
    assert fleet.register.former[0].revoked is not None
    assert fleet.register.former[0].revoked.from_sequence == 1


def test_apply_puts_every_trust_root_into_the_store_where_robots_follow_it(place: Place) -> None:
    place.fleet.apply()
    robot, first = place.store("robot-1"), place.fleet.folder / "trust" / "00000001.json"
    found = list(robot.keys("channels/root/"))
    assert found[:2] == ["channels/root/00000001.json", "channels/root/00000002.json"]
    root = TrustRoot.load(first)
    for key in found[1:]:
        root = root.successor(robot.get(key))
    assert root.to_json() == TrustRoot.load(place.fleet.folder / "trust" / Path(found[-1]).name).to_json()
    before = place.fleet.register.version
    assert place.fleet.apply().todo[1:] == ()
    assert place.fleet.register.version == before, "nothing new, nothing written"


def test_no_secret_is_in_a_log_or_on_a_command_line(place: Place) -> None:
    secrets = secrets_of(place.fleet.folder)
    place.server.shell("s3.bucket.list")
    logs = [path for path in (place.fleet.folder.parent / "s3").iterdir() if path.is_file() and path.suffix != ".db"]
    texts = [path.read_text(errors="replace") for path in logs]
    texts.append(Path(f"/proc/{place.server.pid}/cmdline").read_text())
    texts.append(Path(f"/proc/{place.server.pid}/environ").read_text())
    assert len(logs) > 1
    assert not [secret for secret in secrets for text in texts if secret in text]
