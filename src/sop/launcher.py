"""`sop run`: one command that starts everything a run needs on this machine, in order, and ends it in order.

    setup -> demonstrations -> pretraining -> base evaluation -> fleet -> final evaluation -> report
             lab actors        learner        evaluator     |    actors,    evaluator
                                                            |    learner,
                                                            |    evaluator (progress)
                                                            |
                       when the algorithm asks for them:    `--> base rollouts -> warm-up -> fleet
                                                                 base actors      learner

Every phase leaves its result in the store and is skipped when it is there: that is what `--resume` is.
Ctrl-C ends the current phase, then writes the report of what there is.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event, Thread

import msgspec

from sop.algorithms import make_algorithm
from sop.broadcast import published_versions
from sop.core import layout
from sop.core.errors import NotFound, RunError
from sop.core.evaluation import EvaluationResult
from sop.core.events import ALL_LEARNED
from sop.core.experience import Collection
from sop.evaluator import evaluate, make_request, newest_version
from sop.live import Live
from sop.metrics import JsonlSink
from sop.monitor import Monitor, RunView
from sop.processes import Children, Job, Process, Spawn, spawn_here
from sop.report import describe, summarise, write_report
from sop.runs import Run
from sop.transport.identity import VARIABLE, load_identity

_log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.25
LEARNER_END_S = 300.0
"""A learner publishes and saves all its weights at its end; after so long it is killed."""
ROUGH_PHASE_S = {
    "demonstrations": 20.0,
    "pretraining": 40.0,
    "base evaluation": 60.0,
    "base rollouts": 30.0,
    "warm-up": 90.0,
    "final evaluation": 45.0,
}
"""First guesses for the time that is left; replaced by what the phases take."""


class Launcher:
    """Runs the phases of one run.

    Args:
        run: made by `create_run` or opened to be resumed.
        stop: ends the current phase and leaves out the rest, except the report.
        identities: folder with an identity per process, named like the process; None: nobody has one.
        spawn: starts robots and evaluations; the learner is always a child of this process.
    """

    def __init__(self, run: Run, stop: Event, *, identities: Path | None = None, spawn: Spawn = spawn_here) -> None:
        self._run = run
        self._stop = stop
        self._identities = identities
        self._spawn = spawn
        self._where = (run.place,) if spawn is spawn_here else run.address
        self._children = Children(run.folder / "logs", on_restart=self._note, spawn=self._place)
        self._wall_s: dict[str, float] = _read_timing(run.folder)
        self._began = time.monotonic()
        self._monitor: Monitor
        self._live: Live
        algorithm = make_algorithm(run.config.algorithm, run.config.algorithm_settings, 1.0)
        self._collection = algorithm.collection
        warm_up = algorithm.warm_up
        self._warmup_steps = warm_up.warmup_max_steps if warm_up is not None and warm_up.install == "warmup" else None
        before_fleet = {"base rollouts": self._base_rollouts, "warm-up": self._warm_up}
        self._phases: dict[str, Callable[[], None]] = {
            "demonstrations": self._demonstrations,
            "pretraining": self._pretraining,
            "base evaluation": self._base_evaluation,
            **(before_fleet if algorithm.needs_rollouts else {}),
            "fleet": self._fleet,
            "final evaluation": self._final_evaluation,
        }

    def run(self) -> str:
        """Everything up to the report (blocking); returns the paragraph that says what happened.

        Raises:
            RunError: a phase failed; what was recorded until then is in the store.
        """
        run = self._run
        with ExitStack() as stack:
            bus = stack.enter_context(run.bus())
            metrics = stack.enter_context(closing(JsonlSink(run.folder / "metrics" / "fleet.jsonl")))
            self._monitor = Monitor(run.store, bus, run.manifest, metrics)
            self._live = stack.enter_context(Live())
            stack.callback(self._children.stop_all)
            for phase, work in self._phases.items():
                if not self._stop.is_set():
                    self._phase(phase, work)
        write_report(run.folder)
        return describe(summarise(run.folder))

    def _phase(self, name: str, work: Callable[[], None]) -> None:
        began = time.monotonic()
        self._monitor.view.phase = name
        self._monitor.view.phase_progress = None
        try:
            work()
        finally:
            self._wall_s[name] = self._wall_s.get(name, 0.0) + time.monotonic() - began
            timing = {"wall_s": self._wall_s, "interrupted": self._stop.is_set()}
            (self._run.folder / "timing.json").write_bytes(msgspec.json.encode(timing))

    def _demonstrations(self) -> None:
        """Two lab actors, as fast as the machine can, until every task has its demonstrations."""
        config = self._run.config
        total = config.pretrain.demonstrations_per_task * len(config.robot.all_tasks)
        self._record(layout.LAB_ACTOR, "--demonstrate", [total - total // 2, total // 2])

    def _base_rollouts(self) -> None:
        """The base policy alone, as fast as the machine can, until every fleet task has its rollouts."""
        settings, num_tasks = self._run.config.rollouts, len(self._run.config.robot.fleet_tasks)
        workers = min(settings.workers, settings.episodes_per_task)
        rounds = [settings.episodes_per_task // workers] * workers
        rounds[0] += settings.episodes_per_task % workers
        self._record(layout.BASE_ACTOR, "--rollout", [num_tasks * number for number in rounds])

    def _record(self, prefix: str, flag: str, shares: Sequence[int]) -> None:
        """One actor per share, until all have recorded theirs; what is in the store already counts."""
        if self._count_offline(prefix) >= sum(shares):
            return
        names = [f"{prefix}{number}" for number in range(len(shares))]
        for name, share in zip(names, shares, strict=True):
            arguments = ["actor", *self._where, "--id", name, flag, "--speed", "0", "--end", str(share)]
            self._start(name, arguments)

        def look(view: RunView) -> bool:
            view.phase_progress = (self._count_offline(prefix), sum(shares))
            return not all(self._children.finished(name) for name in names)

        self._watch(look)
        self._children.stop(*names)

    def _pretraining(self) -> None:
        if 0 in published_versions(self._run.store):
            return
        self._start("pretraining", ["learner", self._run.place, "--pretrain"], who="learner")
        steps = self._run.config.pretrain.steps

        def look(view: RunView) -> bool:
            view.phase_progress = (0 if view.learner is None else view.learner.learner_step, steps)
            return not self._children.finished("pretraining")

        self._watch(look)
        self._children.stop("pretraining")
        self._monitor.view.learner = None
        if not self._stop.is_set() and 0 not in published_versions(self._run.store):
            tail = self._children.log_tail("pretraining")
            raise RunError(f"pretraining ended without a base policy; its log ends so:\n{tail}")

    def _warm_up(self) -> None:
        """The learner gets ready on what is there, and publishes version 1; the fleet's learner goes on from it."""
        if self._is_warm():
            return
        self._start("warm-up", ["learner", self._run.place, "--warmup"], who="learner")

        def look(view: RunView) -> bool:
            if self._warmup_steps is not None and view.learner is not None:
                view.phase_progress = (view.learner.learner_step, self._warmup_steps)
            return not self._children.finished("warm-up")

        self._watch(look)
        self._children.stop("warm-up")
        self._monitor.view.learner = None
        if not self._stop.is_set() and not self._is_warm():
            tail = self._children.log_tail("warm-up")
            raise RunError(f"the warm-up ended without a policy; its log ends so:\n{tail}")

    def _base_evaluation(self) -> None:
        progress = ("progress",) if self._run.config.evaluation.progress_episodes_per_task else ()
        for name in ("base", "expert", *progress):  # the base on the scenes of progress evaluations: where they start
            self._evaluate(name, 0)

    def _final_evaluation(self) -> None:
        self._evaluate("final", newest_version(self._run))

    def _evaluate(self, name: str, version: int) -> None:
        request = make_request(self._run, name, version)
        results: list[EvaluationResult] = []
        errors: list[RunError] = []

        def work() -> None:
            try:
                workers = self._run.config.evaluation.workers
                results.append(
                    evaluate(
                        self._run,
                        request,
                        workers=workers,
                        stop=self._stop,
                        spawn=self._spawn,
                        environment=self._identity_of("evaluator"),
                    )
                )
            except RunError as error:
                errors.append(error)

        thread = Thread(target=work, name="evaluation")
        thread.start()
        self._watch(lambda _: thread.is_alive())
        thread.join()
        if errors and not self._stop.is_set():
            raise errors[0]

    def _fleet(self) -> None:
        """Actors, learner and evaluator until the learner has learned from all episodes.

        The learner ends last: robots that go home still send what they have, and it is to be in the index.
        """
        run, fleet = self._run, self._run.config.fleet
        if self._learner_finished():
            return
        actors = [] if self._collection is Collection.NOTHING else [f"robot-{n}" for n in range(fleet.num_actors)]
        demonstrate = ["--demonstrate"] if self._collection is Collection.DEMONSTRATIONS else []
        self._monitor.begin_fleet()
        self._start("learner", ["learner", run.place, "--stay"], restart=True)
        for name in actors:
            self._start(name, ["actor", *self._where, "--id", name, *demonstrate], restart=True, dispensable=True)
        if run.config.evaluation.progress_episodes_per_task:
            self._start("evaluator", ["evaluate", *self._where, "--follow"], restart=True, nice=19)
        began = time.monotonic()
        recording = True

        def look(view: RunView) -> bool:
            nonlocal recording
            collected = max(view.collected, 0 if view.learner is None else sum(view.learner.episodes.values()))
            if fleet.episodes is not None and self._collection is not Collection.NOTHING:
                view.phase_progress = (min(collected, fleet.episodes), fleet.episodes)
            over = fleet.episodes is not None and collected >= fleet.episodes
            late = fleet.minutes is not None and time.monotonic() - began > 60 * fleet.minutes
            learned = view.learner is not None and view.learner.state == ALL_LEARNED
            if recording and (over or late or learned):
                recording = False
                self._children.stop(*actors)
            if learned:
                view.learner = None  # should it fail at its end, the next one says it again
                self._children.ask_to_finish("learner")
            elif late and not over:
                self._children.stop("learner", timeout_s=LEARNER_END_S)
            return not self._children.finished("learner")

        self._watch(look)
        self._children.stop(*actors, "evaluator")
        self._children.stop("learner", timeout_s=LEARNER_END_S)

    def _place(self, job: Job) -> Process:
        """Start a job where it belongs."""
        return (self._spawn if job.arguments[0] in ("actor", "evaluate") else spawn_here)(job)

    def _start(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        who: str | None = None,
        restart: bool = False,
        dispensable: bool = False,
        nice: int = 0,
    ) -> None:
        """Start a process of the run as `who` it is, by its own name if nothing else is said."""
        own = self._identity_of(who or name)
        self._children.start(name, arguments, restart=restart, dispensable=dispensable, nice=nice, environment=own)

    def _identity_of(self, who: str) -> dict[str, str]:
        """The variable that gives a process its identity; nothing when nobody has one."""
        if self._identities is None:
            return {}
        return {VARIABLE: str(load_identity(self._identities / who).folder)}

    def _watch(self, look: Callable[[RunView], bool]) -> None:
        """Keep the processes alive and the terminal up to date while `look` says so and nobody stops it."""
        going_on = True
        while going_on and not self._stop.is_set():
            self._children.watch()
            view = self._monitor.poll()
            going_on = look(view)
            view.time_left_s = self._time_left(view)
            self._live.update(view, time.monotonic() - self._began)
            self._stop.wait(LOOK_EVERY_S)

    def _time_left(self, view: RunView) -> float | None:
        """What the phases that are left will take, by the progress of this one and rough guesses."""
        phases = list(self._phases)
        later = phases[phases.index(view.phase) + 1 :] if view.phase in phases else []
        fleet = self._run.config.fleet
        if fleet.episodes is None:
            return None
        rough_fleet = fleet.episodes * 7.5 / max(1, fleet.num_actors) / (fleet.speed or 10) + 30
        left = sum(ROUGH_PHASE_S.get(phase, rough_fleet) for phase in later)
        if view.phase_progress is None or not view.phase_progress[0]:
            return left + ROUGH_PHASE_S.get(view.phase, rough_fleet)
        done, total = view.phase_progress
        elapsed = time.monotonic() - self._began - sum(self._wall_s.values())
        return left + max(0.0, elapsed) * (total - done) / done

    def _count_offline(self, prefix: str) -> int:
        """Episodes in the offline buffer of the actors whose ids begin so."""
        return sum(1 for _ in self._run.store.keys(f"{layout.DEMONSTRATIONS}/{prefix}"))

    def _is_warm(self) -> bool:
        """Whether version 1 is published: the last thing that a warm-up does."""
        return any(True for _ in published_versions(self._run.store, after=0))

    def _learner_finished(self) -> bool:
        """Whether a final evaluation exists, so that the fleet's work is done."""
        try:
            self._run.store.get(layout.evaluation(newest_version(self._run), "final"))
        except (NotFound, RunError):
            return False
        return True

    def _note(self, text: str) -> None:
        _log.warning(text)
        self._monitor.view.notes.append(text)


def _read_timing(folder: Path) -> dict[str, float]:
    path = folder / "timing.json"
    if not path.exists():
        return {}
    return {name: float(value) for name, value in msgspec.json.decode(path.read_bytes())["wall_s"].items()}
