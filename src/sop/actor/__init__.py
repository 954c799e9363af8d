"""ROBOT: acts, records, spools, uploads; swaps policies between episodes. Never imports torch.

environment -> ChunkPlayback(policy) -> Exploration? -> Operator -> SafetyGate -> environment.step   every step
                                          |
EpisodeRecorder -> encode -> EpisodeSpool (fsync) -> Uploader -> store, bus            beside it, in threads
"""

from sop.actor.actor import Actor, ActorSettings
from sop.actor.chunk import ChunkPlayback
from sop.actor.exploration import Exploration
from sop.actor.lifecycle import ActorState
from sop.actor.recorder import EpisodeRecorder
from sop.actor.reporter import ActorReporter
from sop.actor.safety import SafetyGate
from sop.actor.source import PinnedPolicy, PolicySource
from sop.actor.spool import EpisodeSpool, SpoolWriter
from sop.actor.uploader import Uploader

__all__ = [
    "Actor",
    "ActorReporter",
    "ActorSettings",
    "ActorState",
    "ChunkPlayback",
    "EpisodeRecorder",
    "EpisodeSpool",
    "Exploration",
    "PinnedPolicy",
    "PolicySource",
    "SafetyGate",
    "SpoolWriter",
    "Uploader",
]
