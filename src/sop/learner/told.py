"""Which episodes a learning rule was told of: a few runs of sequence numbers per actor, however many episodes.

A checkpoint keeps it beside the rule's state, because the rows of the index may be lost and the state is not: a
learner that rebuilds the index knows from it what the state has not seen.
"""

from collections.abc import Iterable, Mapping, Sequence

from sop.core.layout import EpisodeKey


class Told:
    """Runs [first, stop) of sequence numbers, per folder and actor.

    Args:
        runs: what `state` gave.
    """

    def __init__(self, runs: Mapping[str, Iterable[Sequence[int]]] | None = None) -> None:
        self._runs = {name: [(first, stop) for first, stop in some] for name, some in (runs or {}).items()}

    def __contains__(self, key: EpisodeKey) -> bool:
        return any(first <= key.sequence < stop for first, stop in self._runs.get(_name(key.folder, key.actor_id), ()))

    def add(self, folder: str, actor_id: str, first: int, stop: int) -> None:
        """Note the numbers in [first, stop); any order."""
        runs = self._runs.setdefault(_name(folder, actor_id), [])
        if runs and runs[-1][1] == first:
            first, _ = runs.pop()
        runs.append((first, stop))

    def state(self) -> dict[str, list[tuple[int, int]]]:
        """JSON: the runs, ascending, joined where they touch."""
        self._runs = {name: _joined(runs) for name, runs in self._runs.items()}
        return {name: list(runs) for name, runs in self._runs.items()}


def _name(folder: str, actor_id: str) -> str:
    return f"{folder}/{actor_id}"


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(runs):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((first, stop))
    return joined
