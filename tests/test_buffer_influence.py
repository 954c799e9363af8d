"""The influence report: of ten robots the one with wrong data is named, and the cap bounds what it does."""

import json
from typing import Any

import numpy as np
import pytest

from sop.buffer import AdaptiveSampler, EpisodeIndex, EpisodeRow
from sop.buffer.influence import NAMED, Influence
from sop.config import SamplerConfig
from sop.core.episode import Outcome
from sop.core.experience import Source, Windows

ROBOTS, EPISODES, STEPS, BATCH, HORIZON = 10, 40, 600, 32, 20
GAIN = np.asarray([[-0.5, 0.0], [0.0, -0.5]])
"""The expert of the toy: half of the way to the origin."""


class ToyRun:
    """Ten robots whose operators show the way to the origin; one may show another. A linear policy learns by SGD."""

    def __init__(self, *, bad: str | None, flood: int, cap: float | None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.index, self.states, self.actions = EpisodeIndex(("touch",)), [], []
        for number in range(EPISODES * (ROBOTS - 1 + flood)):
            robot = max(0, number % (ROBOTS - 1 + flood) - flood + 1)
            state = rng.uniform(-1, 1, (HORIZON, 2))
            action = state @ GAIN + rng.normal(0, 0.05, state.shape)
            success = rng.random() < 0.8
            if robot == 0 and bad == "noise":
                action = rng.normal(0, 1.0, state.shape)
            if robot == 0 and bad == "opposite":
                action = -action
            self.index.add(_row(number, f"robot-{robot}", success != (robot == 0 and bad == "labels")))
            self.states.append(state)
            self.actions.append(action)
        self.sampler = AdaptiveSampler(self.index, SamplerConfig(max_actor_share=cap), seed)
        self.weight = np.zeros((2, 2))

    def train(self) -> "ToyRun":
        for _ in range(STEPS):
            windows = self.sampler.draw(BATCH)
            places = list(zip(windows.episode.tolist(), windows.start.tolist(), strict=True))
            state = np.stack([self.states[row][step] for row, step in places])
            target = np.stack([self.actions[row][step] for row, step in places])
            error = state @ self.weight - target
            self.sampler.observe(windows, (error**2).mean(axis=1).astype(np.float32))
            self.weight -= 0.1 * state.T @ error / BATCH
        return self

    def success(self) -> float:
        """Share of 200 starts from which the policy comes within 0.05 of the origin in 10 steps."""
        state = np.random.default_rng(9).uniform(-1, 1, (200, 2))
        for _ in range(10):
            state = state + np.clip(state @ self.weight, -1, 1)
        return float((np.linalg.norm(state, axis=1) < 0.05).mean())


def _row(number: int, actor: str, success: bool, **changes: Any) -> EpisodeRow:
    facts: dict[str, Any] = {
        "episode_id": f"{number:032x}",
        "actor_id": actor,
        "sequence": number,
        "task": "touch",
        "source": Source.ONLINE,
        "num_steps": HORIZON,
        "human_steps": 0,
        "num_interventions": 0,
        "policy_version": 1,
        "outcome": Outcome.SUCCESS if success else Outcome.FAILURE,
        "start_runs": ((0, HORIZON),),
        "end_utc_ns": 0,
        "indexed_utc_ns": 0,
    }
    return EpisodeRow(**(facts | changes))


@pytest.mark.parametrize("bad", ["noise", "opposite", "labels"])
@pytest.mark.parametrize("seed", range(3))
def test_of_ten_robots_the_one_with_wrong_data_is_named_and_no_other(bad: str, seed: int) -> None:
    """Fault 42: label-flip or noise attack by one actor of ten: named by the influence report."""
    report = ToyRun(bad=bad, flood=1, cap=None, seed=seed).train().sampler.influence.report()
    assert len(report) == ROBOTS
    assert report[0].actor_id == "robot-0"
    assert [one.actor_id for one in report if one.named] == ["robot-0"]


@pytest.mark.parametrize("seed", range(3))
def test_of_ten_honest_robots_none_is_named(seed: int) -> None:
    report = ToyRun(bad=None, flood=1, cap=None, seed=seed).train().sampler.influence.report()
    assert max(one.suspicion for one in report) < NAMED
    assert sum(one.draw_share for one in report) == pytest.approx(1)
    assert sum(one.draws for one in report) == STEPS * BATCH


def test_with_the_cap_a_hostile_flood_costs_no_success_and_without_it_all() -> None:
    """Fault 42: one of ten robots sends ten times the data with opposite actions: the success drop is bounded."""
    honest = ToyRun(bad=None, flood=1, cap=None).train().success()
    free = ToyRun(bad="opposite", flood=10, cap=1.0).train()
    capped = ToyRun(bad="opposite", flood=10, cap=None).train()
    print(honest, free.success(), capped.success())
    assert honest == 1.0
    assert free.success() < 0.05
    assert capped.success() > 0.95
    assert np.linalg.norm(capped.weight - GAIN) < 0.5 * np.linalg.norm(free.weight - GAIN)
    assert capped.sampler.influence.report()[0].actor_id == "robot-0"
    assert capped.sampler.influence.report()[0].draw_share == pytest.approx(0.2, abs=0.01)


def test_what_was_added_up_survives_a_checkpoint() -> None:
    run = ToyRun(bad="noise", flood=1, cap=None).train()
    state = json.loads(json.dumps(run.sampler.influence.state_dict()))
    restored = Influence(run.index)
    restored.load_state_dict(state | {"gone": {"robot-0": [1, 1]}})
    assert restored.report() == run.sampler.influence.report()
    other = Influence(EpisodeIndex(("touch",)))
    other.load_state_dict(state)
    assert other.report() == ()


def test_demonstrations_aborted_episodes_and_losses_that_are_not_finite_do_not_count() -> None:
    index = EpisodeIndex(("touch",))
    index.add(_row(0, "lab-0", True, source=Source.OFFLINE))
    index.add(_row(1, "robot-0", True))
    index.add(_row(2, "robot-0", True, outcome=Outcome.ABORTED))
    influence = Influence(index)
    windows = Windows(
        np.asarray([0, 1, 1]), np.zeros(3, np.int32), np.zeros(3, np.int32), np.asarray([0, 1, 1], np.uint8)
    )
    influence.observe(windows, np.asarray([9.0, np.nan, 0.5], np.float32))
    (only,) = influence.report()
    assert (only.actor_id, only.episodes, only.draws, only.loss_ratio, only.success) == ("robot-0", 1, 1, 1.0, 1.0)
    assert only.suspicion == 0
