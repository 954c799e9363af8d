"""EXPERIENCE: from stored episodes to batches.

    store, bus -> Ingest -> EpisodeIndex -> AdaptiveSampler -> Windows -> BatchLoader -> Batch
                  checks    who, which      which task,        (episode,  frames,
                  once      steps may       which buffer       start)     actions, masks
                            start a window

The index is memory only: columns of numbers, saved in segments with every checkpoint and rebuilt from the
store when they are missing; payloads are loaded when a window needs them.
"""

from sop.buffer.cache import PayloadCache, Payloads, open_payloads
from sop.buffer.index import EpisodeIndex
from sop.buffer.ingest import Ingest, IngestedEpisode
from sop.buffer.loader import BatchLoader
from sop.buffer.rows import EpisodeRow, RowBlock
from sop.buffer.sampler import AdaptiveSampler
from sop.buffer.segments import IndexSegments, labels_id

__all__ = [
    "AdaptiveSampler",
    "BatchLoader",
    "EpisodeIndex",
    "EpisodeRow",
    "IndexSegments",
    "Ingest",
    "IngestedEpisode",
    "PayloadCache",
    "Payloads",
    "RowBlock",
    "labels_id",
    "open_payloads",
]
