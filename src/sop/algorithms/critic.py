"""The value function of a learning rule: fitted before the first step, asked per episode, refreshed on a schedule.

    prepare   demonstrations + base rollouts (a fifth of these held out) -> fit -> calibration on what was held out
    scores    V and A at every step of an episode; kept for the episodes that were asked for last
    refresh   every `value_refresh` learner steps: fit on with the fleet's newest episodes, version + 1

What the fleet records later shows how well the values still hold: drift is predicted minus realised return on its
newest episodes, also while the value function is frozen.

Shapes: T steps.
"""

import logging
import math
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sop.algorithms.base import Origin, TrainedPolicy, origin_of
from sop.algorithms.critic_settings import CriticSettings
from sop.algorithms.segmentation import steps_in
from sop.core.episode import Outcome
from sop.core.errors import InvalidRecord, RunError, StoreError
from sop.core.experience import Library, Source, StoredEpisode
from sop.values import FitReport, ValuedEpisode, ValueFunction, calibrate, require_outcomes

_log = logging.getLogger(__name__)

SCORE_BYTES = 64 << 20
"""Values and advantages that are kept: 8 bytes per step, those of about 25,000 episodes of 300 steps."""
DRIFT_EPISODES = 32
"""Newest episodes of the fleet on which drift is measured."""
_ENTRY_BYTES = 300
"""What a kept entry costs beside its arrays' content."""
_HELD_OUT = 5
"""Of the base rollouts of a task and outcome the 2nd, 7th, 12th, ... is held out: one of two is left to fit on."""


class ValueModel(Protocol):
    """What a critic needs of a value function; see `sop.values.ValueFunction`."""

    version: int

    @property
    def task_steps(self) -> Mapping[str, int]:
        """The tasks that it knows, with the steps of their longest episode."""
        ...

    def fit(self, episodes: Sequence[StoredEpisode], steps: int | None = None) -> FitReport:
        """Learn; blocks."""
        ...

    def predict(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """[T]; blocks, thread-safe."""
        ...

    def returns(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """[T] realised."""
        ...

    def advantages(
        self, episode: StoredEpisode, values: npt.NDArray[np.float32], lookahead: int
    ) -> npt.NDArray[np.float32]:
        """[T]"""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON under `value`, arrays under `value/<name>`."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """What a value function says of an episode."""

    value: npt.NDArray[np.float32]
    """[T] V(o_t); NaN when it does not know the task."""
    advantage: npt.NDArray[np.float32]
    """[T] A_t; NaN on a person's steps in a robot's episode, in aborted episodes, and when the task is unknown."""


class Critic:
    """A value function with what is known about it. `scores` may be called by any thread, the rest by one.

    Args:
        settings: of fit, returns and advantages.
        control_hz: control steps per second.
        max_bytes: bound of the scores that are kept.
    """

    def __init__(self, settings: CriticSettings, control_hz: float, max_bytes: int = SCORE_BYTES) -> None:
        self._settings = settings
        self._lookahead = max(1, steps_in(settings.lookahead_s, control_hz))
        self._max_bytes = max_bytes
        self.function: ValueModel | None = None
        """None until `prepare` or `load_state_dict`."""
        self._scores: OrderedDict[tuple[str, int], Scores] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._newest: deque[ValuedEpisode] = deque(maxlen=DRIFT_EPISODES)
        self._refreshed_at = self._refreshed_with = 0
        """Learner step at which a fit was last tried, and the fleet's episodes at the last one that went well."""
        self._facts: dict[str, float] = {}

    @property
    def ready(self) -> bool:
        """Whether there is a value function."""
        return self.function is not None

    @property
    def version(self) -> int:
        """Of the value function; 0 when there is none."""
        return 0 if self.function is None else self.function.version

    def prepare(self, library: Library, policy: TrainedPolicy) -> None:
        """Fit on the offline buffer, but for a fifth of the base rollouts, and measure on these. Minutes.

        Raises:
            RunError: no base rollouts, or a task that has some lacks a success or a failure; says what to do.
        """
        episodes = list(self._offline(library))
        tasks = sorted({episode.task for episode in episodes if origin_of(episode) is Origin.ROLLOUT})
        if not tasks:
            raise RunError(
                "a value function needs rollouts of the base policy, failures among them, and the offline buffer has "
                f"none in {len(episodes)} episodes; record some: `sop actor RUN --id base-0 --rollout`"
            )
        require_outcomes({task: [episode for episode in episodes if episode.task == task] for task in tasks})
        kept, held_out = _split([episode for episode in episodes if episode.outcome is not Outcome.ABORTED])
        device = next(policy.module.parameters()).device
        function = ValueFunction(
            policy.spec,
            self._settings.value_settings(),
            self._settings.return_settings(),
            module=policy.module,
            device=device,
        )
        report = function.fit(kept)
        self.function = function
        self._forget()
        found = calibrate([self._valued(episode) for episode in held_out], function.version)
        self._facts = {
            "value/fit_loss": report.losses[-1],
            "value/fit_s": report.seconds,
            "value/held_out_episodes": float(len(held_out)),
            "value/rank_correlation": found.rank_correlation,
            "value/calibration_error": found.calibration_error,
            "value/bias": found.bias,
            "value/auc_start": found.auc_start,
            "value/auc_middle": found.auc_middle,
            "value/auc_end": found.auc_end,
        }
        _log.info("value function on %d held-out rollouts: %s", len(held_out), self._facts)

    def scores(self, episode: StoredEpisode) -> Scores:
        """Values and advantages; blocks for a prediction (all frames are decoded) when they are not kept.

        Raises:
            RunError: there is no value function yet.
            InvalidRecord: a frame is damaged, or the episode does not fit the embodiment.
        """
        function = self.function
        if function is None:
            raise RunError("there is no value function yet: prepare the rule, or load its state")
        key, version = (episode.actor_id, episode.sequence), function.version
        with self._lock:
            found = self._scores.get(key)
            if found is not None:
                self._scores.move_to_end(key)
                return found
        if episode.task in function.task_steps:
            value = function.predict(episode)
            found = Scores(value, function.advantages(episode, value, self._lookahead))
        else:
            nothing = np.full(episode.num_steps, np.nan, np.float32)
            found = Scores(nothing, nothing)
        with self._lock:
            if function is self.function and version == function.version and key not in self._scores:
                self._scores[key] = found
                self._num_bytes += _size(found)
                while self._num_bytes > self._max_bytes and len(self._scores) > 1:
                    self._num_bytes -= _size(self._scores.popitem(last=False)[1])
        return found

    def realised(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """[T] normalised return-to-go; NaN where a step has none, and when the task is unknown."""
        function = self.function
        if function is None or episode.task not in function.task_steps:
            return np.full(episode.num_steps, np.nan, np.float32)
        return function.returns(episode)

    def observe(self, episode: StoredEpisode) -> None:
        """Count a new episode of the fleet in the drift."""
        self._newest.append(self._valued(episode))

    def known(self, library: Library) -> Iterator[StoredEpisode]:
        """What a refresh sees: the offline buffer, then the fleet's newest episodes, oldest first."""
        yield from _readable(library, library.keys(Source.OFFLINE))
        yield from _readable(library, library.keys(Source.ONLINE)[-self._settings.refresh_episodes :])

    def refresh(self, learner_step: int, library: Library) -> bool:
        """Fit on when it is due and the fleet has recorded more since; whether all scores are new.

        A fit that fails changes nothing and is tried again when the next one is due.
        """
        function, period = self.function, self._settings.value_refresh
        if function is None or period == 0 or learner_step < self._refreshed_at + period:
            return False
        online = library.keys(Source.ONLINE)
        if len(online) == self._refreshed_with:
            return False
        self._refreshed_at = learner_step
        newest = list(_readable(library, online[-DRIFT_EPISODES:]))
        try:
            before = calibrate([self._valued(episode) for episode in newest], function.version)
            kept, _ = _split([one for one in self.known(library) if one.outcome is not Outcome.ABORTED])
            report = function.fit(kept, self._settings.refresh_steps)
        except (RunError, InvalidRecord, StoreError) as error:
            _log.warning("learner step %d: the value function stays as it is: %s", learner_step, error)
            return False
        self._refreshed_with = len(online)
        self._forget()
        after = calibrate([self._valued(episode) for episode in newest], function.version)
        self._facts |= {
            "value/fit_loss": report.losses[-1],
            "value/fit_s": report.seconds,
            "value/drift_before": before.bias,
            "value/drift_after": after.bias,
            "value/drift_rank_before": before.rank_correlation,
            "value/drift_rank_after": after.rank_correlation,
        }
        return True

    def metrics(self) -> dict[str, float]:
        """`value/version`, quality at the last fit, and `value/drift` (mean of predicted minus realised return) and
        `value/drift_rank` (rank correlation) on the fleet's newest episodes. What is not known is left out.

        `value/rank_correlation`, `value/calibration_error` and the like are those of the first fit, on held-out
        rollouts.
        """
        if self.function is None:
            return {}
        found = {"value/version": float(self.version), **self._facts}
        if self._newest:
            drift = calibrate(list(self._newest), self.version)
            found |= {"value/drift": drift.bias, "value/drift_rank": drift.rank_correlation}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """`critic` and `value` (JSON), `value/<tensor>` (arrays). Scores are computed again."""
        facts = {name: value for name, value in self._facts.items() if math.isfinite(value)}
        learned = {} if self.function is None else self.function.state_dict()
        refreshed = [self._refreshed_at, self._refreshed_with]
        return {"critic": {"refreshed": refreshed, "facts": facts}, **learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; the value function is put on the GPU when there is one.

        Raises:
            KeyError, TypeError, ValueError: it is not such a state.
        """
        saved = state["critic"]
        refreshed_at, refreshed_with = map(int, saved["refreshed"])
        facts = {str(name): float(value) for name, value in saved["facts"].items()}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.function = ValueFunction.from_state(state, device=device) if "value" in state else None
        self._refreshed_at, self._refreshed_with, self._facts = refreshed_at, refreshed_with, facts
        self._forget()

    def _offline(self, library: Library) -> Iterator[StoredEpisode]:
        return (library.get(key) for key in library.keys(Source.OFFLINE))

    def _forget(self) -> None:
        with self._lock:
            self._scores.clear()
            self._num_bytes = 0
        self._newest.clear()

    def _valued(self, episode: StoredEpisode) -> ValuedEpisode:
        return ValuedEpisode(
            task=episode.task,
            success=None if episode.interventions else episode.outcome is Outcome.SUCCESS,
            values=self.scores(episode).value,
            realised=self.realised(episode),
        )


def _split(episodes: Iterable[StoredEpisode]) -> tuple[list[StoredEpisode], list[StoredEpisode]]:
    """What is fitted on, and the base rollouts that never are, each in the given order, on which the choice does not
    depend."""
    given = list(episodes)
    rollouts = [episode for episode in given if origin_of(episode) is Origin.ROLLOUT]
    counts: dict[tuple[str, Outcome], int] = defaultdict(int)
    chosen: set[tuple[str, int]] = set()
    for rollout in sorted(rollouts, key=lambda one: (one.actor_id, one.sequence)):
        kind = (rollout.task, rollout.outcome)
        if counts[kind] % _HELD_OUT == 1:
            chosen.add((rollout.actor_id, rollout.sequence))
        counts[kind] += 1
    kept: list[StoredEpisode] = []
    held_out: list[StoredEpisode] = []
    for episode in given:
        (held_out if (episode.actor_id, episode.sequence) in chosen else kept).append(episode)
    return kept, held_out


def _readable(library: Library, keys: Iterable[str]) -> Iterator[StoredEpisode]:
    """The episodes that can be had: the loop does not stop for one that cannot."""
    for key in keys:
        try:
            yield library.get(key)
        except (StoreError, InvalidRecord) as error:
            _log.warning("%s is left out of the refresh: %s", key, error)


def _size(scores: Scores) -> int:
    return _ENTRY_BYTES + scores.value.nbytes + scores.advantage.nbytes
