"""What is looked at every few seconds while a soak runs: processes, queues, steps; nothing that could disturb it.

    /proc                       memory, open files and threads of every process of the run, by role
    robots' journals            recorded episodes -> robot time
    robots' spools              what waits for upload
    metrics/learner.jsonl       steps, version
    -> metrics/soak.jsonl       a line per look

Everything else (lags, staleness, success) is in the index and in the episodes: it is read afterwards, exactly.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sop.chaos.target import Target
from sop.core.errors import InvalidRecord, RunError
from sop.core.layout import EpisodeKey

METRICS = Path("metrics") / "soak.jsonl"
DECODER = "decode worker"
_TAIL_BYTES = 1 << 16
_MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLook:
    """One process at one moment."""

    role: str
    name: str
    pid: int
    rss_mb: float
    """Resident memory, megabytes of 10^6 bytes."""
    own_mb: float
    """The part of it that is not a file's: what a leak would be made of."""
    files: int
    """Open file descriptors."""
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The run at one moment."""

    utc_s: float
    robot_s: float
    """Robot time of all recorded episodes, seconds: steps / control_hz + reset_s of each."""
    episodes: int
    """Recorded."""
    spooled: int
    """Wait on robots' disks."""
    learner_step: int
    version: int
    """The newest that the learner knows to be published; -1 when it has not said."""
    learner_utc_s: float
    """When the learner last said something; 0: never."""
    disk_mb: float | None = None
    """Of the run's folder; looked at once per robot hour."""
    processes: tuple[ProcessLook, ...] = ()


@dataclass(slots=True)
class Watch:
    """Looks at a run.

    Args:
        target: the run.
    """

    target: Target
    looks: list[Look] = field(default_factory=list)
    """All that were taken."""
    _offsets: dict[Path, int] = field(default_factory=dict)
    _robot_s: float = 0.0
    _episodes: int = 0
    _disk_hour: int = -1

    def look(self) -> Look:
        """Look once and write it down (blocks for milliseconds; once per robot hour for the size of the folder)."""
        self._read_journals()
        step, version, told_utc_s = self._learner()
        found = Look(
            utc_s=time.time(),
            robot_s=self._robot_s,
            episodes=self._episodes,
            spooled=sum(1 for _ in self._actors().glob("robot-*/spool/*.arrow")),
            learner_step=step,
            version=version,
            learner_utc_s=told_utc_s,
            disk_mb=self._disk(),
            processes=tuple(self._processes()),
        )
        self.looks.append(found)
        path = self.target.run.folder / METRICS
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        return found

    def recorded(self, actor_id: str) -> int:
        """How much an actor has recorded: bytes of its journal."""
        journal = self._actors() / actor_id / "spool" / "journal"
        return journal.stat().st_size if journal.exists() else 0

    def _actors(self) -> Path:
        return self.target.run.folder / "actors"

    def _read_journals(self) -> None:
        """New whole lines of the journals of the fleet."""
        manifest, config = self.target.run.manifest, self.target.run.config
        for journal in self._actors().glob("robot-*/spool/journal"):
            with journal.open("rb") as file:
                file.seek(self._offsets.get(journal, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[journal] = self._offsets.get(journal, 0) + len(whole)
            for line in whole.decode().splitlines():
                with suppress(InvalidRecord):
                    steps = EpisodeKey.parse(line).num_steps
                    self._robot_s += steps / manifest.embodiment.control_hz + config.fleet.reset_s
                    self._episodes += 1

    def _learner(self) -> tuple[int, int, float]:
        """(step, version, when) of the learner's last report; those of the last look when newer lines tell of episodes
        alone."""
        path = self.target.run.folder / "metrics" / "learner.jsonl"
        if not path.exists():
            return 0, -1, 0.0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            with suppress(ValueError, KeyError, TypeError):
                record: dict[str, Any] = json.loads(line)
                return int(record["step"]), int(record["learner/version"]), float(record["utc_s"])
        if self.looks:
            return self.looks[-1].learner_step, self.looks[-1].version, self.looks[-1].learner_utc_s
        return 0, -1, 0.0

    def _disk(self) -> float | None:
        hour = int(self._robot_s // 3600)
        if hour == self._disk_hour:
            return None
        self._disk_hour = hour
        return _size(self.target.run.folder) / _MB

    def _processes(self) -> Iterator[ProcessLook]:
        try:
            victims = self.target.processes()
        except RunError:  # the store is away at this moment: it cannot be told which processes are of this run
            return
        for victim in victims:
            if victim.role:
                yield from _read(victim.role, victim.name, victim.pid)
            for child in _children(victim.pid) if victim.role == "learner" else ():
                yield from _read(DECODER, f"{DECODER} of {victim.name}", child)


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; one that goes meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total


def _read(role: str, name: str, pid: int) -> Iterator[ProcessLook]:
    """One process; nothing when it has gone, or is going."""
    place = Path("/proc") / str(pid)
    with suppress(OSError, KeyError, ValueError):
        lines = (place / "status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        kilobytes = {key: int(status[key].split()[0]) for key in ("VmRSS", "RssAnon")}
        yield ProcessLook(
            role=role,
            name=name,
            pid=pid,
            rss_mb=kilobytes["VmRSS"] * 1024 / _MB,
            own_mb=kilobytes["RssAnon"] * 1024 / _MB,
            files=sum(1 for _ in (place / "fd").iterdir()),
            threads=int(status["Threads"]),
        )


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                found += [int(entry.name)] if parent == str(pid) else []
    return found
