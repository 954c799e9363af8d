"""Builds run directories as a run leaves them, from real records, for tests of whatever reads them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sop.buffer import EpisodeRow, IndexSegments, RowBlock
from sop.buffer.segments import IndexRows
from sop.core import layout
from sop.core.codec import content_hash, encode
from sop.core.embodiment import Embodiment
from sop.core.episode import Controller, Episode, Intervention, Outcome, human_runs
from sop.core.evaluation import EvaluationResult, TaskResult
from sop.core.experience import Sidecar, Source
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.core.sidecar import encode_sidecar
from sop.metrics import JsonlSink
from sop.transport import DirectoryStore

START_UTC_S = 1_700_000_000
HZ = 20.0
EMBODIMENT = Embodiment(
    name="test-arm",
    cameras={"front": (16, 16), "wrist": (16, 16)},
    state_names=("x", "y"),
    action_names=("dx", "dy"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    hold_action=(0.0, 0.0),
    max_action_change=(None, None),
    control_hz=HZ,
)


def utc_ns(seconds: float) -> int:
    """Nanoseconds since the epoch, `seconds` after the run's start."""
    return int((START_UTC_S + seconds) * 1e9)


def make_episode(
    controllers: str,
    *,
    actor_id: str = "robot-0",
    sequence: int = 0,
    task: str = "open",
    outcome: Outcome = Outcome.SUCCESS,
    version: int | None = 0,
    start_s: float = 0.0,
    reason: str = "deviation",
    images: Mapping[str, np.ndarray] | None = None,
) -> Episode:
    """An episode whose controllers are spelled out: `PPHHP` is policy, policy, human, human, policy."""
    controller = np.array([Controller.HUMAN if c == "H" else Controller.POLICY for c in controllers], np.uint8)
    steps = len(controller)
    rng = np.random.default_rng(sequence)
    if images is None:
        images = {
            name: np.broadcast_to(rng.integers(0, 255, (steps, 1, 1, 3), np.uint8), (steps, *size, 3)).copy()
            for name, size in EMBODIMENT.cameras.items()
        }
    return Episode(
        actor_id=actor_id,
        sequence=sequence,
        robot=EMBODIMENT.name,
        task=task,
        instruction=f"{task} it",
        policy_version=version,
        images=dict(images),
        state=np.zeros((steps, 2), np.float32),
        action=np.zeros((steps, 2), np.float32),
        policy_action=np.zeros((steps, 2), np.float32),
        proposed=np.full(steps, version is not None),
        controller=controller,
        monotonic_ns=np.arange(steps, dtype=np.int64) * 50_000_000,
        start_utc_ns=utc_ns(start_s),
        end_utc_ns=utc_ns(start_s + steps / HZ),
        outcome=outcome,
        truncated=False,
        interventions=tuple(Intervention(a, b, "stand-in", reason) for a, b in human_runs(controller)),
    )


def _row(key: str) -> EpisodeRow:
    facts = EpisodeKey.parse(key)
    return EpisodeRow(
        episode_id=facts.episode_id,
        actor_id=facts.actor_id,
        sequence=facts.sequence,
        task="open",
        source=Source.ONLINE if facts.folder == layout.EPISODES else Source.OFFLINE,
        num_steps=facts.num_steps,
        human_steps=0,
        num_interventions=0,
        policy_version=None,
        outcome=Outcome.SUCCESS,
        start_runs=(),
        end_utc_ns=0,
        indexed_utc_ns=0,
    )


@dataclass
class RunDirectory:
    """A run directory under construction; every method writes what the process of that name would have written."""

    folder: Path
    fleet_tasks: tuple[str, ...] = ("open", "close")
    held_out_tasks: tuple[str, ...] = ("slide",)
    store: DirectoryStore = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = DirectoryStore(self.folder / "store")

    def write_run(self, **config: Any) -> RunManifest:
        """Write `run.json`."""
        run = RunManifest(
            name=self.folder.name,
            created_utc_ns=utc_ns(0),
            embodiment=EMBODIMENT,
            instructions={task: (f"{task} it",) for task in self.fleet_tasks + self.held_out_tasks},
            fleet_tasks=self.fleet_tasks,
            held_out_tasks=self.held_out_tasks,
            config={"preset": "demo", "algorithm": "hg_dagger", "seed": 7, "fleet": {"reset_s": 1.0}} | config,
        )
        self.store.put(layout.RUN, run.to_json())
        return run

    def record(self, episode: Episode, *, journal: bool = True, spool: bool = False, upload: bool = True) -> str:
        """Record an episode as an actor does; returns its key."""
        data = encode(episode)
        offline = episode.is_demonstration or episode.actor_id.startswith(layout.BASE_ACTOR)
        folder = layout.DEMONSTRATIONS if offline else layout.EPISODES
        key = str(EpisodeKey(folder, episode.actor_id, episode.sequence, episode.num_steps, content_hash(data)))
        place = self.folder / "actors" / episode.actor_id / "spool"
        place.mkdir(parents=True, exist_ok=True)
        if journal:
            with (place / "journal").open("a") as file:
                file.write(key + "\n")
        if spool:
            (place / Path(key).name).write_bytes(data)
        if upload:
            self.store.put(key, data)
        return key

    def quarantine(self, key: str) -> None:
        """Refuse an episode."""
        self.store.put(layout.quarantine(key), json.dumps({"key": key, "reason": "bad"}).encode())

    def sidecar(self, key: str, columns: Mapping[str, Sequence[float]], *, version: int = 1) -> str:
        """Store what RECAP computed about an episode; returns its key."""
        arrays = {name: np.array(column, np.float32) for name, column in columns.items()}
        episode = EpisodeKey.parse(key)
        place = layout.sidecar("recap", version, episode.episode_id)
        self.store.put(place, encode_sidecar(Sidecar(version=version, columns=arrays), episode))
        return place

    def checkpoint(self, step: int, keys: Sequence[str]) -> None:
        """Save what the learner has indexed."""
        rows = IndexRows((), (RowBlock.from_rows([_row(key) for key in keys]),) if keys else ())
        segments = IndexSegments(self.store, "0" * 32).save(rows)
        state = {"learner_step": step, "tensors_hash": "", "segments": segments, "state": {}}
        self.store.put(f"{layout.checkpoint_folder(step)}/state.json", msgspec.json.encode(state))

    def publish(self, *versions: int) -> None:
        """Publish policies (manifests only)."""
        for version in versions:
            self.store.put(layout.policy_manifest(version), b"{}")

    def evaluate(
        self,
        name: str,
        version: int | None,
        counts: Mapping[str, tuple[int, int]],
        *,
        at_s: float = 0.0,
        online_episodes: int = 0,
        attempt_s: float = 10.0,
    ) -> EvaluationResult:
        """Store an evaluation: task -> (successes, episodes); every attempt takes `attempt_s` robot seconds."""
        result = EvaluationResult(
            version=version,
            name=name,
            first_seed=1_000_000,
            tasks={
                task: TaskResult(episodes=episodes, successes=successes, robot_s=attempt_s * episodes)
                for task, (successes, episodes) in counts.items()
            },
            online_episodes=online_episodes,
            utc_ns=utc_ns(at_s + 5),
            published_utc_ns=None if version is None else utc_ns(at_s),
        )
        self.store.put(layout.evaluation(version or 0, name), result.to_json())
        return result

    def log(self, file: str, at_s: float, step: int, values: Mapping[str, float]) -> None:
        """Append a line to `metrics/<file>.jsonl`."""
        sink = JsonlSink(self.folder / "metrics" / f"{file}.jsonl", utc_s=lambda: START_UTC_S + at_s)
        sink.log(values, step)
        sink.close()

    def write_timing(self, wall_s: Mapping[str, float], *, interrupted: bool = False) -> None:
        """Write `timing.json`."""
        timing = {
            "wall_s": dict(wall_s),
            "started_utc_ns": utc_ns(0),
            "phases_done": list(wall_s),
            "interrupted": interrupted,
        }
        (self.folder / "timing.json").write_text(json.dumps(timing))
