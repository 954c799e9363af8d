"""Success-filtered behaviour cloning: learn from everything that was executed in an episode that succeeded (spec D.5).

    what                                              weight             window may start
    demonstration                                     1                  yes
    successful episode: policy                        `policy_weight`    every `policy_stride`-th step
    successful episode: policy, before a takeover     0                  no: the rescue made it a success
    successful episode: human, the first `handover_s` 0                  no
    successful episode: human                         1                  yes
    failed or aborted episode                         0                  no

Needs no value function: the cheapest rule that learns from autonomous episodes, and the control for all others.
"""

from dataclasses import dataclass

import numpy as np

from sop.algorithms.base import Imitation, demonstration_labels, ignored_labels, is_usable_demonstration
from sop.algorithms.segmentation import StepKind, every, segments, step_kinds, steps_in
from sop.core.episode import Outcome
from sop.core.experience import Collection, StepLabels, StoredEpisode


@dataclass(frozen=True, slots=True, kw_only=True)
class FilteredCloningSettings:
    """Settings of `FilteredCloning`; times in seconds of robot time.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    policy_weight: float = 1.0
    """Weight of the policy's own steps."""
    policy_stride: int = 4
    """Every k-th step of a policy run may start a window: autonomous windows overlap, and are many."""
    handover_s: float = 0.3
    """Beginning of every human run that is not learned from."""
    pre_takeover_s: float = 0.8
    """Policy steps this long before a takeover are not learned from."""

    def __post_init__(self) -> None:
        if not 0 <= self.policy_weight <= 1:
            raise ValueError(f"policy_weight must be in [0, 1], got {self.policy_weight}")
        if self.policy_stride < 1:
            raise ValueError(f"policy_stride must be 1 or more, got {self.policy_stride}")
        for name in ("handover_s", "pre_takeover_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")


class FilteredCloning(Imitation):
    """Learns from demonstrations and from successes; failures teach nothing.

    Args:
        settings: weights and the mask's times.
        control_hz: control steps per second, to turn times into steps (rounded up).

    Raises:
        ValueError: `control_hz` is not positive.
    """

    collection = Collection.ON_POLICY

    def __init__(self, settings: FilteredCloningSettings, control_hz: float) -> None:
        if not control_hz > 0:
            raise ValueError(f"control_hz must be positive, got {control_hz}")
        self._settings = settings
        self._handover = steps_in(settings.handover_s, control_hz)
        self._before = steps_in(settings.pre_takeover_s, control_hz)

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        """The table at the top."""
        if is_usable_demonstration(episode):
            return demonstration_labels(episode.num_steps)
        if episode.outcome is not Outcome.SUCCESS or episode.policy_version is None:
            return ignored_labels(episode.num_steps)
        kind = step_kinds(episode.controller, handover=self._handover, before=self._before)
        weights = np.zeros(len(StepKind), np.float32)
        weights[StepKind.HUMAN] = 1
        weights[StepKind.POLICY] = self._settings.policy_weight
        segment, loss_weight = segments(kind), weights[kind]
        chosen = (kind != StepKind.POLICY) | every(segment, self._settings.policy_stride)
        return StepLabels(loss_weight=loss_weight, segment=segment, can_start=(loss_weight > 0) & chosen)
