"""Backup and restore: a copy of the store is the run."""

import json
import threading
from pathlib import Path

import pytest

from recovery_times import Recovery
from sop.backup import copy_store
from sop.broadcast import published_versions
from sop.chaos.history import check_history
from sop.cli import main
from sop.core.errors import RunError, StoreUnavailable
from sop.runs import Run, open_run
from sop.system import ActorOptions, run_actor, run_learner
from sop.testing.memory import MemoryStore
from sop.transport import DirectoryStore


def some_run(store: MemoryStore) -> None:
    for key in (
        "channels/prod/00000001.json", "checkpoints/00000007/state.json", "checkpoints/00000007/tensors.safetensors",
        "episodes/robot-0/00000000-00004-x.arrow", "leases/learner/00000001.json", "policies/00000001/manifest.json",
        "policies/00000001/weights.safetensors", "probes/1", "run.json",
    ):  # fmt: skip
        store.put(key, key.encode())


def test_fault_49_what_names_others_is_copied_after_them_and_leases_stay() -> None:
    order: list[str] = []
    source, target = (
        MemoryStore(),
        MemoryStore(before=lambda *call: order.append(call[1]) if call[0] == "put" else None),
    )
    some_run(source)
    copied = copy_store(source, target, verify=True, pause=lambda _: None)
    assert (copied.copied, copied.there, copied.verified) == (7, 0, 7)
    assert order[-2:] == ["channels/prod/00000001.json", "run.json"]
    assert order.index("policies/00000001/weights.safetensors") < order.index("policies/00000001/manifest.json")
    assert order.index("checkpoints/00000007/tensors.safetensors") < order.index("checkpoints/00000007/state.json")
    assert not [key for key in order if key.startswith(("leases/", "probes/"))]
    again = copy_store(source, target, pause=lambda _: None)
    assert (again.copied, again.there) == (0, 7)


@pytest.mark.parametrize("breaks_at", range(7))
def test_fault_49_a_copy_that_was_interrupted_is_finished_by_the_next(breaks_at: int) -> None:
    left = breaks_at

    def breaks(operation: str, key: str) -> None:
        nonlocal left
        if operation == "put":
            if left <= 0:
                raise StoreUnavailable("the backup's disk is gone")
            left -= 1

    source, target = MemoryStore(), MemoryStore(before=breaks)
    some_run(source)
    with pytest.raises(StoreUnavailable):
        copy_store(source, target, pause=lambda _: None)
    assert "run.json" not in set(target.keys("")), "half a copy is no run"
    left = 100
    assert copy_store(source, target, verify=True, pause=lambda _: None).verified == 7


def test_fault_49_another_runs_object_is_named_and_kept() -> None:
    source, target = MemoryStore(), MemoryStore()
    some_run(source)
    target.put("run.json", b"of another run")
    with pytest.raises(RunError, match=r"run\.json has other bytes"):
        copy_store(source, target, verify=True, pause=lambda _: None)
    assert target.get("run.json") == b"of another run"


@pytest.mark.slow
def test_fault_49_a_new_learner_goes_on_from_a_copy_of_the_store(
    finished_base: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], recovery: Recovery
) -> None:
    """The drill of docs/reliability.md: copy, lose the site, copy back to an empty one, start a learner and a robot."""
    before = DirectoryStore(finished_base.folder / "store")
    episodes = sorted(before.keys("episodes/"))
    assert main(["store", "copy", str(finished_base.folder), str(tmp_path / "backup"), "--verify"]) == 0
    site = tmp_path / "new" / "base"
    recovery.fault_is_over()
    assert main(["store", "copy", str(tmp_path / "backup"), str(site / "store"), "--verify"]) == 0
    assert "0 were there" in capsys.readouterr().out
    run = open_run(str(site))
    assert sorted(run.store.keys("episodes/")) == episodes
    assert {key: run.store.get(key) for key in episodes} == {key: before.get(key) for key in episodes}
    assert list(published_versions(run.store)) == list(published_versions(before))
    run_actor(run, ActorOptions(actor_id="robot-0", speed=0, end_sequence=len(episodes) + 1), threading.Event())
    recovery.whole("a robot recorded at the new place")
    assert len(list(run.store.keys("episodes/"))) == len(episodes) + 1, "a robot with a new disk goes on counting"
    stop = threading.Event()
    threading.Timer(6.0, stop.set).start()
    run_learner(run, stop)
    history = check_history(run, spools=[finished_base.folder / "actors"])
    assert history.words() == []
    assert {key for key, _ in history.indexed or ()} >= set(episodes)
    states = list(run.store.keys("checkpoints/"))
    assert json.loads(run.store.get(next(key for key in states if key.endswith("state.json"))))["learner_step"] >= 0
