"""Channels: what robots run is an order with a number, signed by another key than the policy."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadcast_examples import PATIENCE_S, eventually
from sop.broadcast import newest_state, open_state, publish_root, publish_state
from sop.core import layout
from sop.core.channel import CHANNEL_TYPE, PROD, TRAIN, encode_record
from sop.core.errors import RunError, StoreUnavailable, Untrusted
from sop.core.events import TOPIC_POLICIES, ChannelChanged, decode_event
from trust_examples import DAY_NS, ROBOT_NAME, RUN, Fleet, key, ref, root, signature, state, trust_json


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    for subscriber in fleet.subscribers:
        subscriber.close()


def ban(version: int) -> dict[str, str]:
    return {ref(version).manifest_hash: "it drops things"}


def test_a_state_is_put_once_and_announced(fleet: Fleet) -> None:
    assert publish_state(fleet.store, fleet.bus, key("release"), state(1)) == "channels/train/00000001.json"
    with pytest.raises(
        RunError, match=r"state 1 of channel train exists already: .* order again with number 2 or later"
    ):
        publish_state(fleet.store, fleet.bus, key("release"), state(1, reason="another"))
    ((_, event),) = fleet.bus.poll(TOPIC_POLICIES, None, 0.0)
    changed = decode_event(event, ChannelChanged)
    assert (changed.channel, changed.sequence, changed.state) == (TRAIN, 1, "channels/train/00000001.json")
    found = newest_state(fleet.store, TRAIN, root(), RUN)
    assert found is not None
    assert found.state == state(1)
    assert open_state(found.envelope, root(), RUN, TRAIN) == state(1)
    assert newest_state(fleet.store, TRAIN, root(), RUN, after=1) is None
    assert newest_state(fleet.store, PROD, root(), RUN) is None


def test_without_a_bus_an_order_is_given_all_the_same(fleet: Fleet) -> None:
    def away(_operation: str, _topic: str) -> None:
        raise StoreUnavailable("no answer from the bus")

    fleet.bus.before = away
    fleet.order(1)
    assert newest_state(fleet.store, TRAIN, root(), RUN) is not None


def test_a_root_is_published_once_and_only_when_it_is_one(fleet: Fleet) -> None:
    assert publish_root(fleet.store, trust_json(version=2)) == "channels/root/00000002.json"
    with pytest.raises(RunError, match="version 2 of the trust root exists already"):
        publish_root(fleet.store, trust_json(version=2, expires_utc_ns=1))
    with pytest.raises(Untrusted):
        publish_root(fleet.store, root(3).sealed([key("eve")]))


def test_states_that_nobody_vouches_for_are_passed_over(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Fault 29, of orders."""
    fleet.order(1)
    bad = {
        2: (key("learner").sign(CHANNEL_TYPE, encode_record(state(2))), "role 'release'"),
        3: (key("release").sign(CHANNEL_TYPE, encode_record(state(3, run="run-2"))), "of run 'run-2'"),
        4: (key("release").sign(CHANNEL_TYPE, encode_record(state(4, PROD, stable=ref(1)))), "channel prod of run"),
        5: (key("release").sign(CHANNEL_TYPE, encode_record(state(9))), "lies under the name of another"),
        6: (key("release").sign(CHANNEL_TYPE, b"[1]"), "no state of a channel"),
        7: (b"", "not a signed envelope"),
    }
    for sequence, (envelope, _) in bad.items():
        fleet.store.tamper(layout.channel_state(TRAIN, sequence), envelope)
    with caplog.at_level(logging.WARNING):
        found = newest_state(fleet.store, TRAIN, root(), RUN)
    assert found is not None
    assert found.state.sequence == 1
    said = [record.getMessage() for record in caplog.records]
    assert all(reason in text for (_, reason), text in zip(reversed(bad.values()), said, strict=True))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 400))
def test_whatever_is_signed_as_a_state_is_one_or_refused(data: bytes, cut: int) -> None:
    payload = encode_record(state(1))[:cut] + data
    try:
        found = open_state(key("release").sign(CHANNEL_TYPE, payload), root(), RUN, TRAIN)
    except Untrusted:
        return
    assert (found.run, found.channel) == (RUN, TRAIN)


def test_prod_runs_what_the_state_names_and_nothing_else(fleet: Fleet) -> None:
    for version in (1, 2, 3):
        fleet.place_signed(version)
    subscriber = fleet.subscribe(vetting=fleet.vetting(PROD))
    eventually(subscriber, lambda: subscriber._list_due_s > 0)
    assert subscriber.take() is None, "published is not promoted"
    fleet.order(1, PROD, stable=ref(2))
    assert subscriber.wait_first(PATIENCE_S).version == 2
    assert subscriber.newest_version == 2
    fleet.publish_signed(4)
    fleet.order(2, PROD, stable=ref(3), reason="better")
    assert subscriber.wait_first(PATIENCE_S).version == 3
    assert fleet.fetched("weights.safetensors") == [2, 3]
    assert subscriber.must_leave == ""


def test_going_back_takes_a_newer_order(fleet: Fleet) -> None:
    """Fault 30: a lower version number is right when a newer signed state says so, never otherwise."""
    fleet.place_signed(1, signature(1, expires_utc_ns=1 + 1, issued_utc_ns=1))
    fleet.place_signed(2)
    fleet.order(4, PROD, stable=ref(2))
    subscriber = fleet.subscribe(vetting=fleet.vetting(PROD), list_every_s=60.0)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    fleet.store.tamper(
        layout.channel_state(PROD, 3), key("release").sign(CHANNEL_TYPE, encode_record(state(3, PROD, stable=ref(1))))
    )
    fleet.store.delete(layout.channel_state(PROD, 4))
    fleet.now_s = 61.0
    eventually(subscriber, lambda: subscriber._list_due_s > 61.0)
    assert subscriber.take() is None
    again = fleet.subscribe(vetting=fleet.vetting(PROD))
    assert again.wait_first(PATIENCE_S).version == 2, "nor after a restart"
    fleet.order(5, PROD, stable=ref(1), reason="rollback", banned=ban(2))
    assert subscriber.wait_first(PATIENCE_S).version == 1, "however old its own statement is"


def test_the_canaries_run_the_candidate(fleet: Fleet) -> None:
    fleet.place_signed(1)
    fleet.place_signed(2)
    fleet.order(1, PROD, stable=ref(1), candidate=ref(2), candidate_robots=("robot-9",))
    subscriber = fleet.subscribe(vetting=fleet.vetting(PROD))
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.order(2, PROD, stable=ref(1), candidate=ref(2), candidate_robots=(ROBOT_NAME,))
    assert subscriber.wait_first(PATIENCE_S).version == 2
    fleet.order(3, PROD, stable=ref(1), banned=ban(2), immediate=True)
    eventually(subscriber, lambda: subscriber._stager.staged is not None)
    assert subscriber.must_leave == "channel prod has policy 1 for this robot since state 3"
    assert subscriber.wait_first(PATIENCE_S).version == 1
    assert subscriber.must_leave == ""


def test_prod_asks_for_both_signatures(fleet: Fleet) -> None:
    """Fault 29: neither the learner's key nor the release key moves a robot alone."""
    fleet.place_signed(1, signature(1, "release"))
    fleet.order(1, PROD, stable=ref(1))
    subscriber = fleet.subscribe(vetting=fleet.vetting(PROD))
    eventually(subscriber, lambda: 1 in subscriber._refusals)
    assert "role 'candidate'" in subscriber.refusals[1]


def test_an_expired_state_still_holds_and_the_robot_says_so(fleet: Fleet) -> None:
    """Fault 31, of orders."""
    fleet.place_signed(1)
    fleet.order(1, PROD, stable=ref(1), expires_utc_ns=fleet.now_ns + DAY_NS)
    fleet.now_ns += 2 * DAY_NS
    subscriber = fleet.subscribe(vetting=fleet.vetting(PROD))
    assert subscriber.wait_first(PATIENCE_S).version == 1
    assert subscriber.problem.startswith("nothing fresh has come since 2024-10-04")


def test_a_ban_sends_a_robot_back_to_the_newest_allowed_version(fleet: Fleet) -> None:
    for version in (1, 2, 3):
        fleet.publish_signed(version)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 3
    assert subscriber.take() is None, "the end of an episode before the ban says nothing about the next"
    fleet.order(1, banned=ban(3))
    eventually(subscriber, lambda: subscriber._stager.staged is not None)
    assert subscriber.must_leave == "", "at the end of the episode"
    staged = subscriber.take()
    assert staged is not None
    assert staged.version == 2
    assert "policy 3 is banned: it drops things" in subscriber.refusals[3]
    assert subscriber.newest_version == 3
    fleet.order(2)
    assert subscriber.wait_first(PATIENCE_S).version == 3, "a ban can be lifted"


def test_an_immediate_ban_is_obeyed_at_once(fleet: Fleet) -> None:
    for version in (1, 2):
        fleet.publish_signed(version)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 2
    fleet.order(1, banned=ban(2), immediate=True)
    eventually(subscriber, lambda: subscriber.must_leave != "")
    assert subscriber.must_leave == "policy 2 is banned: it drops things"
    assert subscriber.wait_first(PATIENCE_S).version == 1
    assert subscriber.must_leave == ""


def test_with_nothing_to_go_back_to_a_robot_holds_after_its_episode(fleet: Fleet) -> None:
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.order(1, banned=ban(1))
    eventually(subscriber, lambda: subscriber._current is None)
    assert subscriber.must_leave == ""
    assert subscriber.take() is None
    assert subscriber.must_leave == "policy 1 is banned: it drops things"
    fleet.publish_signed(2)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    assert subscriber.must_leave == ""


def test_a_banned_policy_that_waits_is_withdrawn(fleet: Fleet) -> None:
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.publish_signed(2)
    eventually(subscriber, lambda: subscriber._current == 2)
    fleet.order(1, banned=ban(2))
    eventually(subscriber, lambda: subscriber._current == 1)
    assert (subscriber.take(), subscriber.must_leave) == (None, "")


def test_a_ban_is_no_door_for_an_old_policy(fleet: Fleet) -> None:
    """Fault 30: after a ban the store hides what came between; what was never accepted and is older stays refused."""
    fleet.publish_signed(5)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 5
    fleet.publish_signed(6)
    assert subscriber.wait_first(PATIENCE_S).version == 6
    fleet.store.delete(layout.policy_manifest(5))
    fleet.place_signed(2)
    fleet.order(1, banned=ban(6))
    eventually(subscriber, lambda: subscriber._current is None)
    fleet.announce(2)
    eventually(subscriber, lambda: 2 in subscriber._refusals)
    assert "older than policy 5, which this robot has accepted (rollback)" in subscriber.refusals[2]


def test_events_about_channels_that_are_not_ours_change_nothing(fleet: Fleet) -> None:
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.order(1, PROD, stable=ref(1))
    fleet.bus.publish(TOPIC_POLICIES, b'{"event":"ChannelChanged","channel":3}', "bad")
    fleet.publish_signed(2)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    assert subscriber.problem == ""
