"""Kills processes of a run at random, and takes its store away for a moment; then counts.

    python tests/chaos.py --kills 20          one debug run; prints a table; exit code 0 when nothing was lost

Every episode that an actor's journal says was recorded has to be in the learner's index exactly once, the lineage of
the last version has to tell every learner step exactly once, whichever process took it, and the run has to end
normally. The victims are found by their command lines, and only those of this run are touched.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from sop.broadcast import published_versions
from sop.buffer.segments import read_segment
from sop.core.layout import SegmentKey
from sop.lineage import learned_by
from sop.transport import DirectoryStore

ROLES = ("actor", "learner", "evaluator", "store")
MUST_BE_NONE = ("lost", "unknown", "duplicated", "steps_untold", "steps_told_twice")
OUTAGE_S = 0.5
"""How long the store is away: within the patience of every process that is waiting for it."""


def processes_of(folder: Path) -> dict[str, int]:
    """Role (`learner`, `robot-0`, `evaluator`) -> pid of the children of the run in `folder`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "sop" not in words or str(folder) not in words:
            continue
        command = words[words.index("sop") + 1]
        if command == "actor":
            found[words[words.index("--id") + 1]] = int(entry.name)
        elif command == "learner" and "--pretrain" not in words:
            found["learner"] = int(entry.name)
        elif command == "evaluate" and "--follow" in words:
            found["evaluator"] = int(entry.name)
    return found


def hit(folder: Path, role: str, rng: random.Random) -> str | None:
    """Strike once: what was hit, None when there was nothing of this role."""
    if role == "store":
        away = folder / "store.away"
        (folder / "store").rename(away)
        try:
            time.sleep(OUTAGE_S)
        finally:
            away.rename(folder / "store")
        return "store"
    alive = {
        name: pid
        for name, pid in processes_of(folder).items()
        if name.startswith("robot-" if role == "actor" else role)
    }
    if not alive:
        return None
    name = rng.choice(sorted(alive))
    try:
        os.kill(alive[name], signal.SIGKILL)
    except ProcessLookupError:
        return None
    return role


def strike(
    run: "subprocess.Popen[bytes]", folder: Path, kills: int, every_s: float, rng: random.Random
) -> Counter[str]:
    """Strike `kills` times while the fleet records, waiting a random time of `every_s` on average in between."""
    hits: Counter[str] = Counter()
    while run.poll() is None and not (folder / "store" / "episodes").exists():
        time.sleep(0.05)
    while run.poll() is None and sum(hits.values()) < kills:
        time.sleep(rng.uniform(0.5, 1.5) * every_s)
        done = None if run.poll() is not None else hit(folder, rng.choice(ROLES), rng)
        if done is not None:
            hits[done] += 1
    return hits


def count(folder: Path) -> dict[str, int]:
    """Compare what the actors recorded with what the learner indexed."""
    journals = (folder / "actors").glob("robot-*/spool/journal")
    recorded = Counter(line for journal in journals for line in journal.read_text().splitlines())
    states = sorted((folder / "store" / "checkpoints").glob("*/state.json"))
    store = DirectoryStore(folder / "store")
    segments = [SegmentKey.parse(key) for key in json.loads(states[-1].read_text())["segments"]]
    keys = [key for segment in segments for key in read_segment(store, segment).episode_keys()]
    indexed = Counter(key for key in keys if key.startswith("episodes/"))
    newest = max(published_versions(store))
    generations = [pair for pair in learned_by(store, newest) if pair[0].version != 0]
    steps = Counter(draw.learner_step for _, lineage in generations for draw in lineage.draws)
    last = generations[0][0].learner_step if generations else 0
    return {
        "steps": last,
        "steps_untold": len(set(range(1, last + 1)) - steps.keys()),
        "steps_told_twice": sum(number - 1 for number in steps.values()),
        "recorded": sum(recorded.values()),
        "indexed": sum(indexed.values()),
        "lost": len(recorded.keys() - indexed.keys()),
        "unknown": len(indexed.keys() - recorded.keys()),
        "duplicated": sum(number - 1 for number in (*recorded.values(), *indexed.values())),
    }


def run_with_kills(
    runs: Path, kills: int, *, episodes: int, every_s: float, seed: int
) -> tuple[int, Counter[str], dict[str, int]]:
    """One debug run under fire (blocking): its exit code, what was hit, and the counts."""
    folder = runs / "chaos"
    command = [sys.executable, "-m", "sop", "run", "debug", "--runs", str(runs), "--name", "chaos"]
    command += ["--episodes", str(episodes), "--set", "fleet.speed=1.0", "--set", "learner.checkpoint_every=10"]
    with (runs / "chaos.log").open("wb") as log:
        run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            hits = strike(run, folder, kills, every_s, random.Random(seed))
            code = run.wait(300)
        finally:
            if run.poll() is None:
                run.kill()
    return code, hits, count(folder)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=150)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two strikes, on average")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        code, hits, counts = run_with_kills(
            Path(runs), options.kills, episodes=options.episodes, every_s=options.every, seed=options.seed
        )
        print((Path(runs) / "chaos.log").read_text()[-3000:])
    print("exit code", code, "| hits", dict(hits), "|", counts)
    whole = counts["recorded"] == counts["indexed"] > 0 and not any(counts[name] for name in MUST_BE_NONE)
    return 0 if code == 0 and whole and sum(hits.values()) >= options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
