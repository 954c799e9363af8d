"""What a soak did, hour by hour of robot time: read from the index of the last checkpoint, not from what was counted.

index rows, in the order in which the episodes ended -> robot time, outcome, help, end -> indexed
manifests of the published versions                  -> staleness: versions published before an episode ended
headers of the episodes (`History.readable`)         -> published -> swapped, per robot and version
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from sop.broadcast import PolicyManifest, published_versions
from sop.buffer.rows import OUTCOMES, RowBlock
from sop.buffer.segments import read_segment
from sop.chaos.history import Acted
from sop.core import layout
from sop.core.episode import Outcome
from sop.core.errors import InvalidRecord, NotFound, RunError
from sop.core.evaluation import wilson_interval
from sop.core.layout import EpisodeKey, SegmentKey
from sop.learner.checkpoint import named_segments
from sop.report.summary import newcombe_interval
from sop.runs import Run
from sop.transport import ObjectStore

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episodes:
    """The fleet's episodes in the order in which they ended, as columns [n]."""

    robot_s: npt.NDArray[np.float64]
    """Robot time of the fleet up to the end of each, seconds."""
    success: npt.NDArray[np.bool_]
    aborted: npt.NDArray[np.bool_]
    interventions: npt.NDArray[np.int32]
    indexed_s: npt.NDArray[np.float64]
    """End -> indexed, seconds of wall clock; of one that a learner indexed again after its death: the last time."""
    ended_utc_s: npt.NDArray[np.float64]
    staleness: npt.NDArray[np.int64]
    """Versions that were published while it ran or before, and are newer than the one that acted."""
    acting_hours: float
    """Robot time without resets."""

    def __len__(self) -> int:
        return len(self.robot_s)

    @property
    def hours(self) -> float:
        """Robot time of all, hours."""
        return float(self.robot_s[-1]) / HOUR_S if len(self) else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """One stretch of robot time. Aborted episodes count in none of the rates."""

    begin_h: float
    end_h: float
    episodes: int
    aborted: int
    successes: int
    success_interval: tuple[float, float]
    """Wilson, 95 %."""
    alone: int
    """Successes in which nobody helped."""
    alone_interval: tuple[float, float]
    interventions: int
    indexed_p50_s: float
    indexed_p99_s: float
    staleness_p50: float
    staleness_max: int
    swapped_p50_s: float | None
    """Published -> swapped; None when no robot swapped."""
    swapped_p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A rate in a later quarter of the robot time minus that in an earlier one."""

    what: str
    earlier: tuple[int, int]
    """Successes, episodes."""
    later: tuple[int, int]
    difference: float
    interval: tuple[float, float]
    """Newcombe, 95 %."""


def read_episodes(run: Run, published_utc_s: Mapping[int, float]) -> Episodes:
    """The fleet's rows of the newest checkpoint that can be read (blocking).

    Raises:
        RunError: there is none.
    """
    blocks = _newest_blocks(run.store)
    fleet = [block.from_fleet() for block in blocks]

    def column(name: str) -> npt.NDArray[np.int64]:
        return np.concatenate([block.columns[name][mine] for block, mine in zip(blocks, fleet, strict=True)])

    order = np.argsort(column("end_utc_ns"), kind="stable")
    ended, indexed = column("end_utc_ns")[order] / 1e9, column("indexed_utc_ns")[order] / 1e9
    acting_s = column("num_steps")[order] / run.manifest.embodiment.control_hz
    outcome = column("outcome")[order]
    versions = sorted(published_utc_s)
    published = [published_utc_s[version] for version in versions]
    newest = np.array([versions[max(0, bisect_right(published, end) - 1)] for end in ended], np.int64)
    return Episodes(
        robot_s=np.cumsum(acting_s + run.config.fleet.reset_s),
        success=outcome == OUTCOMES.index(Outcome.SUCCESS),
        aborted=outcome == OUTCOMES.index(Outcome.ABORTED),
        interventions=column("num_interventions")[order].astype(np.int32),
        indexed_s=indexed - ended,
        ended_utc_s=ended,
        staleness=np.maximum(0, newest - column("policy_version")[order]),
        acting_hours=float(acting_s.sum()) / HOUR_S,
    )


def _newest_blocks(store: ObjectStore) -> list[RowBlock]:
    states = [key for key in store.keys(f"{layout.CHECKPOINTS}/") if key.endswith("/state.json")]
    for state in reversed(states):
        with suppress(InvalidRecord, NotFound, msgspec.DecodeError):
            record = msgspec.json.decode(store.get(state), type=dict[str, object])
            return [read_segment(store, SegmentKey.parse(key)) for key in named_segments(record)]
    raise RunError("the learner left no checkpoint that can be read: there is nothing to draw a curve of")


def read_published(store: ObjectStore) -> dict[int, float]:
    """Version -> UTC seconds at which it was handed over to be published (blocking)."""
    found = {}
    for version in published_versions(store):
        manifest = PolicyManifest.from_json(store.get(layout.policy_manifest(version)))
        found[version] = manifest.created_utc_ns / 1e9
    return found


def swap_delays(readable: Mapping[str, Acted], published_utc_s: Mapping[int, float]) -> list[tuple[float, float]]:
    """(UTC seconds of the swap, published -> swapped in seconds), once per robot and version, ascending; the base
    policy waited for the fleet and is left out."""
    first: dict[tuple[str, int], float] = {}
    for key, acted in readable.items():
        if acted.version and acted.swapped_utc_ns is not None and acted.version in published_utc_s:
            who = (EpisodeKey.parse(key).actor_id, acted.version)
            swapped = acted.swapped_utc_ns / 1e9
            first[who] = min(swapped, first.get(who, swapped))
    return sorted((swapped, swapped - published_utc_s[version]) for (_, version), swapped in first.items())


def hours(episodes: Episodes, swaps: list[tuple[float, float]], *, length_s: float = HOUR_S) -> list[Hour]:
    """Stretches of robot time, `length_s` each; a last one that is shorter than half of that joins the one before."""
    whole = max(1, round(float(episodes.robot_s[-1]) / length_s)) if len(episodes) else 0
    bounds = [length_s * number for number in range(whole)] + [float("inf")]
    return [_hour(episodes, swaps, begin, end) for begin, end in pairwise(bounds) if whole]


def _hour(episodes: Episodes, swaps: list[tuple[float, float]], begin_s: float, end_s: float) -> Hour:
    mine = (episodes.robot_s > begin_s) & (episodes.robot_s <= end_s)
    ended = mine & ~episodes.aborted
    count, successes = int(ended.sum()), int((mine & episodes.success).sum())
    alone = int((mine & episodes.success & (episodes.interventions == 0)).sum())
    at = episodes.ended_utc_s[mine]
    delays = [delay for utc_s, delay in swaps if len(at) and at[0] <= utc_s <= at[-1]]
    waited, stale = episodes.indexed_s[mine], episodes.staleness[mine]
    return Hour(
        begin_h=begin_s / HOUR_S,
        end_h=min(end_s / HOUR_S, episodes.hours),
        episodes=count,
        aborted=int((mine & episodes.aborted).sum()),
        successes=successes,
        success_interval=wilson_interval(successes, count),
        alone=alone,
        alone_interval=wilson_interval(alone, count),
        interventions=int(episodes.interventions[mine].sum()),
        indexed_p50_s=float(np.median(waited)) if len(waited) else 0.0,
        indexed_p99_s=float(np.quantile(waited, 0.99)) if len(waited) else 0.0,
        staleness_p50=float(np.median(stale)) if len(stale) else 0.0,
        staleness_max=int(stale.max(initial=0)),
        swapped_p50_s=float(np.median(delays)) if delays else None,
        swapped_p99_s=float(np.quantile(delays, 0.99)) if delays else None,
    )


def compare_quarters(episodes: Episodes) -> Iterator[Comparison]:
    """The last quarter of the robot time against the first and the second, for success and for success alone; none
    when a quarter has no episode that ended."""
    bounds = np.linspace(0.0, episodes.robot_s[-1] if len(episodes) else 0.0, 5)
    quarter = np.clip(np.searchsorted(bounds, episodes.robot_s, side="left") - 1, 0, 3)
    for what, good in (
        ("success", episodes.success),
        ("success without help", episodes.success & (episodes.interventions == 0)),
    ):
        counts = []
        for number in range(4):
            mine = (quarter == number) & ~episodes.aborted
            counts.append((int((mine & good).sum()), int(mine.sum())))
        for name, earlier in (("first", counts[0]), ("second", counts[1])):
            later = counts[3]
            if earlier[1] and later[1]:
                yield Comparison(
                    what=f"{what}, last minus {name} quarter",
                    earlier=earlier,
                    later=later,
                    difference=later[0] / later[1] - earlier[0] / earlier[1],
                    interval=newcombe_interval(earlier, later),
                )


def backlog(episodes: Episodes, moments_utc_s: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """How many episodes had ended and were not indexed, at each of these moments."""
    ended = np.searchsorted(episodes.ended_utc_s, moments_utc_s, side="right")
    indexed = np.searchsorted(np.sort(episodes.ended_utc_s + episodes.indexed_s), moments_utc_s, side="right")
    return np.asarray(ended - indexed, np.int64)
