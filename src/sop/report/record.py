"""What a run left behind, read once: store, journals, spools, metrics and timing. Nothing is decoded but facts.

A part that is missing is empty here and null in the summary: a run may have been stopped at any moment.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sop.buffer.segments import read_segment
from sop.core import layout
from sop.core.codec import EncodedEpisode
from sop.core.episode import Intervention, Outcome, PolicyTimes
from sop.core.errors import InvalidRecord, NotFound, RunError
from sop.core.evaluation import EvaluationResult
from sop.core.experience import Sidecar
from sop.core.freshness import HopSample
from sop.core.layout import EpisodeKey, SegmentKey, from_lab
from sop.core.lineage import Lineage
from sop.core.run import RunManifest
from sop.core.sidecar import MAX_SIDECAR_BYTES, decode_sidecar
from sop.freshness import Swap, hop_samples
from sop.lineage import learned_by
from sop.metrics import read_metrics
from sop.places import find_place, is_run
from sop.transport import ObjectStore, open_store

_log = logging.getLogger(__name__)
T = TypeVar("T")
_SIDECAR = slice(0, MAX_SIDECAR_BYTES + 1)
Line = dict[str, Any]
"""One line of a metrics file: `utc_s`, `step`, and names with values (null where a value was not finite)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFacts:
    """What a report needs of an episode; read from its header and its column `controller`."""

    key: str
    task: str
    outcome: Outcome
    policy_version: int | None
    num_steps: int
    human_steps: int
    interventions: tuple[Intervention, ...]
    start_utc_ns: int
    end_utc_ns: int
    policy_times: PolicyTimes | None

    @property
    def aborted(self) -> bool:
        """Stopped before it came to an end; not counted as an episode."""
        return self.outcome is Outcome.ABORTED


@dataclass(slots=True)
class RunRecord:
    """Everything that the report is made of."""

    folder: Path
    store: ObjectStore | None = None
    """None when the run was stopped before its store existed."""
    run: RunManifest | None = None
    episodes: list[EpisodeFacts] = field(default_factory=list)
    """Readable episodes of the fleet in the store, quarantined ones left out, in the order in which they ended."""
    base_rollouts: list[EpisodeFacts] = field(default_factory=list)
    """What the base policy did alone before the fleet started; otherwise as `episodes`."""
    sidecars: dict[str, Sidecar] = field(default_factory=dict)
    """Key of a fleet's episode -> the oldest sidecar that the run's algorithm has of it."""
    recorded: list[str] | None = None
    """Keys in the journals of all actors, None when no actor has a journal."""
    spooled: set[str] = field(default_factory=set)
    """Keys of episodes that still wait on a robot's disk."""
    stored: set[str] = field(default_factory=set)
    """Keys of all episodes and demonstrations in the store."""
    indexed: list[str] | None = None
    """Keys of the rows that the learner's last readable checkpoint has, None without a checkpoint."""
    checkpoint_step: int | None = None
    quarantined: set[str] = field(default_factory=set)
    """Keys that ingest refused."""
    evaluations: list[EvaluationResult] = field(default_factory=list)
    """In the order of policy versions; the expert's first."""
    published: list[int] = field(default_factory=list)
    """Versions with a manifest, ascending."""
    learner: list[Line] = field(default_factory=list)
    fleet: list[Line] = field(default_factory=list)
    hops: list[HopSample] = field(default_factory=list)
    """How long every hop took, of the versions that the newest one descends from."""
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def fleet_tasks(self) -> tuple[str, ...]:
        """Tasks of the fleet; none when `run.json` is missing."""
        return () if self.run is None else self.run.fleet_tasks

    @property
    def held_out_tasks(self) -> tuple[str, ...]:
        """Tasks that the fleet does not work on."""
        return () if self.run is None else self.run.held_out_tasks

    @property
    def collected(self) -> list[EpisodeFacts]:
        """Episodes that came to an end."""
        return [episode for episode in self.episodes if not episode.aborted]

    @property
    def autonomous(self) -> bool | None:
        """Whether nobody could help the robots; None when not known."""
        kind = self.setting("operator", "kind")
        return None if kind is None else kind == "none"

    @property
    def explored(self) -> bool | None:
        """Whether the fleet tried more than its policy proposed; None when not known."""
        kind = self.setting("exploration", "kind")
        return None if kind is None else kind != "none"

    @property
    def ready_version(self) -> int:
        """The version that the fleet started with: 0, the base; 1 after a warm-up, which base rollouts precede."""
        return 1 if self.base_rollouts else 0

    def setting(self, part: str, name: str) -> Any:
        """A value of a part of the run's configuration; None when it is not there."""
        values = {} if self.run is None else self.run.config.get(part, {})
        return values.get(name) if isinstance(values, dict) else None

    def evaluation(self, name: str) -> EvaluationResult | None:
        """The evaluation with this name; that of the newest version when there are several."""
        return next((result for result in reversed(self.evaluations) if result.name == name), None)


def read_run(folder: Path) -> RunRecord:
    """Read a run directory (blocking; every episode of the fleet is fetched once, no frame is decoded).

    Raises:
        RunError: there is no such directory.
        StoreUnavailable: the store cannot be opened or does not answer.
    """
    if not folder.is_dir():
        raise RunError(f"no run at {folder}: give the folder that `sop run` made")
    record = RunRecord(folder)
    record.learner = list(read_metrics(folder / "metrics" / "learner.jsonl"))
    record.fleet = list(read_metrics(folder / "metrics" / "fleet.jsonl"))
    record.timing = _read_timing(folder / "timing.json")
    record.recorded, record.spooled = _read_spools(folder / "actors")
    if is_run(folder):
        record.store = open_store(find_place(str(folder)).store)
        _read_store(record, record.store)
    return record


def _read_store(record: RunRecord, store: ObjectStore) -> None:
    record.run = _readable(layout.RUN, lambda key: RunManifest.from_json(store.get(key)))
    record.indexed, record.checkpoint_step = _read_checkpoint(store)
    notes = store.keys(f"{layout.QUARANTINE}/")
    record.quarantined = {note.removeprefix(f"{layout.QUARANTINE}/").removesuffix(".json") for note in notes}
    folders = (layout.EPISODES, layout.DEMONSTRATIONS)
    record.stored = {key for folder in folders for key in store.keys(f"{folder}/")}
    fleet = [key for key in record.stored if not from_lab(key)]
    record.episodes = _read_episodes(record, store, fleet)
    rollouts = [key for key in record.stored if key.startswith(f"{layout.DEMONSTRATIONS}/{layout.BASE_ACTOR}")]
    record.base_rollouts = _read_episodes(record, store, rollouts)
    record.sidecars = _read_sidecars(record, store)
    record.evaluations = _read_evaluations(store)
    manifests = (key for key in store.keys(f"{layout.POLICIES}/") if key.endswith("/manifest.json"))
    record.published = [layout.version_of(key) for key in manifests]
    record.hops = _read_hops(record, store)


def _read_episodes(record: RunRecord, store: ObjectStore, keys: Iterable[str]) -> list[EpisodeFacts]:
    checked = set(record.indexed or ())
    found = []
    for key in sorted(set(keys) - record.quarantined):
        facts = _readable(key, lambda key: _facts(key, store.get(key), trusted=key in checked))
        if facts is not None:
            found.append(facts)
    return sorted(found, key=lambda facts: (facts.end_utc_ns, facts.key))


def _read_sidecars(record: RunRecord, store: ObjectStore) -> dict[str, Sidecar]:
    """The oldest of each episode: made when the episode came in, so by a model that had not learned from it yet.

    An episode whose oldest sidecar is damaged has none: a newer model may have learned from it.
    """
    if record.run is None:
        return {}
    episodes = {EpisodeKey.parse(episode.key).episode_id: episode.key for episode in record.episodes}
    oldest: dict[str, str] = {}
    for place in store.keys(f"{layout.LABELS}/{record.run.config.get('algorithm')}/"):
        oldest.setdefault(episodes.get(Path(place).stem, ""), place)
    found = {}
    for key in sorted(oldest.keys() - {""}):
        owner = EpisodeKey.parse(key)
        read = _readable(oldest[key], lambda place: decode_sidecar(store.get(place, _SIDECAR), owner))  # noqa: B023
        if read is not None:
            found[key] = read
    return found


def _facts(key: str, data: bytes, *, trusted: bool) -> EpisodeFacts:
    EpisodeKey.parse(key)
    episode = EncodedEpisode(data, trusted=trusted)
    header = episode.header
    return EpisodeFacts(
        key=key,
        task=header.task,
        outcome=header.outcome,
        policy_version=header.policy_version,
        num_steps=episode.num_steps,
        human_steps=int(episode.controller.sum()),
        interventions=header.interventions,
        start_utc_ns=header.start_utc_ns,
        end_utc_ns=header.end_utc_ns,
        policy_times=header.policy_times,
    )


def _read_hops(record: RunRecord, store: ObjectStore) -> list[HopSample]:
    """Along the ancestry of the newest version; where it breaks off (a damaged lineage), the rest is left out."""
    learned = []
    try:
        for manifest, lineage in learned_by(store, max(record.published)) if record.published else ():
            learned.append((manifest, Lineage(draws=(), learned=lineage.learned)))
    except (InvalidRecord, NotFound) as error:
        _log.warning("hops of older versions are left out of the report: %s", error)
    swaps = [
        Swap(EpisodeKey.parse(episode.key).actor_id, episode.policy_version, episode.policy_times)
        for episode in record.episodes
        if episode.policy_version is not None and episode.policy_times is not None
    ]
    return hop_samples(learned, swaps, base_version=record.ready_version)


def _read_evaluations(store: ObjectStore) -> list[EvaluationResult]:
    keys = store.keys(f"{layout.EVALUATIONS}/")
    results = [_readable(key, lambda key: EvaluationResult.from_json(store.get(key))) for key in keys]
    found = [result for result in results if result is not None]
    return sorted(found, key=lambda result: (-1 if result.version is None else result.version, result.utc_ns))


def _read_checkpoint(store: ObjectStore) -> tuple[list[str] | None, int | None]:
    states = [key for key in store.keys(f"{layout.CHECKPOINTS}/") if key.endswith("/state.json")]
    for key in reversed(states):
        record = _readable(key, lambda key: msgspec.json.decode(store.get(key)))
        try:
            if record is not None:
                segments = [read_segment(store, SegmentKey.parse(segment)) for segment in record["segments"]]
                return [key for block in segments for key in block.episode_keys()], layout.version_of(key)
        except (InvalidRecord, NotFound, KeyError, TypeError) as error:
            _log.warning("%s is left out of the report: its rows of the index cannot be read (%s)", key, error)
    return None, None


def _read_spools(actors: Path) -> tuple[list[str] | None, set[str]]:
    """Keys in the journals, and those of them whose file still waits; a line that a crash cut is no episode."""
    journals = sorted(actors.glob("*/spool/journal"))
    texts = (path.read_text() for path in journals)
    recorded = [line for text in texts for line in text[: text.rfind("\n") + 1].split("\n") if line]
    key_of = {Path(key).name: key for key in recorded}
    spooled = {key_of[path.name] for path in actors.glob("*/spool/*.arrow") if path.name in key_of}
    return (recorded if journals else None), spooled


def _read_timing(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    timing = _readable(path.name, lambda _: json.loads(path.read_text()))
    return timing if isinstance(timing, dict) else {}


def _readable(name: str, read: Callable[[str], T]) -> T | None:
    """What `read` makes of the name; None, and a line in the log, when the object is missing or damaged."""
    try:
        return read(name)
    except NotFound:
        _log.info("the run has no %s", name)
    except (InvalidRecord, msgspec.DecodeError, ValueError) as error:
        _log.warning("%s is left out of the report: %s", name, error)
    return None


def finite(lines: Iterable[Line], name: str) -> list[float]:
    """Values of a metric in the order of the lines; lines without it, or with null, are left out."""
    return [line[name] for line in lines if line.get(name) is not None]


def swaps(record: RunRecord) -> list[Line]:
    """The lines that tell how fast a policy reached a robot; the version that waited for the fleet is left out."""
    return [line for line in record.fleet if "fleet/publish_to_swap_s" in line and line["step"] > record.ready_version]


def fleet_laps(record: RunRecord) -> list[Line]:
    """`laps` without those of a warm-up: they ended before the fleet's first episode began."""
    own = laps(record.learner)
    if not record.base_rollouts or not record.episodes:
        return own
    begin_s = min(episode.start_utc_ns for episode in record.episodes) / 1e9
    return [line for line in own if line["utc_s"] >= begin_s]


def laps(lines: Iterable[Line]) -> list[Line]:
    """The lines in which the fleet's learner reports a lap, in the order of steps.

    Pretraining writes to the same file: it is told by the version, -1 while no policy is published. Steps that a
    resumed learner did again are kept as they were done the last time.
    """
    kept: list[Line] = []
    for line in lines:
        if "learner/busy" in line and (line.get("learner/version") or 0) >= 0:
            while kept and kept[-1]["step"] > line["step"]:
                kept.pop()
            kept.append(line)
    return kept
