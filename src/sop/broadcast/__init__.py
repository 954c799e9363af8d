"""WEIGHTS: from the learner to every robot, whole or not at all.

learner   Publisher.publish(weights) -> thread: tensors -> manifest -> event
robot     Subscriber thread: event or listing -> manifest -> checks -> tensors -> hashes -> staged; take()
"""

from sop.broadcast.fetch import fetch_manifest, fetch_policy, fetch_weights, published_versions
from sop.broadcast.manifest import PolicyFacts, PolicyManifest
from sop.broadcast.publisher import Publisher
from sop.broadcast.subscriber import StagedPolicy, Subscriber

__all__ = [
    "PolicyFacts",
    "PolicyManifest",
    "Publisher",
    "StagedPolicy",
    "Subscriber",
    "fetch_manifest",
    "fetch_policy",
    "fetch_weights",
    "published_versions",
]
