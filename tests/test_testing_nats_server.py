"""The bus for tests: where it listens, and whose configuration it takes."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleet_examples import make_fleet
from sop.fleet.places import bus_place
from sop.testing.servers.nats import NatsServer
from sop.testing.servers.s3 import free_ports
from sop.transport import load_identity, open_bus

pytestmark = pytest.mark.slow


def command_of(server: NatsServer) -> list[str]:
    return Path(f"/proc/{server.pid}/cmdline").read_text().rstrip("\0").split("\0")[1:]


def test_it_listens_where_it_is_told_to_and_keeps_its_events_in_its_folder(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with NatsServer(tmp_path, port=port) as server:
        assert server.url("run") == f"nats://127.0.0.1:{port}/run"
        bus = open_bus(server.url("run"), owner=True)
        bus.publish("episodes", b"e", "1")
        assert [event for _, event in bus.poll("episodes", None, 5.0)] == [b"e"]
        bus.close()
        assert server.data == tmp_path / "jetstream"
        assert any(server.data.rglob("*sop_run_episodes*"))


def test_a_configuration_that_says_everything_is_taken_as_it_is(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    fleet = make_fleet(tmp_path / "fleet", bus=f"tls://127.0.0.1:{port}/run", clock=time.time_ns)
    fleet.enroll("brain", "learner")
    config = fleet.folder / "servers" / "nats.conf"
    with NatsServer(tmp_path / "nats", config=config, port=bus_place(fleet.register.bus).port) as server:
        assert command_of(server) == ["--config", str(config)]
        assert server.data == fleet.folder / "servers" / "nats-data" / "jetstream"
        assert server.url("run") == fleet.register.bus
        bus = open_bus(fleet.register.bus, owner=True, identity=load_identity(fleet.folder / "identities" / "brain"))
        bus.publish("policies", b"p", "1")
        bus.close()
        assert any(server.data.rglob("*sop_run_policies*"))


def test_a_configuration_for_another_port_serves_on_ours(tmp_path: Path) -> None:
    listed, port = free_ports(2)
    config = tmp_path / "given.conf"
    config.write_text(f'listen: "127.0.0.1:{listed}"\njetstream {{\n  store_dir: "{tmp_path}/elsewhere"\n}}\n')
    with NatsServer(tmp_path / "nats", config=config, port=port) as server:
        assert server.url("run") == f"nats://127.0.0.1:{port}/run"
        assert command_of(server) == ["--config", str(config), "--addr", "127.0.0.1", "--port", str(port)]
        bus = open_bus(server.url("run"), owner=True)
        bus.publish("episodes", b"e", "1")
        bus.close()
        assert server.data == tmp_path / "elsewhere" / "jetstream"
        assert any(server.data.rglob("*sop_run_episodes*"))


def test_it_ends_with_whoever_started_it_even_by_sigkill(tmp_path: Path) -> None:
    code = (
        "import sys, time, threading; from pathlib import Path; from sop.testing.servers.nats import NatsServer\n"
        "made = []; starter = threading.Thread(target=lambda: made.append(NatsServer(Path(sys.argv[1]))))\n"
        "starter.start(); starter.join(); print(made[0].pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert select.select([server], [], [], 0)[0] == [], "it runs on when the thread that started it has ended"
            os.kill(parent.pid, signal.SIGKILL)
            assert select.select([server], [], [], 20)[0] == [server]
        finally:
            os.close(server)
