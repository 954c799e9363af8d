"""What came of a soak: `summary.json`, `soak.png`, a paragraph, and which promises were broken.

    promise                      broken when
    ---------------------------  ---------------------------------------------------------------------------------
    nothing is lost              the history checker says so (lost, doubled, unsent, altered, mixed, untold)
    the fleet goes on            a process died again and again, or did not come back after the last strike
    success holds                the interval of last minus first (or second) quarter is wholly below -FALL
    memory does not grow         the interval of a role's slope is wholly above what it may keep per robot hour
    nor do files and threads     the same
    nor does the delay           the same, of end -> indexed: hour by hour

Slopes are looked at over the second half, within lifetimes of processes, without their starts (`soak_trend`).
A soak that is too short for slopes, or for quarters of an hour of robot time each, says so and does not judge them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sop.chaos.history import History, check_history
from sop.chaos.recovery import Strike, read_work, recovery_words, with_recovery
from sop.chaos.soak import Soak
from sop.chaos.soak_curve import (
    HOUR_S,
    Comparison,
    Episodes,
    Hour,
    backlog,
    compare_quarters,
    hours,
    read_episodes,
    read_published,
    swap_delays,
)
from sop.chaos.soak_figure import draw
from sop.chaos.soak_trend import Trend, find_trend
from sop.chaos.soak_watch import Look, ProcessLook
from sop.provenance import code_version, cpu_model

SUMMARY, PICTURE = "summary.json", "soak.png"
FALL = 0.02
"""A fall of the success rate by less is not worth a person's time."""
GROWTH_PER_HOUR = 1e-3
"""Share of its memory by which a process may grow per robot hour: half a megabyte of 500."""
BYTES_PER_EPISODE = 150
"""What the learner may keep of every episode for ever: its row of the index, its id, whether it was drawn."""
HANDLES_PER_HOUR = 0.1
"""Files, or threads, more per robot hour."""
START_S, START_H = 20.0, 0.5
"""A process that started less than this ago, by the wall clock or by the robots', is not looked at: it is importing, or
filling what it keeps within a bound (the learner: hundreds of open episodes)."""
LEAST_H = 1.0
"""Robot time that the longest lifetime has to cover for a slope per hour, and a quarter to be compared: within minutes
success follows the policy, which has just begun to learn."""
_MEASURES = {"memory": "rss_mb", "private memory": "own_mb", "files": "files", "threads": "threads"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is said about a soak."""

    broken: tuple[str, ...]
    """Promises that were broken, in sentences."""
    paragraph: str
    summary: Mapping[str, Any]


def judge(soak: Soak) -> Verdict:
    """Check the history, compute everything, write `summary.json` and `soak.png` (blocking: reads every episode)."""
    run, watch = soak.run, soak.watch
    history = check_history(run, damaged=soak.target.damaged, ended=not soak.failure)
    published = read_published(run.store)
    episodes = read_episodes(run, published)
    per_hour = hours(episodes, swap_delays(history.readable, published))
    comparisons = list(compare_quarters(episodes)) if episodes.hours >= 4 * LEAST_H else []
    trends = dict(_trends(soak, episodes, per_hour))
    waiting = backlog(episodes, np.array([look.utc_s for look in watch.looks]))
    broken = tuple(_broken(soak, history, comparisons, trends, episodes))
    strikes = with_recovery(soak.strikes, read_work(run, history.readable))
    summary = {
        "preset": run.config.preset,
        "seed": soak.plan.seed,
        "robots": run.config.fleet.num_actors,
        "asked_hours": soak.plan.hours,
        "robot_hours": episodes.hours,
        "acting_hours": episodes.acting_hours,
        "storm_s": soak.storm_s,
        "robot_s_per_s": episodes.hours * HOUR_S / soak.storm_s if soak.storm_s else None,
        "settled_s": soak.settled_s,
        "interrupted": soak.interrupted,
        "failure": soak.failure,
        "broken": broken,
        "history": history.counts(),
        "violations": history.words(),
        "strikes": [{**asdict(s), "at_h": h} for s, h in zip(strikes, soak.struck_at_h, strict=True)],
        "restarts": soak.restarts,
        "learner_steps": history.last_step,
        "versions": max(published, default=0),
        "hours": [asdict(hour) for hour in per_hour],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "trends": {name: {**asdict(trend), "allowed": most} for name, (trend, most) in trends.items()},
        "highest": _highest(soak, waiting, episodes),
        "code_version": code_version(),
        "cpu": cpu_model(),
    }
    paragraph = _paragraph(summary, strikes, comparisons, trends, broken)
    (run.folder / SUMMARY).write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    (run.folder / PICTURE).write_bytes(draw(watch.looks, per_hour, soak.struck_at_h, waiting))
    return Verdict(broken=broken, paragraph=paragraph, summary=summary)


def _trends(soak: Soak, episodes: Episodes, per_hour: list[Hour]) -> Iterator[tuple[str, tuple[Trend, float]]]:
    """Name -> slope per robot hour, and what is allowed; of what there is enough to say."""
    episodes_per_hour = len(episodes) / max(episodes.hours, 1e-9)
    roles = sorted({process.role for look in soak.watch.looks for process in look.processes})
    for role in roles:
        for measure, field in _MEASURES.items():
            found = find_trend(lifetimes(soak, role, field), least=LEAST_H, seed=soak.plan.seed)
            if found is None:
                continue
            if measure in ("files", "threads"):
                allowed = HANDLES_PER_HOUR
            else:
                kept_mb = BYTES_PER_EPISODE * episodes_per_hour / 1e6 if role == "learner" else 0.0
                allowed = GROWTH_PER_HOUR * found.level + kept_mb
            yield f"{measure} of {role}", (found, allowed)
    later = [hour for hour in per_hour if hour.end_h > episodes.hours / 2]
    delays = np.array([[hour.end_h, hour.indexed_p50_s] for hour in later]).reshape(-1, 2)
    found = find_trend([delays], least=LEAST_H, seed=soak.plan.seed)
    if found is not None:
        yield "median delay until indexed", (found, found.level / episodes.hours)


def lifetimes(soak: Soak, role: str, field: str) -> list[npt.NDArray[np.float64]]:
    """(robot hours, value) [n, 2] per process of a role, over the second half of the storm, starts left out."""
    looks = soak.watch.looks
    half_s = looks[-1].robot_s / 2 if looks else 0.0
    born: dict[int, Look] = {}
    found: dict[int, list[tuple[float, float]]] = {}
    for look in looks:
        for process in look.processes:
            if process.role != role:
                continue
            first = born.setdefault(process.pid, look)
            starting = look.utc_s - first.utc_s < START_S or look.robot_s - first.robot_s < START_H * HOUR_S
            if not starting and look.robot_s >= half_s:
                found.setdefault(process.pid, []).append((look.robot_s / HOUR_S, _value(process, field)))
    return [np.array(life) for life in found.values()]


def _value(process: ProcessLook, field: str) -> float:
    return float(getattr(process, field))


def _broken(
    soak: Soak,
    history: History,
    comparisons: list[Comparison],
    trends: Mapping[str, tuple[Trend, float]],
    episodes: Episodes,
) -> Iterator[str]:
    yield from history.words()
    if history.waiting:
        yield f"{len(history.waiting)} episodes still wait on a robot's disk"
    if not history.recorded or not len(episodes):
        yield "nothing was recorded"
    if soak.failure:
        yield soak.failure
    for comparison in comparisons:
        if comparison.interval[1] < -FALL:
            low, high = (100 * bound for bound in comparison.interval)
            yield f"{comparison.what} fell: {100 * comparison.difference:+.1f} points [{low:.1f}, {high:.1f}]"
    for name, (trend, allowed) in trends.items():
        if trend.grows(allowed):
            yield (
                f"{name} grows by {trend.slope:.3g} per robot hour [{trend.low:.3g}, {trend.high:.3g}], "
                f"{allowed:.3g} is allowed"
            )


def _highest(soak: Soak, waiting: npt.NDArray[np.int64], episodes: Episodes) -> dict[str, Any]:
    looks = soak.watch.looks
    per_role: dict[str, dict[str, float]] = {}
    for look in looks:
        for process in look.processes:
            mine = per_role.setdefault(process.role, dict.fromkeys(_MEASURES, 0.0))
            for measure, field in _MEASURES.items():
                mine[measure] = max(mine[measure], _value(process, field))
    return {
        "spooled": max((look.spooled for look in looks), default=0),
        "not_indexed": int(waiting.max(initial=0)),
        "disk_mb": max((look.disk_mb for look in looks if look.disk_mb is not None), default=None),
        "indexed_s": float(episodes.indexed_s.max(initial=0.0)),
        "indexed_p50_s": float(np.median(episodes.indexed_s)) if len(episodes) else None,
        "staleness": int(episodes.staleness.max(initial=0)),
        "processes": per_role,
    }


def _paragraph(
    summary: Mapping[str, Any],
    strikes: tuple[Strike, ...],
    comparisons: list[Comparison],
    trends: Mapping[str, tuple[Trend, float]],
    broken: tuple[str, ...],
) -> str:
    counts, highest, recovered = summary["history"], summary["highest"], summary["settled_s"]
    done = (
        f"{summary['robot_hours']:.1f} of {summary['asked_hours']:g} robot hours "
        f"({summary['acting_hours']:.1f} without resets) of {summary['robots']} robots "
        f"in {summary['storm_s'] / 60:.1f} minutes: "
        f"{counts['recorded']} episodes, {summary['learner_steps']} learner steps, {summary['versions']} versions, "
        f"{len(summary['strikes'])} strikes, {len(summary['restarts'])} restarts."
    )
    lost = (
        f"Lost {counts['lost']}, doubled {counts['duplicated']}, unsent {counts['unsent']}, "
        f"altered {counts['unreadable']}, mixed {counts['mixed']}, steps untold {counts['untold']}."
    )
    parts = [done, lost]
    if recovered is not None:
        parts.insert(1, f"All were at work again {recovered:.0f} s after the last strike.")
    parts += recovery_words(strikes)
    for found in comparisons:
        before, after = (f"{100 * good / total:.1f} %" for good, total in (found.earlier, found.later))
        low, high = (100 * bound for bound in found.interval)
        parts.append(
            f"{found.what}: {before} -> {after}, {100 * found.difference:+.1f} points [{low:+.1f}, {high:+.1f}]."
        )
    for name, (trend, allowed) in trends.items():
        if name.startswith(("memory", "median")):
            unit = "MB" if name.startswith("memory") else "s"
            parts.append(
                f"{name}: {trend.slope:+.3f} {unit} per robot hour [{trend.low:+.3f}, {trend.high:+.3f}] "
                f"at {trend.level:.3g} {unit}, {allowed:.3g} allowed."
            )
    if not comparisons:
        parts.append("Too short to say whether success falls.")
    if not any(name.startswith("memory") for name in trends):
        parts.append("Too short to say whether memory grows.")
    delay = highest["indexed_p50_s"]
    parts.append(
        f"At most {highest['spooled']} episodes waited on robots and {highest['not_indexed']} for the index"
        + (f" (median {delay:.2f} s, longest {highest['indexed_s']:.0f} s)." if delay is not None else ".")
    )
    parts.append("Every promise was kept." if not broken else f"Broken: {'; '.join(broken)}.")
    return "\n".join(parts)
