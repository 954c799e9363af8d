"""Simulated robots and evaluations on a Ray cluster: jobs of the launcher, started on whatever machine has room.

    sop run ... --on ray                     a Ray of this machine, on loopback, started and ended by the run
    sop run ... --on ray://head:10001        a cluster that is there (also `host:port` of its head)

    launcher                                       a machine of the cluster
    +--------------------------+    Ray actor      +-----------------------------------------+
    | Children -> RayProcess   | ----------------> | _Host: python -m sop actor URL ...      |
    |   poll, terminate, wait  | <---------------- |   store and bus by URL, nothing else    |
    +--------------------------+   code, output    +-----------------------------------------+

When a machine of the cluster dies, its jobs look like processes that died, and `Children` starts them again on
another one: a robot that comes back goes on with what the store has of it. Ray moves commands, exit codes and printed
lines; episodes and policies take the way that they always take. A cluster belongs to people who trust each other (Ray
serialises its own calls with pickle): it is for simulations, never for robots.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sop.core.errors import RunError
from sop.processes import Job, Spawn, child_environment

_log = logging.getLogger(__name__)
LOST = 70
"""Exit code of a job whose machine went away."""
MAX_OUTPUT_BYTES = 1 << 20
"""Printed bytes that are moved with one answer; what is beyond comes with the next."""
_PAUSE_S = 0.05
_START_S = 120.0
"""How long a cluster may take to give a job a place."""


@contextmanager
def on_cluster(address: str) -> Iterator[Spawn]:
    """What starts jobs on a Ray cluster; the connection (and a Ray of this machine) ends with the context.

    Args:
        address: `ray` for one of this machine, `ray://host:port`, or `host:port` of the head.

    Raises:
        RunError: Ray is not installed, or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise RunError("--on needs Ray: pip install -e '.[ray]'") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    here = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": os.cpu_count()}
    try:
        ray.init(**quiet, **here, address="local") if address == "ray" else ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"no Ray cluster answers at {address!r}: {error}") from error
    host = ray.remote(num_cpus=0, max_restarts=0)(_Host)
    try:
        yield lambda job: RayProcess(job, host)
    finally:
        ray.shutdown()


class RayProcess:
    """A job on the cluster that looks like a child process; what it prints arrives in the job's files here.

    Used from one thread. `poll` asks and takes the answer to the question before: it never waits for the network.
    """

    def __init__(self, job: Job, host: Any) -> None:
        self._job = job
        job.output.parent.mkdir(parents=True, exist_ok=True)
        self._host = host.remote(job.name, list(job.arguments), job.nice, dict(job.environment))
        self._asked: Any = self._host.look.remote()
        self._asked_at = time.monotonic()
        self._heard = False
        self._code: int | None = None
        self._pid = 0

    @property
    def pid(self) -> int:
        """Process id on its machine; 0 until it is known."""
        return self._pid

    def poll(self) -> int | None:
        """Exit code, None while it runs, LOST when its machine went away."""
        import ray

        if self._code is not None:
            return self._code
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            if not self._heard and time.monotonic() - self._asked_at > _START_S:
                return self._ended(LOST, f"the cluster gave {self._job.name} no place within {_START_S:.0f} s")
            return None
        try:
            self._pid, code, output, errors = ray.get(self._asked)
        except ray.exceptions.RayError as error:
            return self._ended(LOST, f"{self._job.name} is lost with its machine: {error}")
        self._heard = True
        _append(self._job.output, output)
        _append(self._job.errors or self._job.output, errors)
        if code is None or len(output) == MAX_OUTPUT_BYTES or len(errors) == MAX_OUTPUT_BYTES:
            self._asked = self._host.look.remote()
            return None
        ray.kill(self._host)
        self._code = int(code)
        return self._code

    def terminate(self) -> None:
        """Ask it to finish."""
        self._host.end.remote(kill=False)

    def kill(self) -> None:
        """Make it finish."""
        self._host.end.remote(kill=True)

    def wait(self, timeout: float | None = None) -> int:
        """Block until it has ended; see `sop.processes.Process`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(self._job.arguments), timeout or 0.0)
            time.sleep(_PAUSE_S)
        return code

    def _ended(self, code: int, why: str) -> int:
        _log.warning(why)
        _append(self._job.output, f"{why}\n".encode())
        self._code = code
        return code


class _Host:
    """Lives on a machine of the cluster: one job as a child process, which ends with it.

    Args:
        name: of the job.
        arguments: of the `sop` command.
        nice: how far it steps back.
        environment: variables of this job.
    """

    def __init__(self, name: str, arguments: Sequence[str], nice: int, environment: Mapping[str, str]) -> None:
        import tempfile

        folder = Path(tempfile.mkdtemp(prefix=f"sop-{name}-"))
        self._files = [(folder / part).open("w+b") for part in ("output", "errors")]
        self._sent = [0, 0]
        command = ["nice", "-n", str(nice)] if nice else []
        self._process = subprocess.Popen(
            [*command, sys.executable, "-m", "sop", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            env=child_environment(environment),
            start_new_session=True,
        )

    def look(self) -> tuple[int, int | None, bytes, bytes]:
        """Process id, exit code (None while it runs), and what it printed and said since the last look."""
        code = self._process.poll()  # before reading: after the end nothing is printed any more
        news = []
        for number, file in enumerate(self._files):
            file.seek(self._sent[number])
            part = file.read(MAX_OUTPUT_BYTES)
            self._sent[number] += len(part)
            news.append(part)
        return self._process.pid, code, news[0], news[1]

    def end(self, *, kill: bool) -> None:
        """Ask the job to finish, or make it."""
        if self._process.poll() is None:
            (self._process.kill if kill else self._process.terminate)()


def _append(path: Path, data: bytes) -> None:
    if data:
        with path.open("ab") as file:
            file.write(data)
