"""What the load generator finds afterwards: every recorded episode indexed once, and how long every hop took."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sop.broadcast import published_versions
from sop.core.episode import PolicyTimes
from sop.core.events import TOPIC_ACTORS, PolicySwapped, decode_event
from sop.core.freshness import HopSample, as_json, summary
from sop.core.layout import EpisodeKey, from_lab
from sop.freshness import Swap, hop_samples
from sop.lineage import learned_by
from sop.report.record import read_run
from sop.runs import Run

_SWAPPED = b'"PolicySwapped"'


def audit(folder: Path) -> dict[str, Any]:
    """Close the books: journals of all robots against the learner's last checkpoint (blocking, reads every episode).

    Keys of the result: `recorded`, `indexed`, `lost` (recorded, but not indexed), `duplicated` (indexed more than
    once, by key or by the robot's number), `quarantined`, `spooled` (still on a robot's disk), `strangers` (indexed,
    but not recorded).
    """
    record = read_run(folder)
    recorded = [key for key in record.recorded or [] if not from_lab(key)]
    indexed = [key for key in record.indexed or [] if not from_lab(key)]
    numbers = Counter((parsed.actor_id, parsed.sequence) for parsed in map(EpisodeKey.parse, indexed))
    repeats = max(_repeats(Counter(indexed)), _repeats(numbers))
    return {
        "recorded": len(recorded),
        "indexed": len(indexed),
        "lost": len(set(recorded) - set(indexed)),
        "duplicated": repeats + _repeats(Counter(recorded)),
        "strangers": len(set(indexed) - set(recorded)),
        "quarantined": len(record.quarantined),
        "spooled": len([key for key in record.spooled if not from_lab(key)]),
        "published_versions": len(record.published) - 1,
    }


def hops_of(run: Run) -> tuple[dict[str, dict[str, float]], int]:
    """(hop -> {p50, p99, count} in seconds, number of swaps): of all versions and all robots (blocking)."""
    swaps = list(_swaps(run))
    newest = max(published_versions(run.store))
    samples: list[HopSample] = hop_samples(learned_by(run.store, newest), swaps)
    return as_json(summary(samples)), len(swaps)


def _swaps(run: Run) -> Iterator[Swap]:
    """Every swap that an actor announced and the bus still knows."""
    cursor = None
    with run.bus() as bus:
        while found := bus.poll(TOPIC_ACTORS, cursor, 0.0):
            cursor = found[-1][0]
            for _, data in found:
                if _SWAPPED in data:
                    event = decode_event(data, PolicySwapped)
                    times = PolicyTimes(
                        published_utc_ns=event.published_utc_ns,
                        staged_utc_ns=event.staged_utc_ns,
                        swapped_utc_ns=event.swapped_utc_ns,
                    )
                    yield Swap(event.actor_id, event.version, times)


def _repeats(counts: Mapping[Any, int]) -> int:
    return sum(count - 1 for count in counts.values())
