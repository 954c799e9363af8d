"""Backup and restore: a store's objects, copied to another store. Any two engines; create-only; resumable.

    1 episodes, demonstrations, index, labels, tensors, ...    facts that nothing else names yet
    2 policies/*/manifest.json, checkpoints/*/state.json       what makes them exist, after everything that they name
    3 channels/*                                               what robots are told to run
    4 run.json                                                 the run itself: without it there is none

A copy that stops anywhere is no run, or one that lacks only what is new; the same command again makes it whole.
While a run goes on, a copy has what was there when it began, or more. Leases, probes and the bus are not copied:
they belong to processes that run.
"""

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from sop.core import layout
from sop.core.codec import content_hash
from sop.core.errors import AlreadyExists, NotFound, RunError
from sop.transport import ObjectStore
from sop.transport.retry import Backoff, get_retrying, put_retrying, retrying

_ATTEMPTS = 8
_LEFT_OUT = (f"{layout.LEASES}/", "probes/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy did."""

    copied: int
    there: int
    """Objects that the target had already."""
    verified: int
    num_bytes: int
    """Copied."""


def copy_store(
    source: ObjectStore,
    target: ObjectStore,
    *,
    verify: bool = False,
    pause: Callable[[float], object] = time.sleep,
) -> Copied:
    """Copy everything that the target lacks (blocking; one object in memory at a time). Idempotent.

    Args:
        source: is only read.
        target: nothing in it is replaced or deleted.
        verify: read every object again at both places and compare.
        pause: waits so many seconds between two attempts.

    Raises:
        RunError: an object of the same name has other bytes in the target; names it.
        StoreUnavailable: one of them stayed away; the same call goes on.
    """

    def keys_of(store: ObjectStore) -> list[str]:
        backoff = Backoff(random.Random())
        return retrying(lambda: list(store.keys("")), attempts=_ATTEMPTS, backoff=backoff, pause=pause)

    def read(store: ObjectStore, key: str) -> bytes:
        return get_retrying(store, key, attempts=_ATTEMPTS, backoff=Backoff(random.Random()), pause=pause)

    there = set(keys_of(target))
    wanted = sorted(
        (key for key in keys_of(source) if not key.startswith(_LEFT_OUT)), key=lambda key: (_rank(key), key)
    )
    copied = verified = num_bytes = 0
    for key in wanted:
        if key in there and not verify:
            continue
        try:
            data = read(source, key)
        except NotFound:  # the learner has collected it meanwhile
            continue
        if key not in there:
            with contextlib.suppress(AlreadyExists):
                backoff = Backoff(random.Random())
                put_retrying(target, key, data, attempts=_ATTEMPTS, backoff=backoff, pause=pause)
            copied, num_bytes = copied + 1, num_bytes + len(data)
        if verify:
            if content_hash(read(target, key)) != content_hash(data):
                raise RunError(
                    f"{key} has other bytes in the target: it is not a copy of this run; take an empty place"
                )
            verified += 1
    return Copied(copied=copied, there=len(there.intersection(wanted)), verified=verified, num_bytes=num_bytes)


def _rank(key: str) -> int:
    """Place in the order of the picture above."""
    if key == layout.RUN:
        return 3
    if key.startswith(f"{layout.CHANNELS}/"):
        return 2
    return 1 if key.endswith(("/manifest.json", "/state.json")) else 0
