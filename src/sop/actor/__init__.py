"""ROBOT: acts, records, spools, uploads; swaps policies between episodes. Never imports torch.

environment -> ChunkPlayback(policy) -> Exploration? -> Operator -> SafetyGate -> environment.step   every step
                                          |          (or GatedRobot: a process of its own, then the machine)
EpisodeRecorder -> encode -> EpisodeSpool (fsync) -> Uploader -> store, bus            beside it, in threads
StepJournal -> the running episode on disk, played back after a power failure                    in a thread
"""

from sop.actor.actor import Actor
from sop.actor.chunk import ChunkPlayback
from sop.actor.exploration import Exploration
from sop.actor.gated_robot import GatedRobot
from sop.actor.journal import StepJournal, recover_interrupted
from sop.actor.latch import SafetyLatch
from sop.actor.lifecycle import ActorState
from sop.actor.limits import RobotLimits, load_limits
from sop.actor.recorder import EpisodeRecorder
from sop.actor.reporter import ActorReporter
from sop.actor.safety import SafetyGate
from sop.actor.settings import ActorSettings
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
    "GatedRobot",
    "PinnedPolicy",
    "PolicySource",
    "RobotLimits",
    "SafetyGate",
    "SafetyLatch",
    "SpoolWriter",
    "StepJournal",
    "Uploader",
    "load_limits",
    "recover_interrupted",
]
