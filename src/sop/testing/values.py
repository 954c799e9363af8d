"""A value function whose values are written down, for tests of what is made from them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.core.experience import StoredEpisode
from sop.values import FitReport, ReturnSettings, advantages, returns


class WrittenValues:
    """`sop.algorithms.critic.ValueModel` with real returns and advantages.

    Args:
        task_steps: the tasks that it knows, with the steps of their longest episode.
        value: V at every step, [T] or one number for all.
        settings: of returns and advantages.
    """

    def __init__(
        self,
        task_steps: Mapping[str, int],
        value: Callable[[StoredEpisode], npt.ArrayLike],
        settings: ReturnSettings | None = None,
    ) -> None:
        self.version = 1
        self.task_steps = dict(task_steps)
        self.value = value
        self.predicted: list[tuple[str, int]] = []
        """Actor and number of the episodes that were asked for."""
        self.fitted: list[list[tuple[str, int]]] = []
        """The same of every fit."""
        self._settings = settings or ReturnSettings()

    def fit(self, episodes: Sequence[StoredEpisode], steps: int | None = None) -> FitReport:
        """Counts; the values stay."""
        self.fitted.append([(episode.actor_id, episode.sequence) for episode in episodes])
        self.version += 1
        return FitReport(losses=(1.0,) * (steps or 1), seconds=0.0, num_frames=1)

    def predict(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """[T]"""
        self.predicted.append((episode.actor_id, episode.sequence))
        written = np.asarray(self.value(episode), np.float32)
        return np.broadcast_to(written, (episode.num_steps,)).copy()

    def returns(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """[T]"""
        return returns(episode, self.task_steps[episode.task], self._settings)

    def advantages(
        self, episode: StoredEpisode, values: npt.NDArray[np.float32], lookahead: int
    ) -> npt.NDArray[np.float32]:
        """[T]"""
        return advantages(episode, values, self.task_steps[episode.task], self._settings, lookahead)

    def state_dict(self) -> dict[str, Any]:
        """Cannot be saved."""
        raise NotImplementedError
