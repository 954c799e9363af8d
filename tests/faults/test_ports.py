"""A port scan: who listens, where, and what garbage gets."""

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sop.chaos.target import Target
from sop.runs import Run, open_run
from sop.testing.servers.nats import NatsServer
from sop.testing.servers.s3 import S3Server

pytestmark = pytest.mark.slow
SOCKETS = ("tcp", "tcp6", "udp", "udp6")
LISTEN = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}


def listening(pid: int) -> list[tuple[str, str, int]]:
    """(kind, address in the kernel's hexadecimal, port) of every socket on which a process waits for others."""
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(str(entry.readlink()))
    found = []
    for kind in SOCKETS:
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN[kind] and f"socket:[{words[9]}]" in own:
                address, port = words[1].split(":")
                found.append((kind, address, int(port, 16)))
    return found


def is_loopback(kind: str, address: str) -> bool:
    if kind.endswith("6"):
        return address in ("00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    return address.endswith("7F")


def test_fault_39_no_process_of_a_run_listens_anywhere(finished_base: Run) -> None:
    """Robots, learner and evaluator dial out; nobody dials them."""
    folder = str(finished_base.folder)
    commands = [["actor", folder, "--id", "robot-7"], ["learner", folder], ["evaluate", folder, "--follow"]]
    running = [
        subprocess.Popen([sys.executable, "-m", "sop", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        for command in commands
    ]
    target = Target(open_run(folder))
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            Path(folder, "actors/robot-7/spool/journal").exists() and Path(folder, "metrics/learner.jsonl").exists()
        ):
            assert all(process.poll() is None for process in running)
        found = {victim.name: listening(victim.pid) for victim in target.processes()}
        assert found == {"robot-7": [], "learner": [], "evaluator": []}
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.communicate()


def answers(port: int, garbage: bytes) -> bytes:
    """Everything that a port says to bytes that mean nothing."""
    said = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2.0) as end:
        end.settimeout(1.0)
        end.sendall(garbage)
        end.shutdown(socket.SHUT_WR)
        while (piece := end.recv(65536)) and len(said) < 1 << 20:
            said += piece
    return said


def test_fault_39_servers_answer_garbage_with_nothing_useful(tmp_path: Path, s3_server: S3Server) -> None:
    """Only loopback, only known ports; random bytes, HTTP and TLS get no traceback, no path, no secret."""
    rng = random.Random(39)
    with NatsServer(tmp_path / "nats") as nats:
        ports = {nats.pid: [nats.port], s3_server.pid: sorted(s3_server._ports.values())}
        for pid, known in ports.items():
            found = listening(pid)
            assert all(is_loopback(kind, address) for kind, address, _ in found)
            assert {port for _, _, port in found} <= set(known), "a port that nobody documented"
        garbage = (rng.randbytes(4096), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + rng.randbytes(500))
        for port in (nats.port, s3_server.port):
            for data in garbage:
                said = answers(port, data).lower()
                for leak in (b"traceback", b"goroutine", b"panic", str(tmp_path).encode(), b"only-for-tests"):
                    assert leak not in said, (port, data[:8], said[:200])
        with NatsServer(tmp_path / "other") as alive:  # and both still serve
            assert answers(alive.port, b"").startswith(b"INFO")
            assert answers(nats.port, b"").startswith(b"INFO")
        assert b"healthz" not in answers(s3_server.port, b"GET /healthz HTTP/1.0\r\n\r\n").lower()
