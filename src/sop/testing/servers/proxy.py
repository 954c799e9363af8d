"""A TCP proxy on this machine that cuts, slows, shortens and refuses, on command."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

_PIECE_BYTES = 64 << 10
_LINGER = b"\1\0\0\0\0\0\0\0"
"""struct linger {1, 0}: closing sends a reset, as a broken link does."""


class CuttingProxy:
    """Forwards connections to a server until it is told otherwise. Ends with `close` or its `with` block.

        with CuttingProxy("127.0.0.1", server_port) as proxy:
            store = open_store(f"s3://bucket/run?endpoint=http://127.0.0.1:{proxy.port}")
            proxy.truncate(100_000)         # the link breaks in the middle of the next request
            store.put("key", bytes(1_000_000))

    Counts what goes through. Safe to use from several threads; no command blocks.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent_bytes = 0
        """Bytes that went to the server until now; what is around TCP is not counted."""
        self.received_bytes = 0
        """Bytes that came from it."""
        self._changed = threading.Condition()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._refusing = False
        self._delay_s = 0.0
        self._sent_bytes_left: int | None = None
        self._answers_lost = False
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="proxy-accept", daemon=True).start()

    def cut(self) -> None:
        """Reset every connection, and every new one until `heal`."""
        self.refuse()
        self._reset_all()

    def refuse(self) -> None:
        """Reset new connections until `heal`; those that exist live on."""
        with self._changed:
            self._refusing = True

    def heal(self) -> None:
        """Forward everything again, at once."""
        with self._changed:
            self._refusing, self._answers_lost = False, False
            self._delay_s, self._sent_bytes_left = 0.0, None

    def delay(self, seconds: float) -> None:
        """Hold every piece of up to 64 KiB for so long, in both directions."""
        with self._changed:
            self._delay_s = seconds

    def truncate(self, after_bytes: int) -> None:
        """Reset all connections, once, when so many more bytes have gone to the server; what follows is forwarded."""
        with self._changed:
            self._sent_bytes_left = after_bytes

    def lose_answer(self) -> None:
        """Reset the connection on which the next answer comes, instead of passing that on; once."""
        with self._changed:
            self._answers_lost = True

    def close(self) -> None:
        """Stop listening and reset every connection. Idempotent."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._reset_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                _reset(client)
                continue
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            pair = (client, server)
            with self._changed:
                self._pairs.add(pair)
            for source, sink, up in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._forward, args=(pair, source, sink, up), name="proxy-forward", daemon=True
                ).start()

    def _forward(
        self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket, up: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                if self._delay_s:
                    self._closed.wait(self._delay_s)
                if up:
                    allowed = self._allow(len(piece))
                    with self._changed:
                        self.sent_bytes += allowed
                    sink.sendall(piece[:allowed])
                    if allowed < len(piece):
                        self._reset_all()
                        return
                elif self._takes_answer():
                    break
                else:
                    with self._changed:
                        self.received_bytes += len(piece)
                    sink.sendall(piece)
        self._drop(pair)

    def _allow(self, num_bytes: int) -> int:
        with self._changed:
            if self._sent_bytes_left is None:
                return num_bytes
            if num_bytes <= self._sent_bytes_left:
                self._sent_bytes_left -= num_bytes
                return num_bytes
            allowed, self._sent_bytes_left = self._sent_bytes_left, None
            return allowed

    def _takes_answer(self) -> bool:
        with self._changed:
            taken, self._answers_lost = self._answers_lost, False
            return taken

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._changed:
            self._pairs.discard(pair)
        for end in pair:
            _reset(end)

    def _reset_all(self) -> None:
        with self._changed:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                _reset(end)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        end.shutdown(socket.SHUT_RDWR)
    end.close()
