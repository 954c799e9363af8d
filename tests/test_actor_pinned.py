"""A robot that was told to run one version: it hears of bans, and does not mind that the version is old."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcast_examples import PATIENCE_S, ROBOT
from sop.actor import PinnedPolicy
from sop.broadcast import prepare_with
from sop.broadcast.vetting import NotNow
from sop.core.errors import StoreUnavailable, Untrusted
from sop.testing.clock import FakeClock
from sop.testing.policy import FakePolicy
from trust_examples import DAY_NS, NOW_NS, Fleet, ref, signature

REASON = "policy 1 is banned: it drops things"


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture
def pinned(fleet: Fleet) -> Iterator[PinnedPolicy]:
    fleet.publish_signed(1)
    made = pin(fleet)
    yield made
    made.close()


def pin(fleet: Fleet) -> PinnedPolicy:
    prepare, vetting = (
        prepare_with(lambda _: FakePolicy(ROBOT, action_horizon=16, execution_horizon=8)),
        fleet.vetting(),
    )
    return PinnedPolicy(fleet.store, 1, ROBOT, prepare=prepare, clock=FakeClock(), vetting=vetting, look_every_s=0.005)


def ban(fleet: Fleet, **changes: Any) -> None:
    fleet.order(1, banned={ref(1).manifest_hash: "it drops things"}, **changes)


def wait_for(pinned: PinnedPolicy, ban: str) -> None:
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if pinned._ban == ban:
            return
        pause.wait(0.005)
    raise AssertionError(f"{pinned._ban!r} instead of {ban!r}")


def test_a_ban_ends_a_rollout_at_the_end_of_the_episode(fleet: Fleet, pinned: PinnedPolicy) -> None:
    assert pinned.take() is not None
    assert pinned.take() is None
    ban(fleet)
    wait_for(pinned, REASON)
    assert pinned.must_leave == "", "the episode is ended first"
    with pytest.raises(Untrusted, match=f"{REASON}; this robot was to run no other policy, so it ends"):
        pinned.take()


def test_a_ban_that_takes_effect_at_once_is_obeyed_at_once(fleet: Fleet, pinned: PinnedPolicy) -> None:
    ban(fleet, immediate=True)
    wait_for(pinned, REASON)
    assert pinned.must_leave == REASON


def test_a_store_that_is_away_is_said_and_the_rollout_goes_on(fleet: Fleet, pinned: PinnedPolicy) -> None:
    def away(*_: object) -> None:
        raise StoreUnavailable("away")

    fleet.store.before = away
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if pinned.problem:
            break
        pause.wait(0.005)
    assert pinned.problem == "bans are not heard of: away"
    assert pinned.take() is not None


def test_a_version_that_was_named_may_be_older_than_its_statement_says(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    old = signature(1, issued_utc_ns=NOW_NS - 9 * DAY_NS, expires_utc_ns=NOW_NS - 2 * DAY_NS)
    fleet.publish_signed(1, old)
    with pytest.raises(NotNow, match="its statement has expired"):
        fleet.vetting().admit(ref(1), old)
    with caplog.at_level(logging.WARNING):
        pinned = pin(fleet)
    pinned.close()
    assert "policy 1: its statement has expired on" in pinned.problem
    assert f"{pinned.problem}: it was asked for by its number, so it is taken all the same" in caplog.text
    assert pinned.take() is not None


def test_what_was_named_is_still_refused_for_everything_else(fleet: Fleet) -> None:
    fleet.publish_signed(1, signature(1, "eve"))
    with pytest.raises(Untrusted, match="0 valid signatures"):
        pin(fleet)
