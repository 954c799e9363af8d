"""The draw log: what becomes the lineage of a version, and what survives a restart of the learner."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sop.buffer import EpisodeIndex, EpisodeRow, IngestedEpisode
from sop.core.codec import EncodedEpisode, content_hash, encode
from sop.core.experience import Batch, Source, Windows
from sop.core.layout import EpisodeKey
from sop.learner import draws
from sop.learner.draws import DrawLog
from sop.testing.episodes import make_episode


def ingested(sequence: int, *, spooled: int | None = 5, controllers: str = "pphh") -> IngestedEpisode:
    data = encode(make_episode(controllers, sequence=sequence))
    key = EpisodeKey("episodes", "robot-0", sequence, len(controllers), content_hash(data))
    uploaded = None if spooled is None else spooled + 1
    return IngestedEpisode(key, Source.ONLINE, EncodedEpisode(data), spooled_utc_ns=spooled, uploaded_utc_ns=uploaded)


class Setup:
    """An index of four episodes, its log, and a clock that counts calls."""

    def __init__(self, episodes: Sequence[IngestedEpisode] | None = None, *, arrive: bool = True) -> None:
        self.index = EpisodeIndex(["push"])
        self.now = 100
        self.log = DrawLog(self.index, self._tick)
        self.episodes = episodes or [ingested(number) for number in range(4)]
        for row, episode in enumerate(self.episodes):
            self.index.add(row_of(episode))
            if arrive:
                self.log.arrived(row, episode)

    def _tick(self) -> int:
        self.now += 1
        return self.now

    def draw(self, step: int, *rows: int) -> list[str]:
        return [episode.key for episode in self.log.drawn(step, batch(step, rows))]

    def key(self, row: int) -> str:
        return str(self.episodes[row].key)


def row_of(episode: IngestedEpisode) -> EpisodeRow:
    encoded, key = episode.encoded, episode.key
    return EpisodeRow(
        episode_id=key.episode_id,
        actor_id=key.actor_id,
        sequence=key.sequence,
        task="push",
        source=Source.ONLINE,
        num_steps=key.num_steps,
        human_steps=int(encoded.controller.sum()),
        num_interventions=1,
        policy_version=3,
        outcome=encoded.outcome,
        start_runs=((0, 1),),
        end_utc_ns=4,
        indexed_utc_ns=50,
    )


def batch(step: int, rows: Sequence[int]) -> Batch:
    size = len(rows)
    empty: Any = np.zeros((size, 1), np.float32)
    return Batch(
        windows=Windows(
            np.asarray(rows, np.int64),
            np.arange(size, dtype=np.int32),
            np.zeros(size, np.int32),
            np.ones(size, np.uint8),
        ),
        images={},
        state=empty,
        action=empty[:, None],
        loss_weight=empty,
        instruction=("push",) * size,
        policy_version=np.full(size, 3, np.int64),
        content_hash=f"{step:032x}",
    )


def test_an_episode_is_new_once_and_carries_its_way_to_the_first_draw() -> None:
    run = Setup()
    assert run.draw(1, 2, 0, 2) == [run.key(0), run.key(2)]
    assert run.draw(2, 2, 3) == [run.key(3)]
    lineage = run.log.hand_over()
    first = lineage.learned[0]
    assert (first.recorded_utc_ns, first.spooled_utc_ns, first.uploaded_utc_ns) == (4, 5, 6)
    assert (first.indexed_utc_ns, first.sampled_utc_ns, first.learner_step) == (50, 101, 1)
    assert (first.operators, first.human_steps, first.policy_version) == (("tester",), 2, 3)
    assert [draw.keys for draw in lineage.draws] == [(run.key(2), run.key(0), run.key(2)), (run.key(2), run.key(3))]
    assert [draw.batch_hash for draw in lineage.draws] == [f"{1:032x}", f"{2:032x}"]


def test_what_waits_for_its_first_draw_is_bounded_and_the_oldest_lose_their_stamps_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draws, "MAX_ARRIVALS", 3)
    run = Setup()
    run.draw(1, 0, 1)
    oldest, next_one = run.log.hand_over().learned
    assert (oldest.spooled_utc_ns, oldest.uploaded_utc_ns, oldest.indexed_utc_ns) == (None, None, 50)
    assert (next_one.spooled_utc_ns, next_one.uploaded_utc_ns) == (5, 6)


def test_each_draw_belongs_to_one_hand_over() -> None:
    run = Setup()
    run.draw(1, 0)
    assert [draw.learner_step for draw in run.log.hand_over().draws] == [1]
    run.draw(2, 1)
    second = run.log.hand_over()
    assert [draw.learner_step for draw in second.draws] == [2]
    assert [episode.key for episode in second.learned] == [run.key(1)]
    assert run.log.hand_over().draws == ()


def test_what_was_handed_over_but_not_published_survives_a_restart() -> None:
    run = Setup()
    run.draw(1, 0)
    run.log.hand_over()  # published
    run.draw(2, 1)
    run.log.hand_over()  # the learner is killed before this is written
    run.draw(3, 2)
    run.log.forget(1)
    arrays = run.log.arrays()

    after = Setup(run.episodes, arrive=False)
    after.log.restore(arrays, published_step=1)
    assert after.draw(4, 0, 1, 3) == [after.key(3)]  # 0 and 1 were learned from before
    lineage = after.log.hand_over()
    assert [draw.learner_step for draw in lineage.draws] == [2, 3, 4]
    assert [episode.key for episode in lineage.learned] == [after.key(1), after.key(2), after.key(3)]


def test_what_a_version_in_the_store_tells_is_not_told_twice_after_a_restart() -> None:
    run = Setup()
    run.draw(1, 0)
    run.log.hand_over()
    run.draw(2, 1)
    run.log.hand_over()
    arrays = run.log.arrays()  # a checkpoint at step 2, before version 2 was written; then it was
    after = Setup(run.episodes, arrive=False)
    after.log.restore(arrays, published_step=2)
    after.draw(3, 1)
    lineage = after.log.hand_over()
    assert [draw.learner_step for draw in lineage.draws] == [3]
    assert lineage.learned == ()


def test_an_episode_that_came_without_an_event_has_unknown_stamps() -> None:
    run = Setup([ingested(0, spooled=None)])
    run.draw(1, 0)
    (episode,) = run.log.hand_over().learned
    assert (episode.spooled_utc_ns, episode.uploaded_utc_ns) == (None, None)
    assert episode.operators == ("tester",)


def test_after_a_restart_the_episode_itself_says_who_corrected() -> None:
    run = Setup(arrive=False)
    run.draw(1, 0)
    assert run.log.hand_over().learned[0].operators is None


def test_thousands_of_episodes_grow_the_log() -> None:
    run = Setup([ingested(number, controllers="p") for number in range(3)])
    episodes = run.episodes[0]
    for number in range(3, 2000):
        row = row_of(episodes)
        run.index.add(
            EpisodeRow(**{name: getattr(row, name) for name in row.__slots__} | {"episode_id": f"{number:032x}"})
        )
    assert len(run.draw(1, 0, 1999)) == 2
    assert run.draw(2, 0, 1999, 1998) == [run.index.key(1998)]


def test_the_labels_of_a_batch_are_kept_when_they_are_an_opinion() -> None:
    run = Setup()
    run.draw(1, 0)
    weights, signs = np.asarray([[0.5], [2.0]], np.float32), np.asarray([1, -1], np.int8)
    opinion = replace(batch(2, (1, 2)), label_version=7, loss_weight=weights, advantage_indicator=signs)
    run.log.drawn(2, opinion)
    weights[:] = 0  # a batch may be written to
    after = Setup(run.episodes, arrive=False)
    after.log.restore(run.log.arrays(), published_step=0)
    fact, kept = after.log.hand_over().draws
    assert (fact.label_version, fact.loss_weight, fact.advantage_indicator) == (0, None, None)
    assert kept.label_version == 7
    assert kept.loss_weight is not None
    assert kept.advantage_indicator is not None
    assert (kept.loss_weight.tolist(), kept.advantage_indicator.tolist()) == ([[0.5], [2.0]], [1, -1])
