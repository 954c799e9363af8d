"""A stream: what one recorded run of RECAP gives to all arms of a seed alike. Nothing of it is copied.

    demonstrations, base policy (version 0), base rollouts     before the fleet
    the value function                                         in its checkpoint, frozen
    the fleet's episodes                                       in the order in which its learner indexed them

`Replay` hands the last to another learner, one every so many of its steps.
"""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from sop.broadcast import fetch_manifest
from sop.buffer import IndexSegments, IngestedEpisode, Payloads, RowBlock, labels_id
from sop.buffer.rows import FOLDERS, OUTCOMES
from sop.buffer.screening import flagged_keys
from sop.core.episode import Outcome
from sop.core.errors import RunError
from sop.core.layout import EpisodeKey
from sop.learner import CheckpointStore
from sop.learner.checkpoint import Checkpoint
from sop.runs import Run, open_run

_ALGORITHM = "algorithm/"
_SOURCE = {folder: source for source, folder in FOLDERS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """An open stream."""

    run: Run
    horizon: int
    """H, steps per window."""
    offline: tuple[str, ...]
    """Keys of demonstrations and base rollouts, sorted."""
    online: tuple[str, ...]
    """Keys of the fleet's episodes, in the order of the learner's index."""
    rule_state: Mapping[str, Any]
    """What the run's algorithm had learned: JSON values and arrays."""


def open_stream(place: str, episodes: int) -> Stream:
    """Open a finished run as a stream (blocking).

    Args:
        place: folder of the run, or URL of its store.
        episodes: of the fleet that are taken, the first.

    Raises:
        RunError: it is no run of RECAP, not finished, or has fewer episodes; says so.
        NotFound: it has no base policy.
    """
    run = open_run(place)
    if run.config.algorithm != "recap":
        raise RunError(f"{place} is a run of {run.config.algorithm}: a stream needs one of recap, for its values")
    horizon = fetch_manifest(run.store, 0).spec.action_horizon
    labels = labels_id(run.config.algorithm, run.config.algorithm_settings, horizon)
    with closing(CheckpointStore(run.store, IndexSegments(run.store, labels))) as checkpoints:
        checkpoint = checkpoints.newest()
    if checkpoint is None or checkpoint.rows is None:
        raise RunError(f"{place} has no checkpoint with an index: finish it (`sop run ... --resume`), then try again")
    offline, online = order(checkpoint.rows.blocks, frozenset(flagged_keys(run.store)))
    if len(online) < episodes:
        raise RunError(f"{place} has {len(online)} episodes of the fleet in its last checkpoint, {episodes} are needed")
    state = _rule_state(checkpoint)
    return Stream(run=run, horizon=horizon, offline=offline, online=online[:episodes], rule_state=state)


def order(blocks: Sequence[RowBlock], flagged: AbstractSet[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys of what was there before the fleet (sorted), and of what the fleet recorded (in the order of the rows,
    aborted episodes left out); without those that screening flagged, which no learner learns from."""
    offline: list[str] = []
    online: list[str] = []
    aborted = OUTCOMES.index(Outcome.ABORTED)
    for block in blocks:
        for key, fleet, outcome in zip(block.episode_keys(), block.from_fleet(), block.columns["outcome"], strict=True):
            if key in flagged:
                continue
            if not fleet:
                offline.append(key)
            elif outcome != aborted:
                online.append(key)
    return tuple(sorted(offline)), tuple(online)


def load(key: str, payloads: Payloads) -> IngestedEpisode:
    """A stored episode as ingest would hand it over; it was checked when the run's learner indexed it."""
    parsed = EpisodeKey.parse(key)
    return IngestedEpisode(parsed, _SOURCE[parsed.folder], payloads.get(key))


class Replay:
    """Releases recorded episodes at a fixed number of learner steps each: `Ingest`, as far as the learner uses it.

        replay = Replay(keys, load, steps_per_episode)
        replay.begin(lambda: learner.step)
        replay.drain()                      # step 0 of the stream: the first; step 5: the second; ...

    A learner that asks twice without a step in between waits for more, and gets the next one early: it is never
    paused for ever.

    Args:
        keys: in the order of release.
        load: reads one.
        steps_per_episode: learner steps between two releases, at least 1.
    """

    num_quarantined = 0
    flagged: frozenset[str] = frozenset()

    def __init__(self, keys: Sequence[str], load: Callable[[str], IngestedEpisode], steps_per_episode: int) -> None:
        if steps_per_episode < 1:
            raise ValueError(f"steps_per_episode must be at least 1, got {steps_per_episode}")
        self._keys = tuple(keys)
        self._load = load
        self._every = steps_per_episode
        self._step: Callable[[], int] | None = None
        self._began = 0
        self._asked_at: int | None = None
        self.released = 0
        """Episodes handed over."""

    def begin(self, step: Callable[[], int]) -> None:
        """The stream begins at the present learner step."""
        self._step, self._began, self._asked_at = step, step(), None

    def drain(self) -> list[IngestedEpisode]:
        """What is due at the present learner step; nothing before `begin`."""
        if self._step is None:
            return []
        now = self._step()
        due = 1 + (now - self._began) // self._every
        if now == self._asked_at:
            due = max(due, self.released + 1)
        self._asked_at = now
        taken = [self._load(key) for key in self._keys[self.released : due]]
        self.released += len(taken)
        return taken

    def finish(self) -> list[IngestedEpisode]:
        """Nothing: what is not released yet belongs to no learner."""
        return []

    def missing(self) -> dict[str, list[range]]:
        """Nothing is missing."""
        return {}


def _rule_state(checkpoint: Checkpoint) -> dict[str, Any]:
    arrays = {
        name.removeprefix(_ALGORITHM): np.asarray(tensor.numpy())
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(_ALGORITHM)
    }
    return {**checkpoint.state["algorithm"], **arrays}
