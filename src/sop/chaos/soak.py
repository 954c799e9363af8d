"""`sop soak`: hours of robot time under fire, as fast as this machine can, then: was anything lost, did anything grow?

    prepare   lab demonstrations, base policy                          as in every run, or those of another
    storm     robots at speed 0, learner, nemeses at random; in the    until the robots have worked long enough
              second half none that kill: who lives long can grow
    settle    no strikes; every robot and the learner show up again    how long that takes is a number
    end       robots first, then the learner, which takes in the rest
    judge     history, curve, trends (soak_judge.py)

Robot time is steps / control_hz + reset_s of every recorded episode, over the whole fleet: the clock is faster than a
robot's, the work per episode is not. Nemeses strike by that clock, too, so that a slow machine is not struck more.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from sop.broadcast import published_versions
from sop.chaos.nemesis import Nemesis, available
from sop.chaos.recovery import Strike
from sop.chaos.soak_watch import Look, Watch
from sop.chaos.target import Target
from sop.config import RunConfig
from sop.core.errors import RunError, SopError
from sop.places import is_run
from sop.presets import make_config
from sop.processes import Children
from sop.runs import Run, create_run, take_base

_log = logging.getLogger(__name__)
LOOK_EVERY_S = 2.0
SETTLE_S = 300.0
"""A fleet that has not come back so long after the last strike has not recovered."""
END_S = 300.0
"""How long robots may take to send what they have, and the learner to take it in."""
_STEP_S = 0.1
SETTINGS = (
    "fleet.speed=0",
    "fleet.episodes=null",
    "fleet.reset_s=1.0",
    "learner.max_draws_per_start=0.5",
    "learner.publish_every=50",
    "learner.checkpoint_every=100",
    "learner.label_cache_mb=1",
)
"""What differs from the preset: no pacing, no end; the learner learns as fast as data come, all the time, instead of
taking the processors from the robots. A reset takes what it takes in the other preset. A cache that would fill for days
is full within two robot hours: what grows then is no cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakPlan:
    """How long and how rough.

    Raises:
        ValueError: no time at all.
    """

    hours: float = 36.0
    """Robot time of the whole fleet, without what comes after the last strike."""
    seed: int = 0
    strike_every_s: float = 900.0
    """Robot time between two strikes, on average (exponential)."""
    look_every_s: float = LOOK_EVERY_S
    deadly_share: float = 0.5
    """Part of the time, from its beginning, in which strikes kill processes: a slope of memory needs long lives."""

    def __post_init__(self) -> None:
        if not (self.hours > 0 and self.strike_every_s > 0):
            raise ValueError(f"a soak needs some time, got {self.hours} hours, {self.strike_every_s} s between strikes")

    @classmethod
    def quick(cls, seed: int = 0) -> "SoakPlan":
        """20 minutes of robot time and a handful of strikes."""
        return cls(hours=1 / 3, seed=seed, strike_every_s=240.0, look_every_s=0.5)


@dataclass(slots=True, kw_only=True)
class Soak:
    """What was done to a run; `soak_judge.judge` says what came of it."""

    run: Run
    plan: SoakPlan
    watch: Watch
    strikes: list[Strike] = field(default_factory=list)
    struck_at_h: list[float] = field(default_factory=list)
    """Robot time of each strike, hours."""
    restarts: list[str] = field(default_factory=list)
    """What was started again, in words."""
    storm_s: float = 0.0
    """Wall-clock time of the storm."""
    settled_s: float | None = None
    """Last strike -> all were at work again; None when they were not."""
    failure: str = ""
    """Why the fleet could not go on; empty when it could."""
    interrupted: bool = False
    """Stopped by a person before the robots had worked long enough."""

    @property
    def target(self) -> Target:
        """The run under fire."""
        return self.watch.target


def start_soak(
    preset: str, folder: Path, plan: SoakPlan, stop: Event, say: Callable[[str], None], *, base: Run | None = None
) -> Soak:
    """Make a run, strike it for as long as the plan says, and end it (blocking).

    Args:
        preset: of the run; with robots that need no pacing.
        folder: of the run; must not hold one.
        plan: how long and how rough.
        stop: ends the storm early; what was recorded until then is judged.
        say: told in a line how it goes.
        base: a run whose demonstrations and base policy are taken; None makes them.

    Raises:
        ValueError: no such preset, or the folder holds a run.
        RunError: the base policy could not be made, or is one of other settings.
    """
    if is_run(folder):
        raise ValueError(f"{folder} exists: choose another name")
    run = create_run(folder, soak_config(preset, plan.seed))
    soak = Soak(run=run, plan=plan, watch=Watch(Target(run)))
    children = Children(folder / "logs", on_restart=soak.restarts.append)
    try:
        if base is None:
            _prepare(children, run, stop)
        else:
            take_base(run, base)
        say(f"{folder}: {plan.hours:g} robot hours, seed {plan.seed}")
        _run_fleet(soak, children, stop, say)
    finally:
        children.stop_all()
    return soak


def soak_config(preset: str, seed: int) -> RunConfig:
    """A preset without pacing and without an end."""
    return make_config(preset, [f"seed={seed}", *SETTINGS])


def _prepare(children: Children, run: Run, stop: Event) -> None:
    """Demonstrations and a base policy."""
    total = run.config.pretrain.demonstrations_per_task * len(run.config.robot.all_tasks)
    lab = ["actor", run.place, "--id", "lab-0", "--demonstrate", "--speed", "0", "--end", str(total)]
    for name, arguments in (("lab-0", lab), ("pretraining", ["learner", run.place, "--pretrain"])):
        children.start(name, arguments)
        while not children.finished(name) and not stop.is_set():
            children.watch()
            stop.wait(_STEP_S)
        children.stop(name)
    if 0 not in published_versions(run.store):
        raise RunError(f"there is no base policy:\n{children.log_tail('pretraining')}")


def _run_fleet(soak: Soak, children: Children, stop: Event, say: Callable[[str], None]) -> None:
    robots = [f"robot-{number}" for number in range(soak.run.config.fleet.num_actors)]
    children.start("learner", ["learner", soak.run.place], restart=True)
    for name in robots:
        children.start(name, ["actor", soak.run.place, "--id", name], restart=True)
    calm = Event()
    storm = Thread(target=_storm, args=(soak, calm, say), name="storm")
    began = time.monotonic()
    storm.start()
    try:
        target_s = soak.plan.hours * 3600
        _attend(soak, children, lambda look: stop.is_set() or look.robot_s >= target_s, say)
        soak.storm_s = time.monotonic() - began
        soak.interrupted = stop.is_set()
        calm.set()
        _attend(soak, children, lambda _: not storm.is_alive(), say)  # a strike may have to be undone
        _settle(soak, children, robots, say)
    except RunError as error:
        soak.failure = soak.failure or str(error)
    finally:
        calm.set()
        storm.join()
    children.stop(*robots, timeout_s=END_S)
    children.stop("learner", timeout_s=END_S)
    soak.watch.look()


def _attend(soak: Soak, children: Children, done: Callable[[Look], bool], say: Callable[[str], None]) -> None:
    """Start again what died and look every few seconds, until a look says that it is done.

    Raises:
        RunError: something dies again and again, or the strikes have broken off.
    """
    told_hour, looked = -1, -1e9
    while True:
        children.watch()
        if soak.failure:
            raise RunError(soak.failure)
        if time.monotonic() - looked >= soak.plan.look_every_s:
            looked = time.monotonic()
            look = soak.watch.look()
            if int(look.robot_s // 3600) != told_hour:
                told_hour = int(look.robot_s // 3600)
                say(describe_look(look, len(soak.strikes), len(soak.restarts)))
            if done(look):
                return
        time.sleep(_STEP_S)


def describe_look(look: Look, strikes: int, restarts: int) -> str:
    """A line for whoever waits."""
    memory = "  ".join(f"{process.name} {process.rss_mb:.0f} MB" for process in look.processes)
    return (
        f"{time.strftime('%H:%M:%S', time.gmtime(look.utc_s))}  {look.robot_s / 3600:5.2f} robot hours, "
        f"{look.episodes} episodes, {strikes} strikes, {restarts} restarts, "
        f"learner step {look.learner_step}, version {look.version}  {memory}"
    )


def _settle(soak: Soak, children: Children, robots: list[str], say: Callable[[str], None]) -> None:
    """Wait until every robot has recorded again and the learner has said something.

    Raises:
        RunError: one has not for a long time.
    """
    began, began_utc_s = time.monotonic(), time.time()
    before = {name: soak.watch.recorded(name) for name in robots}

    def done(look: Look) -> bool:
        away = [name for name in robots if soak.watch.recorded(name) == before[name]]
        away += ["learner"] if look.learner_utc_s <= began_utc_s else []
        if away and time.monotonic() - began > SETTLE_S:
            raise RunError(f"{', '.join(away)} did not come back within {SETTLE_S:.0f} s of the last strike")
        return not away

    _attend(soak, children, done, say)
    soak.settled_s = time.monotonic() - began


def _storm(soak: Soak, calm: Event, say: Callable[[str], None]) -> None:
    """The thread of the nemeses."""
    try:
        _strike_until(soak, calm, say)
    except Exception as error:  # noqa: BLE001 - top of a thread: a soak that is not struck must not pass for one
        soak.failure = f"the strikes broke off: {error!r}"


def _strike_until(soak: Soak, calm: Event, say: Callable[[str], None]) -> None:
    """Strike by the robots' clock, until it is to be calm."""
    rng, began = random.Random(soak.plan.seed), time.monotonic()
    next_s = rng.expovariate(1 / soak.plan.strike_every_s)
    while not calm.wait(_STEP_S):
        robot_s = soak.watch.looks[-1].robot_s if soak.watch.looks else 0.0
        if robot_s < next_s:
            continue
        next_s = robot_s + rng.expovariate(1 / soak.plan.strike_every_s)
        deadly = robot_s < soak.plan.deadly_share * soak.plan.hours * 3600
        nemeses = {name: one for name, one in available(soak.target).items() if deadly or not one.deadly}
        name = rng.choice(sorted(nemeses))
        what = _strike(nemeses[name], name, soak.target, rng)
        if what:
            soak.strikes.append(Strike(round(time.monotonic() - began, 1), name, what, round(time.time(), 3)))
            soak.struck_at_h.append(robot_s / 3600)
            say(f"  {robot_s / 3600:6.2f} h  {name}: {what}")


def _strike(nemesis: Nemesis, name: str, target: Target, rng: random.Random) -> str:
    """What was hit; empty when there was nothing to hit, or what it needs did not answer at the moment."""
    try:
        return nemesis.strike(target, rng)
    except (SopError, OSError) as error:
        _log.warning("%s could not strike: %s", name, error)
        return ""
