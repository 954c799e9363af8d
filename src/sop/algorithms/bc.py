"""Behaviour cloning on the demonstrations alone: the base policy, and the floor for every comparison."""

from dataclasses import dataclass

from sop.algorithms.base import Imitation, demonstration_labels, ignored_labels, is_usable_demonstration
from sop.core.experience import Collection, StepLabels, StoredEpisode


@dataclass(frozen=True, slots=True, kw_only=True)
class BehaviourCloningSettings:
    """Nothing to set: cloning takes every step of a demonstration."""


class BehaviourCloning(Imitation):
    """Clones demonstrations; episodes of robots get weight 0, and none are collected."""

    collection = Collection.NOTHING

    def annotate(self, episode: StoredEpisode) -> StepLabels:
        """All steps of a demonstration that was not aborted, nothing else."""
        if is_usable_demonstration(episode):
            return demonstration_labels(episode.num_steps)
        return ignored_labels(episode.num_steps)
