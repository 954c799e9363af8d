"""Whether there is anything to learn a value function from: each task needs a success and a failure."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from sop.core.episode import Outcome
from sop.core.errors import RunError


class Judged(Protocol):
    """Something that ended; a `StoredEpisode` is one."""

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        ...


_ADVICE = {
    "labelled": "record base rollouts of it whose outcome is detected or marked by an operator",
    "failed": "record more base rollouts, or with more exploration, or start from an earlier base policy",
    "successful": "add demonstrations of it, or rollouts in which it is solved",
}


def missing_outcomes(episodes_by_task: Mapping[str, Iterable[Judged]]) -> str:
    """Why a value function cannot be learned: one sentence per task that lacks something, in the tasks' order.

    A task needs at least one successful and one failed episode; aborted ones carry no label. Empty when nothing is
    missing. Each sentence names the task, what it has, and what to do.
    """
    problems = []
    for task, episodes in episodes_by_task.items():
        outcomes = [episode.outcome for episode in episodes]
        count = {outcome: outcomes.count(outcome) for outcome in Outcome}
        if not count[Outcome.SUCCESS] and not count[Outcome.FAILURE]:
            lacks = "labelled"
        elif not count[Outcome.FAILURE]:
            lacks = "failed"
        elif not count[Outcome.SUCCESS]:
            lacks = "successful"
        else:
            continue
        has = f"{count[Outcome.SUCCESS]} successful, {count[Outcome.FAILURE]} failed, {count[Outcome.ABORTED]} aborted"
        problems.append(f"task {task!r} has no {lacks} episode ({has}): {_ADVICE[lacks]}.")
    return " ".join(problems)


def require_outcomes(episodes_by_task: Mapping[str, Iterable[Judged]]) -> None:
    """Make sure that a value function can be learned for every task.

    Args:
        episodes_by_task: every task of the fleet, also those without an episode.

    Raises:
        RunError: `missing_outcomes`, or there is no task.
    """
    if not episodes_by_task:
        raise RunError("a value function needs at least one task of the fleet; the run names none")
    problems = missing_outcomes(episodes_by_task)
    if problems:
        raise RunError(
            f"a value function cannot be learned. {problems} "
            "Or leave these tasks out, or take an algorithm without a value function, e.g. hg_dagger."
        )
