"""The adaptive sampler S of SOP: uniform over tasks, and per task more from the buffer with the higher loss.

    omega^m     = 1 / M                                              every task with data
    lbar^m_s    = mean of l^{m,i}_s over the last W learner steps i   s in {on, off}
    omega_on^m  = sigmoid(alpha * lbar_on^m - lbar_off^m), clipped to [0.2, 0.8]        `raw`, the paper
    the same with both means divided by their average                                    `ratio`, default

(arXiv 2601.03044, equations of the adaptive sampler.) A flow-matching loss of a few hundredths leaves the
raw formula at one half whatever happens; `ratio` gives 0.62 at equal losses and 0.79 where the online loss
is twice the offline one (alpha = 1.5).

Within a task's online windows every window start counts the same, unless one robot has more than its share of them
(`SamplerConfig.max_actor_share`, 2 / N): then it gets that share of every batch, within one window, and the others
the rest. The offline buffer was there before the fleet and is not capped.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.buffer.index import EpisodeIndex
from sop.buffer.influence import Influence
from sop.buffer.shares import capped_shares
from sop.config import SamplerConfig
from sop.core.errors import RunError
from sop.core.experience import Source, Windows


def online_share(mean_online: float, mean_offline: float, config: SamplerConfig) -> float:
    """omega_on for two mean losses, clipped to [min_share, max_share]; 0.5 when both are zero under `ratio`."""
    if config.scale == "ratio":
        average = (mean_online + mean_offline) / 2
        if average <= 0:
            return 0.5
        mean_online, mean_offline = mean_online / average, mean_offline / average
    logit = config.alpha * mean_online - mean_offline
    share = 1 / (1 + math.exp(-logit)) if logit > -500 else 0.0
    return min(max(share, config.min_share), config.max_share)


_LOSS_BITS = 80
"""Losses are added up as multiples of 2^-80: what a window adds it takes away again, to the last bit."""


class LossWindow:
    """The losses of the last `length` learner steps, with their mean at hand.

    The sum is a whole number, so it depends on the entries alone and not on what came and went before: a
    restored window has exactly the mean of one that ran on.

    Args:
        length: learner steps, W.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._entries: deque[tuple[int, float]] = deque()
        self._sum = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def mean(self) -> float:
        """Mean of the entries, rounded once; there has to be one."""
        return self._sum / (len(self._entries) << _LOSS_BITS)

    def append(self, step: int, loss: float) -> None:
        """Add the loss (finite) of a step; steps ascend."""
        self._entries.append((step, loss))
        self._sum += _fixed(loss)

    def forget(self, step: int) -> None:
        """Drop what lies outside of the window that ends with `step`."""
        while self._entries and self._entries[0][0] <= step - self._length:
            self._sum -= _fixed(self._entries.popleft()[1])

    def entries(self) -> list[tuple[int, float]]:
        """`(step, loss)`, oldest first."""
        return list(self._entries)

    def load(self, entries: Iterable[tuple[int, float]]) -> None:
        """Take up the entries of another window instead of these."""
        self._entries = deque((int(step), float(loss)) for step, loss in entries)
        self._sum = sum(_fixed(loss) for _, loss in self._entries)


class AdaptiveSampler:
    """Draws windows from both buffers. The learner's use of it:

        windows = sampler.draw(batch_size)
        ...                                   # losses of the step
        sampler.observe(windows, losses)

    Owns its random generator; `state_dict` holds all that the next draw depends on besides the index.
    Not thread-safe.
    """

    def __init__(self, index: EpisodeIndex, config: SamplerConfig, seed: int) -> None:
        self._index = index
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._step = 0
        self._losses = {
            (task, source): LossWindow(config.window) for task in range(len(index.tasks)) for source in Source
        }
        self.influence = Influence(index)
        """What every robot's windows weighed and cost so far."""

    def share(self, task: int) -> float | None:
        """omega_on of a task (by number) for the next draw; None when the task has no data at all."""
        online, offline = (self._index.num_starts(task, source) for source in (Source.ONLINE, Source.OFFLINE))
        if not online and not offline:
            return None
        if not offline:
            return 1.0
        if online < self._config.min_online_starts:
            return 0.0
        on, off = self._losses[task, Source.ONLINE], self._losses[task, Source.OFFLINE]
        if min(len(on), len(off)) < max(1, self._config.min_entries):
            return 0.5
        return online_share(on.mean, off.mean, self._config)

    def draw(self, batch_size: int) -> Windows:
        """Draw a batch: the counts per task and buffer differ from their expectation by less than one.

        Raises:
            RunError: no buffer holds a single window.
        """
        cells, expected = self._cells(batch_size)
        counts = self._systematic_counts(expected)
        starts = [self._index.num_starts(task, source) for task, source in cells]
        ranks = self._rng.integers(0, np.repeat(starts, counts))
        end = np.cumsum(counts)
        for (task, source), first, stop in zip(cells, end - counts, end, strict=True):
            if source is Source.ONLINE and stop > first:
                self._cap(task, ranks[first:stop])
        episode, start = self._index.locate(cells, counts.tolist(), ranks)
        task, source = np.repeat(np.asarray(cells), counts, axis=0).T
        return Windows(episode.astype(np.int64), start.astype(np.int32), task.astype(np.int32), source.astype(np.uint8))

    def observe(self, windows: Windows, losses: npt.NDArray[np.float32]) -> None:
        """Take the losses [B] of one learner step: one entry per (task, buffer) that the step drew from."""
        self._step += 1
        self.influence.observe(windows, losses)
        finite = np.isfinite(losses)
        cell = (windows.task * len(Source) + windows.source)[finite]
        number = np.bincount(cell, minlength=len(self._losses)).tolist()
        total = np.bincount(cell, weights=losses[finite], minlength=len(self._losses)).tolist()
        for (task, source), history in self._losses.items():
            place = task * len(Source) + source
            if number[place]:
                history.append(self._step, total[place] / number[place])
            history.forget(self._step)

    def metrics(self) -> dict[str, float]:
        """Per task: online share and mean losses, as `sampler/...`."""
        values: dict[str, float] = {}
        for number, task in enumerate(self._index.tasks):
            share = self.share(number)
            if share is not None:
                values[f"sampler/online_share/{task}"] = share
            for source in Source:
                history = self._losses[number, source]
                if len(history):
                    values[f"sampler/loss_{source.name.lower()}/{task}"] = history.mean
        return values

    def state_dict(self) -> dict[str, Any]:
        """JSON values: generator, loss windows, counter, influence."""
        return {
            "rng": self._rng.bit_generator.state,
            "step": self._step,
            "losses": {
                f"{self._index.tasks[task]}/{source.name}": history.entries()
                for (task, source), history in self._losses.items()
            },
            "influence": self.influence.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the index has to hold the rows that it held then."""
        self._rng.bit_generator.state = state["rng"]
        self._step = state["step"]
        self.influence.load_state_dict(state.get("influence", {}))
        for (task, source), history in self._losses.items():
            history.load(state["losses"].get(f"{self._index.tasks[task]}/{source.name}", []))

    def _cells(self, batch_size: int) -> tuple[list[tuple[int, Source]], npt.NDArray[np.float64]]:
        shares = {task: self.share(task) for task in range(len(self._index.tasks))}
        with_data = {task: share for task, share in shares.items() if share is not None}
        if not with_data:
            raise RunError("nothing to learn from: neither the offline nor the online buffer holds a window")
        cells: list[tuple[int, Source]] = []
        expected: list[float] = []
        for task, share in with_data.items():
            for source, part in ((Source.ONLINE, share), (Source.OFFLINE, 1 - share)):
                if part > 0:
                    cells.append((task, source))
                    expected.append(batch_size * part / len(with_data))
        return cells, np.asarray(expected)

    def _cap(self, task: int, ranks: npt.NDArray[np.int64]) -> None:
        """Where one actor has more than its share of a task's online starts: draw again, actor by actor, in place."""
        by_actor = self._index.starts_by_actor(task, Source.ONLINE)
        actors = np.flatnonzero(by_actor)
        starts, cap = by_actor[actors], self._config.max_actor_share
        cap = min(1.0, 2 / len(actors)) if cap is None else cap
        if starts.max() <= cap * starts.sum():
            return
        counts = self._systematic_counts(len(ranks) * capped_shares(starts, cap))
        own, done = self._rng.integers(0, np.repeat(starts, counts)), 0
        for actor, count in zip(actors.tolist(), counts.tolist(), strict=True):
            if count:
                part = slice(done, done + count)
                ranks[part] = self._index.ranks_of(task, Source.ONLINE, actor, own[part])
                done += count

    def _systematic_counts(self, expected: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Whole numbers with the given expectations and their exact sum (systematic sampling)."""
        order = self._rng.permutation(len(expected))
        total = round(expected.sum())
        edges = np.concatenate(([0.0], np.cumsum(expected[order])))
        edges[-1] = total
        marks = np.floor(edges + self._rng.random())
        marks[0], marks[-1] = 0, total
        counts = np.empty(len(expected), np.int64)
        counts[order] = np.diff(marks).astype(np.int64)
        return counts


def _fixed(loss: float) -> int:
    """A finite loss as a whole number of 2^-80; what is smaller is cut off."""
    return int(math.ldexp(loss, _LOSS_BITS))
