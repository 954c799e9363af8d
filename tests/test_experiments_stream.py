"""A recorded run as a stream: which episodes, in which order, and when they are released."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sop.buffer import EpisodeRow, RowBlock
from sop.core.episode import Outcome
from sop.core.errors import RunError
from sop.core.experience import Source
from sop.experiments.stream import Replay, open_stream, order
from sop.presets import make_config
from sop.runs import create_run


def row(number: int, actor_id: str, outcome: Outcome = Outcome.SUCCESS) -> EpisodeRow:
    return EpisodeRow(
        episode_id=f"{number:032x}",
        actor_id=actor_id,
        sequence=number,
        task="push",
        source=Source.OFFLINE if actor_id.startswith(("lab-", "base-")) else Source.ONLINE,
        num_steps=10,
        human_steps=0,
        num_interventions=0,
        policy_version=0,
        outcome=outcome,
        start_runs=((0, 3),),
        end_utc_ns=100 - number,
        indexed_utc_ns=0,
    )


def test_the_fleets_episodes_keep_the_order_of_the_index_and_aborted_ones_are_left_out() -> None:
    blocks = [
        RowBlock.from_rows([row(5, "lab-1"), row(4, "base-0"), row(3, "robot-1")]),
        RowBlock.from_rows([row(2, "robot-0"), row(1, "robot-1", Outcome.ABORTED), row(0, "robot-1", Outcome.FAILURE)]),
    ]
    offline, online = order(blocks, frozenset())
    assert offline == (row(4, "base-0").key, row(5, "lab-1").key)  # sorted: as a learner finds them
    assert online == (row(3, "robot-1").key, row(2, "robot-0").key, row(0, "robot-1").key)
    flagged = {row(4, "base-0").key, row(2, "robot-0").key}
    offline, online = order(blocks, flagged)
    assert (offline, online) == ((row(5, "lab-1").key,), (row(3, "robot-1").key, row(0, "robot-1").key))


def replay_of(count: int, every: int) -> tuple[Any, SimpleNamespace]:
    learner = SimpleNamespace(step=7)
    return Replay([f"key {number}" for number in range(count)], lambda key: key, every), learner  # type: ignore[arg-type, return-value]


def test_an_episode_is_released_every_so_many_steps_from_where_the_stream_begins() -> None:
    replay, learner = replay_of(4, 3)
    assert replay.drain() == []
    replay.begin(lambda: learner.step)
    released = []
    for step in range(7, 20):
        learner.step = step
        released.append(len(replay.drain()))
    assert released == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert (replay.released, replay.finish(), replay.missing(), replay.num_quarantined) == (4, [], {}, 0)


def test_a_learner_that_waits_gets_the_next_episode_early_but_none_twice() -> None:
    replay, learner = replay_of(3, 5)
    replay.begin(lambda: learner.step)
    assert [replay.drain() for _ in range(4)] == [["key 0"], ["key 1"], ["key 2"], []]


def test_a_late_learner_gets_all_that_is_due_in_order() -> None:
    replay, learner = replay_of(5, 2)
    replay.begin(lambda: learner.step)
    learner.step = 12
    assert replay.drain() == ["key 0", "key 1", "key 2"]


def test_a_schedule_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps_per_episode must be at least 1, got 0"):
        Replay([], lambda key: key, 0)  # type: ignore[arg-type, return-value]


def test_a_run_of_another_algorithm_is_no_stream(tmp_path: Path) -> None:
    create_run(tmp_path / "a", make_config("debug"))
    with pytest.raises(RunError, match="is a run of hg_dagger: a stream needs one of recap"):
        open_stream(str(tmp_path / "a"), 1)
