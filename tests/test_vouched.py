"""Whoever trains or judges a policy believes what is signed for it, as robots do."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from sop import vouched
from sop.core import layout
from sop.core.errors import Untrusted
from sop.runs import Run
from sop.vouched import fetch_vouched
from trust_examples import RUN, Fleet, ref, signature, trust_json


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """A store with policy 0, signed; this process has an identity with a `trust.json`."""
    (tmp_path / "trust.json").write_bytes(trust_json())
    monkeypatch.setattr(vouched, "own_identity", lambda: SimpleNamespace(trust=tmp_path / "trust.json"))
    made = Fleet(tmp_path)
    made.place_signed(0)
    return made


def run_of(fleet: Fleet, name: str = RUN) -> Run:
    return cast("Run", SimpleNamespace(store=fleet.store, manifest=SimpleNamespace(name=name)))


def test_a_policy_that_is_vouched_for_is_fetched(fleet: Fleet) -> None:
    assert fetch_vouched(run_of(fleet), 0)[0].version == 0


def test_a_policy_without_a_signature_is_refused_by_who_knows_whom_to_believe(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.store.delete(layout.policy_signature(0))
    with pytest.raises(Untrusted, match="policy 0 is not signed"):
        fetch_vouched(run_of(fleet), 0)
    monkeypatch.setattr(vouched, "own_identity", lambda: None)
    assert fetch_vouched(run_of(fleet), 0)[0].version == 0, "on one machine nobody signs"


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (signature(0, "stranger"), "not vouched for by the role 'candidate'"),
        (signature(0, run="another"), "is for policy 0 of run 'another'"),
        (signature(0, policy=ref(1)), "is for policy 1 of run"),
    ],
    ids=["another key", "another run", "another version"],
)
def test_a_signature_of_something_else_is_refused(fleet: Fleet, envelope: bytes, reason: str) -> None:
    fleet.store.tamper(layout.policy_signature(0), envelope)
    with pytest.raises(Untrusted, match=reason):
        fetch_vouched(run_of(fleet), 0)


def test_a_policy_of_another_run_is_refused(fleet: Fleet) -> None:
    with pytest.raises(Untrusted, match="here is run 'run-2'"):
        fetch_vouched(run_of(fleet, "run-2"), 0)
