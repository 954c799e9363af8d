"""The independent checker: what a run's records say about each other. A set checker, as Jepsen's are.

    robots' journals    recorded     every key that a robot ever made durable
    robots' spools      waiting      whose bytes are still on the robot, whole
    the store's bytes   readable     listed, read again, hashed again
    the index           indexed      rows that the newest checkpoint names
    policies            told         which episodes and steps the published versions say they learned from

    acknowledged = recorded - waiting: the robot has deleted its copy, so the store must have it, whole, and a run that
    has ended must have it in the index exactly once. Nothing else may be in the store, or in the index.

Nothing that the learner counts is believed. `read_history` only gathers; `History.violations` is a pure function.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sop.broadcast import published_versions
from sop.buffer.segments import read_segment
from sop.core import layout
from sop.core.codec import EncodedEpisode, content_hash
from sop.core.errors import InvalidRecord, NotFound
from sop.core.layout import EpisodeKey, SegmentKey, before_fleet, from_lab
from sop.learner.checkpoint import named_segments
from sop.lineage import learned_by
from sop.places import STORE, find_place
from sop.runs import Run
from sop.transport import ObjectStore

_SHOWN = 20
"""Violations of one kind that are put into words; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken: which, and of what, in words with ids."""

    kind: str
    """lost, duplicated, unsent, unreadable, mixed, untold or told twice."""
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    """Who acted in a stored episode, by its own bytes."""

    version: int | None
    """None: no policy, a demonstration."""
    started_utc_ns: int
    swapped_utc_ns: int | None = None
    """When the robot began to act with that version, by the same clock."""
    ended_utc_ns: int = 0
    """By the same clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What the records say. Keys are those of episodes."""

    recorded: tuple[str, ...] = ()
    """All lines of all journals."""
    waiting: frozenset[str] = frozenset()
    """On a robot, whole."""
    elsewhere: frozenset[str] = frozenset()
    """Actors whose journals are on another machine: of theirs it cannot be said what was recorded."""
    readable: Mapping[str, Acted] = field(default_factory=dict)
    """In the store, and the bytes are those that the key names."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """In the store, and why the bytes are not those that the key names."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """The learner left a note that says why it does not take them."""
    damaged: frozenset[str] = frozenset()
    """Altered in the store on purpose, after the store had acknowledged them: may be refused, may not be indexed."""
    indexed: tuple[tuple[str, int | None], ...] | None = None
    """(key, version that acted) of the rows of the newest checkpoint; None when there is no checkpoint."""
    ended: bool = True
    """Whether the learner has taken in all there is; else what is not indexed yet is not lost."""
    published: frozenset[int] = frozenset()
    learned: tuple[tuple[str, int | None], ...] = ()
    """(key, version that acted) of every episode that a published version says it learned from."""
    steps: tuple[int, ...] = ()
    """Learner steps that the newest published version and its ancestors tell of."""
    last_step: int = 0
    """The step of the newest published version."""
    broken_ancestry: str = ""
    """Why the ancestors of the newest version cannot be followed to the base; empty when they can."""

    @property
    def acknowledged(self) -> frozenset[str]:
        """Recorded, and the robot has deleted its copy."""
        return frozenset(self.recorded) - self.waiting

    def counts(self) -> dict[str, int]:
        """Numbers for people; the ones after `indexed` have to be 0."""
        violations = Counter(violation.kind for violation in self.violations())
        kinds = ("lost", "duplicated", "unsent", "unreadable", "mixed", "untold", "told twice")
        return {
            "recorded": len(set(self.recorded)),
            "acknowledged": len(self.acknowledged),
            "waiting": len(self.waiting),
            "readable": len(self.readable),
            "refused": len(self.refused),
            "indexed": len(self.indexed or ()),
            "steps": self.last_step,
        } | {kind.replace(" ", "_"): violations[kind] for kind in kinds}

    def violations(self) -> tuple[Violation, ...]:
        """Every broken promise, in a fixed order; empty: none."""
        checks = (self._lost(), self._duplicated(), self._unsent(), self._unreadable(), self._mixed(), self._steps())
        return tuple(violation for check in checks for violation in check)

    def words(self) -> list[str]:
        """The violations in sentences, at most some of each kind."""
        found, seen = [], Counter[str]()
        for violation in self.violations():
            seen[violation.kind] += 1
            if seen[violation.kind] <= _SHOWN:
                found.append(str(violation))
        return found + [f"{kind}: {n - _SHOWN} more" for kind, n in seen.items() if n > _SHOWN]

    def _lost(self) -> Iterator[Violation]:
        in_store = self.readable.keys() | self.unreadable.keys()
        for key in sorted(self.acknowledged - in_store):
            yield Violation("lost", f"{key} was recorded, is not on its robot any more, and is not in the store")
        if self.indexed is None or not self.ended:
            return
        rows = {key for key, _ in self.indexed}
        for key in sorted(self.readable.keys() - rows - (self.refused.keys() & self.damaged)):
            if key in self.refused:
                yield Violation("lost", f"{key} is whole, and the learner refused it: {self.refused[key]}")
            elif not from_lab(key):
                yield Violation("lost", f"{key} is in the store, and the learner ended without it in the index")

    def _duplicated(self) -> Iterator[Violation]:
        for key, number in Counter(self.recorded).items():
            if number > 1:
                yield Violation("duplicated", f"{key} is {number} times in its robot's journal")
        numbers: dict[tuple[str, str, int], str] = {}
        for key in sorted({*self.recorded, *self.readable}):
            parsed = EpisodeKey.parse(key)
            number_of = (parsed.folder, parsed.actor_id, parsed.sequence)
            first = numbers.setdefault(number_of, key)
            if first != key:
                yield Violation("duplicated", f"{first} and {key} have the same number")
        for key, number in Counter(key for key, _ in self.indexed or ()).items():
            if number > 1:
                yield Violation("duplicated", f"{key} is {number} times in the index")

    def _unsent(self) -> Iterator[Violation]:
        recorded = frozenset(self.recorded)
        for key in sorted((self.readable.keys() | self.unreadable.keys()) - recorded):
            if _actor(key) not in self.elsewhere:
                yield Violation("unsent", f"{key} is in the store, and no robot's journal has it")
        in_store = self.readable.keys() | self.unreadable.keys()
        for name, keys in (("the index", self.indexed or ()), ("what a published version learned from", self.learned)):
            for key in sorted({key for key, _ in keys} - in_store - self.damaged):
                yield Violation("unsent", f"{key} is in {name}, and is not in the store")

    def _unreadable(self) -> Iterator[Violation]:
        for key, why in sorted(self.unreadable.items()):
            if key in self.recorded and key not in self.waiting and key not in self.damaged:
                yield Violation("unreadable", f"{key} was acknowledged, and the store has other bytes: {why}")
        rows = {key for key, _ in self.indexed or ()} | {key for key, _ in self.learned}
        for key in sorted(rows & self.unreadable.keys()):
            yield Violation("unreadable", f"{key} is learned from, and its bytes are not those that were recorded")

    def _mixed(self) -> Iterator[Violation]:
        told: dict[str, set[int | None]] = {}
        for key, version in (*(self.indexed or ()), *self.learned):
            told.setdefault(key, set()).add(version)
        for key, acted in sorted(self.readable.items()):
            others = told.get(key, set()) - {acted.version}
            if others:
                yield Violation("mixed", f"{key}: version {acted.version} acted; index and lineage say {others}")
            if acted.version is not None and acted.version not in self.published:
                yield Violation("mixed", f"{key}: version {acted.version} acted, which was never published")
            if acted.swapped_utc_ns is not None and acted.swapped_utc_ns > acted.started_utc_ns:
                late_s = (acted.swapped_utc_ns - acted.started_utc_ns) / 1e9
                yield Violation("mixed", f"{key}: version {acted.version} came {late_s:.3f} s after its first step")

    def _steps(self) -> Iterator[Violation]:
        if self.broken_ancestry:
            yield Violation("untold", self.broken_ancestry)
        told = Counter(self.steps)
        for step in sorted(set(range(1, self.last_step + 1)) - told.keys()):
            yield Violation("untold", f"learner step {step} is in no version between the base and the newest")
        for step, number in sorted(told.items()):
            if number > 1:
                yield Violation("told twice", f"learner step {step} is in {number} versions of one ancestry")


def check_history(
    run: Run, *, spools: Collection[Path] = (), damaged: Collection[str] = (), ended: bool = True
) -> History:
    """Read everything that a run left behind (blocking: every episode's bytes are fetched and hashed).

    Args:
        run: opened by its folder or by the URL of its store.
        spools: folders with the spools of more robots (`<folder>/<actor>/spool`), e.g. copied from other machines.
        damaged: keys that were altered in the store on purpose.
        ended: whether the learner has finished.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    recorded, waiting = _read_spools([run.folder / "actors", *spools])
    readable, unreadable = _read_store(run.store)
    steps, last_step, learned, broken = _read_lineage(run.store)
    known = {_actor(key) for key in recorded}
    actors = {_actor(key) for key in (*readable, *unreadable)}
    here = Path(find_place(run.place, run.bus_url).store) == run.folder / STORE
    return History(
        recorded=tuple(recorded),
        waiting=frozenset(waiting),
        elsewhere=frozenset(actor for actor in actors - known if before_fleet(actor) or not here),
        readable=readable,
        unreadable=unreadable,
        refused=_read_notes(run.store),
        damaged=frozenset(damaged),
        indexed=_read_index(run.store),
        ended=ended,
        published=frozenset(published_versions(run.store)),
        learned=learned,
        steps=steps,
        last_step=last_step,
        broken_ancestry=broken,
    )


def _actor(key: str) -> str:
    return key.split("/")[1]


def _read_spools(folders: Collection[Path]) -> tuple[list[str], set[str]]:
    """Lines of the journals (one that a crash cut is none), and keys of the files that wait and are whole."""
    recorded, waiting = [], set()
    for spool in sorted(spool for folder in folders for spool in folder.glob("*/spool")):
        journal = spool / "journal"
        text = journal.read_text() if journal.exists() else ""
        lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
        recorded += lines
        key_of = {key.rsplit("/", 1)[1]: key for key in lines}
        for path in spool.glob("*.arrow"):
            key = key_of.get(path.name)
            if key is not None and content_hash(path.read_bytes()) == EpisodeKey.parse(key).episode_id:
                waiting.add(key)
    return recorded, waiting


def _read_store(store: ObjectStore) -> tuple[dict[str, Acted], dict[str, str]]:
    readable, unreadable = {}, {}
    for folder in (layout.EPISODES, layout.DEMONSTRATIONS):
        for key in store.keys(f"{folder}/"):
            try:
                readable[key] = _read_episode(key, store.get(key))
            except (InvalidRecord, NotFound) as error:
                unreadable[key] = str(error)
    return readable, unreadable


def _read_episode(key: str, data: bytes) -> Acted:
    parsed, found = EpisodeKey.parse(key), content_hash(data)
    if found != parsed.episode_id:
        raise InvalidRecord("episode", f"{len(data)} bytes that hash to {found}")
    episode = EncodedEpisode(data, trusted=False)
    own = EpisodeKey(parsed.folder, episode.actor_id, episode.sequence, episode.num_steps, found)
    if own != parsed:
        raise InvalidRecord("episode", f"its own header says {own}")
    header = episode.header
    swapped = None if header.policy_times is None else header.policy_times.swapped_utc_ns
    return Acted(
        version=header.policy_version,
        started_utc_ns=header.start_utc_ns,
        swapped_utc_ns=swapped,
        ended_utc_ns=header.end_utc_ns,
    )


def _read_notes(store: ObjectStore) -> dict[str, str]:
    notes = {}
    for place in store.keys(f"{layout.QUARANTINE}/"):
        key = place.removeprefix(f"{layout.QUARANTINE}/").removesuffix(".json")
        notes[key] = store.get(place, slice(0, 2000)).decode(errors="replace")
    return notes


def _read_index(store: ObjectStore) -> tuple[tuple[str, int | None], ...] | None:
    """Rows that the newest checkpoint names; one that cannot be read is passed over, as a learner would."""
    states = [key for key in store.keys(f"{layout.CHECKPOINTS}/") if key.endswith("/state.json")]
    for state in reversed(states):
        try:
            record = msgspec.json.decode(store.get(state), type=dict[str, object])
            blocks = [read_segment(store, SegmentKey.parse(key)) for key in named_segments(record)]
        except (InvalidRecord, NotFound, msgspec.DecodeError):
            continue
        rows = []
        for block in blocks:
            versions = block.columns["policy_version"].tolist()
            rows += [
                (key, None if version < 0 else version)
                for key, version in zip(block.episode_keys(), versions, strict=True)
            ]
        return tuple(rows)
    return None


def _read_lineage(store: ObjectStore) -> tuple[tuple[int, ...], int, tuple[tuple[str, int | None], ...], str]:
    """(steps, last step, episodes learned from, why the ancestry breaks off) of the newest version."""
    steps: list[int] = []
    last_step, learned = 0, []
    try:
        newest = max(published_versions(store), default=0)
        for manifest, lineage in learned_by(store, newest):
            learned += [(episode.key, episode.policy_version) for episode in lineage.learned]
            if manifest.version != 0:  # pretraining counts its own steps
                last_step = max(last_step, manifest.learner_step)
                steps += [draw.learner_step for draw in lineage.draws]
    except (InvalidRecord, NotFound) as error:
        if newest:
            return tuple(steps), last_step, tuple(learned), f"the ancestry of version {newest} breaks off: {error}"
    return tuple(steps), last_step, tuple(learned), ""
