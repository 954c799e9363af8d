"""Libraries: keys in the order of the index or of the list, episodes through the cache."""

from pathlib import Path

import numpy as np
import pytest

from buffer_examples import colourful, put_episode
from sop.buffer import EpisodeIndex, EpisodeRow, open_payloads
from sop.buffer.library import IndexLibrary, StoreLibrary
from sop.buffer.rows import FOLDERS
from sop.core.errors import InvalidRecord, NotFound
from sop.core.experience import Library, Source
from sop.core.layout import EpisodeKey
from sop.testing.memory import MemoryStore

SOURCE = {folder: source for source, folder in FOLDERS.items()}


def row(key: EpisodeKey, source: Source) -> EpisodeRow:
    return EpisodeRow(
        episode_id=key.episode_id,
        actor_id=key.actor_id,
        sequence=key.sequence,
        task="push",
        source=source,
        num_steps=key.num_steps,
        human_steps=0,
        num_interventions=0,
        policy_version=3,
        outcome=colourful("pp", 0).outcome,
        start_runs=((0, 1),),
        end_utc_ns=1,
        indexed_utc_ns=2,
    )


def test_an_index_and_a_list_give_the_same_episodes_in_their_order(tmp_path: Path) -> None:
    fetched: list[str] = []
    store = MemoryStore(before=lambda operation, key: fetched.append(key) if operation == "get" else None)
    keys = [EpisodeKey.parse(put_episode(store, colourful("pph", number))) for number in (4, 0, 2)]
    index = EpisodeIndex(["push"])
    payloads = open_payloads(store, tmp_path, memory_bytes=10**9, disk_bytes=0)
    libraries: list[Library] = [IndexLibrary(index, payloads), StoreLibrary(map(str, keys), payloads)]
    assert libraries[0].keys(Source.ONLINE) == []
    for number, key in enumerate(keys):
        index.add(row(key, Source.OFFLINE if number == 1 else Source.ONLINE))
    assert list(libraries[0].keys(Source.ONLINE)) == [str(keys[0]), str(keys[2])]
    assert [EpisodeKey.parse(key).episode_id for key in libraries[0].keys(Source.OFFLINE)] == [keys[1].episode_id]
    assert list(libraries[1].keys(Source.ONLINE)) == [str(key) for key in keys]
    assert list(libraries[1].keys(Source.OFFLINE)) == []
    for library in libraries:
        episode = library.get(str(keys[0]))
        assert (episode.sequence, episode.num_steps) == (4, 3)
        wanted = colourful("pph", 4).images["front"][1].astype(np.int16)
        assert np.abs(episode.frame("front", 1).astype(np.int16) - wanted).mean() < 40
        with pytest.raises(NotFound):
            library.get(f"episodes/robot-0/00000009-00003-{'0' * 32}.arrow")
    assert fetched.count(str(keys[0])) == 1, "the second comes from the cache"


def test_what_is_excluded_is_not_named(tmp_path: Path) -> None:
    """Fault 25: a flagged episode is kept from every learning rule that reads whole episodes, also a later one."""
    index, excluded = EpisodeIndex(("push",)), set[str]()
    keys = [EpisodeKey("episodes", "robot-0", number, 2, f"{number:032x}") for number in range(3)]
    for key in keys:
        index.add(row(key, Source.ONLINE))
    payloads = open_payloads(MemoryStore(), tmp_path, memory_bytes=1 << 20, disk_bytes=0)
    library = IndexLibrary(index, payloads, excluded)
    assert library.keys(Source.ONLINE) == [str(key) for key in keys]
    excluded.add(str(keys[1]))
    assert library.keys(Source.ONLINE) == [str(keys[0]), str(keys[2])]
    payloads.close()


def test_a_list_of_other_keys_is_refused(tmp_path: Path) -> None:
    payloads = open_payloads(MemoryStore(), tmp_path, memory_bytes=1, disk_bytes=0)
    with pytest.raises(InvalidRecord, match="not the key of an episode"):
        StoreLibrary(["run.json"], payloads)
