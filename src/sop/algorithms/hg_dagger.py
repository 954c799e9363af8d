"""HG-DAgger: learn the actions of people who take over, when they take over (Kelly et al., arXiv 1810.02890).

Eq. 2 of the paper labels exactly the steps with g(x_t) = 1, those that the person controlled. What a step is:

    what                                                weight            window may start
    demonstration                                       1                 yes
    policy, the last `pre_intervention_s` before a
      takeover (it led to the mistake)                  0                 no
    policy, otherwise                                   0, or w_auto (*)  no, or yes (*)
    human, the first `handover_s` of a run
      (reflex; the hands find the robot's pose)         0                 no
    human, idle (when idle steps are dropped)           0                 no
    human, otherwise                                    1                 yes

(*) mode `iwr`, and only in a successful episode without a takeover.

Each row above is a segment of its own, so a window never mixes controllers; what lies beyond the segment is
padding. How many steps a window needs is the buffer's rule. Failed episodes keep their human segments, aborted
ones teach nothing.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sop.algorithms.base import Imitation, demonstration_labels, ignored_labels
from sop.algorithms.segmentation import StepKind, segments, spread, step_kinds, steps_in
from sop.core.episode import Controller, Outcome, human_runs
from sop.core.experience import Collection, StepLabels, StoredEpisode


@dataclass(frozen=True, slots=True, kw_only=True)
class HgDaggerSettings:
    """Settings of `HgDagger`; times in seconds of robot time.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    handover_s: float = 0.3
    """Beginning of every human run that is not learned from."""
    pre_intervention_s: float = 1.0
    """Span before a takeover that is a segment of its own with weight 0 in every mode."""
    mode: Literal["human_only", "iwr"] = "human_only"
    """`human_only` is the paper's rule; `iwr` also learns from what went well without help."""
    w_auto: float = 0.0
    """Weight of the policy's own steps in mode `iwr`, at most 0.5."""
    max_segment_s: float = 10.0
    """Window starts per human run, as time: a longer run keeps this many, evenly spread, so that one slow
    correction cannot dominate."""
    drop_idle: bool = False
    """Whether human steps are left out where the state hardly moves for `idle_s`, which avoids learning to be
    slow. Off by default: the speed that counts as idle depends on the units of the state, and a hand that
    presses, holds or waits for a door to open is still for a good reason."""
    idle_speed: float = 0.01
    """Norm of the state's change per second below which a step is idle, state units."""
    idle_s: float = 0.5
    """Shortest idle stretch that is dropped."""

    def __post_init__(self) -> None:
        for name in ("handover_s", "pre_intervention_s", "idle_speed", "idle_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.max_segment_s > 0:
            raise ValueError(f"max_segment_s must be positive, got {self.max_segment_s}")
        if not 0 <= self.w_auto <= 0.5:
            raise ValueError(f"w_auto must be in [0, 0.5], got {self.w_auto}")
        if self.w_auto > 0 and self.mode == "human_only":
            raise ValueError(f"w_auto is {self.w_auto} and mode human_only ignores it; set mode to 'iwr'")


class HgDagger(Imitation):
    """Learns from demonstrations and from the human steps of robots' episodes.

    Args:
        settings: the mask's times and options.
        control_hz: control steps per second, to turn times into steps (rounded up).

    Raises:
        ValueError: `control_hz` is not positive.
    """

    collection = Collection.ON_POLICY

    def __init__(self, settings: HgDaggerSettings, control_hz: float) -> None:
        if not control_hz > 0:
            raise ValueError(f"control_hz must be positive, got {control_hz}")
        self._settings = settings
        self._control_hz = control_hz

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        """The mask of the table at the top. Reads states only when idle steps are dropped, actions never."""
        settings = self._settings
        if episode.outcome is Outcome.ABORTED:
            return ignored_labels(episode.num_steps)
        if episode.policy_version is None:
            return demonstration_labels(episode.num_steps)
        runs = human_runs(episode.controller)
        kind = self._kinds(episode)
        weights = np.zeros(len(StepKind), np.float32)
        weights[StepKind.HUMAN] = 1
        if settings.mode == "iwr" and not runs and episode.outcome is Outcome.SUCCESS:
            weights[StepKind.POLICY] = settings.w_auto
        loss_weight = weights[kind]
        can_start = loss_weight > 0
        for start, stop in runs:
            spread(can_start[start:stop], self._steps(settings.max_segment_s))
        return StepLabels(loss_weight=loss_weight, segment=segments(kind), can_start=can_start)

    def _kinds(self, episode: StoredEpisode) -> npt.NDArray[np.int64]:
        handover, before = self._steps(self._settings.handover_s), self._steps(self._settings.pre_intervention_s)
        kind = step_kinds(episode.controller, handover=handover, before=before)
        if self._settings.drop_idle:
            kind[(kind == StepKind.HUMAN) & self._idle(episode.state)] = StepKind.IDLE
        return kind

    def _idle(self, state: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """[T] whether a step lies in a stretch of at least `idle_s` in which the state hardly moves."""
        if len(state) < 2:
            return np.zeros(len(state), np.bool_)
        speed = np.linalg.norm(np.diff(state, axis=0), axis=1) * self._control_hz
        still = np.append(speed, speed[-1]) < self._settings.idle_speed
        for start, stop in human_runs(np.where(still, Controller.HUMAN, Controller.POLICY).astype(np.uint8)):
            if stop - start < self._steps(self._settings.idle_s):
                still[start:stop] = False
        return np.asarray(still)

    def _steps(self, seconds: float) -> int:
        return steps_in(seconds, self._control_hz)
