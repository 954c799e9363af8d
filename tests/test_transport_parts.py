"""Objects in parts, objects that need not survive a power cut, and objects that are mapped instead of read."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sop.testing.contracts.store as contract
from sop.core.errors import NotFound
from sop.testing.memory import MemoryStore
from sop.transport.directory import TEMP_FOLDER, DirectoryStore


@pytest.mark.parametrize("kind", ["memory", "directory"])
@pytest.mark.parametrize("rule", contract.MAP_RULES, ids=lambda rule: rule.__name__)
def test_stores_of_this_machine_map_their_objects(kind: str, rule: Callable[..., None], tmp_path: Path) -> None:
    memory = MemoryStore()
    rule((lambda: memory) if kind == "memory" else (lambda: DirectoryStore(tmp_path / "store")))


def test_what_need_not_be_durable_is_not_synced_until_something_durable_shares_its_folder(tmp_path: Path) -> None:
    store, synced = DirectoryStore(tmp_path), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink()))
        store.put("a/b/key", [b"x", b"y"], durable=False)
        assert synced == []
        store.put("a/b/key2", b"x")
    assert store.get("a/b/key") == b"xy"
    folders = [path.relative_to(tmp_path) for path in synced if TEMP_FOLDER not in path.parts]
    assert [str(path) for path in folders] == [".", "a", "a/b"], "the folders of before first, the object's last"


def test_parts_are_written_without_being_joined(tmp_path: Path) -> None:
    store, sizes, write = DirectoryStore(tmp_path), [], os.write
    parts = [b"head", memoryview(bytes(range(256)))[7:], b"", memoryview(np.arange(3, dtype=np.float32))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: sizes.append(len(data)) or write(descriptor, data))
        store.put("key", parts)
    assert sizes == [4, 249, 12]
    assert store.get("key") == b"head" + bytes(range(7, 256)) + np.arange(3, dtype=np.float32).tobytes()


def test_a_mapped_object_costs_no_memory_of_its_own_and_outlives_its_key(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("key", bytes(range(256)) * 4096)
    views = [store.map("key") for _ in range(1000)]
    store.delete("key")
    assert all(view[255] == 255 and view[-1] == 255 for view in views)
    (tmp_path / "link").symlink_to(tmp_path / "key")
    with pytest.raises(NotFound):
        store.map("link")
