"""Who recorded which window starts of a cell: so that one actor's part of a batch can be capped, exactly.

    cell (task, buffer)    ranks 0 ... num_starts, in the order of the episodes
    actor a                its episodes as pieces of these ranks: own start k -> the piece that holds it -> rank

24 bytes per episode that has window starts. Nothing is looked at unless a cap binds, and pieces are made of many
episodes at a time.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from sop.buffer.columns import Columns

Ints = npt.NDArray[np.int64]


MAX_WAITING = 256
"""Additions that may wait to be made into pieces: one that waits costs about 500 bytes."""


class CellActors:
    """The actors of one cell, by their numbers in the index. Not thread-safe."""

    def __init__(self) -> None:
        self._starts: Ints = np.zeros(0, np.int64)
        self._pieces: dict[int, Columns] = {}
        self._waiting: list[tuple[npt.NDArray[Any], Ints, Ints]] = []
        """Episodes whose pieces are not made yet: they are when somebody asks for ranks, or many wait."""

    @property
    def starts(self) -> Ints:
        """[n] window starts of each actor, 0 for those that have none; not to be changed."""
        return self._starts

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept, spare room included."""
        waiting = sum(array.nbytes for parts in self._waiting for array in parts)
        return self._starts.nbytes + waiting + sum(pieces.num_bytes for pieces in self._pieces.values())

    def extend(self, actors: npt.NDArray[Any], begin: Ints, count: Ints) -> None:
        """Add episodes: who recorded each, its first rank in the cell, and its number of starts (at least 1)."""
        if not len(actors):
            return
        added = np.bincount(actors, weights=count, minlength=len(self._starts)).astype(np.int64)
        added[: len(self._starts)] += self._starts
        self._starts = added
        self._waiting.append((actors, begin, count))
        if len(self._waiting) >= MAX_WAITING:
            self._make_pieces()

    def ranks(self, actor: int, own: Ints) -> Ints:
        """Ranks in the cell of some starts of an actor, each in [0, starts[actor])."""
        self._make_pieces()
        pieces = self._pieces[actor]
        piece = pieces["own"].searchsorted(own, "right") - 1
        found: Ints = pieces["rank"][piece] + own - pieces["own"][piece]
        return found

    def _make_pieces(self) -> None:
        if not self._waiting:
            return
        actors, begin, count = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        order = np.argsort(actors, kind="stable")
        edges = np.flatnonzero(np.diff(actors[order])) + 1
        for mine in np.split(order, edges):
            pieces = self._pieces.setdefault(
                int(actors[mine[0]]), Columns({"own": np.int64, "rank": np.int64, "end": np.int64})
            )
            before = int(pieces["end"][-1]) if len(pieces) else 0
            end = before + np.cumsum(count[mine])
            pieces.extend({"own": end - count[mine], "rank": begin[mine], "end": end}, len(mine))


def capped_shares(starts: Ints, cap: float) -> npt.NDArray[np.float64]:
    """Share of each actor: in proportion to its window starts, but none above `cap`.

    What is cut off goes to the others in proportion to theirs, as often as one of them reaches the cap. A cap below
    1 / n leaves every actor 1 / n.

    Args:
        starts: [n] at least 1 each.
        cap: largest share.
    """
    share = starts / starts.sum()
    cap = max(cap, 1 / len(starts))
    order = np.argsort(-share, kind="stable")
    ordered = share[order]
    rest = np.append(np.cumsum(ordered[::-1])[::-1][1:], 0.0)
    # the first k are cut when the k-th, grown like those after it, is still above the cap
    left = 1 - cap * np.arange(len(starts))
    grown = ordered * left / (rest + ordered)
    cut = int(np.argmax(grown <= cap * (1 + 1e-12))) if (grown <= cap * (1 + 1e-12)).any() else len(starts)
    ordered[:cut] = cap
    if cut < len(starts):
        ordered[cut:] *= left[cut] / ordered[cut:].sum()
    found: npt.NDArray[np.float64] = np.empty_like(share)
    found[order] = ordered
    return found
