"""Who may vouch for what, how that changes, and what a robot remembers of it."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sop.core.channel import STATEMENT_TYPE
from sop.core.codec import content_hash
from sop.core.errors import InvalidRecord, RunError, Untrusted
from sop.trust import CANDIDATE, RELEASE, Role, TrustMemory, TrustRoot, cosign
from sop.trust.memory import KEPT
from trust_examples import RUN, key, ref, root, signature, statement, trust_json


def test_a_root_is_read_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "trust.json"
    path.write_bytes(trust_json())
    assert TrustRoot.load(path) == root()
    path.write_bytes(trust_json()[:-1])
    with pytest.raises(RunError, match="says nothing about whom to believe"):
        TrustRoot.load(path)
    with pytest.raises(RunError, match=r"missing\.json"):
        TrustRoot.load(tmp_path / "missing.json")


def test_a_root_that_its_own_keys_did_not_sign_is_no_root() -> None:
    with pytest.raises(Untrusted, match="role 'root' of trust root 1"):
        TrustRoot.open(root().sealed([key("eve")]))
    two = root(names={"root": ("root", "root-b")}, thresholds={"root": 2})
    with pytest.raises(Untrusted, match="1 valid signatures of the 2"):
        TrustRoot.open(two.sealed([key("root")]))
    assert TrustRoot.open(two.sealed([key("root"), key("root-b")])) == two
    with pytest.raises(ValueError, match="by one key at least"):
        two.sealed([])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 0}, "version"),
        ({"expires_utc_ns": 0}, "version"),
        ({"schema_version": 2}, "schema_version"),
        ({"roles": {}}, "roles"),
        ({"roles": root().roles | {"root": Role((), 0)}}, r"roles\.root"),
        ({"roles": root().roles | {"root": Role((key("root").key_id,) * 2, 2)}}, r"roles\.root: names a key twice"),
        ({"roles": root().roles | {"root": Role((key("eve").key_id,), 1)}}, r"roles\.root"),
        ({"roles": root().roles | {"root": Role((key("root").key_id,), 2)}}, r"roles\.root: 2 of 1 keys"),
        ({"keys": {"x": key("root").public}}, "keys"),
    ],
)
def test_a_root_that_makes_no_sense_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRecord, match=field):
        replace(root(), **change)


def test_roles_do_not_stand_in_for_one_another() -> None:
    assert root().vouched(signature(1), STATEMENT_TYPE, CANDIDATE)
    with pytest.raises(Untrusted, match="role 'release' of trust root 1"):
        root().vouched(signature(1), STATEMENT_TYPE, RELEASE)
    with pytest.raises(Untrusted, match="role 'candidate'"):
        root().vouched(signature(1, "release"), STATEMENT_TYPE, CANDIDATE)


def test_the_next_root_needs_the_keys_of_both() -> None:
    following = root(2, {"root": ("root-2",), "candidate": ("learner-2",)})
    handed_over = following.sealed([key("root"), key("root-2")])
    assert root().successor(handed_over) == following
    with pytest.raises(Untrusted, match="role 'root' of trust root 2"):
        root().successor(following.sealed([key("root")]))
    with pytest.raises(Untrusted, match="role 'root' of trust root 1"):
        root().successor(following.sealed([key("root-2")]))
    with pytest.raises(Untrusted, match="role 'root' of trust root 1"):
        root().successor(cosign(following.sealed([key("root-2")]), key("learner")))
    with pytest.raises(Untrusted, match="role 'candidate' of trust root 2"):
        following.vouched(signature(1), STATEMENT_TYPE, CANDIDATE)


@pytest.mark.parametrize("version", [1, 3])
def test_roots_follow_one_by_one(version: int) -> None:
    with pytest.raises(Untrusted, match=f"trust root {version} of fleet 'lab' does not follow version 1"):
        root().successor(trust_json(version=version))


def test_the_root_of_another_fleet_does_not_follow() -> None:
    with pytest.raises(Untrusted, match="fleet 'other' does not follow version 1 of 'lab'"):
        root().successor(trust_json(version=2, fleet="other"))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300), start=st.booleans())
def test_whatever_a_root_key_signs_is_a_root_or_refused(data: bytes, start: bool) -> None:
    payload = root().to_json()[: len(data)] + data if start else data
    with pytest.raises(Untrusted, match="not a trust root"):
        TrustRoot.open(key("root").sign("application/vnd.sop.root+json", payload))


def test_memory_survives_a_restart_and_never_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "memory"
    memory = TrustMemory(path, RUN)
    memory.remember_root(2, b"two")
    memory.remember_state("train", 7, b"seven", 70)
    for version in (3, 4):
        memory.remember_policy(statement(version), 60)
    for again in (memory, TrustMemory(path, RUN)):
        again.remember_root(1, b"one")
        again.remember_state("train", 7, b"other", 90)
        again.remember_state("train", 6, b"six", 90)
        assert (again.content.root_version, again.content.root) == (2, b"two")
        assert again.content.states["train"].envelope == b"seven"
        assert [known.policy for known in again.content.accepted] == [ref(3), ref(4)]
        assert again.content.newest_utc_ns == 70
        assert again.problem == ""
    assert [path.name for path in path.parent.iterdir()] == ["memory"]


def test_the_last_accepted_policy_is_the_last_and_their_number_is_bounded(tmp_path: Path) -> None:
    memory = TrustMemory(tmp_path / "memory", RUN)
    for version in (*range(KEPT + 3), 5):
        memory.remember_policy(statement(version), 1)
    versions = [known.policy.version for known in TrustMemory(tmp_path / "memory", RUN).content.accepted]
    assert versions == [3, 4, *range(6, KEPT + 3), 5]
    assert memory.accepted(ref(5))
    assert not memory.accepted(ref(0))


def test_a_memory_of_another_run_is_refused(tmp_path: Path) -> None:
    TrustMemory(tmp_path / "memory", RUN).remember_root(1, b"one")
    with pytest.raises(RunError, match="remembers run 'run-1', not 'run-2'"):
        TrustMemory(tmp_path / "memory", "run-2")


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_memory_says_so_and_is_left_as_it_is(
    position: int, bit: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("memory") / "memory"
    TrustMemory(path, RUN).remember_policy(statement(3), 60)
    data = bytearray(path.read_bytes())
    position %= len(data)
    data[position] ^= 1 << bit
    path.write_bytes(data[:position] if cut else data)
    damaged = path.read_bytes()
    memory = TrustMemory(path, RUN)
    assert "does not know any more what it has seen" in memory.problem
    assert "delete the file" in memory.problem
    memory.remember_policy(statement(4), 60)
    assert path.read_bytes() == damaged, "what a person has to look at is not overwritten"
    assert memory.content.accepted == ()


def test_a_memory_of_a_newer_program_is_damaged_for_this_one(tmp_path: Path) -> None:
    memory = TrustMemory(tmp_path / "memory", RUN)
    data = msgspec.json.encode(replace(memory.content, schema_version=2))
    (tmp_path / "memory").write_bytes(content_hash(data).encode() + b"\n" + data)
    assert "schema 2 is that of another program" in TrustMemory(tmp_path / "memory", RUN).problem


def test_a_disk_that_refuses_is_said_and_tried_again(tmp_path: Path) -> None:
    memory = TrustMemory(tmp_path / "spool" / "memory", RUN)
    (tmp_path / "spool").write_bytes(b"a file where the folder should be")
    memory.remember_root(1, b"one")
    assert "cannot be written" in memory.problem
    assert memory.content.root_version == 1, "known as long as the process lives"
    (tmp_path / "spool").unlink()
    assert memory.problem == ""
    assert TrustMemory(tmp_path / "spool" / "memory", RUN).content.root == b"one"
