"""What rank 0 and its followers say to each other: msgpack, as everywhere.

    rank 0 -> follower    Learn       one step: your part of the batch, the randomness, the learning rate
                          Restore     I have the state of a checkpoint: take it over
                          Collect     I need the weights in one piece (sharded only)
                          Waiting     there is nothing to do, I am alive
                          Finish      end
    follower -> rank 0    Learned     after each Learn: the losses of my part

A follower keeps nothing from one step to the next but weights, optimizer and payloads: every `Learn` says all that the
step needs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sop.buffer.jobs import BatchPlan, LoadJob, to_job, to_plan
from sop.core.errors import RunError
from sop.core.experience import Batch


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A follower's windows of one batch."""

    job: LoadJob
    """The plan; its files are keys only."""
    label_version: int

    @classmethod
    def of(cls, plan: BatchPlan) -> "Part":
        """A plan as a message."""
        return cls(job=to_job(plan, [""] * len(plan.keys), 0), label_version=plan.label_version)

    def plan(self) -> BatchPlan:
        """The inverse of `of`."""
        return replace(to_plan(self.job), label_version=self.label_version)


class Learn(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One learner step."""

    part: Part
    ahead: tuple[Part, ...]
    """What will come next: fetch it meanwhile. It may change, and is said again with every step."""
    first: int
    """Row of the batch at which the part begins."""
    total: int
    """Windows of the whole batch."""
    generator: bytes
    """State of the generator from which the batch's randomness is drawn."""
    lr_factor: float


class Restore(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank 0 gives its tensors out next (`Optimization.load_state`)."""

    state: Mapping[str, Any]


class Collect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank 0 gathers tensors next."""

    averaged: bool
    """The weights as they are published; else everything that a checkpoint holds."""
    names: tuple[str, ...] | None = None
    """Only these."""


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """Nothing to do."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """The learner ends well."""


Message = Learn | Restore | Collect | Waiting | Finish


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a part."""

    losses: bytes
    """[part] float32, in the order of the part."""
    policy_version: bytes
    """[part] int64, see `Batch.policy_version`."""
    content_hash: str
    """Of the part."""
    stop: bool
    """This rank was asked to end (SIGTERM)."""

    @classmethod
    def of(cls, batch: Batch, losses: npt.NDArray[np.float32], *, stop: bool) -> "Learned":
        """The answer for a part that was learned from."""
        return cls(
            losses=losses.tobytes(),
            policy_version=batch.policy_version.tobytes(),
            content_hash=batch.content_hash,
            stop=stop,
        )


def encode(message: msgspec.Struct) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> Message:
    """What rank 0 said.

    Raises:
        RunError: it is no message.
    """
    try:
        message: Message = msgspec.msgpack.decode(data, type=Message)
    except msgspec.DecodeError as error:
        raise RunError(f"rank 0 says what this rank does not know ({error}): start all with one version") from error
    return message


def decode_learned(data: bytes, rank: int, part: int) -> tuple[Learned, npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """What a follower answered: the message, its losses and its policy versions.

    Raises:
        RunError: it is no answer for a part of that size.
    """
    try:
        learned = msgspec.msgpack.decode(data, type=Learned)
        losses = np.frombuffer(learned.losses, np.float32)
        versions = np.frombuffer(learned.policy_version, np.int64)
    except (msgspec.DecodeError, ValueError) as error:
        raise RunError(f"rank {rank} answered what rank 0 does not understand ({error})") from error
    if not len(losses) == len(versions) == part:
        raise RunError(f"rank {rank} answered {len(losses)} losses and {len(versions)} versions for {part} windows")
    return learned, losses, versions
