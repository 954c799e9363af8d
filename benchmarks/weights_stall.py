"""What publishing costs the training thread: a busy loop of optimizer steps, with and without a publisher beside it.

    loop   step step ... step | copy of the weights, publish() | step step ...
    publisher's thread                                         | hash, encode, write |

The loop is a real torch step on one thread. The weights that are published are an artifact of their own, so that the
size that travels and the length of a step can be chosen: 25 steps of about 0.1 s, a far tighter cadence than that of
a policy this size, whose 25 steps take tens of seconds. Every element of it changes by a few units in the last place
from one policy to the next, or not at all, as in a fine-tune.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from weights_artifact import disturbed, facts, total_bytes, wait_published

from sop.broadcast import Publisher
from sop.core.policy import Weights
from sop.transport import SqliteBus
from sop.transport.directory import DirectoryStore

STEPS = 25


class Loop:
    """Optimizer steps on one thread, each about `step_s` long on an idle core."""

    def __init__(self, step_s: float) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        self._batch = torch.randn(64, 1024)
        self._repeats = 1
        self.run(3)
        self._repeats = max(1, round(step_s / min(self.run(1) for _ in range(3))))

    def run(self, steps: int) -> float:
        """Seconds of so many steps."""
        start = time.perf_counter()
        for _ in range(steps * self._repeats):
            loss = self._model(self._batch).square().mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        return time.perf_counter() - start


def measure(
    folder: Path, weights: Weights, *, step_s: float, rounds: int, encodings: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Per encoding of the publisher: rate of the loop while publishing over its rate alone, and the pauses it makes.

    `rate` counts the steps only, `rate_with_snapshot` also the copy of the weights and the call of `publish`. The
    first of the rounds warms up and is dropped.
    """
    loop = Loop(step_s)
    versions = (weights, disturbed(weights))
    return {encoding: _measure(folder / encoding, loop, versions, rounds, encoding) for encoding in encodings}


def _measure(folder: Path, loop: Loop, versions: Sequence[Weights], rounds: int, encoding: str) -> dict[str, float]:
    folder.mkdir(parents=True)
    bus = SqliteBus(folder / "bus.sqlite", owner=True)
    publisher = Publisher(DirectoryStore(folder / "store"), bus, keep_policies=2, encoding=encoding)
    try:
        for turn in (0, 1):  # 0 is the base; from 1 on deltas are possible
            publisher.publish_now(versions[turn], facts(turn))
        done = [_round(loop, publisher, versions[turn % 2], turn) for turn in range(2, rounds + 2)]
    finally:
        publisher.close()
        bus.close()
        shutil.rmtree(folder)
    found = {key: statistics.median(one[key] for one in done[1:] or done) for key in done[0]}
    return {"artifact_mb": total_bytes(versions[0]) / 1e6, **found}


def _round(loop: Loop, publisher: Publisher, weights: Weights, turn: int) -> dict[str, float]:
    """One interval without and one with publishing. The second begins with the hand-over."""
    bare_s = loop.run(STEPS)
    snapshot_s, copy = _timed(lambda: {name: array.copy() for name, array in weights.items()})
    start = time.perf_counter()
    call_s, _ = _timed(lambda: publisher.publish(copy, facts(turn)))
    busy_s = loop.run(STEPS)
    wait_published(publisher, turn)
    written_s = time.perf_counter() - start
    return {
        "rate": bare_s / busy_s,
        "rate_with_snapshot": bare_s / (busy_s + snapshot_s + call_s),
        "step_s": bare_s / STEPS,
        "snapshot_s": snapshot_s,
        "publish_call_s": call_s,
        "written_within_s": written_s,
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found
