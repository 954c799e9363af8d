"""What a nemesis may touch: the processes, the files and the link of one run, and of no other."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, Signals
from typing import Protocol

from sop.places import STORE, find_place
from sop.runs import Run
from sop.transport import DirectoryStore

ACTOR, LEARNER, EVALUATOR = "actor", "learner", "evaluator"
_YOUNG_S = 6.0
"""A launcher gives up on a process that dies three times within 5 s of its start."""


class Link(Protocol):
    """A way to the store that can be broken on command, e.g. a proxy that a test put there. No call blocks."""

    def cut(self) -> None:
        """Reset every connection, and every new one."""

    def delay(self, seconds: float) -> None:
        """Hold every piece of data for so long."""

    def heal(self) -> None:
        """Be an ordinary link again."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A process of the run."""

    role: str
    """actor, learner, evaluator; empty for others (lab actors, pretraining, single evaluations)."""
    name: str
    pid: int
    age_s: float

    def signal(self, number: Signals) -> bool:
        """Send a signal; False when the process is gone."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


@dataclass(slots=True)
class Target:
    """A run under fire, on this machine.

    Args:
        run: what is struck.
        link: the way between its processes and its store, when it can be broken.
    """

    run: Run
    link: Link | None = None
    damaged: set[str] = field(default_factory=set)
    """Keys of episodes that were altered in the store, though the store had acknowledged them."""
    _shot_young: Counter[str] = field(default_factory=Counter)

    @property
    def store_folder(self) -> Path | None:
        """The store, when it is a directory of the run."""
        return self.run.folder / STORE if isinstance(self.run.store, DirectoryStore) else None

    @property
    def bus_file(self) -> Path | None:
        """The bus, when it is a file."""
        scheme, _, place = self.run.bus_url.partition("://")
        return Path(place) if scheme == "sqlite" else None

    def processes(self) -> list[Victim]:
        """All processes of the run that were started by `sop`, in the order of their names."""
        place = find_place(self.run.place, self.run.bus_url).store
        found = [victim for entry in Path("/proc").iterdir() if (victim := _read(entry, self.run.folder, place))]
        return sorted(found, key=lambda victim: victim.name)

    def victims(self, role: str) -> list[Victim]:
        """Processes of a role that may die: what started them starts them again."""
        return [victim for victim in self.processes() if victim.role == role]

    def shoot(self, victim: Victim) -> bool:
        """SIGKILL; False when it is gone, or has died young so often that its launcher would give up."""
        young = victim.age_s < _YOUNG_S
        if young and self._shot_young[victim.name] >= 1:
            return False
        self._shot_young[victim.name] = self._shot_young[victim.name] + 1 if young else 0
        return victim.signal(SIGKILL)

    @contextmanager
    def asleep(self, role: str) -> Iterator[bool]:
        """Stop the processes of a role; they go on at the end. Yields whether there was one."""
        stopped = [victim for victim in self.victims(role) if victim.signal(SIGSTOP)]
        try:
            yield bool(stopped)
        finally:
            for victim in stopped:
                victim.signal(SIGCONT)


def _read(entry: Path, folder: Path, store: str) -> Victim | None:
    """The process behind a folder of /proc when it belongs to the run."""
    if not entry.name.isdigit():
        return None
    with suppress(OSError, ValueError, IndexError):
        words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        at = words.index("-m") + 1
        if words[at] != "sop" or words[at + 1] not in ("actor", "learner", "evaluate"):
            return None
        command, given = words[at + 1], words[at + 2]
        own = given == store or (entry / "cwd").readlink().joinpath(given).resolve() == folder.resolve()
        if own:
            role, name = _role(command, words)
            return Victim(role, name, int(entry.name), _age_s(entry))
    return None


def _role(command: str, words: list[str]) -> tuple[str, str]:
    if command == "actor":
        name = words[words.index("--id") + 1]
        fleet = "--demonstrate" not in words or not name.startswith("lab-")
        return (ACTOR if fleet and "--rollout" not in words else ""), name
    if command == "learner":
        return ("" if {"--pretrain", "--warmup"} & set(words) else LEARNER), "learner"
    return (EVALUATOR if "--follow" in words else ""), "evaluator"


def _age_s(entry: Path) -> float:
    started = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
