"""Nemeses of what is written down: objects in the store, journals and spools on a robot's disk."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sop.chaos.target import ACTOR, LEARNER, Target
from sop.core import layout
from sop.core.errors import AlreadyExists, NotFound, StoreUnavailable

OUTAGE_S = 0.5
"""How long the store is away: within the patience of every process that is waiting for it."""
PATIENCE_S = 15.0
"""How long a nemesis waits for something to come by."""
_LOOK_S = 0.02
_TAIL_BYTES = 16 << 10
_FRESH_S = 30.0
"""What was written so recently may still be in memory alone when the power goes."""


def power_cut(target: Target, rng: random.Random) -> str:
    """Kill robots and learner at once, and lose what none of them had synced."""
    shot = [victim for role in (ACTOR, LEARNER) for victim in target.victims(role) if target.shoot(victim)]
    if not shot:
        return ""
    torn = 0
    for victim in shot:
        for path in (target.run.folder / "actors" / victim.name / "spool").glob("running-*"):
            with suppress(OSError), path.open("r+b") as file:
                file.truncate(max(0, path.stat().st_size - rng.randrange(1, _TAIL_BYTES)))
                torn += 1
    lost = 0
    for path in _unsynced(target) if any(victim.role == LEARNER for victim in shot) else []:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < _FRESH_S:
                path.unlink()
                lost += 1
    return f"cut the power of {', '.join(v.name for v in shot)}; {torn} journals torn, {lost} unsynced objects gone"


def _unsynced(target: Target) -> list[Path]:
    """Objects that a learner writes without fsync: sidecars, and tensors of versions without a manifest."""
    if target.store_folder is None:
        return []
    found = list((target.store_folder / layout.LABELS).rglob("*.arrow"))
    for folder in (target.store_folder / layout.POLICIES).glob("*"):
        if not (folder / "manifest.json").exists():
            found += [path for path in folder.iterdir() if path.suffix in {".packed", ".safetensors"}]
    return found


def store_away(target: Target, rng: random.Random) -> str:  # noqa: ARG001
    """Take the store's folder away for a moment."""
    folder = target.store_folder
    if folder is None or not folder.exists():
        return ""
    away = folder.with_name("store.away")
    folder.rename(away)
    try:
        time.sleep(OUTAGE_S)
    finally:
        away.rename(folder)
    return f"the store was away for {OUTAGE_S} s"


def flip(target: Target, rng: random.Random) -> str:
    """Flip one bit of an episode that the learner has not seen yet."""

    def change(data: bytes) -> bytes:
        place = rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]

    return _damage(target, change, "a bit of it flipped")


def truncate(target: Target, rng: random.Random) -> str:
    """Cut an episode short that the learner has not seen yet."""
    return _damage(target, lambda data: data[: rng.randrange(len(data))], "cut short")


def _damage(target: Target, change: Callable[[bytes], bytes], how: str) -> str:
    store = target.run.store
    with target.asleep(LEARNER) as hit:
        key = next_episode(target) if hit else None
        if key is None:
            return ""
        whole = store.get(key)
        target.damaged.add(key)
        _replace(target, key, change(whole))
    try:
        note, deadline_s = layout.quarantine(key), time.monotonic() + PATIENCE_S
        refused = False
        while not refused and time.monotonic() < deadline_s and target.victims(LEARNER):
            with suppress(NotFound, StoreUnavailable):
                store.get(note, slice(0, 1))
                refused = True
            time.sleep(_LOOK_S)
    finally:
        _replace(target, key, whole)
    return f"{key}: {how}; {'refused by the learner' if refused else 'not looked at meanwhile'}; made whole again"


def next_episode(target: Target) -> str | None:
    """The next episode that reaches the store."""
    known = set(target.run.store.keys(f"{layout.EPISODES}/"))
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s and target.victims(ACTOR):
        for key in target.run.store.keys(f"{layout.EPISODES}/"):
            if key not in known:
                return key
        time.sleep(_LOOK_S)
    return None


def _replace(target: Target, key: str, data: bytes) -> None:
    target.run.store.delete(key)
    with suppress(AlreadyExists):  # its robot was quicker
        target.run.store.put(key, data)


def disk_full(target: Target, rng: random.Random) -> str:
    """Fill the small disk of one robot's spool for some seconds."""
    spools = small_disks(target)
    if not spools:
        return ""
    spool, seconds = rng.choice(spools), rng.uniform(1.0, 4.0)
    filler = spool / "filler"
    try:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        time.sleep(seconds)
    finally:
        filler.unlink(missing_ok=True)
    return f"the disk of {spool.parent.name} was full for {seconds:.1f} s"


def small_disks(target: Target) -> list[Path]:
    """Spools that are disks of their own."""
    return sorted(spool for spool in (target.run.folder / "actors").glob("robot-*/spool") if spool.is_mount())
