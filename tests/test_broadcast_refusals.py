"""Bad policies: each is refused with its reason, once, and the robot keeps what it has."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from broadcast_examples import (
    PATIENCE_S,
    ROBOT,
    FarStore,
    World,
    as_json,
    eventually,
    facts,
    file_of,
    place,
    policy,
    weights,
)
from sop.broadcast.manifest import PolicyManifest
from sop.core import layout
from sop.core.errors import RunError


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for subscriber in world.subscribers:
        subscriber.close()


Bad = tuple[PolicyManifest | dict[str, Any], bytes | None]


def _flipped(position: int = -1) -> Bad:
    manifest, data = policy(1)
    altered = bytearray(data)
    altered[position] ^= 1
    return manifest, bytes(altered)


def _vouching(tensors: Any) -> Bad:
    """A file that matches the hash in its manifest, but not the tensors listed there."""
    (manifest, _), (_, data) = policy(1), policy(1, tensors)
    return replace(manifest, files=(file_of(1, data),)), data


def _changed(**fields: Any) -> Bad:
    manifest, data = policy(1)
    return as_json(manifest) | fields, data


def _file(**fields: Any) -> dict[str, Any]:
    file: dict[str, Any] = as_json(policy(1)[0])["files"][0]
    return file | fields


def _for_robot(**fields: Any) -> Bad:
    manifest, data = policy(1)
    return replace(manifest, spec=facts(1, replace(ROBOT, **fields)).spec), data


WITHOUT_BIAS = {name: array for name, array in weights(1).items() if name != "head.bias"}
BAD_POLICIES: dict[str, tuple[Bad, str]] = {
    "flipped byte": (_flipped(), "tensor 'head.bias' is altered"),
    "flipped byte of the header": (_flipped(9), "weights.safetensors is altered"),
    "cut short": ((policy(1)[0], policy(1)[1][:-3]), "bytes instead of"),
    "missing tensor": (_vouching(WITHOUT_BIAS), "tensor 'head.bias' is missing"),
    "extra tensor": (_vouching({**weights(1), "more": np.zeros(2)}), "tensor 'more' is not in the manifest"),
    "tensor of another version": (_vouching({**weights(1), "steps": weights(2)["steps"]}), "tensor 'steps' is altered"),
    "wrong shape": (_vouching({**weights(1), "steps": np.zeros(1, np.int64)}), "'steps' is I64 [1], the manifest"),
    "another robot": (_for_robot(name="leg"), "made for another robot: name is leg, this robot has arm"),
    "other cameras": (_for_robot(cameras={"front": (32, 32)}), "made for another robot: cameras is"),
    "other actions": (_for_robot(action_names=("dx", "dy")), "made for another robot: action_names is"),
    "unknown encoding": (_changed(files=[_file(encoding="newer")]), "encoding 'newer' is not known"),
    "unknown schema": (_changed(schema_version=9), "schema_version: this program reads 2, got 9"),
    "manifest of another version": (policy(2), "the manifest of policy 1 says it is policy 2"),
    "not a manifest": (({"schema_version": 2}, policy(1)[1]), "the manifest is not valid"),
}


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_a_bad_policy_is_refused_once_and_the_old_one_stays(
    case: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    (manifest, data), reason = BAD_POLICIES[case]
    world.publish(0)
    subscriber = world.subscribe(list_every_s=60.0)
    assert subscriber.wait_first(PATIENCE_S).version == 0
    with caplog.at_level(logging.WARNING):
        place(world.store, manifest, data, 1)
        world.announce(1)
        eventually(subscriber, lambda: 1 in subscriber._refusals)
        asked = world.fetched("manifest.json").count(1)
        world.announce(1, attempt=1)
        world.now_s = 61.0
        eventually(subscriber, lambda: subscriber._list_due_s > 61.0)
        assert subscriber.take() is None
    assert subscriber.refusals.keys() == {1}
    assert subscriber.refusals[1].startswith("policy 1: ")
    assert reason in subscriber.refusals[1]
    assert subscriber.newest_version == 1, "refused, but known to be published"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"refused {subscriber.refusals[1]}; this robot keeps policy 0"]
    world.publish(2)
    assert subscriber.wait_first(PATIENCE_S).version == 2
    assert world.fetched("manifest.json").count(1) == asked == 1, "a refused version is not tried again"


def test_waiting_in_vain_names_the_refusal(world: World) -> None:
    subscriber = world.subscribe()
    place(world.store, *BAD_POLICIES["flipped byte"][0], 1)
    world.announce(1)
    eventually(subscriber, lambda: 1 in subscriber._refusals)
    with pytest.raises(RunError, match=r"after 0\.0 s: policy 1: .* is altered"):
        subscriber.wait_first(0.0)


def test_a_hostile_manifest_is_read_up_to_a_limit(world: World) -> None:
    far = FarStore(world.store)
    world.store.tamper(layout.policy_manifest(1), b" " * ((16 << 20) + 5))
    manifest, data = policy(2)
    place(world.store, manifest, data + bytes(1000), 2)
    subscriber = world.subscribe(store=far)
    eventually(subscriber, lambda: subscriber._refusals.keys() == {1, 2})
    assert "manifest: has more than 16777216 bytes" in subscriber.refusals[1]
    assert f"has more than {len(data)} bytes" in subscriber.refusals[2]
    assert dict(far.got) == {
        layout.policy_manifest(1): slice(0, (16 << 20) + 1),
        layout.policy_manifest(2): slice(0, (16 << 20) + 1),
        layout.policy_weights(2): slice(0, len(data) + 1),
    }
