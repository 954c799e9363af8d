"""Freshness: how long each hop takes from the end of an episode to a robot that has learned from it.

    robot                               learner                                        every robot
    recorded -> spooled -> uploaded  -> indexed -> sampled -> published             -> staged -> swapped
    episode     on its     in the       may be     by a       its gradient is in       verified   acts
    ends        disk       store        drawn      step       the weights handed over

Times are UTC nanoseconds by the clock of the machine where it happened: across machines a hop is as good as their
clocks, and may even come out negative. A stamp that is not known (a lost event) leaves its hops out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sop.core.lineage import LearnedEpisode
from sop.metrics import percentile

STAMPS = ("recorded", "spooled", "uploaded", "indexed", "sampled", "published", "staged", "swapped")
"""The places that an episode's news passes, in order."""
HOPS = tuple(f"{start}_to_{end}" for start, end in pairwise(STAMPS))
"""Names of the hops between them."""
SAMPLEABLE = "recorded_to_indexed"
"""Total: the episode ends -> it may be drawn."""
LEARNED = "recorded_to_swapped"
"""Total: the episode ends -> the first robot acts with weights that learned from it."""
ALL_HOPS = (*HOPS, SAMPLEABLE, LEARNED)


@dataclass(frozen=True, slots=True)
class HopSample:
    """One measured hop."""

    hop: str
    """One of ALL_HOPS."""
    seconds: float
    actor_id: str
    """Who recorded the episode; for staging and swapping, who staged and swapped."""
    task: str | None
    """The episode's task; None for hops of a policy, which is for all tasks."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution in short; seconds."""

    p50: float
    p99: float
    count: int


def arrival_hops(episode: LearnedEpisode) -> list[HopSample]:
    """The hops of an episode up to its first use by the learner."""
    stamps = {
        "recorded": episode.recorded_utc_ns,
        "spooled": episode.spooled_utc_ns,
        "uploaded": episode.uploaded_utc_ns,
        "indexed": episode.indexed_utc_ns,
        "sampled": episode.sampled_utc_ns,
    }
    found = []
    for start, end in [*pairwise(STAMPS[:5]), ("recorded", "indexed")]:
        begin, finish = stamps[start], stamps[end]
        if begin is not None and finish is not None:
            found.append(HopSample(f"{start}_to_{end}", (finish - begin) / 1e9, episode.actor_id, episode.task))
    return found


def summary(samples: Iterable[HopSample]) -> dict[str, Percentiles]:
    """Hop -> percentiles, in the order of ALL_HOPS; hops without a sample are left out."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        values.setdefault(sample.hop, []).append(sample.seconds)
    return {hop: _percentiles(values[hop]) for hop in ALL_HOPS if hop in values}


def by_actor(samples: Iterable[HopSample]) -> dict[str, dict[str, Percentiles]]:
    """Actor -> hop -> percentiles; actors in alphabetical order."""
    return _grouped((sample.actor_id, sample) for sample in samples)


def by_task(samples: Iterable[HopSample]) -> dict[str, dict[str, Percentiles]]:
    """Task -> hop -> percentiles, hops of policies left out; tasks in alphabetical order."""
    return _grouped((sample.task, sample) for sample in samples if sample.task is not None)


def _grouped(samples: Iterable[tuple[str, HopSample]]) -> dict[str, dict[str, Percentiles]]:
    groups: dict[str, list[HopSample]] = {}
    for group, sample in samples:
        groups.setdefault(group, []).append(sample)
    return {group: summary(groups[group]) for group in sorted(groups)}


def _percentiles(values: Sequence[float]) -> Percentiles:
    return Percentiles(percentile(values, 50), percentile(values, 99), len(values))


def as_json(found: Mapping[str, Percentiles]) -> dict[str, dict[str, float]]:
    """Hop -> {p50, p99, count}: seconds."""
    return {hop: {"p50": value.p50, "p99": value.p99, "count": value.count} for hop, value in found.items()}
