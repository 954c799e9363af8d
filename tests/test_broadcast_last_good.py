"""The robot's own copies: it starts and goes back with nobody there, and never with something damaged."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broadcast_examples import PATIENCE_S, bytes_of, eventually, policy, weights
from sop.broadcast import LastGood
from sop.broadcast.fetch import ReadCost, ReadPolicy
from sop.broadcast.last_good import Keeper, KeptPolicy
from sop.core import layout
from sop.core.channel import PROD
from sop.core.errors import PolicyRefused, RunError, StoreUnavailable
from trust_examples import NOW_NS, Fleet, ref, signature


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    for subscriber in fleet.subscribers:
        subscriber.close()


def kept(version: int, envelope: bytes | None = None) -> KeptPolicy:
    manifest, _ = policy(version)
    read = ReadPolicy(manifest, weights(version), ReadCost())
    envelope = signature(version) if envelope is None else envelope
    return KeptPolicy(policy=ref(version), manifest=manifest.to_json(), signature=envelope, read=read)


def filled(folder: Path, *versions: int) -> LastGood:
    last_good = LastGood(folder)
    for version in versions:
        last_good.keep(kept(version))
    return last_good


def test_the_three_that_were_accepted_last_are_kept(tmp_path: Path) -> None:
    last_good = filled(tmp_path / "policies", 1, 2, 3, 4)
    assert last_good.kept() == [ref(4), ref(3), ref(2)]
    last_good.keep(kept(2))
    assert LastGood(tmp_path / "policies").kept() == [ref(2), ref(4), ref(3)], "accepted again is accepted last"
    found = last_good.boot()
    assert found is not None
    assert (found.policy, found.signature) == (ref(2), signature(2))
    assert bytes_of(found.read.weights) == bytes_of(weights(2))
    assert found.read.manifest == policy(2)[0]
    with pytest.raises(ValueError, match="at least 2"):
        LastGood(tmp_path, keep=1)


def test_an_empty_folder_boots_nothing_and_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    last_good = LastGood(tmp_path / "none")
    assert (last_good.boot(), last_good.standing(), last_good.kept()) == (None, None, [])
    with pytest.raises(RunError, match="keeps no policy to go back to"):
        last_good.rollback()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_copy_with_any_byte_changed_is_skipped_and_named(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("policies")
    last_good = filled(folder, 1, 2)
    newest = max(path for path in folder.iterdir())
    path = newest / data.draw(st.sampled_from(["manifest.json", "weights.safetensors"]))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    path.write_bytes(content)
    found = last_good.boot()
    assert found is not None
    assert bytes_of(found.read.weights) in (bytes_of(weights(1)), bytes_of(weights(2)))
    if found.policy == ref(1):
        assert list(last_good.skipped) == [newest.name]


def test_a_copy_whose_signature_is_not_good_any_more_is_skipped(tmp_path: Path) -> None:
    def check(policy: object, envelope: bytes) -> None:
        if envelope != signature(1):
            raise PolicyRefused(f"{policy} is signed by a key that was dropped")

    filled(tmp_path, 1, 2)
    last_good = LastGood(tmp_path, check=check)
    found = last_good.boot()
    assert found is not None
    assert found.policy == ref(1)
    assert "dropped" in next(iter(last_good.skipped.values()))


def test_a_write_that_was_interrupted_leaves_nothing(tmp_path: Path) -> None:
    last_good = filled(tmp_path, 1)
    half = tmp_path / ".part-00000002-00000002-x"
    half.mkdir()
    (half / "manifest.json").write_bytes(b"half")
    assert last_good.kept() == [ref(1)]
    last_good.keep(kept(2))
    assert not half.exists()
    assert last_good.kept() == [ref(2), ref(1)]


def test_a_damaged_copy_is_written_again_when_the_policy_comes_again(tmp_path: Path) -> None:
    last_good = filled(tmp_path, 1)
    (next(tmp_path.iterdir()) / "weights.safetensors").write_bytes(b"")
    assert last_good.boot() is None
    last_good.keep(kept(1))
    assert last_good.boot() is not None


def test_rollback_is_remembered_goes_on_step_by_step_and_passes_over_what_is_damaged(tmp_path: Path) -> None:
    last_good = filled(tmp_path, 1, 2, 3)
    (next(tmp_path.glob("*-00000002-*")) / "weights.safetensors").unlink()
    assert last_good.rollback(sequence=4) == ref(1)
    again = LastGood(tmp_path)
    standing = again.standing()
    assert standing is not None
    assert (standing.policy, standing.instead_of, standing.sequence) == (ref(1), 3, 4)
    found = again.boot()
    assert found is not None
    assert found.policy == ref(1)
    with pytest.raises(RunError, match="keeps no policy to go back to"):
        again.rollback()
    again.overrule()
    again.overrule()
    assert last_good.standing() is None
    (tmp_path / "rollback.json").write_bytes(b"{")
    assert last_good.standing() is None


def test_the_keeper_holds_one_policy_and_says_what_the_disk_refuses(tmp_path: Path) -> None:
    (tmp_path / "policies").write_bytes(b"a file where the folder should be")
    keeper = Keeper(LastGood(tmp_path / "policies"), every_s=1e6)
    for version in (1, 2, 3):
        keeper.keep(kept(version))
    keeper.close()
    keeper.close()
    assert "could not be kept on this robot's disk" in keeper.problem
    last_good = LastGood(tmp_path / "good")
    keeper = Keeper(last_good, every_s=1e6)
    keeper.keep(kept(1))
    keeper.close()
    assert (last_good.kept(), keeper.problem) == ([ref(1)], "")


def copies(fleet: Fleet, *versions: int) -> LastGood:
    last_good = LastGood(fleet.folder / "policies", check=fleet.vetting().signed)
    for version in versions:
        last_good.keep(kept(version))
    return last_good


def cut_off(fleet: Fleet) -> None:
    def away(_operation: str, _place: str) -> None:
        raise StoreUnavailable("the cable is pulled")

    fleet.store.before = fleet.bus.before = away


def test_what_was_accepted_is_there_at_the_next_start_without_a_network(fleet: Fleet) -> None:
    """Fault 4, of policies: a robot that starts with the network gone runs its last good policy."""
    fleet.publish_signed(1)
    subscriber = fleet.subscribe(vetting=fleet.vetting(), last_good=copies(fleet))
    assert subscriber.wait_first(PATIENCE_S).version == 1
    subscriber.close()
    cut_off(fleet)
    again = fleet.subscribe(vetting=fleet.vetting(), last_good=copies(fleet))
    staged = again.wait_first(PATIENCE_S)
    assert (staged.version, bytes_of(staged.weights)) == (1, bytes_of(weights(1)))
    eventually(again, lambda: again._problem == "the cable is pulled")


def test_a_banned_copy_is_not_started_with_even_offline(fleet: Fleet) -> None:
    last_good = copies(fleet, 1, 2)
    fleet.order(1, banned={ref(2).manifest_hash: "bad"})
    fleet.vetting().refresh(fleet.store)
    cut_off(fleet)
    assert fleet.subscribe(vetting=fleet.vetting(), last_good=last_good).wait_first(PATIENCE_S).version == 1


def test_a_banned_policy_is_left_for_the_robots_own_copy_at_once(fleet: Fleet) -> None:
    last_good = copies(fleet, 1)
    fleet.publish_signed(2)
    subscriber = fleet.subscribe(vetting=fleet.vetting(), last_good=last_good)
    eventually(subscriber, lambda: subscriber._current == 2)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    fleet.store.delete(layout.policy_manifest(2))
    fleet.order(1, banned={ref(2).manifest_hash: "bad"}, immediate=True)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    assert subscriber.must_leave == ""


def test_prod_goes_back_to_a_copy_without_fetching_it(fleet: Fleet) -> None:
    last_good = copies(fleet, 1)
    fleet.place_signed(2)
    fleet.order(1, PROD, stable=ref(2))
    subscriber = fleet.subscribe(vetting=fleet.vetting(PROD), last_good=last_good)
    eventually(subscriber, lambda: subscriber._current == 2)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    fleet.order(2, PROD, stable=ref(1))
    assert subscriber.wait_first(PATIENCE_S).version == 1
    assert fleet.fetched("weights.safetensors") == [2]


def test_a_person_at_the_robot_goes_back_until_something_newer_is_published(fleet: Fleet) -> None:
    last_good = copies(fleet, 1)
    fleet.publish_signed(2)
    subscriber = fleet.subscribe(vetting=fleet.vetting(), last_good=last_good, list_every_s=60.0)
    eventually(subscriber, lambda: subscriber._current == 2)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    eventually(subscriber, lambda: last_good.kept() == [ref(2), ref(1)])
    assert last_good.rollback() == ref(1)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.announce(2, attempt=1)
    fleet.now_s = 61.0
    eventually(subscriber, lambda: subscriber._list_due_s > 61.0)
    assert subscriber.take() is None, "what was gone back from is not newer"
    fleet.publish_signed(3)
    assert subscriber.wait_first(PATIENCE_S).version == 3
    eventually(subscriber, lambda: last_good.standing() is None)


def test_on_prod_an_order_at_the_robot_stands_until_the_channel_says_something_newer(fleet: Fleet) -> None:
    last_good = copies(fleet, 1, 2)
    fleet.order(1, PROD, stable=ref(2))
    vetting = fleet.vetting(PROD)
    vetting.refresh(fleet.store)
    last_good.rollback()  # `sop policy rollback --robot` does not know the channel
    fleet.place_signed(2)
    subscriber = fleet.subscribe(vetting=vetting, last_good=last_good)
    eventually(subscriber, lambda: subscriber._current == 1 and subscriber._list_due_s > 0)
    assert subscriber.wait_first(PATIENCE_S).version == 1
    fleet.order(2, PROD, stable=ref(2), issued_utc_ns=NOW_NS + 1)
    assert subscriber.wait_first(PATIENCE_S).version == 2


def test_an_order_given_during_a_transfer_is_not_overruled_by_what_was_ordered_before(fleet: Fleet) -> None:
    last_good = copies(fleet, 1, 2)
    fleet.place_signed(3)
    fleet.order(1, PROD, stable=ref(3))

    def go_back(operation: str, key: str) -> None:
        if key == layout.policy_weights(3) and last_good.standing() is None:
            last_good.rollback()

    fleet.store.before = go_back
    subscriber = fleet.subscribe(vetting=fleet.vetting(PROD), last_good=last_good)
    eventually(subscriber, lambda: subscriber._current == 1)
    order = last_good.standing()
    assert order is not None
    assert order.policy == ref(1)
    assert subscriber.wait_first(PATIENCE_S).version == 1
