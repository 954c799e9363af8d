"""lerobot's weight push with lerobot's own code: run by weights.py in lerobot's environment, once per process.

    learner                                                     actor
    state_to_bytes(state dict)                                  StreamParameters -> receive_bytes_in_chunks
      -> parameters_queue -> LearnerService.StreamParameters -->  -> parameters_queue -> bytes_to_state_dict

Queues, chunk size, message sizes, number of server threads and the order of the calls are those of
`lerobot.rl.learner` and `lerobot.rl.actor` in their default mode (threads); those two modules themselves want a robot,
a dataset and a policy. The pause between two pushes (4 s by default there) is left out. The queues pickle: that is the
peer's way, which this project does not use.
"""

import argparse
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import Empty
from typing import Any

import grpc
import torch
from lerobot.rl.learner_service import MAX_WORKERS, LearnerService
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import (
    MAX_MESSAGE_SIZE,
    bytes_to_state_dict,
    grpc_channel_options,
    receive_bytes_in_chunks,
    state_to_bytes,
)
from torch.multiprocessing import Queue
from workers import serve

Reply = Mapping[str, Any]


class Learner:
    """lerobot's learner, as far as weights go: a server, and a queue in front of it."""

    def __init__(self) -> None:
        self._queue = Queue()
        self._shutdown = threading.Event()
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_SIZE),
            ("grpc.max_send_message_length", MAX_MESSAGE_SIZE),
        ]
        self._server = grpc.server(ThreadPoolExecutor(max_workers=MAX_WORKERS), options=options)
        service = LearnerService(
            shutdown_event=self._shutdown,
            parameters_queue=self._queue,
            seconds_between_pushes=0.0,
            transition_queue=Queue(),
            interaction_message_queue=Queue(),
        )
        services_pb2_grpc.add_LearnerServiceServicer_to_server(service, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self._tensors: dict[str, torch.Tensor] = {}

    def port(self) -> Reply:
        """Where it listens."""
        return {"port": self._port}

    def hold(self, shapes: list[list[int]]) -> Reply:
        """Make the bfloat16 tensors that are pushed."""
        noise = torch.randn(
            max(torch.Size(shape).numel() for shape in shapes), generator=torch.Generator().manual_seed(0)
        )
        noise = (noise * 0.02).to(torch.bfloat16)
        self._tensors = {
            f"tensor{number}": noise[: torch.Size(shape).numel()].reshape(shape).clone()
            for number, shape in enumerate(shapes)
        }
        return {"num_bytes": sum(tensor.nbytes for tensor in self._tensors.values())}

    def push(self) -> Reply:
        """`push_actor_policy_to_queue`: serialise, put."""
        start_ns = time.monotonic_ns()
        data = state_to_bytes({"policy": self._tensors})
        serialised_ns = time.monotonic_ns()
        self._queue.put(data)
        return {"start_ns": start_ns, "serialised_ns": serialised_ns}

    def close(self) -> None:
        """Stop the server."""
        self._shutdown.set()
        self._server.stop(1)
        self._queue.cancel_join_thread()


class Actor:
    """lerobot's actor, as far as weights go: a thread that receives, a queue, and the loop that takes from it."""

    def __init__(self, port: int) -> None:
        self._queue = Queue()
        self._shutdown = threading.Event()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", grpc_channel_options())
        self._stub = services_pb2_grpc.LearnerServiceStub(self._channel)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()
        self._state: dict[str, Any] = {}

    def _receive(self) -> None:
        try:
            receive_bytes_in_chunks(self._stub.StreamParameters(services_pb2.Empty()), self._queue, self._shutdown)
        except grpc.RpcError:
            return  # the benchmark closed the channel

    def wait(self, timeout_s: float) -> Reply:
        """Wait for weights and decode them: a tensor per name, ready for `load_state_dict`. `at_ns` None: none came."""
        try:
            data = self._queue.get(timeout=timeout_s)
        except Empty:
            return {"at_ns": None}
        received_ns = time.monotonic_ns()
        self._state = bytes_to_state_dict(data)["policy"]
        return {"at_ns": time.monotonic_ns(), "received_ns": received_ns, "tensors": len(self._state)}

    def free(self) -> Reply:
        """Forget the weights."""
        self._state = {}
        return {}

    def close(self) -> None:
        """Cut the stream."""
        self._shutdown.set()
        self._channel.close()
        self._queue.cancel_join_thread()


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
