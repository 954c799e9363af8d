"""Processes that a benchmark drives: one JSON object per line to their standard input, one per line back.

    benchmark   -- {"do": "read", "path": ...} -->   worker
                <-- {"at_ns": ..., ...} ----------

Moments are `time.monotonic_ns`, which all processes of one machine share.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Answer = Mapping[str, Any]


class Worker:
    """A process that answers questions, one at a time. A context manager: leaving it ends the process.

    Args:
        command: the program and its arguments.
        environment: variables besides this process's own.
    """

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self._command = [str(part) for part in command]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError(f"{self._command[0]} has no pipes")
        self._questions, self._answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def send(self, **question: Any) -> None:
        """Ask without waiting for the answer."""
        self._questions.write(json.dumps(question) + "\n")
        self._questions.flush()

    def receive(self) -> Answer:
        """Wait for the answer to the oldest open question.

        Raises:
            RuntimeError: the process ended instead.
        """
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended with code {self._process.wait()}")
        answer: Answer = json.loads(line)
        return answer

    def ask(self, **question: Any) -> Answer:
        """Ask and wait for the answer."""
        self.send(**question)
        return self.receive()

    def close(self) -> None:
        """End the process: it sees the end of its questions; after ten seconds it is killed. Idempotent."""
        self._questions.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ask_all(workers: Iterable[Worker], **question: Any) -> list[Answer]:
    """Ask all at once, then wait for all answers, in the workers' order."""
    asked = list(workers)
    for worker in asked:
        worker.send(**question)
    return [worker.receive() for worker in asked]


def serve(answers: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """The worker's side: answer questions until there are none.

    Args:
        answers: value of the question's `do` -> function of the question's other fields.
    """
    for line in sys.stdin:
        question = json.loads(line)
        reply = answers[question.pop("do")](**question)
        print(json.dumps(reply), flush=True)
