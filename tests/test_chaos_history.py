"""The checker finds every defect that is put into a clean history, and nothing in a clean one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run_directory import RunDirectory, make_episode
from sop.chaos.history import Acted, History, check_history
from sop.core import layout
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.presets import make_config
from sop.runs import Run
from sop.transport import DirectoryStore


def key_of(actor: int, sequence: int, content: int = 0) -> str:
    return str(EpisodeKey("episodes", f"robot-{actor}", sequence, 10, f"{actor:08x}{sequence:08x}{content:016x}"))


@st.composite
def clean(draw: st.DrawFn) -> History:
    """A history in which every promise was kept; at least two episodes were acknowledged."""
    keys = [
        key_of(actor, number) for actor in range(draw(st.integers(2, 4))) for number in range(draw(st.integers(1, 5)))
    ]
    versions = {key: draw(st.integers(0, 3)) for key in keys}
    waiting = frozenset(draw(st.sets(st.sampled_from(keys), max_size=len(keys) - 2)))
    stored = [key for key in keys if key not in waiting or draw(st.booleans())]
    last_step = draw(st.integers(1, 30))
    return History(
        recorded=tuple(keys),
        waiting=waiting,
        readable={key: Acted(version=versions[key], started_utc_ns=100, swapped_utc_ns=90) for key in stored},
        indexed=tuple((key, versions[key]) for key in stored),
        published=frozenset(range(4)),
        learned=tuple((key, versions[key]) for key in stored if draw(st.booleans())),
        steps=tuple(range(1, last_step + 1)),
        last_step=last_step,
    )


def changed(history: History, **fields: object) -> History:
    return dataclasses.replace(history, **fields)  # type: ignore[arg-type]


def without(history: History, key: str) -> History:
    """An episode that the store never had, though its robot forgot it."""
    rest = {name: acted for name, acted in history.readable.items() if name != key}
    rows = tuple(row for row in history.indexed or () if row[0] != key)
    learned = tuple(row for row in history.learned if row[0] != key)
    return changed(history, readable=rest, indexed=rows, learned=learned, waiting=history.waiting - {key})


def acting(history: History, key: str, **facts: object) -> History:
    acted = dataclasses.replace(history.readable[key], **facts)  # type: ignore[arg-type]
    return changed(history, readable={**history.readable, key: acted})


def rows_of(history: History) -> tuple[tuple[str, int | None], ...]:
    return history.indexed or ()


Defect = Callable[[History, str], History]
STRANGER = key_of(9, 9)
DEFECTS: dict[str, tuple[str, Defect]] = {
    "not in the store": ("lost", without),
    "not in the index": (
        "lost",
        lambda h, key: changed(h, indexed=tuple(row for row in rows_of(h) if row[0] != key)),
    ),
    "whole and refused": (
        "lost",
        lambda h, key: changed(
            h, indexed=tuple(row for row in rows_of(h) if row[0] != key), refused={key: "no reason"}
        ),
    ),
    "twice in a journal": ("duplicated", lambda h, key: changed(h, recorded=(*h.recorded, key))),
    "twice in the index": (
        "duplicated",
        lambda h, key: changed(h, indexed=(*rows_of(h), (key, h.readable[key].version))),
    ),
    "two of one number": (
        "duplicated",
        lambda h, key: changed(
            h, recorded=(*h.recorded, key_of(*_place(key), 7)), waiting=h.waiting | {key_of(*_place(key), 7)}
        ),
    ),
    "a stranger in the store": (
        "unsent",
        lambda h, key: changed(
            h,
            readable={**h.readable, STRANGER: Acted(version=0, started_utc_ns=1)},
            indexed=(*rows_of(h), (STRANGER, 0)),
        ),
    ),
    "a stranger in the index": ("unsent", lambda h, key: changed(h, indexed=(*rows_of(h), (STRANGER, 0)))),
    "learned from nothing": ("unsent", lambda h, key: changed(h, learned=(*h.learned, (STRANGER, 0)))),
    "other bytes": (
        "unreadable",
        lambda h, key: changed(
            h,
            readable={name: acted for name, acted in h.readable.items() if name != key},
            unreadable={key: "hashes to something else"},
            waiting=h.waiting - {key},
        ),
    ),
    "index says another version": (
        "mixed",
        lambda h, key: changed(
            h, indexed=tuple((name, version if name != key else 3 - (version or 0)) for name, version in rows_of(h))
        ),
    ),
    "lineage says another version": ("mixed", lambda h, key: changed(h, learned=(*h.learned, (key, 77)))),
    "a version that never was": ("mixed", lambda h, key: changed(h, published=h.published - {h.readable[key].version})),
    "a swap in mid-episode": ("mixed", lambda h, key: acting(h, key, swapped_utc_ns=101)),
    "a step untold": ("untold", lambda h, key: changed(h, steps=h.steps[1:])),
    "a broken ancestry": ("untold", lambda h, key: changed(h, broken_ancestry="policy 3 is gone")),
    "a step told twice": ("told twice", lambda h, key: changed(h, steps=(*h.steps, h.steps[-1]))),
}


def _place(key: str) -> tuple[int, int]:
    parsed = EpisodeKey.parse(key)
    return int(parsed.actor_id.removeprefix("robot-")), parsed.sequence


@settings(max_examples=60, deadline=None)
@given(clean())
def test_a_clean_history_has_no_violation(history: History) -> None:
    assert history.violations() == ()
    assert history.counts()["lost"] == 0


@pytest.mark.parametrize("name", DEFECTS)
@settings(max_examples=25, deadline=None)
@given(history=clean(), data=st.data())
def test_every_defect_is_found_and_named(name: str, history: History, data: st.DataObject) -> None:
    kind, defect = DEFECTS[name]
    acknowledged = sorted(history.acknowledged & history.readable.keys())
    key = data.draw(st.sampled_from(acknowledged))
    broken = defect(history, key)
    found = broken.violations()
    assert kind in {violation.kind for violation in found}
    about = {"a stranger in the store", "a stranger in the index", "learned from nothing"}
    told = STRANGER if name in about else "step" if kind in ("untold", "told twice") else key
    assert any(told in violation.what for violation in found) or name == "a broken ancestry"
    assert broken.counts()[kind.replace(" ", "_")] >= 1


@settings(max_examples=40, deadline=None)
@given(history=clean(), data=st.data())
def test_all_defects_together_are_all_found(history: History, data: st.DataObject) -> None:
    names = data.draw(
        st.lists(st.sampled_from(["twice in a journal", "a swap in mid-episode", "a step untold"]), unique=True)
    )
    broken = history
    for name in names:
        broken = DEFECTS[name][1](broken, min(history.acknowledged & history.readable.keys()))
    assert {violation.kind for violation in broken.violations()} == {DEFECTS[name][0] for name in names}


def test_what_a_nemesis_damaged_may_be_refused_but_never_indexed() -> None:
    key = key_of(0, 0)
    acted = Acted(version=0, started_utc_ns=5)
    refused = History(
        recorded=(key,), readable={key: acted}, refused={key: "hash"}, damaged=frozenset({key}), indexed=(),
        published=frozenset({0}),
    )  # fmt: skip
    assert refused.violations() == ()
    indexed = changed(refused, readable={}, unreadable={key: "hash"}, indexed=((key, 0),))
    assert [violation.kind for violation in indexed.violations()] == ["unreadable"]


def test_while_a_run_goes_on_what_is_not_indexed_yet_is_not_lost() -> None:
    key = key_of(0, 0)
    history = History(
        recorded=(key,), readable={key: Acted(version=0, started_utc_ns=5)}, indexed=(), published=frozenset({0})
    )
    assert [violation.kind for violation in history.violations()] == ["lost"]
    assert changed(history, ended=False).violations() == ()


def test_robots_on_other_machines_are_not_called_liars() -> None:
    key = key_of(0, 0)
    history = History(readable={key: Acted(version=0, started_utc_ns=5)}, indexed=((key, 0),), published=frozenset({0}))
    assert [violation.kind for violation in history.violations()] == ["unsent"]
    assert changed(history, elsewhere=frozenset({"robot-0"})).violations() == ()


def test_many_violations_are_counted_and_some_are_told() -> None:
    history = History(recorded=tuple(key_of(0, number) for number in range(30)))
    assert history.counts()["lost"] == 30
    assert len(history.words()) == 21
    assert history.words()[-1] == "lost: 10 more"


def test_a_real_folder_is_read_from_its_files_alone(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.write_run(preset="debug")
    kept = [directory.record(make_episode("PPH", sequence=number)) for number in range(3)]
    waits = directory.record(make_episode("PP", sequence=3), spool=True, upload=False)
    gone = directory.record(make_episode("PP", sequence=4), upload=False)
    unsent = directory.record(make_episode("PP", actor_id="robot-1", sequence=0), journal=False)
    flipped = directory.record(make_episode("PP", sequence=5), upload=False)
    directory.store.put(flipped, b"\xff" * 1000)
    torn = tmp_path / "run" / "actors" / "robot-0" / "spool" / "journal"
    torn.write_text(torn.read_text() + "episodes/robot-0/0000")
    directory.checkpoint(7, [*kept, kept[0], unsent])
    directory.publish(0)
    history = check_history(_opened(tmp_path / "run"))
    assert set(history.recorded) == {*kept, waits, gone, flipped}
    assert history.waiting == {waits}
    assert set(history.readable) == {*kept, unsent}
    assert flipped in history.unreadable
    found = {(violation.kind, violation.what.split(" ")[0]) for violation in history.violations()}
    assert {("lost", gone), ("duplicated", kept[0]), ("unsent", unsent), ("unreadable", flipped)} <= found
    assert not [what for kind, what in found if what == waits]


def _opened(folder: Path) -> Run:
    store = DirectoryStore(folder / "store")
    manifest = RunManifest.from_json(store.get(layout.RUN))
    return Run(str(folder), folder, store, f"sqlite://{folder / 'bus.sqlite'}", manifest, make_config("debug"))
