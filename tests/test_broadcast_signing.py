"""The learner's side of trust: signature before manifest, only while the lease is ours, and never half a policy."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcast_examples import PATIENCE_S, FarStore, bytes_of, eventually, facts, weights
from sop.broadcast import Publisher, fetch_manifest
from sop.core import layout
from sop.core.channel import STATEMENT_TYPE, PolicyRef, PolicyStatement, decode_record
from sop.core.codec import content_hash
from sop.core.errors import RunError, StoreUnavailable
from sop.testing.memory import MemoryBus, MemoryStore
from sop.trust import open_envelope
from trust_examples import DAY_NS, NOW_NS, RUN, Fleet, key


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    for subscriber in fleet.subscribers:
        subscriber.close()


def signing(store: MemoryStore, **options: Any) -> Publisher:
    settings: dict[str, Any] = {"keep_policies": 9, "signer": key("learner"), "run": RUN, "clock_ns": lambda: NOW_NS}
    return Publisher(store, MemoryBus(), **(settings | options))


def test_the_signature_is_put_before_the_manifest_that_it_names() -> None:
    log: list[tuple[str, str]] = []
    store, tokens = MemoryStore(before=lambda *call: log.append(call)), iter(range(5, 20))
    publisher = signing(store, fence=lambda: next(tokens))
    publisher.publish_now(weights(0), facts())
    publisher.close(PATIENCE_S)
    puts = [key.removeprefix("policies/00000000/") for operation, key in log if operation == "put"]
    assert puts == ["weights.safetensors", "signature.json", "manifest.json"]
    envelope = store.get(layout.policy_signature(0))
    said = decode_record(open_envelope(envelope, STATEMENT_TYPE, [key("learner").public]), PolicyStatement)
    assert said.policy == PolicyRef(0, content_hash(store.get(layout.policy_manifest(0))))
    assert (said.run, said.fence, said.issued_utc_ns) == (RUN, 5, NOW_NS)
    assert said.expires_utc_ns == NOW_NS + 7 * DAY_NS
    with pytest.raises(ValueError, match="give the publisher `run`"):
        signing(store, run="")


@pytest.mark.parametrize("signer", ["learner", None])
@pytest.mark.parametrize("lost_at", [0, 1])
def test_a_learner_that_lost_its_lease_puts_no_manifest(signer: str | None, lost_at: int) -> None:
    calls: list[int] = []

    def fence() -> int:
        calls.append(1)
        if len(calls) > lost_at or signer is None:
            raise RunError("the lease is lost")
        return 3

    store = MemoryStore()
    publisher = signing(store, signer=None if signer is None else key(signer), fence=fence)
    with pytest.raises(RunError, match="the lease is lost"):
        publisher.publish_now(weights(0), facts())
    publisher.close(PATIENCE_S)
    assert layout.policy_manifest(0) not in list(store.keys(""))


def test_a_published_and_signed_policy_is_staged(fleet: Fleet) -> None:
    publisher = signing(fleet.store)
    publisher.publish_now(weights(0), facts())
    publisher.close(PATIENCE_S)
    subscriber = fleet.subscribe(vetting=fleet.vetting())
    assert bytes_of(subscriber.wait_first(PATIENCE_S).weights) == bytes_of(weights(0))
    assert (subscriber.problem, subscriber.must_leave, subscriber.newest_version) == ("", "", 0)


@pytest.mark.parametrize("encoding", ["full", "packed"])
def test_a_publish_that_is_interrupted_anywhere_is_never_seen(encoding: str, fleet: Fleet) -> None:
    """Fault 28: the n-th object is the last one that arrives; before the manifest, robots see nothing."""
    for survivors in range(4):
        store = MemoryStore()
        left = iter([True] * survivors)

        def before(operation: str, _key: str, left: Iterator[bool] = left) -> None:
            if operation == "put" and not next(left, False):
                raise StoreUnavailable("killed")

        publisher = signing(store, encoding=encoding, attempts=1)
        store.before = before
        with contextlib.suppress(StoreUnavailable):
            publisher.publish_now(weights(0), facts())
        store.before = lambda *_: None
        publisher.close(PATIENCE_S)
        whole = layout.policy_manifest(0) in list(store.keys(""))
        assert whole == (survivors >= 3)
        fleet.folder = fleet.folder / "next"
        if not whole:
            subscriber = fleet.subscribe(store, vetting=fleet.vetting())
            eventually(subscriber, lambda subscriber=subscriber: subscriber._list_due_s > 0)
            assert (subscriber.take(), subscriber.newest_version, subscriber.refusals) == (None, None, {})


def test_a_delta_without_its_base_is_not_used_and_the_whole_is_fetched(fleet: Fleet) -> None:
    """Fault 34: a robot that lacks the base takes the form that stands alone, and refuses when there is none."""
    publisher = signing(fleet.store, encoding="packed", threads=1)
    for step in range(3):
        publisher.publish_now(weights(step), facts(step))
    publisher.publish(weights(3), facts(3))
    publisher.publish_now(weights(4), facts(4))
    publisher.close(PATIENCE_S)
    far = FarStore(fleet.store)
    staged = fleet.subscribe(far, vetting=fleet.vetting()).wait_first(PATIENCE_S)
    assert (staged.version, bytes_of(staged.weights)) == (4, bytes_of(weights(4)))
    fleet.folder = fleet.folder / "other"
    deltas_only = [file.key for file in fetch_manifest(fleet.store, 4).files if file.base is None]
    deltas_only += [file.key for file in fetch_manifest(fleet.store, 4).history if file.base is None]
    for lost in deltas_only:
        fleet.store.delete(lost)
    again = fleet.subscribe(FarStore(fleet.store), vetting=fleet.vetting())
    eventually(again, lambda: 4 not in again._selection._candidates and again._list_due_s > 0)  # type: ignore[attr-defined]
    assert again.take() is None
