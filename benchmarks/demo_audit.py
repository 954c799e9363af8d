"""The books of the demonstration over TLS: what was acknowledged is indexed once, the rest waits, and what it cost."""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from demo_fleet import AUDITOR, JOINED, REVOKED, DemoFleet

from sop.core.layout import EpisodeKey, from_lab
from sop.report.record import RunRecord, read_run

BOOKS = (
    "recorded",
    "acknowledged",
    "indexed",
    "lost",
    "duplicated",
    "strangers",
    "quarantined",
    "waiting",
    "published",
)
"""Values of the result that are printed one by one."""
IN_FORCE_S = 60.0
"""A revocation is in force within this time."""
IN_FORCE = ("to_last_write_s", "to_refused_s", "to_bus_dropped_s")


def close_books(place: Path, fleet: DemoFleet, facts: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Add to `facts` what the run left behind (blocking; every episode is read).

    Args:
        place: folder of the run, with the spools of all robots.
        fleet: its auditor reads the store.
        facts: what happened.
        options: with `compare`, a plain run.
    """
    os.environ.update(fleet.environment(AUDITOR))
    record = read_run(place)
    summary = json.loads((place / "summary.json").read_text())
    success = {"over TLS": _success(summary)}
    if options.compare is not None:
        plain = json.loads((options.compare / "summary.json").read_text())
        if (plain["preset"], plain["seed"], plain["algorithm"]) != tuple(
            summary[name] for name in ("preset", "seed", "algorithm")
        ):
            raise RuntimeError(f"{options.compare} is a run of another preset, seed or algorithm")
        success["plain"] = _success(plain)
    result = {**facts, **_books(record), "success": success, "per_robot_hour": _per_robot_hour(record, facts)}
    per_actor = {name: Counter(_actor(key) for key in keys) for name, keys in _sets(record).items()}
    for name in REVOKED:
        result["revoked"][name] |= {kind: counts[name] for kind, counts in per_actor.items()}
    for name in JOINED:
        result["joined"][name] |= {kind: counts[name] for kind, counts in per_actor.items()}
    result["wall_minutes"] = summary["wall_minutes"]
    return result | {"violations": violations(result)}


def violations(result: dict[str, Any]) -> list[str]:
    """What must not be, in words; none when all is well."""
    found = [
        f"{result[name]} episodes {what}"
        for name, what in (
            ("lost", "were acknowledged, but are not indexed"),
            ("duplicated", "are indexed more than once"),
            ("strangers", "are indexed, but nobody recorded them"),
            ("quarantined", "were quarantined"),
        )
        if result[name]
    ]
    for name, facts in result["revoked"].items():
        late = {kind for kind in IN_FORCE if facts[kind] is None or facts[kind] >= IN_FORCE_S}
        found += [f"{name}: {kind} is {facts[kind]}, not less than {IN_FORCE_S:.0f}" for kind in sorted(late)]
        if not facts["alive"]:
            found.append(f"{name} died when it was revoked")
    found += [f"{name} contributed nothing" for name, facts in result["joined"].items() if not facts["indexed"]]
    if result["success"]["over TLS"][1] is None:
        found.append("there is no final evaluation")
    return found


def _sets(record: RunRecord) -> dict[str, set[str]]:
    recorded = {key for key in record.recorded or () if not from_lab(key)}
    waiting = {key for key in record.spooled if not from_lab(key)}
    return {
        "recorded": recorded,
        "waiting": waiting,
        "acknowledged": recorded - waiting,
        "indexed": {key for key in record.indexed or () if not from_lab(key)},
    }


def _books(record: RunRecord) -> dict[str, int]:
    sets = _sets(record)
    indexed = [key for key in record.indexed or () if not from_lab(key)]
    numbers = Counter((parsed.actor_id, parsed.sequence) for parsed in map(EpisodeKey.parse, indexed))
    return {
        **{name: len(keys) for name, keys in sets.items()},
        "lost": len(sets["acknowledged"] - sets["indexed"]),
        "duplicated": sum(count - 1 for count in numbers.values()),
        "strangers": len(sets["indexed"] - sets["recorded"]),
        "quarantined": len(record.quarantined),
        "published": len(record.published),
    }


def _per_robot_hour(record: RunRecord, facts: dict[str, Any]) -> dict[str, float]:
    """Bytes on the wire (TLS, HTTP and NATS included) of those that joined, per hour; and of all stored episodes, per
    hour of the robots' own time."""
    hours = sum(robot["hours"] for robot in facts["joined"].values())
    names = next(iter(facts["joined"].values()))["wire"]
    wire = {name: sum(robot["wire"][name] for robot in facts["joined"].values()) / hours for name in names}
    if record.store is None or not record.episodes:
        return wire
    stored = sum(len(record.store.get(episode.key)) for episode in record.episodes)
    acting_s = sum(episode.end_utc_ns - episode.start_utc_ns for episode in record.episodes) / 1e9
    return wire | {
        "episodes_while_acting": stored / acting_s * 3600,
        "bytes_per_episode": stored / len(record.episodes),
    }


def _success(summary: dict[str, Any]) -> tuple[float | None, float | None]:
    """Of base and final policy."""
    base, final = summary["base"], summary["final"]
    return (None if base is None else base["success"], None if final is None else final["success"])


def _actor(key: str) -> str:
    return key.split("/")[1]
