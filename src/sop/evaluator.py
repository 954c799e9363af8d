"""The evaluator's process: judges published policies and stores the results.

evaluations/<version>/base.json, final.json     all tasks, many episodes
evaluations/<version>/progress.json             fleet tasks, few episodes, while the fleet runs
evaluations/00000000/expert.json                the scripted expert: the ceiling
evaluations/<version>/final-bad-1.json          asked for something else than the manifest says: good, bad or nothing,
                                                and with which guidance
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from types import MappingProxyType

import torch

from sop.broadcast import fetch_manifest, published_versions
from sop.core import layout
from sop.core.errors import AlreadyExists, NotFound, RunError, StoreUnavailable
from sop.core.evaluation import EvaluationResult
from sop.core.policy import Conditioning
from sop.evaluation import Driver, ExpertDriver, PolicyDriver, evaluate_task, merge, shard
from sop.policies import make_policy
from sop.processes import Job, Process, Spawn, say_at_work, spawn_here
from sop.robots import make_robot
from sop.runs import Run
from sop.vouched import fetch_vouched

_log = logging.getLogger(__name__)
PROGRESS_SEED_OFFSET = 2**20
"""Progress evaluations use other scenes than base and final ones: looking often chooses nothing."""
FOLLOW_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to evaluate."""

    name: str
    """`base`, `final`, `progress` or `expert`; names the stored result."""
    version: int
    """Policy version; for the expert the version beside which the result is stored."""
    tasks: tuple[str, ...]
    episodes: int
    """Per task."""
    first_seed: int
    conditioning: Conditioning | None = None
    """What the policy is asked for; None for what its manifest says."""

    @property
    def key(self) -> str:
        """Where the result is stored."""
        return layout.evaluation(self.version, self.name)


def make_request(run: Run, name: str, version: int) -> Request:
    """The request that belongs to a name, by the run's configuration."""
    config, robot = run.config.evaluation, run.config.robot
    if name == "progress":
        seed = config.first_seed + PROGRESS_SEED_OFFSET
        return Request(
            name=name,
            version=version,
            tasks=robot.fleet_tasks,
            episodes=config.progress_episodes_per_task,
            first_seed=seed,
        )
    return Request(
        name=name,
        version=version,
        tasks=robot.all_tasks,
        episodes=config.episodes_per_task,
        first_seed=config.first_seed,
    )


ASKED: dict[str, bool | None] = {"good": True, "bad": False, "nothing": None}
"""What a policy with an advantage indicator can be asked for -> the indicator."""


def asking(request: Request, ask: str, guidance: float) -> Request:
    """The same evaluation with another conditioning than the manifest's, stored under a name of its own.

    Raises:
        ValueError: `ask` is not in `ASKED`, or `guidance` is negative or not finite.
    """
    if ask not in ASKED:
        raise ValueError(f"--ask must be one of {', '.join(ASKED)}, got {ask!r}")
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"--guidance must be 0 or more and finite, got {guidance}")
    conditioning = Conditioning(advantage_indicator=ASKED[ask], guidance=guidance)
    return replace(request, name=f"{request.name}-{ask}-{guidance:g}", conditioning=conditioning)


def evaluate(
    run: Run,
    request: Request,
    *,
    workers: int,
    stop: Event,
    spawn: Spawn = spawn_here,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> EvaluationResult:
    """Evaluate with several processes and store the result (blocking); a stored one is returned as it is.

    Args:
        run, request: what to evaluate.
        workers: processes; 1 evaluates in this one.
        stop: ends it.
        spawn: starts the processes.
        environment: variables of these processes alone, e.g. whose identity they have.

    Raises:
        RunError: a worker failed, or it was stopped: nothing is stored.
    """
    try:
        return EvaluationResult.from_json(run.store.get(request.key))
    except NotFound:
        pass
    if workers == 1 and spawn is spawn_here:
        result = evaluate_part(run, request, 0, 1)
    else:
        result = merge(_evaluate_in_processes(run, request, workers, stop, spawn, environment=environment))
    try:
        run.store.put(request.key, result.to_json())
    except AlreadyExists:
        _log.info("%s was stored by somebody else meanwhile", request.key)
    return result


def evaluate_part(run: Run, request: Request, part: int, parts: int) -> EvaluationResult:
    """Every `parts`-th episode of a request, in this process (blocking)."""
    torch.set_num_threads(1)
    robot = make_robot(run.config.robot)
    seeds = shard(request.first_seed, request.episodes, part, parts)
    published, online, version = None, 0, None
    driver: Driver = ExpertDriver(robot)
    if request.name != "expert":
        manifest, weights = fetch_vouched(run, request.version)
        policy = make_policy(manifest.spec)
        policy.load(weights, request.version)
        driver = PolicyDriver(robot, policy, request.conditioning or manifest.conditioning)
        published, online, version = manifest.created_utc_ns, manifest.online_episodes, request.version
    reset_s = run.config.fleet.reset_s
    tasks = {task: evaluate_task(robot, driver, task, seeds, reset_s) for task in request.tasks if seeds}
    robot.close()
    return EvaluationResult(
        version=version,
        name=request.name,
        first_seed=request.first_seed,
        tasks=tasks,
        online_episodes=online,
        utc_ns=time.time_ns(),
        published_utc_ns=published,
    )


def follow(run: Run, stop: Event) -> None:
    """Evaluate the newest policy again and again until stopped (blocking): the `progress` of a run."""
    done = 0
    while not stop.is_set():
        try:
            newest = max(published_versions(run.store, after=done), default=done)
            if newest > done:
                evaluate(run, make_request(run, "progress", newest), workers=1, stop=stop)
                done = newest
                say_at_work()
                continue
        except NotFound as error:
            _log.info("version %d is gone already: %s", newest, error)
            done = newest
        except StoreUnavailable as error:
            _log.warning("the evaluation waits for the store: %s", error)
        stop.wait(FOLLOW_PAUSE_S)


def newest_version(run: Run) -> int:
    """The newest published version.

    Raises:
        RunError: there is none.
    """
    versions = list(published_versions(run.store))
    if not versions:
        raise RunError(f"{run.place} has no published policy yet")
    return fetch_manifest(run.store, versions[-1]).version


def _evaluate_in_processes(
    run: Run, request: Request, workers: int, stop: Event, spawn: Spawn, *, environment: Mapping[str, str]
) -> list[EvaluationResult]:
    workers = min(workers, request.episodes)
    where = (run.place,) if spawn is spawn_here else run.address
    arguments = ["evaluate", *where, "--name", request.name.split("-")[0], "--version", str(request.version)]
    if request.conditioning is not None:
        _, ask, _ = request.name.split("-", 2)
        arguments += ["--ask", ask, "--guidance", str(request.conditioning.guidance)]
    with TemporaryDirectory() as folder:
        jobs = [
            Job(
                name=f"evaluation-{part}",
                arguments=[*arguments, "--part", f"{part}/{workers}"],
                output=Path(folder) / f"{part}.json",
                errors=run.folder / "logs" / "evaluation.log",
                environment=environment,
            )
            for part in range(workers)
        ]
        (run.folder / "logs").mkdir(parents=True, exist_ok=True)
        processes: list[Process] = []
        try:
            processes += [spawn(job) for job in jobs]
            while not stop.is_set() and any(process.poll() is None for process in processes):
                stop.wait(0.1)
            if stop.is_set():
                raise RunError(f"the evaluation {request.key} was stopped")
            failed = [process.poll() for process in processes if process.poll()]
            if failed:
                log = run.folder / "logs" / "evaluation.log"
                raise RunError(f"a worker of the evaluation {request.key} ended with code {failed[0]}: see {log}")
            return [EvaluationResult.from_json(job.output.read_bytes().splitlines()[-1]) for job in jobs]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
