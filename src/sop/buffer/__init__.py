"""EXPERIENCE: from stored episodes to batches.

    store, bus -> Ingest -> EpisodeIndex -> AdaptiveSampler -> Windows -> BatchLoader -> Batch
                  checks    who, which      which task,        (episode,  frames,
                  once      steps may       which buffer       start)     actions, masks
                            start a window

The index is memory only and is rebuilt from the store; payloads are loaded when a window needs them.
"""

from sop.buffer.index import EpisodeIndex, EpisodeRow
from sop.buffer.ingest import Ingest, IngestedEpisode
from sop.buffer.loader import BatchLoader, PayloadCache
from sop.buffer.sampler import AdaptiveSampler

__all__ = [
    "AdaptiveSampler",
    "BatchLoader",
    "EpisodeIndex",
    "EpisodeRow",
    "Ingest",
    "IngestedEpisode",
    "PayloadCache",
]
