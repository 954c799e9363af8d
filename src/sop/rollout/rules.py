"""What a controller does next with a candidate: a pure function of the comparison, the stage and the time.

     candidate -> offline gate -> 10 % of the robots -> 25 % -> 100 %, promoted
                       |               |  |               |
                    refused            |  +-- too long, nothing to judge by --> withdrawn
                                       +-- worse, unsafe --> rolled back and banned

Order of the rules, the first that applies decides: numbers that are not finite; safety stops; proven clamps; proven
deadline misses; proven interventions; proven loss of success; missing data; too many pairs without a verdict; the next
stage. Proven means: by a test that may be looked at all the time (`sop.rollout.sequential`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sop.rollout.comparison import Comparison, Limits
from sop.rollout.sequential import Verdict


class Action(StrEnum):
    """What happens next."""

    HOLD = "hold"
    """Nothing: more episodes are needed, or somebody is missing."""
    WIDEN = "widen"
    """More canaries."""
    PROMOTE = "promote"
    """Every robot."""
    ROLL_BACK = "roll_back"
    """No robot, and never again: its hash is banned."""
    WITHDRAW = "withdraw"
    """No robot; nothing is known against it, it may be tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanarySettings:
    """Stages and error probabilities of a canary."""

    shares: tuple[float, ...] = (0.10, 0.25)
    """Of the robots, stage by stage, each at least one robot; after the last stage comes everybody."""
    alpha: float = 0.01
    """Probability that a candidate is rolled back by a test although it breaks no limit, over its whole trial. Half of
    it is for success, the rest is shared by interventions, clamps and deadlines."""
    beta: float = 0.05
    """Probability that a candidate is promoted although it loses the margin on some task."""
    limits: Limits = field(default_factory=Limits)
    max_stops: int = 2
    """Safety stops that end the trial: those of the candidate beyond as many as the control arm had meanwhile, which
    are not its fault."""
    min_pairs: int = 30
    """Pairs per task before a stage can be left for the next one, in this stage."""
    max_pairs: int = 5000
    """Pairs per task, over all stages, after which an undecided candidate is withdrawn."""
    patience_s: float = 3600.0
    """A robot of an arm that sends nothing usable for so long ends the trial: no data, no promotion."""
    lifetime_s: float = 7 * 86400.0
    """How long a state of the channel is fresh; it is renewed at half of that."""

    def __post_init__(self) -> None:
        ordered = list(self.shares) == sorted(set(self.shares)) and bool(self.shares)
        if not ordered or not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"canary.shares must rise within (0, 1), got {self.shares}")
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"canary.{name} must be in (0, 1), got {getattr(self, name)}")
        for name in ("max_stops", "min_pairs", "max_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"canary.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("patience_s", "lifetime_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"canary.{name} must be positive, got {getattr(self, name)}")

    def num_canaries(self, stage: int, robots: int) -> int:
        """Canaries of a stage in a fleet: max(1, share), but never more than the control arm can match."""
        return max(1, min(math.floor(self.shares[stage] * robots + 1e-9), robots // 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and why, in words."""

    action: Action
    why: str
    immediate: bool = False
    """Robots that run the candidate hold and change at once instead of at the end of their episode."""
    missing: tuple[str, ...] = ()
    """Robots whose data is waited for."""


def judge(
    comparison: Comparison, settings: CanarySettings, *, last_stage: bool, began_utc_ns: int, now_utc_ns: int
) -> Decision:
    """Decide. Pure.

    Args:
        comparison: of the running stage.
        settings: the rules' numbers.
        last_stage: whether everybody comes next.
        began_utc_ns: when the running stage began.
        now_utc_ns: now, by the same clock.
    """
    for rule in (_unsafe(comparison, settings), _proven(comparison, settings)):
        if rule is not None:
            return rule
    missing = _missing(comparison, settings, began_utc_ns, now_utc_ns)
    return missing or _progress(comparison, settings, last_stage)


def _unsafe(comparison: Comparison, settings: CanarySettings) -> Decision | None:
    counts = comparison.candidate
    if counts.nonfinite:
        why = f"{counts.nonfinite} command(s) were not finite"
    elif counts.stops - comparison.control.stops >= settings.max_stops:
        why = f"{counts.stops} safety stops with it, {comparison.control.stops} in the control arm"
    elif comparison.wagers["clamps"].rejects(settings.alpha / 6):
        shares = [100 * arm.clamped / max(1, arm.steps) for arm in (counts, comparison.control)]
        why = f"the safety gate clamped {shares[0]:.1f} % of its steps, {shares[1]:.1f} % of the control's"
    else:
        return None
    return Decision(action=Action.ROLL_BACK, why=why, immediate=True)


def _proven(comparison: Comparison, settings: CanarySettings) -> Decision | None:
    ours, theirs = comparison.candidate, comparison.control
    if comparison.wagers["deadlines"].rejects(settings.alpha / 6):
        why = f"{ours.late} inferences missed their deadline in {ours.steps} steps"
    elif comparison.wagers["interventions"].rejects(settings.alpha / 6):
        why = (
            f"people took over in {ours.interventions} of {ours.episodes} episodes, "
            f"in {theirs.interventions} of {theirs.episodes} of the control's"
        )
    elif comparison.success.verdict(settings.alpha / 2, settings.beta) is Verdict.WORSE:
        why = (
            f"worse: {ours.successes} of {ours.episodes} episodes succeeded, "
            f"{theirs.successes} of {theirs.episodes} of the control's"
        )
    else:
        return None
    return Decision(action=Action.ROLL_BACK, why=why)


def _missing(comparison: Comparison, settings: CanarySettings, began_utc_ns: int, now_utc_ns: int) -> Decision | None:
    silent, mute = [], []
    for robot, seen in comparison.progress.items():
        last = max(began_utc_ns, min(seen.last_end_utc_ns, now_utc_ns))
        if now_utc_ns - last > settings.patience_s * 1e9:
            silent.append(robot)
        elif seen.uncounted:
            mute.append(robot)
    if silent:
        why = f"nothing from {_names(silent)} for more than {settings.patience_s:g} s: no data, no promotion"
        return Decision(action=Action.WITHDRAW, why=why, missing=tuple(silent))
    if not mute:
        return None
    why = f"episodes of {_names(mute)} do not say what the safety gate did or cannot be read: update the robot"
    over = now_utc_ns - began_utc_ns > settings.patience_s * 1e9
    return Decision(action=Action.WITHDRAW if over else Action.HOLD, why=why, missing=tuple(mute))


def _progress(comparison: Comparison, settings: CanarySettings, last_stage: bool) -> Decision:
    test = comparison.success
    verdict = test.verdict(settings.alpha / 2, settings.beta)
    fewest = min(test.pairs, key=comparison.stage_pairs)
    if comparison.stage_pairs(fewest) < settings.min_pairs:
        why = f"{fewest}: {comparison.stage_pairs(fewest)} of {settings.min_pairs} pairs of this stage"
        return Decision(action=Action.HOLD, why=why)
    if last_stage and verdict is Verdict.BETTER_OR_EQUAL:
        points = 100 * settings.limits.margin
        why = f"not worse by {points:g} points on any of {len(test.pairs)} task(s), {sum(test.pairs.values())} pairs"
        return Decision(action=Action.PROMOTE, why=why)
    if min(test.pairs.values()) >= settings.max_pairs:
        return Decision(action=Action.WITHDRAW, why=f"undecided after {settings.max_pairs} pairs per task")
    if not last_stage and test.log_e_worse <= 0:
        return Decision(action=Action.WIDEN, why=f"{sum(test.pairs.values())} pairs, nothing against it")
    lean = "worse" if test.log_e_worse > 0 else "not worse"
    need = -math.log(settings.alpha / 2 if test.log_e_worse > 0 else settings.beta)
    found = test.log_e_worse if test.log_e_worse > 0 else test.log_e_not_worse
    return Decision(action=Action.HOLD, why=f"{lean} so far, evidence {found:.1f} of {need:.1f} nats")


def _names(robots: Sequence[str]) -> str:
    return ", ".join(robots[:5]) + (f" and {len(robots) - 5} more" if len(robots) > 5 else "")
