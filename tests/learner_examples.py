"""A learning rule with an opinion that changes, and a learner over the episodes of a recorded run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sop.algorithms import Imitation
from sop.algorithms.base import demonstration_labels
from sop.config import LearnerConfig
from sop.core.experience import Collection, Library, Sidecar, Source, StepLabels, StoredEpisode
from sop.learner import Learner
from sop.learner.learner import LearnerParts
from sop.runs import Run
from sop.system import make_learner_policy
from sop.wiring import learner_parts


class Moody(Imitation):
    """Learns from every step; every `every` learner steps it weighs all of them anew."""

    collection = Collection.NOTHING

    def __init__(self, every: int = 3) -> None:
        self.every = every
        self.mood = 1
        self.asked: list[str] = []
        self.told: list[tuple[str, Source]] = []
        self.library: Library | None = None

    def indexed(self, episode: StoredEpisode, source: Source) -> None:
        self.told.append((f"{episode.actor_id}/{episode.sequence}", source))

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        self.asked.append(f"{episode.actor_id}/{episode.sequence}")
        labels = demonstration_labels(episode.num_steps)
        return replace(labels, loss_weight=labels.loss_weight / self.mood, label_version=self.mood)

    def sidecar(self, episode: StoredEpisode) -> Sidecar:
        return Sidecar(version=self.mood, columns={"value": np.full(episode.num_steps, -0.5, np.float32)})

    def refresh(self, learner_step: int, library: Library) -> bool:
        self.library = library
        if not learner_step or learner_step % self.every:
            return False
        self.mood += 1
        return True

    def metrics(self) -> Mapping[str, float]:
        return {"moody/mood": float(self.mood)}

    def state_dict(self) -> dict[str, Any]:
        return {"mood": self.mood}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mood = state["mood"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """Settings of a warm-up."""

    install: str = "warmup"
    warmup_max_steps: int = 2
    warmup_separation: float = 0.0
    warmup_null_tolerance: float = 1e9


@contextmanager
def open_learner(
    run: Run, algorithm: Any, *, policy: Any = None, **changes: Any
) -> Iterator[tuple[Learner, LearnerParts]]:
    """A learner without a fleet, nothing indexed."""
    config: LearnerConfig = replace(run.config.learner, checkpoint_every=10**6, publish_every=10**6, **changes)
    if policy is None:
        policy, _ = make_learner_policy(run)
    with learner_parts(run, policy, algorithm, config) as parts:
        yield Learner(parts, config, target_episodes=None), parts
