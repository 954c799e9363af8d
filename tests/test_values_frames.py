"""Which steps a fit draws: those with a target, no task and no outcome forgotten."""

import numpy as np
import pytest

from sop.core.episode import Episode, Outcome
from sop.core.errors import RunError
from sop.testing.episodes import make_episode
from sop.values import ReturnSettings, returns
from sop.values.frames import FrameTable


def table_of(episodes: list[Episode], *, takeover: str = "charge", balance: bool = True) -> FrameTable:
    settings = ReturnSettings(takeover=takeover)
    return FrameTable(episodes, [returns(one, 50, settings) for one in episodes], balance_outcomes=balance)


EPISODES = [
    make_episode("p" * 30), make_episode("p" * 10), make_episode("pp", outcome=Outcome.FAILURE),
    make_episode("ppp", task="pull"), make_episode("pp", outcome=Outcome.ABORTED),
]  # fmt: skip


def test_tasks_count_alike_then_outcomes_then_steps() -> None:
    drawn = table_of(EPISODES).draw(4000, np.random.default_rng(0))
    counts = np.bincount(drawn.episode, minlength=5)
    assert counts[3] == 2000
    assert counts[4] == 0
    assert counts[2] == pytest.approx(1000, abs=100)
    assert counts[0] == pytest.approx(750, abs=100)
    assert counts[1] == pytest.approx(250, abs=60)
    steps = np.bincount(drawn.step[drawn.episode == 1], minlength=10)
    assert len(steps) == 10
    assert steps.min() > 5


def test_without_balance_outcomes_count_as_in_the_data() -> None:
    counts = np.bincount(table_of(EPISODES, balance=False).draw(4000, np.random.default_rng(0)).episode, minlength=5)
    assert counts[3] == 2000
    assert counts[2] == pytest.approx(2000 * 2 / 42, abs=40)


def test_every_draw_carries_the_target_of_its_step() -> None:
    drawn = table_of(EPISODES).draw(200, np.random.default_rng(1))
    targets = [returns(one, 50, ReturnSettings()) for one in EPISODES]
    for episode, step, target in zip(drawn.episode, drawn.step, drawn.target, strict=True):
        assert targets[episode][step] == target


def test_peoples_steps_and_cut_runs_are_never_drawn() -> None:
    corrected = [make_episode("pphhp")]
    charged, cut = table_of(corrected), table_of(corrected, takeover="cut")
    assert (len(charged), len(cut)) == (3, 1)
    assert set(charged.draw(100, np.random.default_rng(0)).step) == {0, 1, 4}
    assert set(cut.draw(100, np.random.default_rng(0)).step) == {4}


def test_a_charged_takeover_is_on_the_side_of_the_failures() -> None:
    """Step 8 led to success, steps 0 to 6 to a takeover: each side gets half."""
    drawn = table_of([make_episode("p" * 7 + "hp")]).draw(1000, np.random.default_rng(0))
    assert (drawn.step == 8).sum() == pytest.approx(500, abs=60)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(RunError, match="none of 1 episodes has a step to learn from"):
        table_of([make_episode("pph")], takeover="cut")
