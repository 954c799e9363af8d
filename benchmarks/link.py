"""Seconds from publish to swapped over a thin link: dense and delta, for robots that are up to date and that are not.

    learner -- publish --> store === link (bandwidth, delay) === robot: fetch, decode, verify, load, swap

    .venv/bin/python benchmarks/link.py [--quick]

The link is `sop.testing.link.LinkStore`: delay and bandwidth, no TCP; its bandwidth is checked with a plain get in the
same run, and events take the delay too. The policies are snapshots of a real fine-tune (delta_workload.py, lr 1e-5),
25 optimizer steps apart, bfloat16, repeated under other names up to the size of the artifact. Where a chain needs more
snapshots than were trained, the fine-tune is continued with the fp32 changes of the intervals that were. Learner and
robot share this machine: their processor time is in the seconds, the robot's store is nobody else's.

Newest is version 7, keyframes are 0 and 4: for a late joiner nearly the worst moment (one keyframe and three deltas).
Writes runs/bench/link.json: seconds, bytes and floor (bytes over bandwidth and a round trip) per link, form and robot.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import weights_delta
from harness import arguments, print_table, write_result
from link_robot import Arrival, DelayedBus, Robot
from weights_artifact import facts, total_bytes, wait_published

from sop.broadcast import Publisher
from sop.core.policy import Weights
from sop.testing.link import LinkStore
from sop.transport import SqliteBus
from sop.transport.directory import DirectoryStore

LINKS = {"1gbit": 125e6, "100mbit": 12.5e6}
"""Bytes per second."""
DELAY_S = 0.05
"""One way; a round trip is twice that."""
FORMS = {"dense": "full", "delta": "packed"}
BEFORE = 7
"""Versions that are published before the measured one, which is number 7."""
ROBOTS: dict[str, int | None] = {"up_to_date": 6, "behind_2": 5, "behind_6": 1, "late_joiner": None}
"""Robot -> version that it holds when 7 is the newest."""
ARTIFACT_MB, QUICK_ARTIFACT_MB = 780.0, 12.0
QUICK_INTERVALS, INTERVALS = 1, 3
CHECK_S = 0.5


def main() -> None:
    """Command line."""
    parser = arguments("Publish -> swapped over emulated links of 1 Gbit/s and 100 Mbit/s, dense and delta.")
    parser.add_argument("--megabytes", type=float, help=f"size of the artifact ({ARTIFACT_MB:.0f}; quick: 12)")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    options = parser.parse_args()
    repeats = options.repeats or 1
    megabytes = options.megabytes or (QUICK_ARTIFACT_MB if options.quick else ARTIFACT_MB)
    folder = Path(options.out) / "tmp" / f"link-{time.monotonic_ns()}"
    intervals = QUICK_INTERVALS if options.quick else INTERVALS
    files = weights_delta.fine_tune("lr1e-5", intervals, quick=options.quick)
    found: dict[str, Any] = {"delay_s": DELAY_S, "repeats": repeats, "trained_intervals": intervals}
    for key in ("seconds", "bytes", "floor", "over_floor", "phases"):
        found[key] = {link: {form: {} for form in FORMS} for link in options.links}
    found["link_check"] = {}
    found["artifact_mb"] = total_bytes(next(_versions(files, megabytes))) / 1e6
    try:
        for link in options.links:
            for form in FORMS:
                measured = [
                    _measure(folder / f"{link}-{form}-{n}", link, form, files, megabytes) for n in range(repeats)
                ]
                _enter(found, link, form, measured)
            found["link_check"][link] = _check(folder, link)
            _print(found, link)
            print(f"{link}: a plain get reaches {found['link_check'][link]:.1%} of the bandwidth")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"-> {write_result('link', found, options)}")


def _measure(folder: Path, link: str, form: str, files: list[Path], megabytes: float) -> dict[str, Arrival]:
    """One store with versions 0 to 6, then 7 while the up-to-date robot listens, then the other robots."""
    with ExitStack() as stack:
        folder.mkdir(parents=True)
        stack.callback(shutil.rmtree, folder)
        store = DirectoryStore(folder / "store")
        bus = stack.enter_context(closing(SqliteBus(folder / "bus.sqlite", owner=True)))
        publisher = Publisher(store, bus, keep_policies=BEFORE + 1, encoding=FORMS[form], clock_ns=time.monotonic_ns)
        stack.callback(publisher.close)
        for number, weights in enumerate(_versions(files, megabytes)):
            if number == BEFORE:
                break
            publisher.publish(weights, facts(number))
            wait_published(publisher, number)
        found: dict[str, Arrival] = {}
        for name, held in ROBOTS.items():
            road = LinkStore(store, delay_s=DELAY_S, bytes_per_s=LINKS[link])
            robot = Robot(store, DelayedBus(bus, DELAY_S), road, held=held, like=weights)
            new = name == "up_to_date"
            start_ns = time.monotonic_ns()
            with closing(robot.connect()) as subscriber:
                if new:
                    time.sleep(1.0)  # until it has listed the store and waits for events
                    start_ns = time.monotonic_ns()
                    publisher.publish(weights, facts(BEFORE))
                found[name] = robot.swap(subscriber, start_ns)
            if found[name].version != BEFORE:
                raise RuntimeError(f"{name} swapped in version {found[name].version} instead of {BEFORE}")
        return found


def _versions(files: list[Path], megabytes: float) -> Iterator[Weights]:
    """Snapshot after snapshot of the fine-tune, each repeated to the size of the artifact."""
    snapshots = [weights_delta.load_float32(path) for path in files]
    changes = [{name: after[name] - before[name] for name in before} for before, after in pairwise(snapshots)]
    current = {name: array.copy() for name, array in snapshots[0].items()}
    for number in range(BEFORE + 1):
        yield _repeated({name: array.astype(ml_dtypes.bfloat16) for name, array in current.items()}, megabytes)
        for name, change in changes[number % len(changes)].items():
            current[name] += change


def _repeated(weights: Weights, megabytes: float) -> Weights:
    """The same arrays under more names, whole tensors only, or the first of them, to about so many MB."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    size, turn = 0, 0
    while True:
        for name, array in weights.items():
            if found and size + array.nbytes > megabytes * 1e6:
                return found
            found[f"copy{turn}_{name.replace('.', '_')}"] = array
            size += array.nbytes
        turn += 1


def _check(folder: Path, link: str) -> float:
    """Share of the bandwidth that one get of half a second of bytes reaches, delays taken off."""
    store = DirectoryStore(folder / "check")
    num_bytes = int(LINKS[link] * CHECK_S)
    store.put(f"check/{link}", bytes(num_bytes))
    road = LinkStore(store, delay_s=DELAY_S, bytes_per_s=LINKS[link])
    start = time.monotonic()
    road.get(f"check/{link}")
    return num_bytes / (time.monotonic() - start - 2 * DELAY_S) / LINKS[link]


def _enter(found: dict[str, Any], link: str, form: str, measured: list[dict[str, Arrival]]) -> None:
    for robot in ROBOTS:
        arrivals = [one[robot] for one in measured]
        seconds = statistics.median(arrival.seconds for arrival in arrivals)
        num_bytes = arrivals[0].num_bytes
        floor = num_bytes / LINKS[link] + 2 * DELAY_S
        found["seconds"][link][form][robot] = seconds
        found["bytes"][link][form][robot] = num_bytes
        found["floor"][link][form][robot] = floor
        found["over_floor"][link][form][robot] = seconds / floor
        found["phases"][link][form][robot] = arrivals[-1].phases


def _print(found: dict[str, Any], link: str) -> None:
    rows = []
    for robot in ROBOTS:
        row: list[object] = [robot.replace("_", " ")]
        for form in FORMS:
            row += [found[key][link][form][robot] for key in ("seconds", "over_floor")]
            row.append(found["bytes"][link][form][robot] / 1e6)
        rows.append([*row, *found["phases"][link]["delta"][robot].values()])
    columns = ["robot", "dense s", "/floor", "MB", "delta s", "/floor", "MB"]
    size = f"{found['artifact_mb']:.0f} MB, {DELAY_S * 1e3:.0f} ms each way"
    title = f"{link}: publish -> swapped, {size}; phases of the delta in s"
    print_table(title, [*columns, "published", "fetch", "decode", "verify", "load"], rows)


if __name__ == "__main__":
    main()
