"""WEIGHTS: from the learner to every robot, whole or not at all.

learner   Publisher.publish(weights) -> thread: hash -> full file, or delta and keyframe -> manifest -> event
robot     Subscriber thread: event or listing -> manifest -> checks -> cheapest way -> tensors -> hashes
          -> loaded into the policy that does not act -> staged; take() exchanges the two
"""

from sop.broadcast.fetch import (
    PolicyReader,
    ReadCost,
    ReadPolicy,
    fetch_manifest,
    fetch_policy,
    fetch_weights,
    published_versions,
)
from sop.broadcast.manifest import PolicyFacts, PolicyManifest
from sop.broadcast.publisher import Publisher
from sop.broadcast.subscriber import Prepare, StagedPolicy, Subscriber, prepare_with

__all__ = [
    "PolicyFacts",
    "PolicyManifest",
    "PolicyReader",
    "Prepare",
    "Publisher",
    "ReadCost",
    "ReadPolicy",
    "StagedPolicy",
    "Subscriber",
    "fetch_manifest",
    "fetch_policy",
    "fetch_weights",
    "prepare_with",
    "published_versions",
]
