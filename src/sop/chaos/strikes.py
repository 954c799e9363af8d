"""Strikes a run on this machine until it ends, then checks its history: `sop chaos RUN`, `sop chaos --start debug`.

seed -> which nemesis, when, on whom         the same seed draws the same; what it hits depends on the moment
<run>/chaos.json                             strikes with what followed each, numbers and violations
"""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from sop.chaos.history import History, check_history
from sop.chaos.nemesis import Nemesis, available
from sop.chaos.recovery import Strike, read_work, with_recovery
from sop.chaos.target import Target
from sop.core import layout
from sop.core.errors import RunError, SopError
from sop.places import is_run
from sop.runs import open_run

REPORT = "chaos.json"
EPISODES_PER_STRIKE = 16
"""Two robots record some two a second, and a strike with its pause takes 5 to 10 s."""
SMALL_DISK_MB = 16
END_S = 900.0
"""A run that goes on so long after the last strike hangs."""
_QUIET_S = 20.0
"""A run none of whose processes was seen for so long has ended."""
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """What was done to a run and what it left."""

    run: str
    seed: int
    strikes: tuple[Strike, ...]
    exit_code: int | None
    """Of the run; None when somebody else started it."""
    history: History

    @property
    def survived(self) -> bool:
        """Whether nothing was lost, doubled, altered or mixed, and the run ended as it should."""
        return not self.history.violations() and self.exit_code in (None, 0) and bool(self.history.recorded)

    def to_json(self) -> bytes:
        """For `chaos.json`."""
        record = {
            "run": self.run,
            "seed": self.seed,
            "strikes": [asdict(strike) for strike in self.strikes],
            "exit_code": self.exit_code,
            "survived": self.survived,
            "counts": self.history.counts(),
            "violations": self.history.words(),
        }
        return msgspec.json.format(msgspec.json.encode(record), indent=2)


def attack_running(
    place: str, *, strikes: int, seed: int, names: tuple[str, ...], every_s: float, say: Callable[[str], None]
) -> Attack:
    """Strike a run that somebody else started on this machine, until it ends (blocking).

    Args:
        place: its folder or the URL of its store.
        strikes: how many have to hit.
        seed: of what is drawn.
        names: of nemeses; all that can strike it when empty.
        every_s: seconds between two strikes, on average.
        say: told of every strike.

    Raises:
        RunError: there is no such run, or nothing of it runs here.
        ValueError: a nemesis that there is not, or that cannot strike this run.
    """
    target = Target(open_run(place))
    if not target.processes():
        raise RunError(f"nothing of {place} runs on this machine: start it, or use `sop chaos --start debug`")
    seen_s = time.monotonic()

    def alive() -> bool:
        nonlocal seen_s
        if target.processes():
            seen_s = time.monotonic()
        return time.monotonic() - seen_s < _QUIET_S

    rng, nemeses = random.Random(seed), available(target, names)
    hits = _strike(target, nemeses, strikes=strikes, every_s=every_s, rng=rng, alive=alive, say=say)
    _await(lambda: not alive(), "the run")
    return _judge(target, seed, hits, None)


def attack_new(
    preset: str,
    runs: Path,
    *,
    strikes: int,
    seed: int,
    names: tuple[str, ...],
    every_s: float,
    say: Callable[[str], None],
    changes: tuple[str, ...] = (),
) -> Attack:
    """Start a run of its own and strike it (blocking).

    Args:
        preset: of the run.
        runs: where its folder is made, `<preset>-seed<seed>` or the next free name.
        strikes, seed, names, every_s, say: as in `attack_running`.
        changes: settings of the run, `name=value`.

    Raises:
        RunError: the run did not start.
    """
    folder, number = runs / f"{preset}-seed{seed}", 1
    while folder.exists():
        number += 1
        folder = runs / f"{preset}-seed{seed}-{number}"
    episodes = max(40, EPISODES_PER_STRIKE * strikes)
    settings = ("fleet.speed=1.0", "learner.checkpoint_every=10", f"fleet.episodes={episodes}", *changes)
    command = [sys.executable, "-m", "sop", "run", preset, "--runs", str(runs), "--name", folder.name]
    command += [word for setting in settings for word in ("--set", setting)]
    folder.mkdir(parents=True)
    say(f"seed {seed}: {folder}, {episodes} episodes")
    with _small_disks(folder, ("robot-0", "robot-1")), (folder / "run.log").open("wb") as log:
        run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _await(lambda: _begun(folder) or run.poll() is not None, "the store")
            if run.poll() is not None:
                raise RunError(f"{preset} did not start:\n{(folder / 'run.log').read_text()[-2000:]}")
            target = Target(open_run(str(folder)))
            rng, nemeses = random.Random(seed), available(target, names)
            hits = _strike(
                target,
                nemeses,
                strikes=strikes,
                every_s=every_s,
                rng=rng,
                alive=lambda: run.poll() is None,
                say=say,
            )
            _await(lambda: run.poll() is not None, "the run")
        finally:
            if run.poll() is None:
                run.terminate()
                with suppress(subprocess.TimeoutExpired):
                    run.wait(60)
                run.kill()
        return _judge(target, seed, hits, run.wait())


def _begun(folder: Path) -> bool:
    return is_run(folder) and (folder / "store" / layout.RUN).exists()


def _strike(
    target: Target,
    nemeses: Mapping[str, Nemesis],
    *,
    strikes: int,
    every_s: float,
    rng: random.Random,
    alive: Callable[[], bool],
    say: Callable[[str], None],
) -> tuple[Strike, ...]:
    """Strike at random times while the fleet records; what the store or bus cannot do at the moment is no hit."""
    while alive() and not (target.victims("actor") and any(target.run.store.folders(f"{layout.EPISODES}/"))):
        time.sleep(_LOOK_S)
    began, hits = time.monotonic(), list[Strike]()
    while alive() and len(hits) < strikes:
        time.sleep(rng.uniform(0.5, 1.5) * every_s)
        name = rng.choice(sorted(nemeses))
        try:
            what = nemeses[name].strike(target, rng) if alive() else ""
        except SopError as error:
            say(f"  {name} could not strike: {error}")
            continue
        if what:
            hits.append(Strike(round(time.monotonic() - began, 1), name, what, round(time.time(), 3)))
            say(f"  {hits[-1].at_s:6.1f} s  {name}: {what}")
    return tuple(hits)


def _judge(target: Target, seed: int, hits: tuple[Strike, ...], code: int | None) -> Attack:
    history = check_history(target.run, damaged=target.damaged, ended=code in (None, 0))
    strikes = with_recovery(hits, read_work(target.run, history.readable))
    attack = Attack(run=target.run.place, seed=seed, strikes=strikes, exit_code=code, history=history)
    (target.run.folder / REPORT).write_bytes(attack.to_json())
    return attack


def _await(done: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + END_S
    while not done():
        if time.monotonic() > deadline_s:
            raise RunError(f"{what} did not come to an end within {END_S:.0f} s")
        time.sleep(_LOOK_S)


@contextmanager
def _small_disks(folder: Path, actors: tuple[str, ...]) -> Iterator[None]:
    """Give each robot's spool a disk of its own (tmpfs; needs root, else there is none); afterwards it is a folder."""
    spools = [folder / "actors" / actor / "spool" for actor in actors]
    mounted = []
    for spool in spools:
        spool.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m", "tmpfs", str(spool)]
        with suppress(OSError):
            if subprocess.run(mount, check=False, capture_output=True).returncode == 0:
                mounted.append(spool)
    try:
        yield
    finally:
        for spool in mounted:
            kept = spool.with_name("spool.kept")
            shutil.copytree(spool, kept)
            subprocess.run(["umount", str(spool)], check=False, capture_output=True)
            spool.rmdir()
            kept.rename(spool)
