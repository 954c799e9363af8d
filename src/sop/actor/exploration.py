"""Exploration: what a policy would seldom do by itself, tried for a while, bounded, recorded, and repeatable.

`noise`: the policy samples all its proposals from noise that an episode has in common. A policy that samples every
chunk anew averages its ways of doing a task; one that keeps its noise goes one way to the end, in one episode this, in
another that, and outcomes tell which was better. `offset` adds to what is proposed. Either kind may go faster or slower
than proposed (`tempo`, `tempo_mean`); `noise` without these leaves the proposals alone:

    chunk           0                1                2                3
    offset [A]      none             (.2, -.1)        none             (-.4, .3)        none at all with `noise`
    factor          f0               f1               f2               f3               1 without `tempo`
    executed        f0 p             f1 p + o1        f2 p             f3 p + o3        then the safety gate
    recorded        action = executed, policy_action = the proposal p

Noise on single steps averages out over a chunk and shakes the robot; an offset that lasts a chunk leads somewhere
else, and a factor gets there sooner or later. When a person takes over both are dropped, and nothing is drawn until
control is handed back. The episode's seed decides its draws: a repeated episode gets the same ones, and another
probability or std only decides how many chunks get theirs, and how far it goes.
"""

import numpy as np
import numpy.typing as npt

from sop.config import ExplorationConfig
from sop.core.embodiment import Embodiment

_STREAM = 0x45585058
"""Keeps the numbers apart from those of the scene and of the policy, which come from the same seed."""


def explored_elements(config: ExplorationConfig, embodiment: Embodiment) -> npt.NDArray[np.bool_]:
    """Which elements of an action [A] are explored: those named, else all that have a hold value (displacements).

    Raises:
        ValueError: there is no such element, or none at all.
    """
    count = embodiment.num_actions
    if config.elements is None:
        chosen = np.array([value is not None for value in embodiment.hold_action], np.bool_)
    else:
        unknown = [element for element in config.elements if element >= count]
        if unknown:
            raise ValueError(
                f"exploration.elements: {embodiment.name} has the action elements 0 to {count - 1}, got {unknown}"
            )
        chosen = np.isin(np.arange(count), config.elements)
    if not chosen.any():
        raise ValueError(f"exploration.elements: no element of {embodiment.name} has a hold value: name some")
    return chosen


class Exploration:
    """Changes a policy's proposals, within bounds. The actor's use of it:

        exploration.reset(seed, sequence)                                 # every episode
        command = exploration.explore(proposal, new_chunk=planned_now)    # every step that nobody else controls
        exploration.drop()                                                # somebody takes over

    Args:
        config: how often, how far, how long.
        embodiment: bounds the result, so that what an operator is shown is what would be executed.

    Raises:
        ValueError: as `explored_elements`.
    """

    def __init__(self, config: ExplorationConfig, embodiment: Embodiment) -> None:
        self._config = config
        self._explored = explored_elements(config, embodiment)
        self._low = np.asarray(embodiment.action_low, np.float32)
        self._high = np.asarray(embodiment.action_high, np.float32)
        self._scale = np.where(self._explored, (self._high - self._low) / 2, 0.0)
        self.reset(0, 0)

    @property
    def coherence(self) -> float:
        """What `Policy.reset` is given: 0 unless the noise is explored."""
        return self._config.coherence if self._config.kind == "noise" else 0.0

    @property
    def factor(self) -> float:
        """By what the running chunk's explored elements are multiplied; 1 when they are not."""
        return self._factor

    @property
    def offset(self) -> npt.NDArray[np.float32] | None:
        """The offset [A] of the running chunk in action units; None when it has none."""
        return self._offset

    def reset(self, seed: int, sequence: int) -> None:
        """Begin an episode.

        Args:
            seed: decides its offsets.
            sequence: the actor's number of the episode; decides how far the schedule has come.
        """
        self._rng = np.random.default_rng([_STREAM, seed])
        self._sequence = sequence
        self._std = self._config.std * self._config.share(sequence)
        self.drop()

    def explore(self, proposal: npt.NDArray[np.float32], *, new_chunk: bool) -> npt.NDArray[np.float32]:
        """The command [A] for a proposal [A]: times the chunk's factor plus its offset, explored elements clipped to
        their bounds.

        The proposal itself when the chunk has neither. A proposal that is not finite stays so: the gate holds.
        """
        if new_chunk and self._config.kind != "none":
            self._begin_chunk()
        if (self._offset is None and self._factor == 1) or not np.isfinite(proposal).all():
            return proposal
        shift = 0.0 if self._offset is None else self._offset
        moved = np.clip(self._factor * proposal + shift, self._low, self._high)
        return np.where(self._explored, moved, proposal).astype(np.float32)

    def drop(self) -> None:
        """Forget offset and factor; the next chunk draws anew. Idempotent."""
        self._offset: npt.NDArray[np.float32] | None = None
        self._factor = 1.0
        self._chunks_left = 0

    def _begin_chunk(self) -> None:
        if self._chunks_left == 0:
            chosen = self._rng.random() < self._config.probability and self._config.kind == "offset"
            direction = self._rng.standard_normal(len(self._scale))
            self._offset = (self._std * self._scale * direction).astype(np.float32) if chosen else None
            share = self._config.share(self._sequence)
            mean, spread = self._config.tempo_mean * share, self._config.tempo * share
            self._factor = float(np.exp(mean + spread * self._rng.standard_normal())) if mean or spread else 1.0
            self._chunks_left = self._config.hold_chunks
        self._chunks_left -= 1


def make_exploration(config: ExplorationConfig, embodiment: Embodiment) -> Exploration | None:
    """What a configuration asks for; None when it asks for nothing.

    Raises:
        ValueError: as `explored_elements`.
    """
    return None if config.kind == "none" else Exploration(config, embodiment)
