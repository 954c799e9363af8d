"""The numbers of a run, as `summary.json`. Every number is computed from what the run left behind.

Units are in the names; success rates, shares and their intervals are fractions; null means not known (the run
was stopped before, or the part is missing). Intervals cover 95 %: Wilson's for a rate, Newcombe's hybrid score
interval for a difference of two.
"""

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sop.core import freshness as hops
from sop.core.evaluation import EvaluationResult, TaskResult, wilson_interval
from sop.core.freshness import as_json
from sop.core.layout import BASE_ACTOR, LAB_ACTOR, EpisodeKey
from sop.metrics import percentile
from sop.provenance import cpu_model
from sop.report.before_fleet import advantage_numbers
from sop.report.record import EpisodeFacts, Line, RunRecord, finite, fleet_laps, laps, read_run, swaps
from sop.report.value import VALUE, value_numbers, valued_episodes

SUMMARY = "summary.json"
GAIN_METHOD = "final minus base, Newcombe hybrid score interval (Newcombe 1998, method 10), 95 %"
LOST = (
    "lost: an actor's journal has the episode, and neither the learner's last checkpoint, nor the store, "
    "nor the actor's spool, nor quarantine has it"
)
PACKAGES = ("sop", "numpy", "pyarrow", "gymnasium", "matplotlib", "torch", "metaworld", "mujoco", "lerobot")
"""Distributions whose versions are part of a result."""


def newcombe_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """Interval of the difference second - first of two rates, each (successes, trials).

    Hybrid score interval of Newcombe 1998 (Statistics in Medicine 17:873, method 10): with Wilson limits l, u,
    lower = d - sqrt((p2 - l2)^2 + (u1 - p1)^2) and upper = d + sqrt((u2 - p2)^2 + (p1 - l1)^2). It treats the
    two as independent; evaluations on the same seeds are not, so it errs on the wide side.
    """
    rate1, rate2 = first[0] / first[1], second[0] / second[1]
    low1, high1 = wilson_interval(*first)
    low2, high2 = wilson_interval(*second)
    difference = rate2 - rate1
    return difference - math.hypot(rate2 - low2, high1 - rate1), difference + math.hypot(high2 - rate2, rate1 - low1)


def summarise(run_dir: Path) -> dict[str, Any]:
    """Compute the summary of a run and write it to `summary.json` in its folder. Blocks; may be repeated.

    Works for a run that was stopped at any moment: what is not known is None.

    Raises:
        RunError: there is no such folder.
    """
    return write_summary(read_run(run_dir))


def write_summary(record: RunRecord) -> dict[str, Any]:
    """As `summarise`, for a run that is read already."""
    summary = compute(record)
    part = record.folder / f"{SUMMARY}.part"
    part.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    part.replace(record.folder / SUMMARY)
    return summary


def compute(record: RunRecord) -> dict[str, Any]:
    """The summary as a dict of JSON values."""
    config = {} if record.run is None else record.run.config
    return {
        "name": None if record.run is None else record.run.name,
        "preset": config.get("preset"),
        "algorithm": config.get("algorithm"),
        "seed": config.get("seed"),
        "operators": None if record.autonomous is None else not record.autonomous,
        "exploration": record.explored,
        "interrupted": record.timing.get("interrupted"),
        **_outcome(record),
        **_work(record),
        **_accounting(record),
        **_learning(record),
        "value": value_numbers(valued_episodes(record)),
        "recap": advantage_numbers(record),
        **_wall(record.timing),
        "versions": _versions(),
        "hardware": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "definitions": {"gain": GAIN_METHOD, "lost_episodes": LOST, "value": VALUE},
    }


def _outcome(record: RunRecord) -> dict[str, Any]:
    base, final, expert = (record.evaluation(name) for name in ("base", "final", "expert"))
    fleet = {
        name: _pooled(result, record.fleet_tasks)
        for name, result in (("base", base), ("final", final), ("expert", expert))
    }
    held_out = {task: _per_task(task, base, final, expert) for task in record.held_out_tasks}
    return {
        "base": _rate(fleet["base"]),
        "final": {**_rate(fleet["final"]), "version": None if final is None else final.version},
        "gain": _gain(fleet["base"], fleet["final"]),
        "expert": _rate(fleet["expert"]),
        "throughput": {name: _throughput(fleet[name]) for name in ("base", "final")},
        "per_task": {
            task: {**_per_task(task, base, final, expert), **_task_work(record.episodes, task)}
            for task in record.fleet_tasks
        },
        "held_out": {
            "base": _rate(_pooled(base, record.held_out_tasks))["success"],
            "final": _rate(_pooled(final, record.held_out_tasks))["success"],
            "per_task": {task: {**values, "final_interval": values["interval"]} for task, values in held_out.items()},
        },
    }


def _pooled(result: EvaluationResult | None, tasks: tuple[str, ...]) -> TaskResult | None:
    """The tasks counted as one; None unless every one of them was evaluated."""
    if result is None or not tasks or not all(task in result.tasks for task in tasks):
        return None
    pooled = result.pooled(tasks)
    return pooled if pooled.episodes else None


def _rate(result: TaskResult | None) -> dict[str, Any]:
    if result is None or not result.episodes:
        return {"success": None, "interval": None, "successes": None, "episodes": None}
    return {
        "success": result.success,
        "interval": list(result.interval),
        "successes": result.successes,
        "episodes": result.episodes,
    }


def _gain(base: TaskResult | None, final: TaskResult | None) -> dict[str, Any]:
    if base is None or final is None:
        return {"difference": None, "interval": None, "method": GAIN_METHOD}
    counts = [(result.successes, result.episodes) for result in (base, final)]
    return {
        "difference": final.success - base.success,
        "interval": list(newcombe_interval(counts[0], counts[1])),
        "method": GAIN_METHOD,
    }


def _throughput(result: TaskResult | None) -> float | None:
    return None if result is None or result.robot_s <= 0 else result.throughput


def _per_task(task: str, *results: EvaluationResult | None) -> dict[str, Any]:
    base, final, expert = (_rate(None if result is None else result.tasks.get(task)) for result in results)
    return {
        "base": base["success"],
        "base_interval": base["interval"],
        "final": final["success"],
        "interval": final["interval"],
        "expert": expert["success"],
    }


def _task_work(episodes: Iterable[EpisodeFacts], task: str) -> dict[str, int]:
    mine = [episode for episode in episodes if episode.task == task]
    return {
        "episodes": sum(not episode.aborted for episode in mine),
        "interventions": sum(len(episode.interventions) for episode in mine),
    }


def _work(record: RunRecord) -> dict[str, Any]:
    """What robots and people did; aborted episodes are no episodes, but their time and corrections count."""
    episodes = record.episodes
    human_steps = sum(episode.human_steps for episode in episodes)
    steps = sum(episode.num_steps for episode in episodes)
    operator_minutes = robot_minutes = None
    if record.run is not None:
        control_hz = record.run.embodiment.control_hz
        reset_s = float(record.run.config.get("fleet", {}).get("reset_s", 0.0))
        operator_minutes = human_steps / control_hz / 60
        robot_minutes = (steps / control_hz + reset_s * len(episodes)) / 60
    return {
        "episodes": len(record.collected),
        "aborted_episodes": len(episodes) - len(record.collected),
        "demonstrated_episodes": sum(episode.policy_version is None for episode in record.collected),
        "interventions": sum(len(episode.interventions) for episode in episodes),
        "steps": steps,
        "human_steps": human_steps,
        "operator_minutes": operator_minutes,
        "robot_minutes": robot_minutes,
    }


def _accounting(record: RunRecord) -> dict[str, Any]:
    """Where every recorded episode is. Top level: the fleet's; `demonstrations`: the lab's; `base_rollouts`: what the
    base policy did alone. The last two were there before the fleet started."""

    def of(origin: str) -> dict[str, Any]:
        def mine(keys: Iterable[str]) -> list[str]:
            return [key for key in keys if _origin(key) == origin]

        recorded = mine(record.recorded or ()) or None  # no journal here: recorded on another machine, or nothing
        indexed = None if record.indexed is None else mine(record.indexed)
        settled = set(indexed or ()) | record.quarantined
        waiting = set(mine(record.stored | record.spooled)) - settled
        lost = None if recorded is None else len(set(recorded) - settled - waiting)
        return {
            "recorded_episodes": None if recorded is None else len(recorded),
            "indexed_episodes": None if indexed is None else len(indexed),
            "waiting_episodes": len(waiting),
            "lost_episodes": lost,
            "duplicate_episodes": None if indexed is None else len(indexed) - _distinct(indexed),
        }

    return {
        **of(""),
        "demonstrations": of(LAB_ACTOR),
        "base_rollouts": of(BASE_ACTOR),
        "quarantined": len(record.quarantined),
    }


def _origin(key: str) -> str:
    """Who recorded the episode under a key: the prefix of the actor's id, nothing for the fleet's robots."""
    actor_id = key.split("/")[1]
    return next((prefix for prefix in (LAB_ACTOR, BASE_ACTOR) if actor_id.startswith(prefix)), "")


def _distinct(keys: Iterable[str]) -> int:
    """Number of different episodes: an actor uses a sequence number once."""
    return len({(key.actor_id, key.sequence) for key in map(EpisodeKey.parse, keys)})


def _learning(record: RunRecord) -> dict[str, Any]:
    steps = [record.checkpoint_step] if record.checkpoint_step is not None else []
    own = laps(record.learner)
    if own:
        steps.append(own[-1]["step"])
    return {
        "publishes": sum(version > 0 for version in record.published),
        "learner_steps": max(steps, default=None),
        "learner_busy": busy(fleet_laps(record)),
        "freshness": {
            "episode_to_sampleable_s": _percentiles(finite(record.learner, "episode/sampleable_s")),
            "publish_to_swap_s": _percentiles(finite(swaps(record), "fleet/publish_to_swap_s")),
            "publish_to_staged_s": _percentiles(finite(swaps(record), "fleet/publish_to_staged_s")),
            "hops": as_json(hops.summary(record.hops)),
            "by_task": {task: as_json(found) for task, found in hops.by_task(record.hops).items()},
            "by_actor": {actor: as_json(found) for actor, found in hops.by_actor(record.hops).items()},
        },
        "staleness": _percentiles(finite(record.learner, "episode/staleness")),
    }


def busy(own: Sequence[Line]) -> float | None:
    """Share of its time in which the learner did not wait for batches; pauses at the data cap excluded.

    The mean of `learner/busy` over laps, weighted by their length without pauses: a lap that was all pause, in
    which nothing was trained, weighs nothing.
    """
    worked = [(line.get("learner/worked_s") or 0.0, line.get("learner/busy") or 0.0) for line in own]
    total = sum(worked_s for worked_s, _ in worked)
    return None if total <= 0 else sum(worked_s * share for worked_s, share in worked) / total


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": percentile(values, percent) if values else None for percent in (50, 99)}


def _wall(timing: Mapping[str, Any]) -> dict[str, Any]:
    """Minutes of wall-clock time, in total and per phase."""
    wall_s: Mapping[str, float] = timing.get("wall_s") or {}
    wall = {phase: seconds / 60 for phase, seconds in wall_s.items()}
    return {"wall_minutes": sum(wall.values()) if wall else None, "wall": wall}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
