"""When a run was whole again after each strike: computed afterwards, from what the run left on disk.

    robots      headers of the stored episodes     the end of the first episode that began after the strike was over
    learner     metrics/learner.jsonl              its first report of a new step after that; it reports once a second
    recovered_s = the last of these - the end of the strike

So an undisturbed run has a figure, too: the rest of the running episode, a reset and an episode. Where strikes overlap,
the next one's outage is in the figure of the one before: nothing is taken off. A strike after which one of them did
nothing more (the run ended) has no figure. The evaluator is in none: it works now and then.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from statistics import median

from sop.chaos.history import Acted
from sop.chaos.target import LEARNER
from sop.core.layout import EpisodeKey, before_fleet
from sop.metrics import read_metrics
from sop.runs import Run


@dataclass(frozen=True, slots=True)
class Strike:
    """One that hit, and what followed."""

    at_s: float
    """When it was over, since the first process of the fleet was seen."""
    nemesis: str
    what: str
    ended_utc_s: float
    """The same, by the clock of this machine."""
    recovered_s: float | None = None
    """From then until every robot and the learner had worked; None: not known, or the run ended before."""


class Work:
    """What one robot or the learner did, as (began, done) in UTC seconds, in any order."""

    def __init__(self, spans: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(spans)
        self._began = [began for began, _ in ordered]
        self._done = list(accumulate((done for _, done in reversed(ordered)), min))[::-1]

    def first_after(self, utc_s: float) -> float | None:
        """When the first piece of work was done that began at this moment or later; None when there is none."""
        place = bisect_left(self._began, utc_s)
        return self._done[place] if place < len(self._done) else None


def recovery_s(ended_utc_s: float, work: Mapping[str, Work]) -> float | None:
    """Seconds from the end of a strike until all had worked again; None when one of them, or nobody, ever did."""
    first = [one.first_after(ended_utc_s) for one in work.values()]
    known = [done for done in first if done is not None]
    return max(known) - ended_utc_s if known and len(known) == len(first) else None


def read_work(run: Run, readable: Mapping[str, Acted]) -> dict[str, Work]:
    """Robots of the fleet and the learner -> what they did (reads the learner's metrics).

    Args:
        run: on this machine, ended or not.
        readable: `History.readable`: key of a stored episode -> its times.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for key, acted in readable.items():
        actor_id = EpisodeKey.parse(key).actor_id
        if not before_fleet(actor_id):
            spans.setdefault(actor_id, []).append((acted.started_utc_ns / 1e9, acted.ended_utc_ns / 1e9))
    records = read_metrics(run.folder / "metrics" / "learner.jsonl")
    reports = [{"step": 0.0}, *(record for record in records if "learner/version" in record)]
    steps = [new["utc_s"] for last, new in pairwise(reports) if new["step"] > last["step"]]
    spans[LEARNER] = [(utc_s, utc_s) for utc_s in steps]
    return {name: Work(mine) for name, mine in spans.items()}


def with_recovery(strikes: Sequence[Strike], work: Mapping[str, Work]) -> tuple[Strike, ...]:
    """The same strikes with what followed each of them."""
    found = [(strike, recovery_s(strike.ended_utc_s, work)) for strike in strikes]
    return tuple(
        replace(strike, recovered_s=None if seconds is None else round(seconds, 3)) for strike, seconds in found
    )


def recovery_words(strikes: Iterable[Strike]) -> list[str]:
    """A line per nemesis, in the order of their names: median, longest, of how many, how many have no figure."""
    by_name: dict[str, list[float | None]] = {}
    for strike in strikes:
        by_name.setdefault(strike.nemesis, []).append(strike.recovered_s)
    lines = []
    for name, found in sorted(by_name.items()):
        known = [seconds for seconds in found if seconds is not None]
        line = f"recovered: {name} "
        if known:
            line += f"{median(known):.1f} s median, {max(known):.1f} s longest of {len(known)}"
        if len(known) < len(found):
            line += f"{', ' if known else ''}{len(found) - len(known)} not before the run ended"
        lines.append(line)
    return lines
