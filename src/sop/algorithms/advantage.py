"""What rules have in common that learn from everything a robot does, by how much better than expected it was.

    what                                       weight          opinion of the rule
    demonstration                              1               a person's
    base rollout, `rollouts=value_only`        0               -          (the value function alone learns from it)
    base rollout, `rollouts=value_and_policy`  policy's        by advantage, `offline_positive`
    fleet: policy                              policy's        by advantage, `online_positive`
    fleet: policy, before a takeover           policy's        bad
    fleet: human, the first `handover_s`       0               -
    fleet: human                               1               a person's

Failed episodes count like successful ones, aborted ones teach nothing. Each row is a segment of its own, so no window
mixes controllers. Where windows start is fixed by who drove and by the settings; values and thresholds change only
what is thought of the steps.

Shapes: T steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sop.algorithms.base import Imitation, Origin, TrainedPolicy, origin_of
from sop.algorithms.critic import Critic
from sop.algorithms.critic_settings import AdvantageSettings
from sop.algorithms.segmentation import StepKind, every, segments, step_kinds, steps_in
from sop.algorithms.thresholds import PositiveFraction, Threshold
from sop.core.episode import Outcome
from sop.core.experience import Collection, Library, Sidecar, Source, StepLabels, StoredEpisode

GENERATIONS = 10**6
"""`StepLabels.label_version` is the value function's version times this, plus the generation of the thresholds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What of an episode is learned from, whatever values and thresholds say."""

    origin: Origin
    kind: npt.NDArray[np.int64]
    """[T] `StepKind`; HUMAN in a demonstration."""
    by_policy: npt.NDArray[np.bool_]
    """[T] the policy drove."""
    learned: npt.NDArray[np.bool_]
    """[T] the step has weight."""
    can_start: npt.NDArray[np.bool_]
    """[T] a window may start."""


class AdvantageRule(Imitation):
    """Keeps a value function and thresholds up to date; a rule inherits it and writes `weights_and_indicator`.

    `annotate` may be called by any thread; everything else belongs to the learner's.

    Args:
        settings: of the rule.
        control_hz: control steps per second, to turn times into steps (rounded up).

    Raises:
        ValueError: `control_hz` is not positive.
    """

    collection = Collection.ON_POLICY
    needs_rollouts = True
    name: ClassVar[str] = "advantage"
    """Beginning of the metrics' names."""

    def __init__(self, settings: AdvantageSettings, control_hz: float) -> None:
        if not control_hz > 0:
            raise ValueError(f"control_hz must be positive, got {control_hz}")
        self._common = settings
        self._handover = steps_in(settings.handover_s, control_hz)
        self._before = steps_in(settings.pre_takeover_s, control_hz)
        self.critic = Critic(settings, control_hz)
        """Its value function."""
        self._thresholds = PositiveFraction(
            {Source.OFFLINE: settings.offline_positive, Source.ONLINE: settings.online_positive},
            window=settings.threshold_window,
            least=settings.threshold_least,
        )
        self._counted: set[tuple[str, int]] = set()
        self._stale = False
        self._label_version = 0

    def prepare(self, library: Library, policy: TrainedPolicy) -> None:
        """Fit the value function on demonstrations and base rollouts; minutes.

        Episodes that are there already are taken note of here, whether they were `indexed` before or will be.

        Raises:
            RunError: no base rollouts, or a task without a success or a failure; says what to do.
        """
        self.critic.prepare(library, policy)
        for source in Source:
            for key in library.keys(source):
                episode = library.get(key)
                self._counted.add((episode.actor_id, episode.sequence))
                self._record(episode)
        self._stale = True

    def indexed(self, episode: StoredEpisode, source: Source) -> None:  # noqa: ARG002
        """Compute the episode's advantages and take note of them; labels follow at the next `refresh`."""
        if not self.critic.ready:
            return  # before `prepare`, which reads everything that is there; or while a lost index is rebuilt
        key = (episode.actor_id, episode.sequence)
        if key in self._counted:
            self._counted.discard(key)
            return
        self._record(episode)

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        """The table at the top. Quick when the episode's values are kept, which they are while it is new."""
        plan = self._plan(episode)
        weight, indicator = self.weights_and_indicator(episode, plan)
        return StepLabels(
            loss_weight=np.where(plan.learned, weight, 0).astype(np.float32),
            segment=segments(plan.kind),
            can_start=plan.can_start,
            advantage_indicator=indicator,
            label_version=self._label_version,
        )

    def weights_and_indicator(
        self, episode: StoredEpisode, plan: Plan
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8] | None]:
        """The rule's opinion: weight [T], positive where `plan.learned`; indicator [T], or None."""
        raise NotImplementedError

    def threshold(self, episode: StoredEpisode, origin: Origin) -> Threshold | None:
        """What an advantage of this episode's task has to exceed; None while there are too few to tell."""
        source = Source.ONLINE if origin is Origin.FLEET else Source.OFFLINE
        return self._thresholds.get(episode.task, source)

    def sidecar(self, episode: StoredEpisode) -> Sidecar | None:
        """Value, realised return and advantage per step, float32 [T].

        None for aborted episodes, for demonstrations that nobody judges, and before the value function exists.
        """
        if not self.critic.ready or episode.outcome is Outcome.ABORTED:
            return None
        if origin_of(episode) is Origin.DEMONSTRATION and not self._judges(Origin.DEMONSTRATION):
            return None
        scores = self.critic.scores(episode)
        return Sidecar(
            version=self.critic.version,
            columns={
                "value": scores.value,
                "realised": self.critic.realised(episode),
                "advantage": scores.advantage,
            },
        )

    def refresh(self, learner_step: int, library: Library) -> bool:
        """Apply thresholds that moved; when the value function is due, fit it anew first (blocks for the fit)."""
        refreshed = self.critic.refresh(learner_step, library)
        if refreshed:
            self._thresholds.restart()
            for episode in self.critic.known(library):
                self._record(episode)
        changed = self._thresholds.apply() or refreshed or self._stale
        self._stale = False
        if changed:
            self._label_version = self.critic.version * GENERATIONS + self._thresholds.generation
        return changed

    def metrics(self) -> Mapping[str, float]:
        """Thresholds and shares of positive steps per task, quality and drift of the value function."""
        return {**self._thresholds.metrics(self.name), **self.critic.metrics()}

    def state_dict(self) -> dict[str, Any]:
        """The value function (`value/<tensor>`), the thresholds and what they are made from (`threshold/<number>`)."""
        return {
            "rule": self.name,
            "label_version": self._label_version,
            **self.critic.state_dict(),
            **self._thresholds.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; labels are those of then.

        Raises:
            ValueError: the state belongs to another rule, or is damaged.
        """
        if state.get("rule") != self.name:
            raise ValueError(f"{self.name}: the checkpoint holds the state of another rule: {sorted(state)[:8]}")
        try:
            self.critic.load_state_dict(state)
            self._thresholds.load_state_dict(state)
            self._label_version = int(state["label_version"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.name}: the checkpoint's state is damaged: {error!r}") from error
        self._stale = True

    def _judges(self, origin: Origin) -> bool:
        """Whether the advantages of such episodes matter to the labels."""
        if origin is Origin.ROLLOUT:
            return self._common.rollouts == "value_and_policy"
        return origin is Origin.FLEET

    def _record(self, episode: StoredEpisode) -> None:
        origin = origin_of(episode)
        if episode.outcome is Outcome.ABORTED or not self._judges(origin):
            return
        source = Source.ONLINE if origin is Origin.FLEET else Source.OFFLINE
        self._thresholds.add(episode.task, source, self.critic.scores(episode).advantage)
        if origin is Origin.FLEET:
            self.critic.observe(episode)

    def _plan(self, episode: StoredEpisode) -> Plan:
        origin, steps = origin_of(episode), episode.num_steps
        if origin is Origin.FLEET:
            kind = step_kinds(episode.controller, handover=self._handover, before=self._before)
        else:
            kind = np.full(steps, StepKind.HUMAN if origin is Origin.DEMONSTRATION else StepKind.POLICY, np.int64)
        by_policy = (kind == StepKind.POLICY) | (kind == StepKind.PRE_TAKEOVER)
        learned = kind != StepKind.HANDOVER
        if episode.outcome is Outcome.ABORTED or (origin is Origin.ROLLOUT and not self._judges(origin)):
            learned = np.zeros(steps, np.bool_)
        stride = self._common.rollout_stride if origin is Origin.ROLLOUT else self._common.policy_stride
        chosen = ~by_policy | every(segments(kind), stride)
        return Plan(origin, kind, by_policy, learned, learned & chosen)
