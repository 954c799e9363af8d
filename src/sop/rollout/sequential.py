"""Comparing two concurrent arms while looking at every episode: tests that may be stopped at any moment.

One idea serves every question that a canary asks. Episodes come in pairs, one of the candidate and one of the control
arm, each with a number in [0, 1] (failed or not, somebody took over or not, share of clamped steps). A claim is

    the candidate's mean  <=  factor * the control's mean + margin

and a gambler who doubts it bets a share of his wealth on every pair:

    z = candidate - factor * control - margin            E[z] <= 0 while the claim holds
    wealth *= 1 + stake * z                              stake in [0, 1 / (factor + margin)): never below 0

While the claim holds his wealth is a non-negative supermartingale that begins at 1, so by Ville's inequality it ever
reaches 1 / alpha with probability alpha at most, however often one looks and whenever one stops. He does not know the
best stake and splits his wealth evenly over a few of them: a mean of such processes is one, too.

Sources: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS B 2024,
arXiv 2010.09686); Shekhar and Ramdas, Nonparametric two-sample testing by betting (arXiv 2112.09162). For two
Bernoulli arms the e-variables of Turner, Ly and Grunwald (arXiv 2106.02693; with a margin: 2203.09785) are an
alternative with the same growth to first order, margin^2 / (2 Var[z]) nats per pair between equal arms; they need a
prior on both rates and do not cover shares of steps. STEP (arXiv 2503.10966) decides sooner, but needs the largest
number of trials in advance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

STAKES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95)
"""Shares of the largest stake among which the wealth is split; the split costs at most log(8) = 2.1 nats."""
_MAX_KNOWN_PAIRS = 64
"""Pairs whose logarithms are kept: yes and no need four."""


class Verdict(StrEnum):
    """What the episodes say about the candidate's success so far."""

    BETTER_OR_EQUAL = "better_or_equal"
    """Not worse by more than the margin, on every task."""
    WORSE = "worse"
    """Worse by more than the margin on some task."""
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Claim:
    """`mean of the candidate <= factor * mean of the control + margin`, of numbers in [0, 1].

    Raises:
        ValueError: nothing could ever contradict it or it cannot be bet against.
    """

    factor: float
    margin: float

    def __post_init__(self) -> None:
        if self.factor < 0 or not self.factor + self.margin > 0 or self.margin >= 1:
            raise ValueError(f"not a claim that can be doubted: factor {self.factor}, margin {self.margin}")


class Wager:
    """The wealth of one who doubts a claim. Not thread-safe.

    Args:
        claim: what he bets against.
        log_wealth: one per stake, of an earlier process (`log_wealth`); None starts with 1 in all.
        peak: the largest `log_e` so far of an earlier process.
    """

    def __init__(self, claim: Claim, log_wealth: Sequence[float] | None = None, peak: float = 0.0) -> None:
        self._claim = claim
        largest = 1.0 / (claim.factor + claim.margin)
        self._stakes = [share * largest for share in STAKES]
        self._gains: dict[tuple[float, float], tuple[float, ...]] = {}
        self.log_wealth = list(log_wealth) if log_wealth is not None else [0.0] * len(STAKES)
        """Natural logarithm of the wealth on each stake."""
        if len(self.log_wealth) != len(STAKES):
            raise ValueError(f"a wager has {len(STAKES)} stakes, got {len(self.log_wealth)}")
        self.log_e = log_mean_exp(self.log_wealth)
        """Natural logarithm of the wealth now: the evidence against the claim, 0 before the first pair."""
        self.peak = peak
        """The largest `log_e` there has been: once 1 / alpha was reached, the claim stays rejected."""

    def add(self, candidate: float, control: float) -> None:
        """Bet on one more pair of numbers in [0, 1].

        Raises:
            ValueError: a number outside of [0, 1].
        """
        if not (0 <= candidate <= 1 and 0 <= control <= 1):
            raise ValueError(f"a pair has numbers in [0, 1], got {candidate} and {control}")
        gains = self._gains.get((candidate, control))
        if gains is None:
            z = candidate - self._claim.factor * control - self._claim.margin
            gains = tuple(math.log1p(stake * z) for stake in self._stakes)
            if len(self._gains) < _MAX_KNOWN_PAIRS:
                self._gains[candidate, control] = gains
        self.log_wealth = [wealth + gain for wealth, gain in zip(self.log_wealth, gains, strict=True)]
        self.log_e = log_mean_exp(self.log_wealth)
        self.peak = max(self.peak, self.log_e)

    def rejects(self, alpha: float) -> bool:
        """Whether the claim has been refuted at level `alpha`, now or at any earlier pair."""
        return self.peak >= -math.log(alpha)


class SuccessTest:
    """Is the candidate's success worse than the control's by more than the margin, on any task? Not thread-safe.

    Two claims per task: "not worse by more than the margin" is refuted for `worse`, "worse by at least the margin" is
    refuted on every task for `better_or_equal`. Against the first claim of all tasks together there is one process:
    half of the wealth bets on all pairs alike, the other half is split over the tasks; its mean is tested at `alpha`,
    so that more tasks make no more false alarms. To be wrong with `better_or_equal` a task has to be wrong: no split.

    Args:
        tasks: all that have to be compared; a task without pairs leaves the verdict undecided.
        margin: share of episodes.
        saved: `state_dict` of an earlier process.
    """

    def __init__(self, tasks: Sequence[str], margin: float, saved: Mapping[str, object] | None = None) -> None:
        if not tasks:
            raise ValueError("a comparison needs at least one task")
        self._worse = {task: Wager(Claim(1.0, margin)) for task in tasks}
        self._worse_pooled = Wager(Claim(1.0, margin))
        self._not_worse = {task: Wager(Claim(1.0, -margin)) for task in tasks}
        self._margin = margin
        self.pairs = dict.fromkeys(tasks, 0)
        """Task -> pairs compared."""
        self.log_e_worse = 0.0
        """Natural logarithm of the evidence that some task is worse."""
        self._peak = 0.0
        if saved is not None:
            self._load(saved)

    def add(self, task: str, *, candidate: bool, control: bool) -> None:
        """Compare one more pair of episodes of a task: whether each succeeded. Other tasks are ignored."""
        if task not in self.pairs:
            return
        self.pairs[task] += 1
        for wager in (self._worse[task], self._worse_pooled):
            wager.add(float(not candidate), float(not control))
        self._not_worse[task].add(float(candidate), float(control))
        split = log_mean_exp([wager.log_e for wager in self._worse.values()])
        self.log_e_worse = log_mean_exp([self._worse_pooled.log_e, split])
        self._peak = max(self._peak, self.log_e_worse)

    @property
    def log_e_not_worse(self) -> float:
        """Natural logarithm of the evidence that no task is worse: that of the task with the least."""
        return min(wager.peak for wager in self._not_worse.values())

    def verdict(self, alpha: float, beta: float) -> Verdict:
        """What can be said; `worse` of a candidate that is not has probability `alpha` at most over the whole of its
        trial, `better_or_equal` of one that is worse by the margin on some task `beta` at most."""
        if self._peak >= -math.log(alpha):
            return Verdict.WORSE
        good = all(wager.rejects(beta) for wager in self._not_worse.values())
        return Verdict.BETTER_OR_EQUAL if good else Verdict.UNDECIDED

    def state_dict(self) -> dict[str, object]:
        """Everything, as JSON values; for `saved`."""
        wagers = {"": self._worse_pooled}
        wagers |= {f"worse/{task}": wager for task, wager in self._worse.items()}
        wagers |= {f"not_worse/{task}": wager for task, wager in self._not_worse.items()}
        return {
            "pairs": dict(self.pairs),
            "peak": self._peak,
            "log_e_worse": self.log_e_worse,
            "wagers": {name: [*wager.log_wealth, wager.peak] for name, wager in wagers.items()},
        }

    def _load(self, saved: Mapping[str, object]) -> None:
        state = msgspec.convert(saved, _Saved)
        if state.pairs.keys() != self.pairs.keys():
            raise ValueError(f"the trial began with the tasks {sorted(state.pairs)}, not {sorted(self.pairs)}")
        self.pairs, self._peak, self.log_e_worse = dict(state.pairs), state.peak, state.log_e_worse
        margin = self._margin
        self._worse_pooled = _restored(Claim(1.0, margin), state.wagers[""])
        for task in self.pairs:
            self._worse[task] = _restored(Claim(1.0, margin), state.wagers[f"worse/{task}"])
            self._not_worse[task] = _restored(Claim(1.0, -margin), state.wagers[f"not_worse/{task}"])


class _Saved(msgspec.Struct):
    """Form of `state_dict`."""

    pairs: dict[str, int]
    peak: float
    log_e_worse: float
    wagers: dict[str, list[float]]


def log_mean_exp(logs: Sequence[float]) -> float:
    """Logarithm of the mean of what the logarithms stand for."""
    top = max(logs)
    return top + math.log(math.fsum([math.exp(value - top) for value in logs]) / len(logs))


def _restored(claim: Claim, saved: Sequence[float]) -> Wager:
    return Wager(claim, saved[:-1], saved[-1])
