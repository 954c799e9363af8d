"""Nemeses: real faults for a running run, each within what it may touch, each undone when `strike` returns.

    processes   kill, pause, power-cut, second-learner
    store       store-away, flip, truncate               objects that are put and not yet indexed
    disk        disk-full                                a robot's spool on a small disk of its own
    bus         events-lost, events-again, bus-wiped
    link        slow, cut                                when the run goes through a link that can be broken

The clock is not among them: a running process cannot be given another one without changing what it is. Faults of
clocks are tests with clocks of their own (`sop.chaos.faults`, number 16).
"""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sop.chaos.storage import disk_full, flip, next_episode, power_cut, small_disks, store_away, truncate
from sop.chaos.target import ACTOR, EVALUATOR, LEARNER, Target
from sop.core.errors import StoreUnavailable
from sop.core.events import TOPIC_EPISODES, TOPIC_POLICIES
from sop.places import find_place

SECOND_LEARNER_S = 90.0
"""A second learner that still runs then was not refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nemesis:
    """One way to hurt a run."""

    does: str
    """What happens, for people."""
    touches: str
    """What it may change, and how that is undone."""
    strike: Callable[[Target, random.Random], str]
    """Blocks until it is undone; says what was hit, empty when there was nothing to hit."""
    needs: Callable[[Target], str] = lambda _: ""
    """Why it cannot strike this target; empty when it can."""
    deadly: bool = False
    """Whether processes die of it."""


def kill(target: Target, rng: random.Random) -> str:
    """SIGKILL one process."""
    alive = target.victims(rng.choice((ACTOR, LEARNER, EVALUATOR)))
    victim = rng.choice(alive) if alive else None
    return f"killed {victim.name}" if victim is not None and target.shoot(victim) else ""


def pause(target: Target, rng: random.Random) -> str:
    """SIGSTOP one role for some seconds, then SIGCONT."""
    role, seconds = rng.choice((ACTOR, LEARNER)), rng.uniform(0.5, 3.0)
    with target.asleep(role) as hit:
        if hit:
            time.sleep(seconds)
    return f"stopped every {role} for {seconds:.1f} s" if hit else ""


def events_lost(target: Target, rng: random.Random) -> str:
    """Delete announced episodes from the bus before the learner sees them."""
    with target.asleep(LEARNER) as hit, _database(target) as execute:
        newest = execute("SELECT COALESCE(MAX(row), 0) FROM events")
        if not hit or next_episode(target) is None:
            return ""
        time.sleep(rng.uniform(0.1, 1.0))
        gone = execute("DELETE FROM events WHERE topic = ? AND row > ?", TOPIC_EPISODES, newest)
    return f"{gone} announcements were lost" if gone else ""


def bus_wiped(target: Target, rng: random.Random) -> str:  # noqa: ARG001
    """Unlink the bus: whoever has it open goes on with the old one, whoever starts makes a new one (split brain)."""
    if target.bus_file is None:
        return ""
    files = [target.bus_file.with_name(target.bus_file.name + end) for end in ("", "-wal", "-shm")]
    there = [path for path in files if path.exists()]
    for path in there:
        path.unlink(missing_ok=True)
    return "the bus's file was deleted under everybody" if there else ""


def events_again(target: Target, rng: random.Random) -> str:
    """Publish old events again under new ids, shuffled: doubled, late and out of order."""
    copied = 0
    with target.run.bus() as bus:
        for topic in (TOPIC_EPISODES, TOPIC_POLICIES):
            events = [event for _, event in bus.poll(topic, None, 0.5)]
            for event in rng.choices(events, k=50 if events else 0):
                bus.publish(topic, event, event_id=f"again-{rng.getrandbits(64):x}")
                copied += 1
    return f"{copied} old events came again, shuffled" if copied else ""


@contextmanager
def _database(target: Target) -> Iterator[Callable[..., int]]:
    """The bus's file: runs a statement; gives the number that it selects, or how many rows it changed.

    Raises:
        StoreUnavailable: there is no such file, or no bus in it: another nemesis has taken it away.
    """
    import sqlite3

    def execute(statement: str, *values: object) -> int:
        cursor = connection.execute(statement, values)
        row = cursor.fetchone() if statement.startswith("SELECT") else (cursor.rowcount,)
        return int(row[0])

    try:
        with closing(
            sqlite3.connect(f"file:{target.bus_file}?mode=rw", 10, isolation_level=None, uri=True)
        ) as connection:
            yield execute
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(f"the bus {target.bus_file} cannot be written: {error}") from error


def slow(target: Target, rng: random.Random) -> str:
    """Hold every piece of data on the link for some seconds."""
    if target.link is None:
        return ""
    delay_s, seconds = rng.uniform(0.05, 0.5), rng.uniform(2.0, 5.0)
    target.link.delay(delay_s)
    try:
        time.sleep(seconds)
    finally:
        target.link.heal()
    return f"every piece took {delay_s:.2f} s longer for {seconds:.1f} s"


def cut(target: Target, rng: random.Random) -> str:
    """Cut the link for a moment."""
    if target.link is None:
        return ""
    seconds = rng.uniform(0.5, 3.0)
    target.link.cut()
    try:
        time.sleep(seconds)
    finally:
        target.link.heal()
    return f"the link was cut for {seconds:.1f} s"


def second_learner(target: Target, rng: random.Random) -> str:  # noqa: ARG001
    """Start another learner for the same run, in another folder, as another machine would."""
    if not target.victims(LEARNER):
        return ""
    place = find_place(target.run.place, target.run.bus_url)
    store = place.store if "://" in place.store else f"file://{Path(place.store).resolve()}"
    scheme, _, bus = place.bus.partition("://")
    bus = f"sqlite://{Path(bus).resolve()}" if scheme == "sqlite" else place.bus
    command = [sys.executable, "-m", "sop", "learner", store, "--bus", bus]
    with tempfile.TemporaryDirectory() as elsewhere:
        second = subprocess.Popen(
            command, cwd=elsewhere, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, said = second.communicate(timeout=SECOND_LEARNER_S)
        except subprocess.TimeoutExpired:
            second.kill()
            second.communicate()
            return "a second learner was not refused, and was killed"
    words = said.decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
    return f"a second learner ended with code {second.returncode}: {words[0]}"


def _needs_folder(target: Target) -> str:
    return "" if target.store_folder is not None else "its store is not a folder here"


def _needs_file(target: Target) -> str:
    return "" if target.bus_file is not None else "its bus is not a file here"


def _needs_link(target: Target) -> str:
    return "" if target.link is not None else "its way to the store is not one that can be broken"


def _needs_small_disk(target: Target) -> str:
    return "" if small_disks(target) else "no spool is on a disk of its own (root: `--start` makes some)"


NEMESES: Mapping[str, Nemesis] = {
    "kill": Nemesis(
        does="SIGKILL of a robot, the learner or the evaluator",
        touches="one process of the run; its launcher starts it again",
        strike=kill,
        deadly=True,
    ),
    "pause": Nemesis(
        does="SIGSTOP of all robots or of the learner, SIGCONT after 0.5 to 3 s",
        touches="processes of one role",
        strike=pause,
    ),
    "power-cut": Nemesis(
        does="robots and learner die at once, and what was not synced is gone",
        touches="step journals' tails, sidecars and tensors of half-published versions; the launcher starts all again",
        strike=power_cut,
        deadly=True,
    ),
    "store-away": Nemesis(
        does="the store does not answer",
        touches="the store's folder is renamed, and back",
        strike=store_away,
        needs=_needs_folder,
    ),
    "flip": Nemesis(
        does="a bit of a stored episode flips before the learner reads it",
        touches="one new episode; its bytes are put back",
        strike=flip,
    ),
    "truncate": Nemesis(
        does="a stored episode is cut short before the learner reads it",
        touches="one new episode; its bytes are put back",
        strike=truncate,
    ),
    "disk-full": Nemesis(
        does="a robot's disk is full",
        touches="a file on a small disk that `--start` made; deleted again",
        strike=disk_full,
        needs=_needs_small_disk,
    ),
    "events-lost": Nemesis(
        does="announcements of episodes vanish",
        touches="rows of the bus's file",
        strike=events_lost,
        needs=_needs_file,
    ),
    "events-again": Nemesis(
        does="old events come again, shuffled", touches="adds events to the bus", strike=events_again
    ),
    "bus-wiped": Nemesis(
        does="the bus loses everything and splits in two",
        touches="the bus's file is deleted",
        strike=bus_wiped,
        needs=_needs_file,
    ),
    "slow": Nemesis(does="the store is slow", touches="the link, healed", strike=slow, needs=_needs_link),
    "cut": Nemesis(does="the network is cut", touches="the link, healed", strike=cut, needs=_needs_link),
    "second-learner": Nemesis(
        does="another learner is started on the same run", touches="a process of its own", strike=second_learner
    ),
}
"""Name on the command line -> nemesis."""


def available(target: Target, names: tuple[str, ...] = ()) -> dict[str, Nemesis]:
    """The nemeses that can strike a target; of those named, or of all.

    Raises:
        ValueError: a name that there is not, or a named one that cannot strike; says why.
    """
    for name in names:
        if name not in NEMESES:
            raise ValueError(f"no nemesis is called {name!r}: there are {', '.join(NEMESES)}")
        if why := NEMESES[name].needs(target):
            raise ValueError(f"{name} cannot strike this run: {why}")
    return {name: NEMESES[name] for name in names or NEMESES if not NEMESES[name].needs(target)}
