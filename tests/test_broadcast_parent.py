"""Which version a training goes on from after a restart: never one of a branch that ended."""

import logging

import pytest

from broadcast_examples import policy
from sop.broadcast.fetch import parent_at
from sop.core import layout
from sop.testing.memory import MemoryStore


def store_with(*versions: tuple[int, int | None, int]) -> MemoryStore:
    """Manifests of (version, parent, learner step)."""
    store = MemoryStore()
    for version, parent, step in versions:
        manifest, _ = policy(version, parent_version=parent, learner_step=step)
        store.put(layout.policy_manifest(version), manifest.to_json())
    return store


FIRST_LIFE = [(0, None, 400), (1, 0, 25), (2, 1, 50), (3, 2, 75)]


def test_the_parent_is_not_younger_than_the_checkpoint() -> None:
    store = store_with(*FIRST_LIFE)
    assert parent_at(store, [0, 1, 2, 3], 50, (2, 2)) == (2, 50)
    assert parent_at(store, [0, 1, 2, 3], 60, (2, 3)) == (2, 50)


def test_before_the_first_version_it_is_the_base_whose_steps_are_of_another_kind() -> None:
    assert parent_at(store_with(*FIRST_LIFE), [0, 1, 2, 3], 10, (0, 0)) == (0, 0)
    assert parent_at(MemoryStore(), [], 10) is None


def test_a_snapshot_that_waited_while_the_checkpoint_was_made_is_the_parent_once_it_is_written() -> None:
    """At step 75 version 3 was handed over, then the checkpoint was made, then version 3 was written."""
    assert parent_at(store_with(*FIRST_LIFE), [0, 1, 2, 3], 75, (2, 2)) == (3, 75)


def test_a_branch_that_ended_is_no_parent_even_with_a_fitting_step() -> None:
    """The first life published 1 to 3 and died; the second went on from version 1, published 4, made a checkpoint at
    its step 75 before anything else of it was in the store, and died."""
    store = store_with(*FIRST_LIFE, (4, 1, 50))
    assert parent_at(store, [0, 1, 2, 3, 4], 75, (4, 4)) == (4, 50)
    late = store_with(*FIRST_LIFE, (4, 1, 50), (5, 2, 75))
    assert parent_at(late, [0, 1, 2, 3, 4, 5], 75, (4, 4)) == (4, 50)


def test_a_twin_of_a_branch_that_ended_is_told_by_what_was_there_then() -> None:
    """The second life went on from version 1 as the first had, and nothing of it reached the store."""
    assert parent_at(store_with(*FIRST_LIFE), [0, 1, 2, 3], 75, (1, 3)) == (1, 25)


def test_a_manifest_that_a_power_cut_tore_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    store = store_with(*FIRST_LIFE)
    store.tamper(layout.policy_manifest(3), b"")
    with caplog.at_level(logging.WARNING):
        assert parent_at(store, [0, 1, 2, 3], 90) == (2, 50)
    assert "policy 3 is passed over" in caplog.text
