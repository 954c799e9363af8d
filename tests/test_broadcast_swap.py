"""Two policies take turns: one acts, the other is loaded on the subscriber's thread; the swap exchanges pointers."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from broadcast_examples import PATIENCE_S, Gate, World, eventually, facts, place, policy, weights
from sop.broadcast import Publisher, fetch_policy, prepare_with
from sop.core.embodiment import Observation
from sop.core.errors import PolicyRefused
from sop.core.lineage import Lineage, StepDraw
from sop.core.policy import Conditioning, Policy, PolicySpec, Weights
from sop.policies import make_policy
from sop.policies.base import export_weights, load_weights
from sop.testing.memory import MemoryBus, MemoryStore
from sop.testing.policy import FakePolicy
from test_policies_contract import tiny_policy


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for subscriber in world.subscribers:
        subscriber.close()


class Recording(FakePolicy):
    """Says which thread loads it; refuses what it is told to."""

    def __init__(self, spec: PolicySpec) -> None:
        super().__init__(spec.embodiment, action_horizon=16)
        self._spec = spec
        self.refuses: int | None = None
        self.threads: list[str] = []

    def load(self, weights: Weights, version: int) -> None:
        self.threads.append(threading.current_thread().name)
        if version == self.refuses:
            raise PolicyRefused("body.weight has another shape here")
        super().load(weights, version)


class Maker:
    def __init__(self) -> None:
        self.made: list[Recording] = []

    def __call__(self, spec: PolicySpec) -> Policy:
        self.made.append(Recording(spec))
        return self.made[-1]


def test_two_policies_take_turns_and_are_loaded_on_the_thread(world: World) -> None:
    maker = Maker()
    subscriber = world.subscribe(prepare=prepare_with(maker))
    acting: Policy | None = None
    for version in range(6):
        world.publish(version)
        eventually(subscriber, lambda version=version: subscriber._current == version)
        staged = subscriber.take(acting)
        assert staged is not None
        assert staged.policy is not acting
        assert staged.policy is not None
        assert staged.policy.version == staged.version == version
        assert staged.prepare_s >= 0
        acting = staged.policy
        assert subscriber.take(acting) is None, "nothing new: it stays the caller's"
    assert [made.loaded for made in maker.made] == [[0, 2, 4], [1, 3, 5]]
    assert {name for made in maker.made for name in made.threads} == {"subscriber"}


def test_a_staged_policy_that_nobody_took_is_loaded_again_and_the_acting_one_never(world: World) -> None:
    maker = Maker()
    subscriber = world.subscribe(prepare=prepare_with(maker))
    world.publish(0)
    eventually(subscriber, lambda: subscriber._current == 0)
    acting = subscriber.wait_first(PATIENCE_S).policy
    assert acting is maker.made[0]
    maker.made[0].acting = True  # from now on it refuses to be loaded
    for version in (1, 2, 3):
        world.publish(version)
        eventually(subscriber, lambda version=version: subscriber._current == version)
    staged = subscriber.take(acting)
    assert staged is not None
    assert staged.policy is maker.made[1]
    assert (staged.version, staged.policy.version) == (3, 3)
    assert maker.made[1].loaded == [1, 2, 3]
    assert len(maker.made) == 2
    assert subscriber.refusals == {}


def test_while_the_staged_one_is_loaded_again_there_is_nothing_to_take(world: World) -> None:
    gate, maker = Gate(), Maker()
    subscriber = world.subscribe(prepare=prepare_with(maker))
    world.publish(0)
    eventually(subscriber, lambda: subscriber._current == 0)
    (first,) = maker.made
    load = first.load
    first.load = lambda tensors, version: (gate(), load(tensors, version))  # type: ignore[method-assign,assignment,func-returns-value]
    world.publish(1)
    assert gate.reached.wait(PATIENCE_S)
    assert subscriber.take() is None, "half loaded is not staged"
    gate.open.set()
    staged = subscriber.wait_first(PATIENCE_S)
    assert (staged.version, staged.policy) == (1, first)


def test_a_policy_that_does_not_take_the_weights_refuses_the_version_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker()
    subscriber = world.subscribe(prepare=prepare_with(maker), list_every_s=60.0)
    world.publish(0)
    eventually(subscriber, lambda: subscriber._current == 0)
    world.publish(1)
    eventually(subscriber, lambda: subscriber._current == 1)
    maker.made[0].refuses = 2
    with caplog.at_level(logging.WARNING):
        world.publish(2)
        eventually(subscriber, lambda: 2 in subscriber._refusals)
        world.announce(2, attempt=1)
        world.now_s = 61.0
        eventually(subscriber, lambda: subscriber._list_due_s > 61.0)
    reason = "policy 2: it cannot be run here: body.weight has another shape here"
    assert subscriber.refusals == {2: reason}
    assert [record.getMessage() for record in caplog.records] == [f"refused {reason}; this robot keeps policy 1"]
    staged = subscriber.take()
    assert staged is not None, "the one that waited is back"
    assert (staged.version, maker.made[0].loaded) == (1, [0, 1])
    world.publish(3)
    assert subscriber.wait_first(PATIENCE_S).version == 3
    assert len(maker.made) == 2


def test_another_spec_needs_another_policy(world: World) -> None:
    maker = Maker()
    subscriber = world.subscribe(prepare=prepare_with(maker))
    acting: Policy | None = None
    for version, horizon in ((0, 8), (1, 8), (2, 4), (3, 4), (4, 4)):
        spec = replace(facts().spec, execution_horizon=horizon)
        place(world.store, *policy(version, spec=spec), version)
        world.announce(version)
        eventually(subscriber, lambda version=version: subscriber._current == version)
        staged = subscriber.take(acting)
        assert staged is not None
        assert staged.policy is not None
        assert staged.policy.spec == spec
        acting = staged.policy
    assert [made.loaded for made in maker.made] == [[0], [1], [2, 4], [3]]


def test_a_policy_that_cannot_be_made_is_a_refusal(world: World) -> None:
    def unknown(spec: PolicySpec) -> Policy:
        raise ValueError(f"no policy is called {spec.kind!r}")

    subscriber = world.subscribe(prepare=prepare_with(unknown))
    world.publish(1)
    eventually(subscriber, lambda: 1 in subscriber._refusals)
    assert subscriber.refusals == {1: "policy 1: it cannot be run here: no policy is called 'flow_vla'"}


def lineage(step: int) -> Lineage:
    draw = StepDraw(
        learner_step=step,
        keys=(f"episodes/a/00000000-00001-{0:032x}.arrow",),
        starts=np.array([step], np.int32),
        batch_hash="0" * 32,
    )
    return Lineage(draws=(draw,), learned=())


def test_the_lineage_lies_beside_the_tensors_and_is_named_by_the_manifest() -> None:
    log: list[tuple[str, str]] = []
    store = MemoryStore(before=lambda *call: log.append(call))
    publisher = Publisher(store, MemoryBus(), keep_policies=5)
    publisher.publish_now(weights(0), facts())
    publisher.publish_now(weights(1), facts(1), lineage(1))
    publisher.close(PATIENCE_S)
    puts = [key.removeprefix("policies/") for operation, key in log if operation == "put"]
    names = ("weights.safetensors", "lineage.arrow.zst", "manifest.json")
    assert puts[2:] == [f"00000001/{name}" for name in names]
    assert fetch_policy(store, 0)[0].lineage is None
    entry = fetch_policy(store, 1)[0].lineage
    assert entry is not None
    data = store.get(entry.key)
    assert (entry.num_bytes, entry.encoding) == (len(data), "lineage")
    assert [draw.learner_step for draw in Lineage.decode(data).draws] == [1]


def test_a_replaced_snapshot_leaves_its_lineage_to_the_one_that_replaced_it() -> None:
    gate = Gate()
    store = MemoryStore(before=lambda operation, _key: gate() if operation == "put" else None)
    publisher = Publisher(store, MemoryBus(), keep_policies=5)
    publisher.publish(weights(0), facts(), lineage(1))
    assert gate.reached.wait(PATIENCE_S)
    for step, learned in ((2, lineage(2)), (3, None), (4, lineage(4)), (5, lineage(5)), (6, None)):
        publisher.publish(weights(step), facts(step), learned)
    gate.open.set()
    publisher.close(PATIENCE_S)
    entry = fetch_policy(store, 1)[0].lineage
    assert entry is not None
    assert [draw.learner_step for draw in Lineage.decode(store.get(entry.key)).draws] == [2, 4, 5]
    assert publisher.skipped == 4


@pytest.mark.parametrize("encoding", ["full", "packed"])
def test_bfloat16_weights_go_round_from_policy_to_policy(encoding: str, world: World) -> None:
    """Learner's float32 -> bfloat16 -> store -> staged policy: acts as one that was loaded with the rounded values."""
    learner = tiny_policy()
    publisher = Publisher(world.store, world.bus, keep_policies=5, encoding=encoding, threads=1)
    spec = replace(facts(), spec=learner.spec)
    subscriber = world.subscribe(prepare=prepare_with(make_policy), embodiment=learner.spec.embodiment)
    publisher.publish_now(learner.export(dtype="bfloat16"), spec)
    acting = subscriber.wait_first(PATIENCE_S).policy
    for step in (1, 2, 3):
        with torch.no_grad():
            for name, parameter in learner.module.named_parameters():
                if name.startswith("expert."):
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        trained = [name for name, _ in learner.module.named_parameters() if name.startswith("expert.")]
        publisher.publish_now(learner.export(dtype="bfloat16", names=trained), replace(spec, learner_step=step))
        eventually(subscriber, lambda step=step: subscriber._current == step)
        staged = subscriber.take(acting)
        assert staged is not None
        acting = staged.policy
        assert acting is not None
        rounded = {name: tensor.bfloat16().float() for name, tensor in learner.module.state_dict().items()}
        for name, tensor in acting.module.state_dict().items():  # type: ignore[attr-defined]
            assert torch.equal(tensor, rounded[name]), name
        expected = tiny_policy()
        expected.load({name: tensor.numpy() for name, tensor in rounded.items()}, step)
        for plans in (acting, expected):
            plans.reset(5)
        seen = Observation(*_scene(learner.spec))
        first, second = (plans.infer(seen, "open it", Conditioning()) for plans in (acting, expected))
        np.testing.assert_array_equal(first, second)
    publisher.close(PATIENCE_S)


def _scene(spec: PolicySpec) -> tuple[dict[str, np.ndarray], np.ndarray]:
    robot, rng = spec.embodiment, np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (*size, 3), np.uint8) for camera, size in robot.cameras.items()}
    return images, rng.standard_normal(robot.num_states).astype(np.float32)


def test_every_bfloat16_pattern_is_loaded_exactly_and_what_is_not_finite_is_refused() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    finite = patterns[(patterns & 0x7F80) != 0x7F80]
    module = torch.nn.Linear(len(finite), 1, bias=False)
    values = finite.view(export_weights(module, dtype="bfloat16")["weight"].dtype)[None]
    load_weights(module, {"weight": values})
    assert torch.equal(
        module.weight.detach(), torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16).float()[None]
    )
    again = export_weights(module, dtype="bfloat16")["weight"]
    np.testing.assert_array_equal(again.view(np.uint16), values.view(np.uint16))
    for special in (0x7F80, 0xFF80, 0x7FC0, 0xFF81):
        bad = values.copy()
        bad.view(np.uint16)[0, 77] = special
        with pytest.raises(PolicyRefused, match="weight holds values that are not finite"):
            load_weights(module, {"weight": bad})


def test_an_export_of_some_names_is_exactly_these() -> None:
    learner = tiny_policy()
    names = list(learner.module.state_dict())[:3]
    some = {name: tensor + 1 for name, tensor in learner.module.state_dict().items() if name in names}
    exported = learner.export(some, names=names)
    assert list(exported) == names
    assert all(np.array_equal(exported[name], some[name].numpy()) for name in names)
    with pytest.raises(ValueError, match=r"1 tensors are missing, e\.g\. "):
        learner.export({name: some[name] for name in names[1:]}, names=names)
    with pytest.raises(ValueError, match=r"1 tensors are unknown, e\.g\. surplus"):
        learner.export(names=[*names, "surplus"])
    with pytest.raises(ValueError, match=r"dtype must be one of .*'bfloat16'.*, got 'int8'"):
        learner.export(dtype="int8")
