"""The subscriber: the newest policy of several, whatever store, bus and publisher do in between."""

from collections.abc import Callable, Iterator

import msgspec
import pytest

from broadcast_examples import PATIENCE_S, Gate, World, bytes_of, eventually, facts, place, policy, weights
from recovery_times import Recovery
from sop.broadcast import Publisher
from sop.broadcast.manifest import PolicyManifest
from sop.core import layout
from sop.core.errors import RunError, StoreUnavailable
from sop.core.events import TOPIC_POLICIES


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for subscriber in world.subscribers:
        subscriber.close()


def test_an_announced_policy_is_staged_once_with_its_times(world: World) -> None:
    subscriber = world.subscribe()
    assert subscriber.take() is None
    assert subscriber.newest_version is None
    world.publish(3)
    staged = subscriber.wait_first(PATIENCE_S)
    assert staged.version == 3
    assert bytes_of(staged.weights) == bytes_of(weights(3))
    assert staged.manifest == policy(3)[0]
    assert (staged.published_utc_ns, staged.staged_utc_ns) == (5003, 777)
    assert subscriber.take() is None
    assert subscriber.newest_version == 3


def test_at_the_start_only_the_newest_policy_of_the_store_is_fetched(world: World) -> None:
    for version in range(5):
        place(world.store, *policy(version), version)
    staged = world.subscribe().wait_first(PATIENCE_S)
    assert staged.version == 4
    assert staged.published_utc_ns == 1004, "without an event: when the learner handed it over"
    assert world.fetched("manifest.json") == [4]
    assert world.fetched("weights.safetensors") == [4]


def test_versions_published_during_a_transfer_are_skipped_but_the_newest(world: World) -> None:
    gate = Gate()

    def hold_five(operation: str, key: str) -> None:
        world.log.append((operation, key))
        if (operation, key) == ("map", layout.policy_weights(5)):
            gate()

    world.store.before = hold_five
    subscriber = world.subscribe()
    world.publish(5)
    assert gate.reached.wait(PATIENCE_S)
    for version in (6, 7, 8):
        world.publish(version)
    assert subscriber.take() is None, "take never blocks, not even while the store hangs"
    gate.open.set()
    eventually(subscriber, lambda: subscriber._current == 8)
    staged = subscriber.take()
    assert staged is not None
    assert staged.version == 8
    assert world.fetched("weights.safetensors") == [5, 8]


def test_a_lost_event_is_healed_by_listing(world: World) -> None:
    place(world.store, *policy(0), 0)
    subscriber = world.subscribe(list_every_s=60.0)
    assert subscriber.wait_first(PATIENCE_S).version == 0
    place(world.store, *policy(1), 1)
    world.now_s = 59.0
    world.announce(0, attempt=1)  # wakes the thread up, tells nothing new
    assert subscriber.take() is None
    world.now_s = 61.0
    assert subscriber.wait_first(PATIENCE_S).version == 1


def test_versions_never_go_back(world: World) -> None:
    world.publish(5)
    subscriber = world.subscribe()
    assert subscriber.wait_first(PATIENCE_S).version == 5
    world.publish(4)
    world.announce(5, attempt=1)
    world.publish(6)
    assert subscriber.wait_first(PATIENCE_S).version == 6
    assert world.fetched("weights.safetensors") == [5, 6]


def test_a_robot_that_has_a_version_already_waits_for_a_newer_one(world: World) -> None:
    world.publish(5)
    subscriber = world.subscribe(newer_than=5)
    world.publish(6)
    assert subscriber.wait_first(PATIENCE_S).version == 6
    assert world.fetched("manifest.json") == [6]


def test_the_owner_may_refuse_before_the_tensors_are_fetched(world: World) -> None:
    subscriber = world.subscribe(accepts=lambda manifest: f"kind {manifest.spec.kind!r} is not installed here")
    world.publish(1)
    eventually(subscriber, lambda: 1 in subscriber._refusals)
    assert subscriber.refusals == {1: "policy 1: kind 'flow_vla' is not installed here"}
    assert world.fetched("weights.safetensors") == []


def test_when_the_newest_is_refused_the_next_older_one_gets_its_chance(world: World) -> None:
    for version in (0, 1, 2):
        place(world.store, *policy(version), version)
    manifest, data = policy(3)
    place(world.store, manifest, data[:-1] + b"!", 3)
    subscriber = world.subscribe()
    assert subscriber.wait_first(PATIENCE_S).version == 2
    assert subscriber.refusals.keys() == {3}
    assert subscriber.newest_version == 3


@pytest.mark.parametrize("missing", ["manifest.json", "weights.safetensors"])
def test_an_announced_policy_that_is_not_there_is_no_refusal_and_found_later(missing: str, world: World) -> None:
    world.publish(0)
    subscriber = world.subscribe(list_every_s=60.0)
    assert subscriber.wait_first(PATIENCE_S).version == 0
    place(world.store, *policy(1), 1)
    world.store.delete(f"{layout.policy_folder(1)}/{missing}")
    world.announce(1)
    world.publish(2)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    late = f"{layout.policy_folder(3)}/{missing}"
    place(world.store, *policy(3), 3)
    hidden = world.store.get(late)
    world.store.delete(late)
    world.log.clear()
    world.announce(3)
    eventually(subscriber, lambda: 3 in world.fetched(missing) and not subscriber._selection._candidates)
    assert subscriber.take() is None
    world.store.put(late, hidden)
    world.now_s = 61.0
    assert subscriber.wait_first(PATIENCE_S).version == 3
    assert subscriber.refusals == {}


def test_events_that_make_no_sense_are_ignored(world: World) -> None:
    subscriber = world.subscribe()
    for number, data in enumerate([b"", b"[" * 1000, b'{"event":"EpisodeCommitted"}', b'{"event":"PolicyPublished"}']):
        world.bus.publish(TOPIC_POLICIES, data, f"bad-{number}")
    world.announce(9, manifest="policies/00000009/other.json")
    world.announce(9, manifest="../../etc/passwd")
    world.announce(-1)
    world.announce(10**15)
    world.publish(1)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    assert subscriber.newest_version == 1
    assert world.fetched("manifest.json") == [1]


def _away(until: Callable[[], bool], what: str) -> Callable[[str, str], None]:
    def before(operation: str, place: str) -> None:
        if not until():
            raise StoreUnavailable(f"no answer from the {what}")

    return before


def test_an_unavailable_store_is_waited_for(world: World) -> None:
    back: list[bool] = []
    world.store.before = _away(lambda: bool(back), "store")
    world.publish(1)
    subscriber = world.subscribe()
    eventually(subscriber, lambda: subscriber._problem == "no answer from the store")
    assert subscriber.problem == "no answer from the store"
    with pytest.raises(RunError, match=r"after 0\.0 s: no answer from the store"):
        subscriber.wait_first(0.0)
    back.append(True)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    eventually(subscriber, lambda: subscriber._problem == "")


def test_without_a_bus_policies_are_found_by_listing(world: World) -> None:
    world.bus.before = _away(lambda: False, "bus")
    place(world.store, *policy(1), 1)
    subscriber = world.subscribe(list_every_s=60.0)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    eventually(subscriber, lambda: subscriber._problem == "no answer from the bus")
    place(world.store, *policy(2), 2)
    world.now_s = 61.0
    assert subscriber.wait_first(PATIENCE_S).version == 2


def test_an_unexpected_error_reaches_the_owner(world: World) -> None:
    def broken(manifest: PolicyManifest) -> str | None:
        raise ZeroDivisionError(f"broken check of policy {manifest.version}")

    subscriber = world.subscribe(accepts=broken)
    world.publish(1)
    with pytest.raises(ZeroDivisionError, match="broken check of policy 1"):
        subscriber.wait_first(PATIENCE_S)
    with pytest.raises(ZeroDivisionError):
        subscriber.take()


def test_a_publisher_that_breaks_anywhere_never_reaches_a_robot_with_half_a_policy(
    world: World, recovery: Recovery
) -> None:
    """Puts fail at every third call: what a robot stages is always whole, and the last whole policy arrives."""
    calls = iter(range(10_000))

    def flaky(operation: str, key: str) -> None:
        if operation == "put" and next(calls) % 3 == 1:
            raise StoreUnavailable("503")

    world.store.before = flaky
    subscriber = world.subscribe()
    publisher = Publisher(world.store, world.bus, keep_policies=50, attempts=1)
    published: dict[int, int] = {}
    for step in range(12):
        try:
            published[publisher.publish_now(weights(step), facts(step))] = step
        except StoreUnavailable:
            recovery.fault_is_over()
    publisher.close(PATIENCE_S)
    assert sorted(published) == [1, 3, 5, 7, 9, 11], "a manifest failed first, then tensors"
    eventually(subscriber, lambda: subscriber._current == max(published))
    staged = subscriber.wait_first(PATIENCE_S)
    recovery.whole("a robot has the next whole one")
    assert bytes_of(staged.weights) == bytes_of(weights(published[max(published)]))
    assert subscriber.refusals == {}


def test_waiting_in_vain_says_why(world: World) -> None:
    subscriber = world.subscribe()
    with pytest.raises(RunError, match=r"no policy to start with after 0\.0 s: none is published"):
        subscriber.wait_first(0.0)


def test_a_closed_subscriber_has_no_thread(world: World) -> None:
    subscriber = world.subscribe()
    subscriber.close()
    subscriber.close()
    assert not subscriber._thread.is_alive()


def test_the_manifest_on_disk_is_plain_json() -> None:
    plain = msgspec.json.decode(policy(1)[0].to_json())
    assert plain["tensors"]["body.weight"].keys() == {"dtype", "shape", "hash", "origin"}
    assert plain["files"][0]["key"] == "policies/00000001/weights.safetensors"
    assert plain["spec"]["embodiment"]["cameras"] == {"front": [64, 64]}
