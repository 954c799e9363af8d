"""Many ranks, without processes: who gets which windows, what is said, what is refused."""

import re
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from sop.buffer.jobs import BatchPlan, part_of
from sop.core.errors import RunError
from sop.core.experience import Batch, Share, Windows, batch_hash, hash_like, rows_of, shared_hash
from sop.learner.crew import ALIVE_S, Alone, Crew, shared
from sop.learner.follower import PartLoader
from sop.learner.messages import Finish, Learn, Learned, Part, Waiting, decode, decode_learned, encode
from sop.learner.ranks import OneRank, num_ranks, open_ranks, part_size, require_one_rank
from sop.policies.draws import draw_rows
from sop.policies.indicator import POSITIVE, drop_out
from test_policies_contract import tiny_policy

KEYS = tuple(f"episodes/robot-0/{number:08d}-00020-{number:032x}.arrow" for number in range(3))

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


def a_plan(count: int = 6, version: int = 2) -> BatchPlan:
    """Window i starts at step 10 i, in the episodes 2, 0, 2, 0, 1, 1."""
    row = np.asarray([2, 0, 2, 0, 1, 1][:count], np.int32)
    return BatchPlan(
        windows=Windows(
            row.astype(np.int64) + 40, np.arange(count, dtype=np.int32) * 10, np.zeros(count, np.int32),
            np.ones(count, np.uint8),
        ),
        keys=KEYS,
        row=row,
        length=np.arange(1, count + 1, dtype=np.int16),
        loss_weight=np.arange(count * 8, dtype=np.float32).reshape(count, 8),
        advantage_indicator=np.asarray([1, 0, -1, 1, 0, -1][:count], np.int8),
        label_version=version,
    )  # fmt: skip


def a_batch(plan: BatchPlan) -> Batch:
    """What a fetcher makes of a plan: the state of a window is its start."""
    numbers = np.asarray([KEYS.index(plan.keys[row]) for row in plan.row])
    count = len(plan.windows)
    batch = Batch(
        windows=plan.windows,
        images={"front": np.zeros((count, 2, 2, 3), np.uint8) + numbers[:, None, None, None].astype(np.uint8)},
        state=plan.windows.start[:, None].astype(np.float32),
        action=np.zeros((count, 8, 2), np.float32),
        loss_weight=plan.loss_weight,
        instruction=tuple(plan.keys[row] for row in plan.row),
        policy_version=numbers.astype(np.int64),
        advantage_indicator=plan.advantage_indicator,
        label_version=plan.label_version,
    )
    return replace(batch, content_hash=batch_hash(batch))


class FakeLoader:
    """One plan is due, one comes after it."""

    def __init__(self, part: int) -> None:
        self.part = part

    def due(self) -> Any:
        whole = a_plan()

        class Due:
            plan = whole

            @staticmethod
            def batch() -> Batch:
                return a_batch(part_of(whole, 0, self.part))

        return Due

    def ahead(self) -> list[BatchPlan]:
        return [a_plan(version=3)]

    def next(self) -> Batch:
        return a_batch(a_plan())


class FakeRanks:
    """Remembers what is said; the losses of rank r are 10 r, 10 r + 1, ..."""

    rank, size, sharded = 0, 3, False

    def __init__(self, stopping: int = 0) -> None:
        self.said: list[tuple[int, Any]] = []
        self.stopping = stopping

    def send(self, rank: int, message: bytes) -> None:
        self.said.append((rank, decode(message)))

    def receive(self, rank: int) -> bytes:
        part = a_batch(part_of(a_plan(), 2 * rank, 2 * rank + 2))
        losses = np.arange(2, dtype=np.float32) + 10 * rank
        return encode(Learned.of(part, losses, stop=rank == self.stopping))


def test_the_parts_of_a_plan_are_its_windows_in_order_with_no_episode_too_many() -> None:
    plan = a_plan()
    parts = [part_of(plan, first, first + 2) for first in (0, 2, 4)]
    assert [part.keys for part in parts] == [(KEYS[0], KEYS[2]), (KEYS[0], KEYS[2]), (KEYS[1],)]
    assert [part.keys[row] for part in parts for row in part.row] == [KEYS[row] for row in plan.row]
    for name in ("length", "loss_weight", "advantage_indicator"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(plan, name))
    for name in ("episode", "start", "task", "source"):
        found = np.concatenate([getattr(part.windows, name) for part in parts])
        np.testing.assert_array_equal(found, getattr(plan.windows, name))
    assert {part.label_version for part in parts} == {2}


def test_a_part_survives_the_wire() -> None:
    plan = part_of(a_plan(), 1, 4)
    learn = Learn(part=Part.of(plan), ahead=(Part.of(plan),), first=1, total=6, generator=b"state", lr_factor=0.5)
    heard = decode(encode(learn))
    assert isinstance(heard, Learn)
    assert (heard.first, heard.total, heard.generator, heard.lr_factor) == (1, 6, b"state", 0.5)
    for part in (heard.part, *heard.ahead):
        found = part.plan()
        assert (found.keys, found.label_version) == (plan.keys, plan.label_version)
        for name in ("row", "length", "loss_weight", "advantage_indicator"):
            np.testing.assert_array_equal(getattr(found, name), getattr(plan, name))
        np.testing.assert_array_equal(found.windows.start, plan.windows.start)


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode({"type": "Dance"}), b"\x93\x01\x02"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(RunError, match="start all with one version"):
        decode(data)
    with pytest.raises(RunError, match="rank 2"):
        decode_learned(data, 2, 4)


def test_an_answer_for_another_number_of_windows_is_refused() -> None:
    answer = encode(Learned.of(a_batch(a_plan()), np.zeros(6, np.float32), stop=False))
    assert decode_learned(answer, 1, 6)[1].tolist() == [0.0] * 6
    with pytest.raises(RunError, match="rank 1 answered 6 losses and 6 versions for 3 windows"):
        decode_learned(answer, 1, 3)


def test_losses_and_facts_are_those_of_the_whole_batch_in_the_order_of_the_draw() -> None:
    ranks, generator = FakeRanks(stopping=2), torch.Generator().manual_seed(5)
    crew = Crew(FakeLoader(2), ranks, 2, clock=lambda: 0.0)  # type: ignore[arg-type]
    batch = crew.next_batch(generator, 0.25)
    assert batch.share == Share(0, 6)
    assert batch.state[:, 0].tolist() == [0, 10]
    orders = [(rank, order.first, order.total, order.lr_factor) for rank, order in ranks.said]
    assert orders == [(1, 2, 6, 0.25), (2, 4, 6, 0.25)]
    for _, order in ranks.said:
        assert order.generator == generator.get_state().numpy().tobytes()
        assert order.part.plan().windows.start.tolist() == [10 * order.first, 10 * order.first + 10]
        assert [part.label_version for part in order.ahead] == [3]
    whole, losses = crew.learned(batch, torch.tensor([0.5, 1.5], requires_grad=True))
    assert losses.tolist() == [0.5, 1.5, 10.0, 11.0, 20.0, 21.0]
    plan = a_plan()
    assert whole.windows.start.tolist() == plan.windows.start.tolist()
    assert whole.policy_version.tolist() == plan.row.tolist()
    assert whole.content_hash == hash_like(a_batch(plan), whole.content_hash)
    assert crew.stop_asked


def test_alone_a_batch_is_learned_whole_and_nobody_is_told() -> None:
    alone = Alone(FakeLoader(6))  # type: ignore[arg-type]
    batch = alone.next_batch(torch.Generator(), 1.0)
    assert (batch.share, len(batch)) == (None, 6)
    learned, losses = alone.learned(batch, torch.arange(6.0))
    assert learned is batch
    assert losses.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_waiting_rank_0_gives_signs_of_life_now_and_then() -> None:
    now, ranks = [0.0], FakeRanks()
    crew = Crew(FakeLoader(2), ranks, 2, clock=lambda: now[0])  # type: ignore[arg-type]
    for seconds in (1.0, ALIVE_S, 1.0, ALIVE_S - 1):
        now[0] += seconds
        crew.waiting()
    crew.finish()
    assert [(rank, type(message)) for rank, message in ranks.said] == [
        (1, Waiting), (2, Waiting), (1, Waiting), (2, Waiting), (1, Finish), (2, Finish),
    ]  # fmt: skip


class FakeFetcher:
    """Makes batches at once; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def load(self, plan: BatchPlan) -> Batch:
        self.asked.append(plan.windows.start.tolist())
        return a_batch(plan)

    def submit(self, plan: BatchPlan) -> "Future[Batch]":
        future: Future[Batch] = Future()
        future.set_result(self.load(plan))
        return future


def test_a_follower_fetches_ahead_once_and_takes_over_new_labels() -> None:
    fetcher, plan = FakeFetcher(), a_plan()
    first, second = part_of(plan, 0, 2), part_of(plan, 2, 4)
    loader = PartLoader(fetcher)  # type: ignore[arg-type]
    loader.expect([first, second])
    assert loader.take(first).content_hash == a_batch(first).content_hash
    changed = replace(second, loss_weight=second.loss_weight / 2, label_version=7)
    loader.expect([changed, first])
    batch = loader.take(changed)
    assert fetcher.asked == [[0, 10], [20, 30], [0, 10]], "labels are not decoded again"
    assert (batch.label_version, batch.content_hash) == (7, a_batch(changed).content_hash)
    longer = replace(first, length=first.length + 1)
    loader.take(longer)
    assert fetcher.asked[3:] == [[0, 10]], "other steps count: what was expected does not fit"


def test_a_batch_of_parts_has_a_hash_per_part_that_can_be_made_of_the_whole() -> None:
    batch = a_batch(a_plan())
    parts = [rows_of(batch, first, first + 2) for first in (0, 2, 4)]
    assert [part.share for part in parts] == [Share(0, 6), Share(2, 6), Share(4, 6)]
    recorded = shared_hash([part.content_hash for part in parts])
    assert hash_like(batch, recorded) == recorded
    assert hash_like(replace(batch, state=batch.state + 1), recorded) != recorded
    assert hash_like(batch, "0" * 32) == batch.content_hash
    assert hash_like(batch, "+".join(["0" * 32] * 4)) == batch.content_hash, "6 windows are not 4 parts"
    assert parts[1].content_hash == a_batch(part_of(a_plan(), 2, 4)).content_hash


def test_rows_are_drawn_for_the_whole_batch() -> None:
    asked = []

    def draw(count: int) -> torch.Tensor:
        asked.append(count)
        return torch.arange(count)

    assert draw_rows(3, None, draw).tolist() == [0, 1, 2]
    assert draw_rows(2, Share(3, 6), draw).tolist() == [3, 4]
    assert asked == [3, 6]


def test_the_indicator_is_dropped_in_the_same_windows_whoever_has_them() -> None:
    rows, seed = torch.full((64,), POSITIVE), 4
    whole = drop_out(rows, 0.5, torch.Generator().manual_seed(seed))
    parts = [
        drop_out(rows[first : first + 16], 0.5, torch.Generator().manual_seed(seed), Share(first, 64))
        for first in range(0, 64, 16)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert 0 < int((whole == POSITIVE).sum()) < 64


def test_a_policy_with_an_indicator_learns_the_same_in_parts() -> None:
    from sop.testing.contracts.policy import sample_batch, with_indicator

    policy = tiny_policy(indicator="embed", precision="float32", indicator_dropout=0.5)
    batch = with_indicator(sample_batch(policy.spec, 6))
    whole = policy.loss(batch, torch.Generator().manual_seed(1))
    parts = [policy.loss(rows_of(batch, first, first + 3), torch.Generator().manual_seed(1)) for first in (0, 3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "ranks", "advice"), [(64, 3, "63 or 66"), (2, 4, "take 4,")])
def test_a_batch_that_cannot_be_shared_is_named(batch: int, ranks: int, advice: str) -> None:
    with pytest.raises(ValueError, match=f"learner.batch_size is {batch}, which {ranks} ranks cannot share.*{advice}"):
        part_size(batch, ranks)
    assert part_size(64, 4) == 16


def test_torchrun_says_how_many_there_are() -> None:
    assert num_ranks({}) == num_ranks({"WORLD_SIZE": "1"}) == 1
    assert num_ranks(TORCHRUN) == 2


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(RunError, match=re.escape("WORLD_SIZE=2 without LOCAL_RANK, MASTER_ADDR, MASTER_PORT")):
        num_ranks({"WORLD_SIZE": "2", "RANK": "0"})


def test_one_rank_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    require_one_rank("--warmup")
    with open_ranks(torch.device("cpu")) as ranks:
        assert isinstance(ranks, OneRank)
        value = torch.tensor(2.0)
        assert ranks.mean(value) is value
        assert ranks.whole(value) is value
        named = iter([("a", value)])
        assert ranks.collect(named)["a"] is value
        assert ranks.distribute({"a": value}, {})["a"] is value


def test_pretraining_is_refused_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--pretrain is done by one process"):
        require_one_rank("--pretrain")


def test_a_part_says_that_it_is_one() -> None:
    batch = shared(a_batch(a_plan()), 6, 12)
    assert batch.share == Share(6, 12)
    assert batch.content_hash == batch_hash(batch), "where it lies in the whole is not part of its content"
