"""An algorithm whose opinion changes: what it is told, what it is asked, and that a resumed learner sees the same."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner_examples import Moody, open_learner
from sop import system
from sop.algorithms import make_algorithm
from sop.buffer import IndexSegments
from sop.core import layout
from sop.core.codec import EncodedEpisode, content_hash, decode, encode
from sop.core.episode import Outcome
from sop.core.errors import RunError
from sop.core.experience import Source
from sop.core.layout import EpisodeKey
from sop.core.lineage import Lineage, StepDraw
from sop.core.sidecar import decode_sidecar
from sop.learner import Checkpoint, CheckpointStore
from sop.learner.told import Told
from sop.replay import replay_batch
from sop.runs import Run
from sop.system import make_learner_policy, run_pretraining
from sop.testing.episodes import make_episode
from sop.testing.memory import MemoryStore


def all_keys(run: Run) -> list[str]:
    return [*run.store.keys("demonstrations/"), *run.store.keys("episodes/")]


def train(run: Run, steps: int, resume: Checkpoint | None = None) -> tuple[list[StepDraw], Checkpoint, Moody]:
    """Draws since the base, the state at the end, the rule."""
    algorithm = Moody()
    with open_learner(run, algorithm, offline_steps=steps) as (learner, parts):
        if resume is None:
            parts.books.index(parts.ingest.take(all_keys(run)))
        else:
            learner.restore(resume)
        learner.train(threading.Event())
        saved = learner.checkpoint()
        store = CheckpointStore(MemoryStore(), IndexSegments(MemoryStore(), "0" * 32))
        store.save(saved)
        store.close()
        again = store.newest()
    assert again is not None
    return list(Lineage.decode(saved.tensors["draws/lineage"].numpy().tobytes()).draws), again, algorithm


def facts(draws: list[StepDraw]) -> list[tuple[int, str, int]]:
    return [(draw.learner_step, draw.batch_hash, draw.label_version) for draw in draws]


def test_labels_are_those_of_the_moment_of_the_step_and_a_resumed_learner_sees_the_same(finished_base: Run) -> None:
    straight, _, _ = train(finished_base, 12)
    assert [draw.label_version for draw in straight] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    for draw in straight:
        assert draw.loss_weight is not None
        assert set(np.unique(draw.loss_weight)) <= {np.float32(0), np.float32(1 / np.float32(draw.label_version))}
    for middle in (5, 6):  # after a step whose successor changes the labels, and after one whose does not
        first, checkpoint, _ = train(finished_base, middle)
        both, _, _ = train(finished_base, 12, checkpoint)
        assert facts(first) == facts(straight)[:middle]
        assert facts(both) == facts(straight)


def test_the_algorithm_is_asked_in_an_order_that_repeats_and_told_once_in_the_order_of_the_index(
    finished_base: Run,
) -> None:
    _, _, first = train(finished_base, 5)
    _, checkpoint, again = train(finished_base, 5)
    assert first.asked == again.asked
    assert first.told == again.told
    keys = [EpisodeKey.parse(key) for key in all_keys(finished_base)]
    sources = {layout.DEMONSTRATIONS: Source.OFFLINE, layout.EPISODES: Source.ONLINE}
    assert first.told == [(f"{key.actor_id}/{key.sequence}", sources[key.folder]) for key in keys]
    assert first.library is not None
    assert [*first.library.keys(Source.OFFLINE), *first.library.keys(Source.ONLINE)] == all_keys(finished_base)
    _, _, resumed = train(finished_base, 6, checkpoint)
    assert resumed.told == [], "a resumed rule knows what it was told"


def test_a_rule_is_told_nothing_twice_and_what_came_late_once_when_a_lost_index_is_rebuilt(
    finished_base: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Moody, "state_dict", lambda rule: {"mood": rule.mood, "told": list(map(list, rule.told))})
    monkeypatch.setattr(
        Moody, "load_state_dict", lambda rule, state: vars(rule).update(mood=state["mood"], told=list(state["told"]))
    )
    _, checkpoint, first = train(finished_base, 4)
    _, _, resumed = train(finished_base, 5, replace(checkpoint, rows=None))
    assert resumed.told == list(map(list, first.told))
    late = add_rollouts(finished_base, 2)
    try:
        _, again, resumed = train(finished_base, 5, replace(checkpoint, rows=None))
        assert resumed.told[: len(first.told)] == list(map(list, first.told))
        assert resumed.told[len(first.told) :] == [("base-0/0", Source.OFFLINE), ("base-0/1", Source.OFFLINE)]
        _, _, once_more = train(finished_base, 6, replace(again, rows=None))
        assert once_more.told == list(map(list, resumed.told))
        before_it_was_kept = {name: value for name, value in checkpoint.state.items() if name != "told"}
        _, _, resumed = train(finished_base, 5, replace(checkpoint, rows=None, state=before_it_was_kept))
        assert resumed.told == list(map(list, first.told))
    finally:
        for key in late:
            finished_base.store.delete(key)


def test_runs_of_what_was_told_are_joined_in_whatever_order_they_come() -> None:
    told = Told()
    for number in (3, 0, 1, 5, 4, 9):
        told.add("episodes", "robot-0", number, number + 1)
    told.add("episodes", "robot-1", 0, 4)
    assert told.state() == {"episodes/robot-0": [(0, 2), (3, 6), (9, 10)], "episodes/robot-1": [(0, 4)]}
    again = Told(json.loads(json.dumps(told.state())))
    assert again.state() == told.state()
    keys = [EpisodeKey("episodes", "robot-0", number, 5, "0" * 32) for number in range(11)]
    assert [key.sequence for key in keys if key in again] == [0, 1, 3, 4, 5, 9]
    assert EpisodeKey("demonstrations", "robot-0", 0, 5, "0" * 32) not in again


def add_rollouts(run: Run, count: int) -> list[str]:
    """What a base actor would have recorded: the fleet's episodes under its name, of version 0."""
    keys = []
    for number, key in enumerate(sorted(run.store.keys("episodes/"))[:count]):
        changes: dict[str, Any] = {"actor_id": "base-0", "sequence": number, "policy_version": 0}
        data = encode(replace(decode(run.store.get(key)), **changes))
        steps = EncodedEpisode(data).num_steps
        keys.append(str(EpisodeKey(layout.DEMONSTRATIONS, "base-0", number, steps, content_hash(data))))
        run.store.put(keys[-1], data)
    return keys


@pytest.fixture
def with_rollouts(finished_base: Run) -> Any:
    keys = add_rollouts(finished_base, 3)
    yield keys
    for key in keys:
        finished_base.store.delete(key)


def test_base_rollouts_are_indexed_first_and_are_not_counted_as_collected(
    finished_base: Run, with_rollouts: list[str]
) -> None:
    algorithm, run = Moody(), finished_base
    with open_learner(run, algorithm) as (_, parts):
        new = parts.books.index(system._prepared(run, parts))
        assert (new, parts.books.collected, parts.books.fresh_starts) == ([], 0, 0)
        assert parts.index.num_episodes(Source.OFFLINE) == 12 + 3
        assert parts.library.keys(Source.OFFLINE)[:3] == with_rollouts
        assert parts.library.get(with_rollouts[0]).policy_version == 0
        block = parts.index.block(0, len(parts.index))
        assert not block.from_fleet().any()
        parts.books.learned(1, parts.loader.next(), newest_version=0)
        assert parts.books.fresh_draws == 0
        assert len(parts.books.index(parts.ingest.take(run.store.keys("episodes/")))) == parts.books.collected == 6


def test_a_rule_that_needs_rollouts_is_not_prepared_before_every_task_of_the_fleet_has_one(
    finished_base: Run, with_rollouts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prepared = finished_base, []
    monkeypatch.setattr(Moody, "prepare", lambda *_: prepared.append(1))
    monkeypatch.setattr(Moody, "needs_rollouts", True)
    rollouts = [EncodedEpisode(run.store.get(key)) for key in with_rollouts]
    shown = {one.task for one in rollouts if one.outcome is not Outcome.ABORTED}
    assert shown
    for tasks, missing in (((*sorted(shown), "touch-blue"), "touch-blue"), (tuple(sorted(shown)), "")):
        robot = replace(run.config.robot, fleet_tasks=tasks, held_out_tasks=())
        changed = replace(run, config=replace(run.config, robot=robot))
        with open_learner(run, Moody()) as (_, parts):
            if missing:
                with pytest.raises(RunError, match=rf"of the fleet's tasks {missing} there is none .*--rollout"):
                    system._prepared(changed, parts)
                assert not prepared
            else:
                system._prepared(changed, parts)
                assert prepared


def test_only_rollouts_that_came_to_an_end_count_for_their_task() -> None:
    some = [
        make_episode("hh", actor_id="lab-0", policy_version=None),
        make_episode("pp", actor_id="base-0", policy_version=0, outcome=Outcome.ABORTED),
        make_episode("pp", actor_id="base-0", policy_version=0, sequence=1, task="pull"),
    ]
    system._require_rollouts(("pull",), some)
    with pytest.raises(RunError, match="tasks push there is none"):
        system._require_rollouts(("push", "pull"), some)


def test_only_what_can_be_drawn_waits_for_its_first_draw(finished_base: Run, with_rollouts: list[str]) -> None:
    with open_learner(finished_base, make_algorithm("hg_dagger", {"handover_s": 0.0}, control_hz=10.0)) as (_, parts):
        parts.books.index(parts.ingest.take(all_keys(finished_base)))
        rows = [parts.index.row(number) for number in range(len(parts.index))]
        drawable = [number for number, row in enumerate(rows) if row.num_starts]
        assert sorted(parts.books.draws._arrivals) == drawable
        assert len(drawable) <= len(rows) - len(with_rollouts), "a policy's own steps teach HG-DAgger nothing"


def test_numbers_behind_the_labels_are_stored_for_rollouts_and_the_fleet_but_not_for_demonstrations(
    finished_base: Run, with_rollouts: list[str]
) -> None:
    run = finished_base
    for key in list(run.store.keys("labels/")):
        run.store.delete(key)
    with open_learner(run, Moody()) as (_, parts):
        parts.books.index(parts.ingest.take(all_keys(run)))
    told = [EpisodeKey.parse(key) for key in (*with_rollouts, *run.store.keys("episodes/"))]
    wanted = {layout.sidecar(run.config.algorithm, 1, key.episode_id): key for key in told}
    assert set(run.store.keys("labels/")) == set(wanted)
    for place, key in wanted.items():
        found = decode_sidecar(run.store.get(place), key)
        assert (found.version, found.columns["value"].tolist()) == (1, [-0.5] * key.num_steps)


def test_pretraining_reads_the_lab_and_no_rollout(
    finished_base: Run, with_rollouts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def look(_: object, keys: list[str]) -> list[object]:
        taken.extend(keys)
        return []

    monkeypatch.setattr(system.Ingest, "take", look)
    with pytest.raises(system.RunError, match="no demonstrations"):
        run_pretraining(finished_base, threading.Event())
    assert len(taken) == 12
    assert set(taken).isdisjoint(with_rollouts)


def test_a_batch_is_drawn_again_with_the_labels_it_had_though_the_rule_thinks_otherwise_now(
    finished_base: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_base
    with open_learner(run, Moody(), offline_steps=5) as (learner, parts):
        parts.books.index(parts.ingest.take(all_keys(run)))
        learner.run(threading.Event())
    monkeypatch.setattr("sop.replay.make_algorithm", lambda *_: make_algorithm("bc", {}, 1.0))
    for step in (3, 4, 5):
        replay = replay_batch(run, step)
        assert replay.draw.label_version == (1 if step < 4 else 2)
        assert replay.same
    unlabelled = replace(replay.draw, loss_weight=None)
    monkeypatch.setattr("sop.replay.find_draw", lambda *_: (replay.manifest, unlabelled))
    assert not replay_batch(run, 5).same, "the rule as it is now gives other labels"


def test_a_rule_s_metrics_are_in_the_learner_s_report(finished_base: Run) -> None:
    with open_learner(finished_base, Moody()) as (learner, parts):
        learner.report("here", force=True)
        lines = (finished_base.folder / "metrics" / "learner.jsonl").read_text().splitlines()
        assert parts.publisher.last_published is not None
    assert '"moody/mood":1.0' in lines[-1].replace(" ", "")


def test_a_policy_is_made_with_what_the_algorithm_needs(
    finished_base: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Moody()
    monkeypatch.setattr(Moody, "policy_settings", {"indicator": "embed"})
    monkeypatch.setattr(system, "make_algorithm", lambda *_: rule)
    policy, algorithm = make_learner_policy(finished_base)
    assert algorithm is rule
    assert policy.spec.config["indicator"] == "embed"


@pytest.mark.parametrize(
    ("indicator", "freeze", "message"),
    [
        ("embed", "expert", r"'expert' matches expert\.indicator\.weight, which the base policy lacks"),
        ("embed", "vision", None),
        ("text", "expert", None),
    ],
)
def test_what_the_base_lacks_cannot_be_frozen(
    finished_base: Run, monkeypatch: pytest.MonkeyPatch, indicator: str, freeze: str, message: str | None
) -> None:
    monkeypatch.setattr(Moody, "policy_settings", {"indicator": indicator})
    monkeypatch.setattr(system, "make_algorithm", lambda *_: Moody())
    config = finished_base.config
    run = replace(finished_base, config=replace(config, learner=replace(config.learner, freeze=freeze)))
    if message is None:
        assert make_learner_policy(run)[0].spec.config["indicator"] == indicator
    else:
        with pytest.raises(ValueError, match=message):
            make_learner_policy(run)


def test_what_the_base_has_cannot_be_left_behind() -> None:
    with pytest.raises(ValueError, match="the base policy has b, which the algorithm's policy lacks"):
        system._require_publishable({"a", "b"}, {"a"}, "")
