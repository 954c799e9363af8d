"""The base policy: the algorithm's loss on the lab demonstrations alone, published as version 0."""

import math
import threading
from collections.abc import Callable

from sop.core.errors import RunError
from sop.learner.learner import Learner

WARMUP_STEPS = 20


def cosine_after_warmup(steps: int) -> Callable[[int], float]:
    """Learning-rate factor: linear warm-up over 20 steps, then half a cosine down to 0 at `steps`."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    return factor


def pretrain(learner: Learner, stop: threading.Event) -> int:
    """Train to the end of `offline_steps` on what is indexed and publish the result (blocking).

    Returns:
        The published version, 0 in a new run.

    Raises:
        RunError: it was stopped before the end; nothing is published.
    """
    learner.train(stop)
    if stop.is_set():
        raise RunError(f"pretraining was stopped at step {learner.step}: no base policy; start it again")
    return learner.publish()
