"""What an episode turned out to be worth at every step, and how much better than expected its actions were.

Reward (pi*0.6, arXiv 2511.14759): -1 per step; at the last step 0 after a success and -C_fail after a failure. All of
it is divided by `scale` = task_steps + C_fail, so that returns lie in [-1, 0] and tasks are comparable; C_fail is a
multiple of the task's longest episode. There is no discount.

The policy answers for its own steps only. An episode falls into *runs* of steps that the policy drove:

    step         0 1 2 3 | 4 5 6 | 7 8 9
    controller   p p p p | h h h | p p p      runs [0, 4) and [7, 10)
                        ^takeover       ^the episode's end: success or failure

What a person did from the takeover on says nothing about the actions before it: neither returns nor advantages of a
run read anything behind it, not the rescue and not the outcome. A demonstration is one run.

Shapes: T steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sop.core.episode import Controller, Outcome
from sop.core.experience import StoredEpisode


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnSettings:
    """How outcomes become numbers.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    failure_cost: float = 1.0
    """C_fail, as a multiple of the task's longest episode."""
    takeover: Literal["charge", "cut"] = "charge"
    """What a takeover means for the steps before it: `charge` = as a failure of the policy; `cut` = unknown."""

    def __post_init__(self) -> None:
        if not 0 <= self.failure_cost < float("inf"):
            raise ValueError(f"failure_cost must be 0 or more and finite, got {self.failure_cost}")
        if self.takeover not in ("charge", "cut"):
            raise ValueError(f"takeover must be 'charge' or 'cut', got {self.takeover!r}")

    def scale(self, task_steps: int) -> float:
        """Steps that make a normalised return of -1: the longest episode and the cost of a failure.

        Raises:
            ValueError: `task_steps` is below 1.
        """
        if task_steps < 1:
            raise ValueError(f"task_steps must be at least 1, got {task_steps}")
        return task_steps * (1 + self.failure_cost)


def policy_runs(controller: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Maximal runs `[start, stop)` of POLICY steps, in order."""
    driven = np.concatenate(([False], controller == Controller.POLICY, [False]))
    edges = np.flatnonzero(driven[1:] != driven[:-1])
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def value_runs(episode: StoredEpisode) -> list[tuple[int, int]]:
    """The runs that have values of their own: `policy_runs`, or the whole episode for a demonstration."""
    if episode.policy_version is None:
        return [(0, episode.num_steps)]
    return policy_runs(episode.controller)


def ends_in_success(episode: StoredEpisode) -> npt.NDArray[np.bool_]:
    """[T] whether the step's run goes on to the end of a successful episode; False on steps outside of all runs."""
    good = np.zeros(episode.num_steps, np.bool_)
    for start, stop in value_runs(episode):
        good[start:stop] = stop == episode.num_steps and episode.outcome is Outcome.SUCCESS
    return good


def longest_episodes(episodes: Iterable[StoredEpisode]) -> dict[str, int]:
    """Task -> steps of its longest episode; aborted ones do not count."""
    longest: dict[str, int] = {}
    for episode in episodes:
        if episode.outcome is not Outcome.ABORTED:
            longest[episode.task] = max(longest.get(episode.task, 0), episode.num_steps)
    return longest


def returns(episode: StoredEpisode, task_steps: int, settings: ReturnSettings) -> npt.NDArray[np.float32]:
    """Normalised return-to-go at every step, float32 [T] in [-1, 0]: what the value function is to predict.

    With `last` the final step of the run that holds t:
        success         -(last - t) / scale
        failure         (-(last - t) - C_fail) / scale
        takeover        `charge`: as a failure; `cut`: NaN
    NaN on a person's steps within a policy's episode, and in all of an aborted episode. Episodes that are longer
    than `task_steps` are clipped at -1.

    Raises:
        ValueError: `task_steps` is below 1.
    """
    scale = settings.scale(task_steps)
    result = np.full(episode.num_steps, np.nan)
    for start, stop in _judged_runs(episode):
        end = _terminal_reward(episode, stop, task_steps, settings)
        if end is not None:
            result[start:stop] = (np.arange(start - stop + 1, 1) + end) / scale
    return result.clip(-1, 0).astype(np.float32)


def advantages(
    episode: StoredEpisode, values: npt.NDArray[np.float32], task_steps: int, settings: ReturnSettings, lookahead: int
) -> npt.NDArray[np.float32]:
    """N-step advantage at every step, float32 [T] in units of the normalised return; N is `lookahead`.

    With V = `values`, `last` the final step of the run that holds t, and rewards already divided by `scale`:
        t + N <= last           A_t = -N + V(t + N) - V(t)
        the episode ends first  A_t = -(last - t) + (0 | -C_fail) - V(t), no bootstrap
        a takeover comes first  `charge`: as a failure at `last`
                                `cut`: A_t = -(last - t) + V(last) - V(t), which is 0 at `last`
    NaN on a person's steps within a policy's episode, and in all of an aborted episode. Not clipped.

    Args:
        values: [T] value of the observation at every step; only those within a run are read.

    Raises:
        ValueError: `values` is not [T], or `task_steps` or `lookahead` is below 1.
    """
    scale = settings.scale(task_steps)
    if lookahead < 1:
        raise ValueError(f"lookahead must be at least 1 step, got {lookahead}")
    if values.shape != (episode.num_steps,):
        raise ValueError(f"values must be [{episode.num_steps}], one per step of the episode, got {values.shape}")
    result = np.full(episode.num_steps, np.nan)
    for start, stop in _judged_runs(episode):
        end = _terminal_reward(episode, stop, task_steps, settings)
        value, last = values[start:stop].astype(np.float64), stop - 1 - start
        step = np.arange(stop - start)
        future = np.minimum(step + lookahead, last)
        gained = (step - future) / scale + value[future]
        if end is not None:
            ends = step + lookahead > last
            gained[ends] = (step[ends] - last + end) / scale
        result[start:stop] = gained - value
    return result.astype(np.float32)


def _judged_runs(episode: StoredEpisode) -> list[tuple[int, int]]:
    return [] if episode.outcome is Outcome.ABORTED else value_runs(episode)


def _terminal_reward(episode: StoredEpisode, stop: int, task_steps: int, settings: ReturnSettings) -> float | None:
    """Reward in steps at the end of the run that ends before `stop`; None when it is not known."""
    if stop < episode.num_steps:
        return None if settings.takeover == "cut" else -settings.failure_cost * task_steps
    return 0.0 if episode.outcome is Outcome.SUCCESS else -settings.failure_cost * task_steps
