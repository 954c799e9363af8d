"""Freshness of a whole run, from its store: every hop of every episode and of every policy that acted.

Episodes' hops come from the lineage of published versions, policies' hops from the headers of the episodes in
which they acted. The lab's demonstrations and the base policy wait for the fleet to start: they are left out.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from sop.broadcast import PolicyManifest
from sop.core.episode import PolicyTimes
from sop.core.freshness import LEARNED, HopSample, arrival_hops
from sop.core.layout import from_lab
from sop.core.lineage import Lineage


@dataclass(frozen=True, slots=True)
class Swap:
    """A robot began to act with a version."""

    actor_id: str
    version: int
    times: PolicyTimes


def hop_samples(
    learned: Iterable[tuple[PolicyManifest, Lineage]], swaps: Iterable[Swap], *, base_version: int = 0
) -> list[HopSample]:
    """All hops that are known.

    Args:
        learned: a version and its ancestors with what they learned, in any order.
        swaps: one or more per robot and version (repeats count once).
        base_version: left out, it was there before the fleet.
    """
    latest_first = sorted(swaps, key=lambda swap: swap.times.swapped_utc_ns, reverse=True)  # the first one counts
    distinct = {(swap.actor_id, swap.version): swap for swap in latest_first if swap.version > base_version}
    found = [sample for swap in distinct.values() for sample in _policy_hops(swap)]
    first_swap = first_swaps(distinct.values())
    versions = sorted(first_swap)
    counted: set[str] = set()
    for manifest, lineage in sorted(learned, key=lambda pair: pair[0].version):
        if manifest.version == base_version:
            continue
        place = bisect_left(versions, manifest.version)
        swapped_utc_ns = first_swap[versions[place]] if place < len(versions) else None
        for episode in lineage.learned:
            if from_lab(episode.key) or episode.key in counted:  # new once more after the index was rebuilt
                continue
            counted.add(episode.key)
            found += arrival_hops(episode)
            who = (episode.actor_id, episode.task)
            to_published_s = (manifest.created_utc_ns - episode.sampled_utc_ns) / 1e9
            found.append(HopSample("sampled_to_published", to_published_s, *who))
            if swapped_utc_ns is not None:
                found.append(HopSample(LEARNED, (swapped_utc_ns - episode.recorded_utc_ns) / 1e9, *who))
    return found


def first_swaps(swaps: Iterable[Swap]) -> dict[int, int]:
    """Version -> UTC ns at which the first robot acted with it or with a later one."""
    earliest: dict[int, int] = {}
    for swap in swaps:
        before = earliest.get(swap.version, swap.times.swapped_utc_ns)
        earliest[swap.version] = min(before, swap.times.swapped_utc_ns)
    first: dict[int, int] = {}
    soonest: int | None = None
    for version in sorted(earliest, reverse=True):
        soonest = earliest[version] if soonest is None else min(soonest, earliest[version])
        first[version] = soonest
    return first


def _policy_hops(swap: Swap) -> list[HopSample]:
    times = swap.times
    return [
        HopSample("published_to_staged", (times.staged_utc_ns - times.published_utc_ns) / 1e9, swap.actor_id, None),
        HopSample("staged_to_swapped", (times.swapped_utc_ns - times.staged_utc_ns) / 1e9, swap.actor_id, None),
    ]
