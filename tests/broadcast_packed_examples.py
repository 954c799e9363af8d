"""A network that is trained a little from version to version, published in packed form."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from broadcast_examples import PATIENCE_S, bytes_of, facts
from sop.broadcast import Publisher
from sop.core.policy import Weights
from sop.testing.memory import MemoryBus
from sop.transport import ObjectStore

MakePublisher = Callable[..., Publisher]
BF16 = np.dtype(ml_dtypes.bfloat16)


def packed_publishers() -> Iterator[MakePublisher]:
    """The body of a fixture: makes publishers of packed policies that share nothing, and closes them at the end."""
    made: list[Publisher] = []

    def make_one(store: ObjectStore, **options: Any) -> Publisher:
        settings: dict[str, Any] = {"keep_policies": 50, "pause": lambda _s: None, "encoding": "packed", "threads": 1}
        made.append(Publisher(store, MemoryBus(), rng=random.Random(0), **(settings | options)))
        return made[-1]

    yield make_one
    for publisher in made:
        publisher.close(PATIENCE_S)


def trained(step: int) -> Weights:
    """A network after some steps: every tensor has moved a little, deltas are far smaller than the whole."""
    rng = np.random.default_rng(7)
    body = rng.standard_normal((96, 128)).astype(np.float32)
    moved = np.random.default_rng(step).standard_normal(body.shape).astype(np.float32)
    return {
        "body": (body * (1 + 0.004 * step * np.abs(moved))).astype(BF16),
        "scale": np.linspace(0.5, 1.5, 300, dtype=np.float32) + np.float32(step) / 1000,
        "count": np.asarray(step, np.int64),
    }


FROZEN: Mapping[str, np.ndarray] = {
    "eyes": np.random.default_rng(1).standard_normal((200, 100)).astype(BF16),
    "words": np.random.default_rng(2).standard_normal(1000).astype(np.float32),
}


def run_of(publisher: Publisher, versions: int) -> None:
    """Version 0 whole and durable, the others as in training, one after the other."""
    publisher.publish_now({**trained(0), **FROZEN}, facts())
    for step in range(1, versions):
        publisher.publish(trained(step), facts(step))
        with publisher._changed:
            assert publisher._changed.wait_for(lambda: not publisher._writing and publisher._waiting is None, 60)


def whole(step: int) -> dict[str, bytes]:
    return bytes_of({**trained(step), **FROZEN})


def forms(store: ObjectStore) -> list[str]:
    return [key.removeprefix("policies/") for key in store.keys("policies/") if not key.endswith(".json")]
