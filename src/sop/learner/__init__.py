"""CLOUD: the training loop, which does not know what it trains or by which rule."""

from sop.learner.bookkeeping import Bookkeeping
from sop.learner.checkpoint import Checkpoint, CheckpointStore
from sop.learner.learner import Learner
from sop.learner.optimization import Optimization

__all__ = ["Bookkeeping", "Checkpoint", "CheckpointStore", "Learner", "Optimization"]
