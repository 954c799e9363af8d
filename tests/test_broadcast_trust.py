"""A robot runs what is vouched for, whole, for it, and never older than what it has seen. Numbers are those of the
list of faults in docs/reliability.md."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broadcast_examples import (
    PATIENCE_S,
    ROBOT,
    eventually,
    facts,
    place,
    policy,
    weights,
)
from recovery_times import Recovery
from sop.actor import PinnedPolicy
from sop.broadcast import Subscriber, prepare_with, publish_root
from sop.core import layout
from sop.core.channel import CHANNEL_TYPE, STATEMENT_TYPE, PolicyRef
from sop.core.codec import content_hash
from sop.core.errors import RunError, Untrusted
from sop.testing.clock import FakeClock
from sop.testing.policy import FakePolicy
from trust_examples import DAY_NS, NOW_NS, Fleet, key, ref, root, signature, trust_json


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    for subscriber in fleet.subscribers:
        subscriber.close()


def refused(subscriber: Subscriber, version: int) -> str:
    eventually(subscriber, lambda: version in subscriber._refusals)
    return subscriber.refusals[version]


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json", "signature.json"])
def test_an_object_that_ends_at_any_byte_is_never_run(name: str, fleet: Fleet) -> None:
    """Fault 28: whatever a store shows of an upload that broke off."""
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.place_signed(2)
    whole = fleet.store.get(f"{layout.policy_folder(2)}/{name}")
    ends = [0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1]
    for version, end in enumerate(ends, 2):
        fleet.place_signed(version)
        object_key = f"{layout.policy_folder(version)}/{name}"
        fleet.store.tamper(object_key, fleet.store.get(object_key)[: min(end, len(whole) - 1)])
        fleet.announce(version)
        assert refused(subscriber, version)
    assert subscriber.take() is None


def _other_type() -> bytes:
    return signature(2, payload_type=CHANNEL_TYPE)


def _of_manifest(version: int) -> Callable[[], bytes]:
    return lambda: signature(2, policy=ref(version))


BAD_SIGNATURES: dict[str, tuple[Callable[[], bytes | None], str]] = {
    "unsigned": (lambda: None, "policy 2: nobody signed it"),
    "empty": (lambda: b"", "not a signed envelope"),
    "wrong key": (lambda: signature(2, "eve"), "0 valid signatures of the 1"),
    "key of another role": (lambda: signature(2, "release"), "role 'candidate'"),
    "another kind of record": (_other_type, "instead of 'application/vnd.sop.policy"),
    "not a statement": (lambda: key("learner").sign(STATEMENT_TYPE, b"{}"), "no statement about a policy"),
    "another run": (lambda: signature(2, run="run-2"), "signed for run 'run-2', this robot works for 'run-1'"),
    "another version": (_of_manifest(1), "vouches for policy 1"),
    "another manifest": (lambda: signature(2, policy=PolicyRef(2, "0" * 32)), f"manifest {'0' * 32}, found was"),
}


@pytest.mark.parametrize("name", BAD_SIGNATURES)
def test_a_policy_that_nobody_vouches_for_is_refused_and_the_old_one_stays(name: str, fleet: Fleet) -> None:
    """Fault 29: unsigned, wrong key, wrong role, wrong payload."""
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 1
    make, reason = BAD_SIGNATURES[name]
    place(fleet.store, *policy(2), 2)
    if (envelope := make()) is not None:
        fleet.store.tamper(layout.policy_signature(2), envelope)
    fleet.announce(2)
    assert reason in refused(subscriber, 2)
    assert subscriber.take() is None
    assert fleet.fetched("weights.safetensors") == [1], "refused before its tensors are fetched"
    fleet.publish_signed(3)
    assert subscriber.wait_first(PATIENCE_S).version == 3


def test_below_the_threshold_is_refused(fleet: Fleet) -> None:
    """Fault 29: two keys are needed, one signed."""
    two = trust_json(names={"candidate": ("learner", "second")}, thresholds={"candidate": 2})
    fleet.publish_signed(1)
    assert "1 valid signatures of the 2" in refused(fleet.subscribe(vetting=fleet.vetting(trust=two)), 1)


def test_an_expired_statement_is_refused_unless_the_policy_was_accepted_before(fleet: Fleet) -> None:
    """Fault 29: expired. A robot that restarts with what it had goes on; a new one says what is wrong."""
    fleet.publish_signed(1)
    assert fleet.subscribe(vetting=fleet.vetting()).wait_first(PATIENCE_S).version == 1
    fleet.now_ns += 8 * DAY_NS
    fleet.publish_signed(2)
    again = fleet.subscribe(vetting=fleet.vetting())
    eventually(again, lambda: "policy 2: its statement has expired" in again._distrust)
    assert again.refusals == {}, "time may yet show that the clock was wrong"
    assert again.take() is None
    fleet.store.delete(layout.policy_manifest(2))
    assert fleet.subscribe(vetting=fleet.vetting()).wait_first(PATIENCE_S).version == 1


def test_with_an_expired_root_what_acts_goes_on_and_nothing_new_is_accepted(fleet: Fleet) -> None:
    """Fault 29: expired root; and rotation through the store ends it."""
    fleet.publish_signed(1)
    short = trust_json(expires_utc_ns=NOW_NS + DAY_NS)
    subscriber = fleet.subscribe(vetting=fleet.vetting(trust=short), list_every_s=60.0)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.now_ns += 2 * DAY_NS
    fleet.publish_signed(2)
    eventually(subscriber, lambda: "trust root 1 has expired on" in subscriber._distrust)
    assert (subscriber.take(), subscriber.must_leave, subscriber.refusals) == (None, "", {})
    publish_root(fleet.store, root(2, {"candidate": ("learner-2",)}).sealed([key("root")]))
    fleet.place_signed(3, signature(3, "learner-2"))
    fleet.now_s = 61.0
    assert subscriber.wait_first(PATIENCE_S).version == 3
    fleet.publish_signed(4)
    assert "trust root 2" in refused(subscriber, 4), "the old key is not believed any more"
    assert fleet.vetting(trust=short).root.version == 2, "nor after a restart with the old trust.json"


def test_a_root_that_does_not_follow_is_said_and_changes_nothing(fleet: Fleet) -> None:
    """Fault 29: a stolen release key cannot make itself root."""
    fleet.store.put(layout.channel_state("root", 2), root(2).sealed([key("release")]))
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 1
    eventually(subscriber, lambda: "the next trust root in the store is refused" in subscriber._distrust)
    with pytest.raises(RunError, match=r"trust\.json cannot be believed"):
        fleet.vetting(trust=root(2).sealed([key("release")]))
    with pytest.raises(RunError, match="contradicts"):
        fleet.vetting(trust=trust_json(fleet="other"))


@pytest.mark.parametrize("restarted", [False, True])
def test_an_old_signed_policy_is_not_run_again(restarted: bool, fleet: Fleet) -> None:
    """Fault 30: the store forgets the newest and offers what came before, to the same robot and after its restart."""
    fleet.publish_signed(5)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 5
    fleet.store.delete(layout.policy_manifest(5))
    if restarted:
        subscriber.close()
        subscriber = fleet.subscribe(vetting=fleet.vetting())
    fleet.publish_signed(4)
    if restarted:
        assert "older than policy 5, which this robot has accepted (rollback)" in refused(subscriber, 4)
    fleet.publish_signed(6)
    assert subscriber.wait_first(PATIENCE_S).version == 6
    assert 4 not in fleet.fetched("weights.safetensors")


def test_another_policy_under_a_known_number_is_refused(fleet: Fleet) -> None:
    """Fault 30: somebody with the key replaces what was published."""
    fleet.publish_signed(5)
    fleet.subscribe(vetting=fleet.vetting()).wait_first(PATIENCE_S)
    other = policy(5, weights(99))
    place(fleet.store, *other, 5)
    swapped = PolicyRef(5, content_hash(other[0].to_json()))
    fleet.store.tamper(layout.policy_signature(5), signature(5, policy=swapped))
    assert "accepted another policy of that number" in refused(fleet.subscribe(vetting=fleet.vetting()), 5)


def test_a_learner_that_lost_its_lease_is_not_followed(fleet: Fleet) -> None:
    """Fault 30: the old learner wakes up and publishes above the new one's versions."""
    fleet.publish_signed(1, signature(1, fence=1))
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.publish_signed(2, signature(2, fence=2))
    assert subscriber.wait_first(PATIENCE_S).version == 2
    fleet.publish_signed(3, signature(3, fence=1))
    assert "published with lease 1, after lease 2 was taken" in refused(subscriber, 3)


def test_when_nothing_fresh_comes_the_robot_says_since_when(fleet: Fleet, recovery: Recovery) -> None:
    """Fault 31: the store serves the same for ever."""
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting(), list_every_s=60.0)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.now_ns += 7 * DAY_NS - 1
    fleet.now_s = 61.0
    eventually(subscriber, lambda: subscriber._list_due_s > 61.0)
    assert subscriber.problem == ""
    fleet.now_ns += 1
    fleet.now_s = 122.0
    eventually(subscriber, lambda: subscriber._distrust != "")
    assert subscriber.problem.startswith("nothing fresh has come since 2024-10-04 00:00 UTC: ")
    assert subscriber.must_leave == ""
    recovery.fault_is_over()
    fleet.publish_signed(2, signature(2, issued_utc_ns=fleet.now_ns, expires_utc_ns=fleet.now_ns + DAY_NS))
    assert subscriber.wait_first(PATIENCE_S).version == 2
    eventually(subscriber, lambda: subscriber._distrust == "")
    recovery.whole("the alarm has ended, after something fresh came")


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_is_a_day_off_changes_nothing(days: int, fleet: Fleet) -> None:
    """Fault 16, of policies: new ones are run, old ones are not, and a clock that jumps back revives nothing."""
    fleet.now_ns += days * DAY_NS
    fleet.publish_signed(3)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 3
    assert subscriber.problem == ""
    fleet.now_ns -= 2 * days * DAY_NS
    fleet.publish_signed(4)
    assert subscriber.wait_first(PATIENCE_S).version == 4
    stale = signature(5, issued_utc_ns=NOW_NS - 9 * DAY_NS, expires_utc_ns=NOW_NS - 1)
    fleet.now_ns = NOW_NS - DAY_NS
    fleet.publish_signed(5, stale)
    eventually(subscriber, lambda: "policy 5: its statement has expired" in subscriber._distrust)
    assert subscriber.take() is None


def test_a_statement_from_far_in_the_future_waits_for_the_clocks(fleet: Fleet) -> None:
    """Fault 16, of policies: a grace state with words, no crash, and no poisoned memory of time."""
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting(), list_every_s=60.0)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.publish_signed(2, signature(2, issued_utc_ns=NOW_NS + 3 * DAY_NS, expires_utc_ns=NOW_NS + 9 * DAY_NS))
    eventually(subscriber, lambda: "more than a day ahead of this robot's clock" in subscriber._distrust)
    assert (subscriber.take(), subscriber.refusals) == (None, {})
    fleet.now_ns += 2 * DAY_NS
    fleet.now_s = 61.0
    assert subscriber.wait_first(PATIENCE_S).version == 2


def test_with_a_damaged_memory_nothing_new_is_accepted(fleet: Fleet) -> None:
    """Fault 30: forgetting silently is what a rollback needs."""
    fleet.publish_signed(1)
    fleet.subscribe(vetting=fleet.vetting()).wait_first(PATIENCE_S)
    (fleet.folder / "memory").write_bytes(b"?")
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    eventually(subscriber, lambda: "does not know any more what it has seen" in subscriber._distrust)
    assert (subscriber.take(), subscriber.refusals) == (None, {})


def test_tensors_of_two_versions_are_refused(fleet: Fleet) -> None:
    """Fault 32: every object is genuine, the mix is not: the signed manifest has the hash of every tensor."""
    fleet.publish_signed(1)
    fleet.place_signed(2)
    fleet.store.tamper(layout.policy_weights(2), policy(1)[1])
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert subscriber.wait_first(PATIENCE_S).version == 1
    assert "is altered" in refused(subscriber, 2)
    fleet.place_signed(3)
    fleet.store.tamper(layout.policy_manifest(3), policy(2)[0].to_json())
    fleet.announce(3)
    assert "its signature vouches for policy 3" in refused(subscriber, 3)


@pytest.mark.parametrize(
    ("robot", "reason"),
    [
        ({"name": "leg"}, "name is leg"),
        ({"action_names": ("dx", "dy")}, "action_names is"),
        ({"cameras": {"front": (32, 32)}}, "cameras is"),
    ],
)
def test_a_signed_policy_for_another_robot_is_refused(robot: dict[str, Any], reason: str, fleet: Fleet) -> None:
    """Fault 33: genuine, and not for this robot."""
    manifest, data = policy(1, spec=facts(1, replace(ROBOT, **robot)).spec)
    place(fleet.store, manifest, data, 1)
    fleet.store.tamper(layout.policy_signature(1), signature(1, policy=PolicyRef(1, content_hash(manifest.to_json()))))
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert f"made for another robot: {reason}" in refused(subscriber, 1)
    assert fleet.fetched("weights.safetensors") == []
    fleet.publish_signed(1 + 1)
    assert subscriber.wait_first(PATIENCE_S).version == 2, "what was refused is not what was accepted"


@pytest.mark.parametrize(
    ("envelope", "message"),
    [
        (b"", "not a signed envelope"),
        (signature(1, "stranger"), "valid signatures"),
        (signature(1, run="other"), "run"),
    ],
)
def test_a_rollout_of_the_base_asks_for_signatures_as_well(envelope: bytes, message: str, fleet: Fleet) -> None:
    prepare = prepare_with(FakePolicy)
    fleet.place_signed(1, envelope)
    with pytest.raises(Untrusted, match=message):
        PinnedPolicy(fleet.store, 1, ROBOT, prepare=prepare, clock=FakeClock(), vetting=fleet.vetting())
    assert fleet.fetched("weights.safetensors") == []


def test_a_rollout_of_a_base_that_is_banned_or_unsigned_does_not_begin(fleet: Fleet) -> None:
    prepare = prepare_with(FakePolicy)
    place(fleet.store, *policy(2), 2)
    with pytest.raises(Untrusted, match="nobody signed it"):
        PinnedPolicy(fleet.store, 2, ROBOT, prepare=prepare, clock=FakeClock(), vetting=fleet.vetting())
    fleet.place_signed(1)
    fleet.order(1, banned={ref(1).manifest_hash: "bad"})
    with pytest.raises(Untrusted, match="is banned: bad"):
        PinnedPolicy(fleet.store, 1, ROBOT, prepare=prepare, clock=FakeClock(), vetting=fleet.vetting())
