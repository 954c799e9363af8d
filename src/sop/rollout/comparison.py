"""The two arms of a canary, compared: tests of success, interventions, clamps and deadlines, and plain counts."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from sop.rollout.evidence import EpisodeFacts
from sop.rollout.sequential import Claim, SuccessTest, Wager


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much worse than the control arm a candidate may be."""

    margin: float = 0.03
    """Success per task, share of episodes: losing less is no loss."""
    intervention_factor: float = 1.5
    """Episodes in which somebody took over, over the control's."""
    clamp_factor: float = 3.0
    """Share of steps that the safety gate changed, over the control's."""
    tolerance: float = 0.01
    """Added to both: a share that small is blamed on nobody, also when the control has none at all."""
    late_share: float = 0.01
    """Inferences that miss their deadline; absolute, not compared with the control."""

    @property
    def claims(self) -> Mapping[str, Claim]:
        """What is bet against beside success: name -> claim about numbers per episode in [0, 1]."""
        return {
            "interventions": Claim(self.intervention_factor, self.tolerance),
            "clamps": Claim(self.clamp_factor, self.tolerance),
            "deadlines": Claim(0.0, self.late_share),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """Who is compared, with what, from which episode on."""

    candidate: int
    """Policy version."""
    stable: int
    """Policy version."""
    canaries: tuple[str, ...]
    controls: tuple[str, ...]
    first: Mapping[str, int]
    """Robot -> its first sequence number that counts."""
    execution_horizon: int
    """Steps per inference."""

    @property
    def robots(self) -> tuple[str, ...]:
        """Both arms, sorted within each."""
        return (*sorted(self.canaries), *sorted(self.controls))

    def version_of(self, robot: str) -> int:
        """What a robot is meant to run."""
        return self.candidate if robot in self.canaries else self.stable


class ArmCount(msgspec.Struct):
    """What an arm did, compared or not."""

    episodes: int = 0
    """Without aborted ones."""
    successes: int = 0
    interventions: int = 0
    """Episodes with at least one."""
    steps: int = 0
    clamped: int = 0
    nonfinite: int = 0
    stops: int = 0
    late: int = 0

    def add(self, facts: EpisodeFacts) -> None:
        """Count an episode."""
        self.steps += facts.steps
        self.episodes += facts.success is not None
        self.successes += facts.success is True
        self.interventions += facts.intervened
        if facts.safety is not None:
            for name in ("clamped", "nonfinite", "stops", "late"):
                setattr(self, name, getattr(self, name) + getattr(facts.safety, name))


class ComparisonState(msgspec.Struct, frozen=True, kw_only=True):
    """`Comparison.state_dict`, typed: goes from one stage of a trial to the next."""

    success: dict[str, Any]
    wagers: dict[str, list[float]]
    candidate: ArmCount
    control: ArmCount


@dataclass(slots=True)
class RobotProgress:
    """What one robot has sent since the stage began."""

    next_sequence: int
    episodes: int = 0
    """With the version that it is meant to run."""
    last_end_utc_ns: int = 0
    """End of the newest of these, by the robot's clock; 0 without any."""
    uncounted: int = 0
    """Episodes of these, or unreadable ones, without safety counts."""


class Comparison:
    """Everything that the episodes of one stage say, on top of what the stages before said. Not thread-safe.

    Args:
        arms: who and from where on.
        tasks: that have to be compared.
        limits: what is bet against.
        carried: of the stage before; None for the first one.
    """

    def __init__(
        self, arms: Arms, tasks: Sequence[str], limits: Limits, carried: ComparisonState | None = None
    ) -> None:
        self.arms = arms
        self.progress = {robot: RobotProgress(arms.first[robot]) for robot in arms.robots}
        self.success = SuccessTest(tasks, limits.margin, None if carried is None else carried.success)
        self.before = dict(self.success.pairs)
        """Task -> pairs of earlier stages."""
        saved = {} if carried is None else carried.wagers
        self.wagers = {
            name: Wager(claim, saved[name][:-1], saved[name][-1]) if name in saved else Wager(claim)
            for name, claim in limits.claims.items()
        }
        self.candidate = ArmCount() if carried is None else carried.candidate
        self.control = ArmCount() if carried is None else carried.control
        self._waiting: dict[str, deque[EpisodeFacts]] = {robot: deque() for robot in arms.robots}
        self._unpaired: dict[str, tuple[deque[EpisodeFacts], deque[EpisodeFacts]]] = {}

    def add(self, facts: EpisodeFacts) -> None:
        """Take the next episode of a robot of an arm; rounds that it completes are compared.

        An episode with another version (of before the swap) is passed over. One that nobody can read, or that does
        not say what the safety gate did, counts as missing data.

        Raises:
            ValueError: it is not the robot's next one.
        """
        seen = self.progress[facts.robot]
        if facts.sequence != seen.next_sequence:
            raise ValueError(f"{facts.robot}: episode {facts.sequence} where {seen.next_sequence} is next")
        seen.next_sequence += 1
        if facts.version is None:
            seen.uncounted += 1
            return
        if facts.version != self.arms.version_of(facts.robot):
            return
        seen.episodes += 1
        seen.last_end_utc_ns = facts.end_utc_ns
        seen.uncounted += facts.safety is None
        (self.candidate if facts.robot in self.arms.canaries else self.control).add(facts)
        self._waiting[facts.robot].append(facts)
        while all(self._waiting.values()):
            self._compare_round()

    def stage_pairs(self, task: str) -> int:
        """Pairs of a task that this stage has compared."""
        return self.success.pairs[task] - self.before[task]

    def state(self) -> ComparisonState:
        """For `carried` of the next stage. What waits for its round or its partner is left behind."""
        return ComparisonState(
            success=self.success.state_dict(),
            wagers={name: [*wager.log_wealth, wager.peak] for name, wager in self.wagers.items()},
            candidate=self.candidate,
            control=self.control,
        )

    def _compare_round(self) -> None:
        for robot in self.arms.robots:
            facts = self._waiting[robot].popleft()
            if facts.success is not None and facts.safety is not None:
                arms = self._unpaired.setdefault(facts.task, (deque(), deque()))
                arms[robot in self.arms.controls].append(facts)
        for candidate, control in self._unpaired.values():
            while candidate and control:
                self._compare(candidate.popleft(), control.popleft())

    def _compare(self, candidate: EpisodeFacts, control: EpisodeFacts) -> None:
        self.success.add(candidate.task, candidate=candidate.success is True, control=control.success is True)
        pair = (candidate, control)
        self.wagers["interventions"].add(*(float(facts.intervened) for facts in pair))
        self.wagers["clamps"].add(*(_share(_clamped(facts), facts.steps) for facts in pair))
        self.wagers["deadlines"].add(*(self._late(facts) for facts in pair))

    def _late(self, facts: EpisodeFacts) -> float:
        late = 0 if facts.safety is None else facts.safety.late
        return _share(late, -(-facts.steps // self.arms.execution_horizon))


def _clamped(facts: EpisodeFacts) -> int:
    return 0 if facts.safety is None else facts.safety.clamped


def _share(part: int, whole: int) -> float:
    return min(1.0, part / max(1, whole))
