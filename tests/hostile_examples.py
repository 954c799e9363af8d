"""A run, a store and episodes that are wrong in chosen ways, for the tests of hostile input."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from sop.buffer import Ingest
from sop.core import layout
from sop.core.codec import content_hash, encode
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.testing.episodes import TOY_BODY, make_episode
from sop.testing.memory import MemoryBus, MemoryStore

RUN = RunManifest(
    name="test",
    created_utc_ns=0,
    embodiment=TOY_BODY,
    instructions={"push": ("push the block",)},
    fleet_tasks=("push",),
    held_out_tasks=(),
    config={},
)
STEPS = 40


def long_episode(**changes: Any) -> bytes:
    """40 steps, every image another one."""
    noise = np.random.default_rng(0).integers(0, 255, (STEPS, 16, 16, 3), np.uint8)
    return encode(make_episode("p" * STEPS, **({"images": {"front": noise}} | changes)))


def altered(data: bytes, columns: Mapping[str, Callable[[pa.Array], pa.Array]] = {}, **header: Any) -> bytes:
    """An encoded episode with other columns or other fields of its header: what a hostile robot can write."""
    batch = pa.ipc.open_file(data).get_batch(0)
    metadata = dict(batch.schema.metadata)
    metadata[b"sop.episode"] = msgspec.json.encode(msgspec.json.decode(metadata[b"sop.episode"]) | header)
    names = batch.schema.names
    arrays = [columns.get(name, lambda same: same)(batch.column(name)) for name in names]
    schema = pa.schema([pa.field(name, array.type) for name, array in zip(names, arrays, strict=True)], metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def put(store: MemoryStore, data: bytes, *, sequence: int = 0, steps: int = STEPS, actor: str = "robot-0") -> str:
    """Store bytes under a key that names their hash; returns the key."""
    key = str(EpisodeKey(layout.EPISODES, actor, sequence, steps, content_hash(data)))
    store.put(key, data)
    return key


def good(sequence: int) -> bytes:
    """A valid episode that breaks no rule."""
    return long_episode(sequence=sequence)


def refusal(data: bytes, steps: int = STEPS) -> str:
    """Why ingest refuses these bytes: from the note in the store. The next episode still gets in."""
    store = MemoryStore()
    bad = put(store, data, steps=steps)
    fine = put(store, good(1), sequence=1)
    ingest = Ingest(store, MemoryBus(), RUN)
    ingest.reconcile()
    assert [str(episode.key) for episode in ingest.drain()] == [fine]
    assert ingest.num_quarantined == 1
    assert store.get(bad) == data
    note = msgspec.json.decode(store.get(layout.quarantine(bad)))
    assert note["key"] == bad
    return str(note["reason"])
