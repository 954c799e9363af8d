"""The arms of an X-IND against their base policy, scene by scene, on scenes that nobody has seen.

    <folder>/seed1/<arm>/store   last policy  --.
    stream of seed1, "run"       last policy  --+
    --runs NAME=FOLDER{}         last policy  --+
    stream of seed1, "base"      version 0    --+--> the same fresh scenes --> 0 or 1 per scene --> paired differences

A difference of two policies on the same scenes needs several times fewer of them than one of two rates. Every seed has
scenes of its own. `pooled` holds for these policies (bootstrap over scenes); `over_seeds` is Student's interval with
the training seeds as the units, and is wide with three of them.

    .venv/bin/python benchmarks/paired_arms.py runs/x-alone [--episodes 100] [--arms filtered weighted]
        [--runs 'filtered alone=runs/alone/own-filtered-{}']        {} is the number of the seed; same base policies
    .venv/bin/python benchmarks/paired_arms.py runs/x-people --streams runs/recap-1 runs/recap-2 --betas 2
        --runs hg_dagger=runs/hg-{}                            runs without an experiment; the folder gets the result
    .venv/bin/python benchmarks/paired_arms.py runs/x-five --pool runs/x-fast runs/x-fresh     seeds of two comparisons
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import numpy.typing as npt
import torch

from sop.broadcast import fetch_manifest, published_versions
from sop.core.policy import Conditioning
from sop.experiments.arm import Setup
from sop.experiments.measures import SEED_OFFSET, load_policy, success
from sop.experiments.plan import ARMS, FULL
from sop.experiments.training import STORE
from sop.robots import make_robot
from sop.runs import open_run
from sop.transport import open_store

BASE, RUN = "base", "run"
FRESH = 2**18
"""So far behind the scenes of X-IND's own evaluations, and before those of its look-aheads."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantiles of Student's t with n - 1 degrees of freedom."""


Outcomes = dict[str, dict[str, npt.NDArray[np.int8]]]
"""Policy -> seed -> 1 or 0 per scene."""


class Job(NamedTuple):
    """One policy on the scenes of one seed."""

    folder: str
    """Of the experiment."""
    place: str
    """Of a run: the stream's, or one of `--runs`."""
    seed: str
    arm: str
    """`base`, `run`: the last policy of the run at `place`, asked as its manifest says; else an arm."""
    begin: int
    """First scene, counted from the fresh ones."""
    episodes: int
    """Per task."""
    guidance: float | None = None
    """Asked for good actions with this beta; None: as the manifest says."""


def outcomes(job: Job) -> npt.NDArray[np.int8]:
    """1 or 0 per scene, tasks in a row, of a last policy asked for good, or of the base (blocking)."""
    torch.set_num_threads(1)
    folder, place, seed, arm, begin, episodes, guidance = job
    run = open_run(place)
    store = run.store if arm in {BASE, RUN} else open_store(str(Path(folder) / seed / arm / STORE))
    version = 0 if arm == BASE else max(published_versions(store))
    manifest, policy = fetch_manifest(store, version), load_policy(store, version)
    told = True if arm in ARMS and ARMS[arm].kind is not None else None
    conditioning = manifest.conditioning if arm == RUN else Conditioning(advantage_indicator=told)
    if guidance is not None:
        conditioning = Conditioning(advantage_indicator=True, guidance=guidance)
    first = run.config.evaluation.first_seed + SEED_OFFSET + FRESH + begin
    robot = make_robot(run.config.robot)
    found = [
        success(robot, policy, conditioning, [task], [scene])[task][0]
        for task in run.config.robot.fleet_tasks
        for scene in range(first, first + episodes)
    ]
    robot.close()
    return np.asarray(found, np.int8)


def compared(arm: list[npt.NDArray[np.int8]], base: list[npt.NDArray[np.int8]]) -> dict[str, Any]:
    """Rates and paired differences of an arm, over all seeds; arrays as `outcomes` gives them, one per seed."""
    differences = [np.subtract(one, other, dtype=np.float64) for one, other in zip(arm, base, strict=True)]
    per_seed = [float(one.mean()) for one in differences]
    rng = np.random.default_rng(0)
    drawn = [one[rng.integers(0, len(one), (10_000, len(one)))].mean(axis=1) for one in differences]
    mean, seeds = float(np.mean(per_seed)), len(per_seed)
    found: dict[str, Any] = {
        "success": [float(one.mean()) for one in arm],
        "per_seed": per_seed,
        "pooled": {"difference": mean, "interval": np.quantile(np.mean(drawn, axis=0), [0.025, 0.975]).tolist()},
        "better": int(sum((one > 0).sum() for one in differences)),
        "worse": int(sum((one < 0).sum() for one in differences)),
        "scenes": int(sum(len(one) for one in differences)),
    }
    if seeds in STUDENT:
        half = STUDENT[seeds] * float(np.std(per_seed, ddof=1)) / seeds**0.5
        found["over_seeds"] = {"difference": mean, "interval": [mean - half, mean + half]}
    return found


def jobs_of(setup: Setup, options: argparse.Namespace) -> dict[tuple[str, str], Job]:
    """The policies that are compared, each at every seed: (name, seed) -> what is to be done."""
    further = dict(one.split("=", 1) for one in options.runs)
    guided = {f"{RUN}, beta {beta:g}": beta for beta in options.betas}
    named = setup.plan.arms if options.arms is None else options.arms
    jobs = {}
    for name in (BASE, RUN, *guided, *further, *(() if options.streams else named)):
        for number, seed in enumerate(sorted(setup.streams)):
            place = further[name].format(seed.removeprefix("seed")) if name in further else setup.streams[seed]
            jobs[name, seed] = Job(
                folder=str(options.folder),
                place=place,
                seed=seed,
                arm=RUN if name in further or name in guided else name,
                begin=options.skip + number * options.episodes,
                episodes=options.episodes,
                guidance=guided.get(name),
            )
    return jobs


def _setup(options: argparse.Namespace) -> Setup:
    if options.streams is None:
        return Setup.read(options.folder)
    return Setup(plan=FULL, streams={f"seed{open_run(place).config.seed}": place for place in options.streams})


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="arms of an X-IND against their base, paired by scene")
    parser.add_argument("folder", type=Path, help="of an experiment that has ended; gets the result")
    parser.add_argument("--episodes", type=int, default=100, help="fresh scenes per task and seed (default 100)")
    parser.add_argument("--skip", type=int, default=0, help="scenes that earlier comparisons have used (default 0)")
    parser.add_argument("--arms", nargs="*", help="some of its arms (default: all)")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=FOLDER", help="further runs, {} for the seed")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--streams", nargs="+", metavar="RUN", help="runs, in place of an experiment's streams")
    parser.add_argument("--pool", nargs="+", type=Path, metavar="FOLDER", help="run nothing, pool earlier comparisons")
    parser.add_argument("--betas", nargs="*", type=float, default=[], help="ask the streams' own policies so, too")
    options = parser.parse_args(namespace=argparse.Namespace(quick=False))
    options.out = options.folder
    began = time.monotonic()
    if options.pool is not None:
        report(earlier(options.pool), options, began)
        return
    setup = _setup(options)
    seeds, jobs = sorted(setup.streams), jobs_of(setup, options)
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        done = dict(zip(jobs, pool.map(outcomes, jobs.values(), chunksize=1), strict=True))
    names = list(dict.fromkeys(name for name, _ in jobs))
    report({name: {seed: done[name, seed] for seed in seeds} for name in names}, options, began)


def earlier(folders: list[Path]) -> Outcomes:
    """Outcomes that earlier comparisons have left, of the policies that all of them have.

    Raises:
        SystemExit: two of them are of one seed.
    """
    found: list[Outcomes] = []
    for folder in folders:
        kept = json.loads((folder / "paired.json").read_text())
        found.append(
            {
                name: {
                    seed: np.array(list(text), np.int8)
                    for seed, text in zip(kept["seeds"], one["outcomes"], strict=True)
                }
                for name, one in kept["arms"].items()
            }
        )
    seeds = [seed for each in found for seed in each[BASE]]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"--pool takes comparisons of different seeds, these are of {', '.join(seeds)}")
    shared = [name for name in found[0] if all(name in other for other in found)]
    return {name: {seed: one for each in found for seed, one in each[name].items()} for name in shared}


def report(done: Outcomes, options: argparse.Namespace, began: float) -> None:
    """Print the table, write `paired.json`."""
    seeds = sorted(done[BASE])
    base, last = ([done[name][seed] for seed in seeds] for name in (BASE, RUN))
    found = {name: compared([one[seed] for seed in seeds], base) for name, one in done.items()}
    for name, one in done.items():
        own = [one[seed] for seed in seeds]
        against = compared(last, own)
        found[name]["run_minus_it"] = {
            key: against[key] for key in ("per_seed", "pooled", "over_seeds") if key in against
        }
        found[name]["outcomes"] = ["".join(map(str, each.tolist())) for each in own]
    rows = [
        [
            name,
            *(f"{100 * rate:.1f}" for rate in one["success"]),
            *(_points(one.get(key)) for key in ("pooled", "over_seeds")),
            *(_points(one["run_minus_it"].get(key)) for key in ("pooled", "over_seeds")),
        ]
        for name, one in found.items()
    ]
    columns = ["minus base: these policies", "seeds as units", "run minus it: these policies", "seeds as units"]
    harness.print_table("success, and differences in points, on fresh scenes", ["policy", *seeds, *columns], rows)
    values = {"seeds": seeds, "scenes": len(base[0]), "wall_s": time.monotonic() - began, "arms": found}
    print(f"Numbers: {harness.write_result('paired', values, options)}")


def _points(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    main()
