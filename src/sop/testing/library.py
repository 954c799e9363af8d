"""Stored episodes in memory, and the smallest policy, for learning rules that read whole episodes."""

from collections.abc import Iterable, Sequence

from sop.core.embodiment import Embodiment
from sop.core.errors import NotFound
from sop.core.experience import Source, StoredEpisode
from sop.policies import TrainablePolicy, make_policy, make_spec

_FOLDERS = {Source.OFFLINE: "demonstrations", Source.ONLINE: "episodes"}
_TINY = {
    "action_horizon": 4, "width": 8, "heads": 2, "prefix_layers": 1, "expert_layers": 1, "prefix_mlp": 1,
    "channels": [2, 2, 4], "keypoints": 2, "grid": 2, "text_encoder": "hash", "random_shift": 1, "noise_draws": 1,
    "precision": "float32",
}  # fmt: skip


class MemoryLibrary:
    """`Library` over episodes that are given.

    Args:
        offline: of the offline buffer, in order.
        online: of the online buffer, in order.
    """

    def __init__(self, offline: Iterable[StoredEpisode] = (), online: Iterable[StoredEpisode] = ()) -> None:
        self._episodes: dict[Source, dict[str, StoredEpisode]] = {source: {} for source in Source}
        for source, episodes in ((Source.OFFLINE, offline), (Source.ONLINE, online)):
            for episode in episodes:
                self.add(episode, source)

    def add(self, episode: StoredEpisode, source: Source) -> str:
        """Store one more; returns its key.

        Raises:
            ValueError: the actor has stored an episode with this number.
        """
        key = f"{_FOLDERS[source]}/{episode.actor_id}/{episode.sequence:08d}"
        if key in self._episodes[source]:
            raise ValueError(f"{key} is stored already: give every episode of an actor a number of its own")
        self._episodes[source][key] = episode
        return key

    def keys(self, source: Source) -> Sequence[str]:
        """See `Library`."""
        return tuple(self._episodes[source])

    def get(self, key: str) -> StoredEpisode:
        """See `Library`."""
        for episodes in self._episodes.values():
            if key in episodes:
                return episodes[key]
        raise NotFound(f"no episode {key!r}")


def tiny_policy(embodiment: Embodiment, seed: int = 0) -> TrainablePolicy:
    """The built-in policy with a few hundred parameters; images need at least 8 pixels per side."""
    states, actions = embodiment.num_states, embodiment.num_actions
    normalization = {
        "state_mean": (0.0,) * states,
        "state_std": (1.0,) * states,
        "action_mean": (0.0,) * actions,
        "action_std": (1.0,) * actions,
    }
    return make_policy(make_spec("flow_vla", _TINY, embodiment, 4, normalization), seed)
