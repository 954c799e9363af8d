"""How busy the learner is while four actors stream: the real processes, and the same step without everything else.

    sop actor x 4   ----- episodes, in real time ----->  store, bus  --->  sop learner
    (all the time)                                                           |  stopped and continued in turns
    bare step: policy, algorithm, optimizer of the learner, one batch  <-----+

Two numbers: the share of its time in which the learner does not wait for a batch, as it reports it itself; and its
steps per second over those of the bare step. The bare step runs in a process of its own, with the same threads and
the same actors beside it, while the learner and its decoding processes are stopped (SIGSTOP): the ratio is the share
of "what the processor leaves it" that the learner turns into steps.

    .venv/bin/python benchmarks/experience_learner.py --bare RUN       # that process; answers `workers.serve`
"""

import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import RESULTS
from workers import Worker, serve

from sop.algorithms import Algorithm
from sop.buffer import AdaptiveSampler, BatchLoader, EpisodeIndex, EpisodeRow, open_payloads
from sop.buffer.windows import start_runs
from sop.core import layout
from sop.core.experience import Batch, Source
from sop.core.layout import EpisodeKey
from sop.learner import Optimization
from sop.learner.optimization import constant_after_warmup
from sop.metrics import read_metrics
from sop.presets import make_config
from sop.processes import Children, stop_with_parent
from sop.runs import Run, create_run, open_run
from sop.system import ActorOptions, make_learner_policy, run_actor, run_pretraining

ACTORS = 4
SETTLE_S = 2.0
"""After the learner is continued: it takes in what was recorded meanwhile."""
_SETTINGS = {
    "fleet.episodes": "null",
    "learner.max_draws_per_start": "0",  # never pause because there is little new
    "learner.checkpoint_every": "200",
    "pretrain.steps": "5",  # an untrained policy costs as much as a good one, and its operators correct more
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How long is measured."""

    robot: str
    """`metaworld` as in the demo, or `toy`: its images are made 64 px high as well."""
    demonstrations_per_task: int
    rounds: int
    lap_s: float
    """Seconds of the learner, and of the bare step, per round."""


FULL = Size(robot="metaworld", demonstrations_per_task=8, rounds=6, lap_s=12.0)
QUICK = Size(robot="toy", demonstrations_per_task=3, rounds=1, lap_s=2.5)


def measure(size: Size, rounds: int | None = None) -> dict[str, Any]:
    """`learner_busy`, `step_rate_over_bare` and what they were made of: medians over rounds. Blocks for minutes.

    Raises:
        RunError: a process failed; its log is part of the message.
    """
    robot = size.robot if size.robot == "toy" or find_spec("metaworld") else "toy"
    RESULTS.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="learner-", dir=RESULTS))
    try:
        run = prepare(folder / "run", robot, size.demonstrations_per_task)
        with ExitStack() as stack:
            children = Children(run.folder / "logs")
            stack.callback(children.stop_all)
            laps = _rounds(stack, children, run, size, rounds or size.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "learner_busy": statistics.median(lap["busy"] for lap in laps),
        "step_rate_over_bare": statistics.median(lap["steps_per_s"] / lap["bare_steps_per_s"] for lap in laps),
        "learner": {
            "robot": robot,
            "actors": ACTORS,
            "batch_size": run.config.learner.batch_size,
            **{name: statistics.median(lap[name] for lap in laps) for name in laps[0]},
            "rounds": laps,
        },
    }


def prepare(folder: Path, robot: str, demonstrations_per_task: int) -> Run:
    """A new run with demonstrations and a base policy (blocking); the policy is of the demo's size on any robot."""
    changes = dict(_SETTINGS)
    if robot == "toy":
        demo = make_config("metaworld")
        changes |= {"robot.image_size": str(demo.robot.image_size), "fleet.speed": "1"}
        changes |= {"policy.settings": '{"text_encoder": "hash"}'}  # quick to load; the rest is the demo's size
        changes |= {"learner.batch_size": str(demo.learner.batch_size), "learner.publish_every": "25"}
        changes |= {"fleet.reset_s": "1"}
    changes["fleet.num_actors"] = str(ACTORS)
    changes["pretrain.demonstrations_per_task"] = str(demonstrations_per_task)
    preset = "debug" if robot == "toy" else "metaworld"
    run = create_run(folder, make_config(preset, [f"{name}={value}" for name, value in changes.items()]))
    total = demonstrations_per_task * len(run.config.robot.all_tasks)
    lab = ActorOptions(actor_id=f"{layout.LAB_ACTOR}0", demonstrate=True, speed=0.0, end_sequence=total)
    run_actor(run, lab, threading.Event())
    run_pretraining(run, threading.Event())
    return run


def _rounds(stack: ExitStack, children: Children, run: Run, size: Size, count: int) -> list[dict[str, float]]:
    """Learner and bare step in turns, actors beside both."""
    for number in range(ACTORS):
        children.start(f"robot-{number}", ["actor", run.place, "--id", f"robot-{number}"])
    children.start("learner", ["learner", run.place])
    bare = stack.enter_context(Worker([sys.executable, __file__, "--bare", run.place]))
    stack.callback(_signal, children.pid("learner"), signal.SIGCONT)  # a stopped process cannot be ended
    bare.ask(do="steps", seconds=0.5)
    while len(_laps(run, 0.0)) < 2:
        children.watch()
        time.sleep(0.2)
    rounds = []
    for _ in range(count):
        time.sleep(SETTLE_S)
        began, thread, process = time.time(), *_processor_s(children.pid("learner"))
        time.sleep(size.lap_s)
        while len(_laps(run, began)) < 3:
            children.watch()
            time.sleep(0.2)
        _signal(children.pid("learner"), signal.SIGSTOP)
        wall, used = time.time() - began, _processor_s(children.pid("learner"))
        lap = _lap(run, began)
        lap["cpu_s_per_step"] = (used[0] - thread) / wall / lap["steps_per_s"]
        lap["process_cpu_s_per_step"] = (used[1] - process) / wall / lap["steps_per_s"]
        answer = bare.ask(do="steps", seconds=size.lap_s)
        _signal(children.pid("learner"), signal.SIGCONT)
        rounds.append(lap | {f"bare_{name}": value for name, value in answer.items()} | {"load": os.getloadavg()[0]})
    return rounds


def _processor_s(pid: int) -> tuple[float, float]:
    """Processor time of a process's first thread, which trains, and of all its threads."""
    threads = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process(pid).threads()}
    return threads[pid], sum(threads.values())


def _lap(run: Run, began: float) -> dict[str, float]:
    """The learner's rate and busy share between the first and the last of its reports since `began`."""
    first, *lines = _laps(run, began)
    worked = sum(line["learner/worked_s"] for line in lines)
    busy = sum(line["learner/worked_s"] * line["learner/busy"] for line in lines)
    steps, seconds = lines[-1]["step"] - first["step"], lines[-1]["utc_s"] - first["utc_s"]
    return {"busy": busy / worked, "steps_per_s": steps / seconds, "seconds": seconds}


def _laps(run: Run, began: float) -> list[dict[str, float]]:
    """The learner's reports since a moment (UTC seconds), the one before training left out."""
    lines = read_metrics(run.folder / "metrics" / "learner.jsonl")
    return [line for line in lines if line["utc_s"] >= began and line.get("learner/busy") is not None]


def _signal(pid: int, number: signal.Signals) -> None:
    """To a process and the processes that it started: each child of ours leads a session."""
    if os.path.exists(f"/proc/{pid}"):  # noqa: PTH110 - a process, not a file
        os.killpg(pid, number)


class BareStep:
    """The learner's training step on one batch, again and again; nothing else.

    Args:
        place: of the run.
    """

    def __init__(self, place: str) -> None:
        run = open_run(place)
        config = run.config.learner
        torch.set_num_threads(config.threads)
        self._policy, self._algorithm = make_learner_policy(run)
        self._optimization = Optimization(self._policy.module, config, constant_after_warmup(config.warmup_steps))
        self._generator = torch.Generator().manual_seed(0)
        self._batch = _first_batch(run, self._algorithm, self._policy.spec.action_horizon)

    def steps(self, seconds: float) -> Mapping[str, Any]:
        """Steps per second of wall clock, and processor seconds per step."""
        start, busy, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < seconds:
            losses = self._algorithm.loss(self._policy, self._batch, self._generator)
            self._optimization.step(losses)
            losses.detach().float().cpu().numpy()
            count += 1
        wall = time.perf_counter() - start
        return {"steps_per_s": count / wall, "cpu_s_per_step": (time.process_time() - busy) / count}


def _first_batch(run: Run, algorithm: Algorithm, horizon: int) -> Batch:
    """A batch of demonstrations, loaded as the learner loads it."""
    index = EpisodeIndex(run.config.robot.all_tasks)
    payloads = open_payloads(run.store, run.folder / "cache", memory_bytes=1 << 30, disk_bytes=0)
    for text in sorted(run.store.keys(f"{layout.DEMONSTRATIONS}/{layout.LAB_ACTOR}")):
        key, encoded = EpisodeKey.parse(text), payloads.get(text)
        index.add(
            EpisodeRow(
                episode_id=key.episode_id,
                actor_id=key.actor_id,
                sequence=key.sequence,
                task=encoded.header.task,
                source=Source.OFFLINE,
                num_steps=encoded.num_steps,
                human_steps=encoded.num_steps,
                num_interventions=1,
                policy_version=None,
                outcome=encoded.outcome,
                start_runs=tuple(start_runs(algorithm.annotate(encoded), horizon)),
                end_utc_ns=encoded.header.end_utc_ns,
                indexed_utc_ns=0,
            )
        )
    sampler = AdaptiveSampler(index, run.config.sampler, seed=0)
    size = run.config.learner.batch_size
    loader = BatchLoader(index, payloads, algorithm.annotate, lambda: sampler.draw(size), horizon=horizon, depth=1)
    batch = loader.load(sampler.draw(size))
    loader.close()
    return batch


def main() -> None:
    """The process that takes bare steps."""
    stop_with_parent()
    bare = BareStep(sys.argv[sys.argv.index("--bare") + 1])
    serve({"steps": bare.steps})


if __name__ == "__main__":
    main()
