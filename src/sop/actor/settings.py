"""What an actor is told to do, and what it has done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sop.core.episode import Episode, Outcome


def training_seed(seed: int, sequence: int) -> int:
    """Seed of an actor's episode: 2^31 or more, so that evaluations (below 2^31) never share one."""
    return int(np.random.SeedSequence([seed, sequence]).generate_state(1)[0]) | 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorSettings:
    """What an actor does, episode after episode."""

    actor_id: str
    tasks: tuple[str, ...]
    """Episode i works on tasks[(first_task + i) mod n], i counted by the actor's sequence numbers."""
    instructions: Mapping[str, tuple[str, ...]]
    """Phrasings per task; episodes take turns."""
    seed: int
    """Episode i is reset with a seed derived from this and i."""
    first_task: int = 0
    """Shifts the order of tasks, so that the robots of a fleet do not all work on the same one."""
    reset_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the robot's `reset` beside the task."""
    reset_s: float = 0.0
    """Robot seconds between two episodes."""
    speed: float = 1.0
    """Robot seconds per wall-clock second, 0 for no pacing (simulation only)."""
    end_sequence: int | None = None
    """Stop when the next episode would have this number; None for no end."""


@dataclass(slots=True)
class ActorCounts:
    """What an actor has done since it started."""

    episodes: int = 0
    successes: int = 0
    interventions: int = 0
    human_steps: int = 0
    steps: int = 0
    overruns: int = 0
    """Control steps that came late."""
    gated: int = 0
    """Actions that the gate in this process changed."""
    clamped: int = 0
    nonfinite: int = 0
    stops: int = 0
    late: int = 0
    """These four as in `SafetyCounts`."""

    def add(self, episode: Episode) -> None:
        """One more episode ended."""
        self.episodes += episode.outcome is not Outcome.ABORTED
        self.successes += episode.outcome is Outcome.SUCCESS
        self.interventions += len(episode.interventions)
        self.human_steps += int(episode.controller.sum())
        self.steps += episode.num_steps
        if episode.safety is not None:
            self.clamped += episode.safety.clamped
            self.nonfinite += episode.safety.nonfinite
            self.stops += episode.safety.stops
            self.late += episode.safety.late
