"""WHICH ROBOT RUNS WHAT: a candidate is judged offline, tried on few robots beside others, promoted or taken back.

evidence     facts of stored episodes, robot by robot          sequential   tests that may be looked at all the time
comparison   both arms of a trial, in rounds                   rules        what follows: a pure function
states       the channel's next state: pure functions          stage        where a comparison begins
canary       the controller                                    replay       the offline gate
signed       the channel in a store                            command      `sop policy ...`
"""

from sop.rollout.canary import Canary, ChannelPort
from sop.rollout.comparison import Limits
from sop.rollout.evidence import EpisodeFacts, EpisodeSource, StoredEpisodes
from sop.rollout.replay import ReplayLimits, ReplayVerdict, replay
from sop.rollout.rules import Action, CanarySettings, Decision
from sop.rollout.sequential import SuccessTest, Verdict
from sop.rollout.signed import SignedChannel, policy_ref

__all__ = [
    "Action",
    "Canary",
    "CanarySettings",
    "ChannelPort",
    "Decision",
    "EpisodeFacts",
    "EpisodeSource",
    "Limits",
    "ReplayLimits",
    "ReplayVerdict",
    "SignedChannel",
    "StoredEpisodes",
    "SuccessTest",
    "Verdict",
    "policy_ref",
    "replay",
]
