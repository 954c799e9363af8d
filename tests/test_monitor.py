"""What the monitor counts: each stored episode of the fleet once, whatever the bus says of it."""

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from sop.core.episode import Outcome
from sop.core.errors import StoreUnavailable
from sop.core.events import TOPIC_EPISODES, EpisodeCommitted, encode_event
from sop.monitor import Monitor
from sop.presets import make_config
from sop.runs import create_run
from sop.testing.memory import MemoryBus, MemoryStore


class Nowhere:
    """A sink for numbers that nobody asks for."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Forget them."""

    def close(self) -> None:
        """Nothing is open."""


class Fleet:
    """A run whose robots speak through `says`, and the monitor that hears them."""

    def __init__(self, folder: Path) -> None:
        run = create_run(folder, make_config("debug"))
        self.store, self.bus = MemoryStore(), MemoryBus()
        self.monitor = Monitor(self.store, self.bus, run.manifest, Nowhere())
        self._said = 0

    def says(
        self, actor: str, *sequences: int, stored: bool = True, folder: str = "episodes", outcome: str = Outcome.SUCCESS
    ) -> int:
        """An actor announces episodes; returns how many the monitor has counted then."""
        for sequence in sequences:
            key = f"{folder}/{actor}/{sequence:08d}-00005-{sequence:032x}.arrow"
            if stored:
                self.store.tamper(key, b"an episode")
            event = EpisodeCommitted(key=key, outcome=outcome, ended_utc_ns=1, committed_utc_ns=2)
            self._said += 1
            self.bus.publish(TOPIC_EPISODES, encode_event(event), event_id=str(self._said))
        return self.monitor.poll().collected


def test_an_episode_counts_once_in_whatever_order_and_however_often_it_is_announced(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "run")
    assert fleet.says("robot-0", 0, 1) == 2
    assert fleet.says("robot-0", 4, 1, 0, 4) == 3
    assert fleet.says("robot-1", 1) == 4
    assert fleet.says("robot-0", 3, 2, 4) == 6


def test_the_labs_and_the_aborted_count_for_nothing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "run")
    assert fleet.says("lab-0", 0, folder="demonstrations") == 0
    assert fleet.says("robot-0", 0, outcome=Outcome.ABORTED) == 0
    assert fleet.says("robot-0", 1) == 1


def test_invented_episodes_do_not_end_a_collection_and_count_when_they_are_there_after_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        assert fleet.says("robot-0", *range(50), stored=False) == 0
    assert "announced and not in the store" in caplog.text
    assert fleet.says("robot-0", 0) == 1


def test_what_was_announced_while_the_store_was_away_counts_when_it_is_back(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "run")

    def away(operation: str, key: str) -> None:
        raise StoreUnavailable(f"no answer to {operation} {key}")

    fleet.store.before = away
    assert fleet.says("robot-0", 0, 1) == 0
    assert "no answer" in fleet.monitor.view.notes[-1]
    fleet.store.before = lambda _operation, _key: None
    assert fleet.monitor.poll().collected == 2
