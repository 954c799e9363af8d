"""WEIGHTS: from the learner to every robot, whole or not at all, and only what somebody vouches for.

learner   Publisher.publish(weights) -> thread: hash -> full file, or delta and keyframe -> signature -> manifest
          -> event
release   publish_state: what robots of a channel run, what is banned
robot     Subscriber thread: event or listing -> whom to believe -> manifest -> checks -> cheapest way -> tensors
          -> hashes -> loaded into the policy that does not act -> staged; take() exchanges the two
          -> LastGood: the robot's own copies, for starting and going back with nobody there
"""

from sop.broadcast.channels import SignedState, newest_state, open_state, publish_root, publish_state
from sop.broadcast.fetch import (
    PolicyReader,
    ReadCost,
    ReadPolicy,
    fetch_manifest,
    fetch_policy,
    fetch_weights,
    manifest_bytes,
    published_versions,
)
from sop.broadcast.last_good import LastGood
from sop.broadcast.manifest import PolicyFacts, PolicyManifest
from sop.broadcast.publisher import Publisher
from sop.broadcast.stager import Prepare, StagedPolicy, prepare_with
from sop.broadcast.subscriber import Subscriber
from sop.broadcast.vetting import PolicyVetting

__all__ = [
    "LastGood",
    "PolicyFacts",
    "PolicyManifest",
    "PolicyReader",
    "PolicyVetting",
    "Prepare",
    "Publisher",
    "ReadCost",
    "ReadPolicy",
    "SignedState",
    "StagedPolicy",
    "Subscriber",
    "fetch_manifest",
    "fetch_policy",
    "fetch_weights",
    "manifest_bytes",
    "newest_state",
    "open_state",
    "prepare_with",
    "publish_root",
    "publish_state",
    "published_versions",
]
