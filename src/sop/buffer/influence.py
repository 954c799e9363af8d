"""Influence: how much each robot's data weighs in what is learned, and whose data is unlike that of the others.

    share of draws    of its windows among all online windows that were learned from
    loss ratio        loss of its windows over the mean online loss of the same task in the same step: noise and wrong
                      actions cannot be learned, so they stay expensive while everything else becomes cheap
    success           of its episodes, beside that of the other robots on the same tasks: flipped labels show here

    suspicion = max(|robust z of log loss ratio|, |z of success|)      z: in standard deviations of the other robots

A number, not a verdict: a robot with a worn gripper is found as well as one that lies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.buffer.index import EpisodeIndex
from sop.buffer.rows import OUTCOMES
from sop.core.episode import Outcome
from sop.core.experience import Source, Windows

NAMED = 4.0
"""Suspicion from which a robot is named; one honest robot in ten thousand reaches it by chance."""
MIN_DRAWS = 50
"""Windows of a robot before its losses say anything."""
_LEAST_SPREAD = 0.1
"""Log loss ratios of honest robots differ by this much because their tasks' starts do."""
_CONSISTENT = 1.4826
"""Median absolute deviation times this is the standard deviation of a normal distribution."""
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorInfluence:
    """What is known about one robot."""

    actor_id: str
    episodes: int
    """In the online buffer, aborted ones not counted."""
    draws: int
    """Windows that were learned from."""
    draw_share: float
    """Of all online windows that were learned from."""
    loss_ratio: float | None
    """Mean over its windows; None before the first."""
    success: float | None
    """Share of its episodes; None without one."""
    expected_success: float | None
    """What the other robots reach on the same tasks, in the same proportions."""
    suspicion: float

    @property
    def named(self) -> bool:
        """Whether somebody should look at this robot's data."""
        return self.suspicion >= NAMED


class Influence:
    """Adds up what the learner draws and what it costs, per robot and task. Not thread-safe.

    Args:
        index: names the robots.
    """

    def __init__(self, index: EpisodeIndex) -> None:
        self._index = index
        self._draws: _Floats = np.zeros((len(index.tasks), 0))
        self._ratios: _Floats = np.zeros((len(index.tasks), 0))

    def observe(self, windows: Windows, losses: npt.NDArray[np.float32]) -> None:
        """Take the losses [B] of one learner step; what is not finite is left out."""
        chosen = (windows.source == Source.ONLINE) & np.isfinite(losses)
        if not chosen.any():
            return
        task, loss = windows.task[chosen], losses[chosen].astype(np.float64)
        actor = self._index.actors_of(windows.episode[chosen])
        mean = np.bincount(task, weights=loss) / np.maximum(np.bincount(task), 1)
        usable = mean[task] > 0
        self._grow()
        place = (task[usable], actor[usable])
        np.add.at(self._draws, place, 1.0)
        np.add.at(self._ratios, place, loss[usable] / mean[task[usable]])

    def report(self) -> tuple[ActorInfluence, ...]:
        """All robots of the fleet that recorded or were drawn from, the most suspicious first."""
        self._grow()
        counts = self._index.outcomes_by_actor(Source.ONLINE).astype(np.float64)
        successes = counts[:, :, OUTCOMES.index(Outcome.SUCCESS)]
        ended = successes + counts[:, :, OUTCOMES.index(Outcome.FAILURE)]
        draws = self._draws.sum(axis=0)
        ratio = self._ratios.sum(axis=0) / np.maximum(draws, 1)
        expected = _of_others(successes, ended)
        suspicion = np.maximum(_loss_z(ratio, draws), _success_z(successes, ended, expected))
        found = [
            ActorInfluence(
                actor_id=actor_id,
                episodes=int(ended[:, number].sum()),
                draws=int(draws[number]),
                draw_share=float(draws[number] / max(1.0, draws.sum())),
                loss_ratio=float(ratio[number]) if draws[number] else None,
                success=_share(successes[:, number].sum(), ended[:, number].sum()),
                expected_success=_share((expected * ended)[:, number].sum(), ended[:, number].sum()),
                suspicion=float(suspicion[number]),
            )
            for number, actor_id in enumerate(self._index.actors)
            if draws[number] or ended[:, number].any()
        ]
        return tuple(sorted(found, key=lambda one: (-one.suspicion, one.actor_id)))

    def state_dict(self) -> dict[str, Any]:
        """JSON values: for every task the robots that were drawn from, `[draws, sum of loss ratios]` each."""
        return {
            task: {
                self._index.actors[actor]: [float(self._draws[number, actor]), float(self._ratios[number, actor])]
                for actor in np.flatnonzero(self._draws[number]).tolist()
            }
            for number, task in enumerate(self._index.tasks)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; robots that the index does not have are left out."""
        self._grow()
        numbers = {actor_id: number for number, actor_id in enumerate(self._index.actors)}
        for place, task in enumerate(self._index.tasks):
            for actor_id, (draws, ratios) in state.get(task, {}).items():
                if actor_id in numbers:
                    self._draws[place, numbers[actor_id]] = draws
                    self._ratios[place, numbers[actor_id]] = ratios

    def _grow(self) -> None:
        missing = len(self._index.actors) - self._draws.shape[1]
        if missing:
            self._draws = np.pad(self._draws, ((0, 0), (0, missing)))
            self._ratios = np.pad(self._ratios, ((0, 0), (0, missing)))


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _of_others(successes: _Floats, ended: _Floats) -> _Floats:
    """[tasks, actors] share of successes of all other actors on the task; (k + 1) / (n + 2), so never 0 or 1."""
    others = successes.sum(axis=1, keepdims=True) - successes
    episodes = ended.sum(axis=1, keepdims=True) - ended
    found: _Floats = (others + 1) / (episodes + 2)
    return found


def _loss_z(ratio: _Floats, draws: _Floats) -> _Floats:
    """[actors] robust z of the log loss ratio among those that were drawn from often enough; 0 with two or fewer."""
    found, judged = np.zeros(len(ratio)), np.flatnonzero((draws >= MIN_DRAWS) & (ratio > 0))
    if len(judged) > 2:
        logs = np.log(ratio[judged])
        distance = np.abs(logs - np.median(logs))
        found[judged] = distance / max(_LEAST_SPREAD, _CONSISTENT * float(np.median(distance)))
    return found


def _success_z(successes: _Floats, ended: _Floats, expected: _Floats) -> _Floats:
    """[actors] how far the number of successes is from what the others lead to expect, in standard deviations."""
    others = ended.sum(axis=1, keepdims=True) - ended
    variance = (ended * expected * (1 - expected) * (1 + ended / np.maximum(others, 1))).sum(axis=0)
    difference = np.abs((successes - ended * expected).sum(axis=0))
    alone = (others == 0).all(axis=0)
    found: _Floats = np.where(alone | (variance == 0), 0.0, difference / np.sqrt(np.maximum(variance, math.ulp(1.0))))
    return found
