"""Clocks that are a day off, or jump back: numbers order, never time."""

from pathlib import Path

import numpy as np
import pytest

from faults.test_links import RUN, indexed
from sop.actor import EpisodeRecorder, EpisodeSpool, Uploader
from sop.buffer import Ingest
from sop.core.embodiment import Observation
from sop.core.episode import Outcome
from sop.testing.clock import FakeClock
from sop.testing.episodes import TOY_BODY
from sop.testing.memory import MemoryBus, MemoryStore

DAY_NS = 86_400 * 10**9


class SetClock(FakeClock):
    """A clock of a machine whose time of day somebody sets."""

    offset_ns = 0

    def utc_ns(self) -> int:
        return super().utc_ns() + self.offset_ns


@pytest.mark.parametrize("jump_ns", [-DAY_NS, DAY_NS])
def test_fault_16_a_robots_clock_changes_neither_order_nor_contents_of_the_index(tmp_path: Path, jump_ns: int) -> None:
    """The clock is set in the middle of an episode, in the middle of a run."""
    store, bus, spool, clock = MemoryStore(), MemoryBus(), EpisodeSpool(tmp_path, "episodes", "robot-0"), SetClock()
    recorder = EpisodeRecorder("robot-0", TOY_BODY, clock)
    keys = []
    for number in range(6):
        recorder.begin("push", "push the block", 3)
        for step in range(4):
            seen = Observation({"front": np.full((16, 16, 3), 40 * step, np.uint8)}, np.full(2, step, np.float32))
            recorder.append(seen, np.full(2, step / 100, np.float32), np.zeros(2, np.float32), None)
            clock.sleep_until(clock.monotonic_ns() + 10**8)
            if (number, step) == (3, 1):
                clock.offset_ns = jump_ns
        keys.append(str(spool.commit(recorder.finish(number, Outcome.SUCCESS, truncated=False))))
    Uploader(spool, store, bus, clock).upload_pending()
    ingest = Ingest(store, bus, RUN, speedup=1e9)
    assert indexed(ingest) == keys
    assert ingest.num_quarantined == 0
    assert ingest.missing() == {}
