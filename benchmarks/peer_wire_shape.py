"""The wire shape of lerobot's weight push, for machines without lerobot: `wire_shape` in the results, not `lerobot`.

Written here from what `peer_lerobot_push.py` shows: a state dict written with torch.save, sent over one gRPC stream
in messages of 2 MB, put together in memory, read with torch.load. Left out, in the peer's favour: its protobuf
message, its queues between processes.
"""

import argparse
import io
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import torch
from workers import serve

Reply = Mapping[str, Any]
CHUNK_BYTES = 2 << 20
MAX_MESSAGE_BYTES = 4 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
METHOD = "StreamParameters"


class Learner:
    """A server with a queue in front of it."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes] = queue.Queue()
        self._closing = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=3), options=OPTIONS)
        handler = grpc.method_handlers_generic_handler(
            "Shape", {METHOD: grpc.unary_stream_rpc_method_handler(self._stream)}
        )
        self._server.add_generic_rpc_handlers((handler,))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self._tensors: dict[str, torch.Tensor] = {}

    def _stream(self, _request: bytes, _context: object) -> Iterator[bytes]:
        while not self._closing.is_set():
            try:
                data = self._queue.get(timeout=0.01)
            except queue.Empty:
                continue
            for start in range(0, len(data), CHUNK_BYTES):
                last = start + CHUNK_BYTES >= len(data)
                yield bytes([last]) + data[start : start + CHUNK_BYTES]

    def port(self) -> Reply:
        """Where it listens."""
        return {"port": self._port}

    def hold(self, shapes: list[list[int]]) -> Reply:
        """Make the bfloat16 tensors that are pushed."""
        self._tensors = {str(number): torch.ones(shape, dtype=torch.bfloat16) for number, shape in enumerate(shapes)}
        return {"num_bytes": sum(tensor.nbytes for tensor in self._tensors.values())}

    def push(self) -> Reply:
        """Serialise, put."""
        start_ns = time.monotonic_ns()
        file = io.BytesIO()
        torch.save({"policy": self._tensors}, file)
        data = file.getvalue()
        serialised_ns = time.monotonic_ns()
        self._queue.put(data)
        return {"start_ns": start_ns, "serialised_ns": serialised_ns}

    def close(self) -> None:
        """Stop the server."""
        self._closing.set()
        self._server.stop(1)


class Actor:
    """A thread that receives, and a queue behind it."""

    def __init__(self, port: int) -> None:
        self._queue: queue.Queue[bytes] = queue.Queue()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", OPTIONS)
        self._stream = self._channel.unary_stream(f"/Shape/{METHOD}")(b"")
        threading.Thread(target=self._receive, daemon=True).start()
        self._state: dict[str, Any] = {}

    def _receive(self) -> None:
        buffer = io.BytesIO()
        try:
            for message in self._stream:
                buffer.write(message[1:])
                if message[0]:
                    self._queue.put(buffer.getvalue())
                    buffer = io.BytesIO()
        except grpc.RpcError:
            return  # the benchmark closed the channel

    def wait(self, timeout_s: float) -> Reply:
        """Wait for weights and decode them. `at_ns` None: none came."""
        try:
            data = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return {"at_ns": None}
        received_ns = time.monotonic_ns()
        self._state = torch.load(io.BytesIO(data), weights_only=True)["policy"]
        return {"at_ns": time.monotonic_ns(), "received_ns": received_ns, "tensors": len(self._state)}

    def free(self) -> Reply:
        """Forget the weights."""
        self._state = {}
        return {}

    def close(self) -> None:
        """Cut the stream."""
        self._channel.close()


def main() -> None:
    """Command line: `learner`, or `actor --port N`; then questions on standard input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("role", choices=("learner", "actor"))
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.role == "learner":
        learner = Learner()
        serve({"port": learner.port, "hold": learner.hold, "push": learner.push})
        learner.close()
    else:
        actor = Actor(options.port)
        serve({"wait": actor.wait, "free": actor.free})
        actor.close()


if __name__ == "__main__":
    main()
