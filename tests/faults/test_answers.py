"""What a store can answer to a put: 503, 409, 412, nothing for a while. A server on loopback says it for real."""

import http.server
import random
import threading
from collections.abc import Callable, Iterator

import pytest

from recovery_times import Recovery
from sop.core.errors import AlreadyExists, StoreUnavailable
from sop.transport import ObjectStore, open_store
from sop.transport.retry import Backoff, put_retrying

DATED = {"Last-Modified": "Mon, 23 Nov 2026 06:00:00 GMT", "ETag": '"x"'}


class Moody(http.server.BaseHTTPRequestHandler):
    """Answers puts with the statuses of its list, then as a store that has the object."""

    protocol_version = "HTTP/1.1"
    statuses: list[int] = []  # noqa: RUF012 - each test makes a class of its own
    kept = b""
    recovery: Recovery | None = None

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200:
            type(self).kept = data
        elif self.recovery is not None:
            self.recovery.fault_is_over()
        self.answer(status, b"" if status == 200 else b"<Error><Code>Moody</Code></Error>")

    def do_GET(self) -> None:
        last = min(int(self.headers["Range"].rpartition("-")[2]), len(self.kept) - 1)
        part = self.kept[: last + 1]
        self.answer(206, part, {"Content-Range": f"bytes 0-{last}/{len(self.kept)}"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **DATED, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Moody], ObjectStore]]:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    handler = type("OneMoody", (Moody,), {"statuses": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield handler, open_store(f"s3://bucket/run?endpoint=http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def put(store: ObjectStore, attempts: int = 5, pause: Callable[[float], object] = lambda _: None) -> list[float]:
    """Put with bounded attempts; returns the pauses."""
    pauses: list[float] = []

    def waits(seconds: float) -> None:
        pauses.append(seconds)
        pause(seconds)

    put_retrying(store, "key", b"mine", attempts=attempts, backoff=Backoff(random.Random(0)), pause=waits)
    return pauses


@pytest.mark.parametrize("statuses", [[503], [503, 503, 500], [409], [409, 503, 409]])
def test_fault_11_what_the_store_answers_is_tried_again_or_settled(
    moody: tuple[type[Moody], ObjectStore], statuses: list[int], recovery: Recovery
) -> None:
    """503, 500: later. 409: somebody writes the same key at this moment, so look again; nobody else did here."""
    handler, store = moody
    handler.statuses, handler.recovery = list(statuses), recovery
    pauses = put(store, pause=threading.Event().wait)
    recovery.whole("the put is made, after the last bad answer")
    assert len(pauses) <= len(statuses)
    assert all(0 < pause <= 10 for pause in pauses)
    assert handler.kept == b"mine"


def test_fault_11_taken_by_the_same_bytes_after_a_lost_answer_is_success(
    moody: tuple[type[Moody], ObjectStore],
) -> None:
    handler, store = moody
    handler.kept, handler.statuses = b"mine", [503, 412]
    put(store)
    assert handler.statuses == []


def test_fault_11_taken_by_others_is_said(moody: tuple[type[Moody], ObjectStore]) -> None:
    handler, store = moody
    handler.kept, handler.statuses = b"theirs", [412]
    with pytest.raises(AlreadyExists):
        put(store)
    handler.statuses = [503, 412]
    with pytest.raises(AlreadyExists):
        put(store)


def test_fault_11_trying_again_ends(moody: tuple[type[Moody], ObjectStore]) -> None:
    handler, store = moody
    handler.statuses = [503] * 50
    with pytest.raises(StoreUnavailable):
        put(store, attempts=3)
    assert len(handler.statuses) >= 50 - 3 * 5  # the library may repeat, within bounds
