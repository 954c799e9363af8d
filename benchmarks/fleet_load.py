"""Load generator: a fleet of protocol-true actors and one learner on this machine. Is anything lost, how fresh is it?

    2-4 processes of actors, each actor with its own           one real learner (`sop learner`)
    spool, uploader, subscriber and reporter
    +-------------------------------------------+  episodes  +---------------------------------+
    | recorded episodes, stamped anew           | ---------> | ingest, train, publish          |
    | (no physics, no inference, no control)    | <--------- |                                 |
    +-------------------------------------------+  policies  +---------------------------------+
                          store: a directory, perhaps behind an emulated link, or S3 (SeaweedFS, started here)
                          bus: SQLite, or NATS (started here), with a connection per actor

Afterwards the books are closed: what the journals of all actors say was recorded must be what the learner's last
checkpoint has indexed, each once. Hops come from the lineage of the published versions and from the swaps that the
actors announced. The default rate is what two cores carry; `--period-s` and `--actors` find out what yours do.

    .venv/bin/python benchmarks/fleet_load.py [--quick] [--actors 1000] [--period-s 60] [--delay-ms 25 --mbit 100]
    .venv/bin/python benchmarks/fleet_load.py --store s3 --bus nats [--quick] [--actors 1000]
"""

import argparse
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import harness
import msgspec
import psutil
from fleet_actors import SiteConfig
from fleet_audit import audit, hops_of
from fleet_processes import LearnerReports, Process, Processes, Watch
from fleet_recordings import make_recordings
from fleet_servers import Backends, open_backends

from sop.core.events import LearnerReported
from sop.metrics import percentile, read_metrics
from sop.places import Place, find_place
from sop.presets import make_config
from sop.runs import Run, create_run

HERE = Path(__file__).parent
READY_S = 240.0
"""How long the processes may take to start."""
WARM_STEPS = 3
"""Learner steps before the measured time begins: the first ones load and compile code, and need an episode. One period
passes too, in which every actor ends its first episode: what that touches for the first time is no leak."""
WARM_S = 60.0
"""How long these steps may take."""
DRAIN_S = 120.0
"""How long the spools may take to empty after the last episode."""
CATCH_UP_S = 300.0
"""How long the learner may take to index what is in the store then, and again how long it may take to stop."""
BOOKS = (
    "recorded",
    "indexed",
    "lost",
    "duplicated",
    "spooled",
    "episodes_per_s",
    "published_versions",
    "publish_every_s",
    "learner_steps_per_s",
    "threads",
    "rss_slope_mb_per_min",
    "caught_up_s",
)
"""Values of the result that are printed one by one."""
ONE_HEAP = {"MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
"""Allocators that keep no heap per thread: a process has a thousand threads here, and three on a robot."""
SETTINGS = (
    "robot.image_size=64",
    "fleet.episodes=null",
    "pretrain.demonstrations_per_task=2",
    "pretrain.steps=2",
    "learner.threads=1",
    "learner.checkpoint_every=500",
)
"""The debug preset, with larger images, no end, and a base policy that has hardly been trained."""


def prepare(folder: Path, options: argparse.Namespace, place: Place | None) -> Run:
    """A run with a few demonstrations and a base policy, and recordings for the actors (blocking)."""
    import torch

    from sop.system import ActorOptions, run_actor, run_pretraining

    torch.set_num_threads(1)
    changes = [*SETTINGS, f"learner.publish_every={options.publish_every}", *options.set]
    run = create_run(folder, make_config("debug", changes), place)
    never = threading.Event()
    demonstrations = 2 * len(run.config.robot.all_tasks)
    lab = ActorOptions(actor_id="lab-0", demonstrate=True, speed=0.0, end_sequence=demonstrations)
    run_actor(run, lab, never)
    run_pretraining(run, never)
    make_recordings(folder / "recordings", run, number=8, num_steps=options.steps)
    return run


def start_sites(run: Run, processes: Processes, options: argparse.Namespace) -> list[Process]:
    """Start the processes of actors; they wait to be told to record."""
    ids = [f"robot-{number:05d}" for number in range(options.actors)]
    sites = []
    for number in range(options.processes):
        config = SiteConfig(
            run=str(run.folder),
            store=find_place(str(run.folder)).store,
            bus=run.bus_url,
            own_bus=options.bus_connections == "actor",
            recordings=str(run.folder / "recordings"),
            actor_ids=tuple(ids[number :: options.processes]),
            period_s=options.period_s,
            report_s=options.report_s,
            seed=number + 1,
            delay_s=options.delay_ms / 1e3,
            bytes_per_s=options.mbit * 1e6 / 8 if options.mbit else None,
            loss=options.loss,
        )
        path = run.folder / f"site-{number}.json"
        path.write_bytes(msgspec.json.encode(config))
        sites.append(processes.start(f"site-{number}", [str(HERE / "fleet_actors.py"), str(path)], ONE_HEAP))
    return sites


def say(what: str) -> None:
    """A line about what goes on now; the result is printed at the end."""
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def wait_for(what: Callable[[], bool], timeout_s: float, check: Callable[[], None]) -> float:
    """Seconds until something was so, at most `timeout_s`."""
    started_s = time.monotonic()
    while not what() and time.monotonic() - started_s < timeout_s:
        check()
        time.sleep(0.1)
    return time.monotonic() - started_s


def run_fleet(
    run: Run, processes: Processes, backends: Backends, reports: LearnerReports, options: argparse.Namespace
) -> tuple[Watch, dict[str, Any]]:
    """Start everything, record for the given time, let it drain, and stop it in order (blocking)."""
    sites = start_sites(run, processes, options)
    learner = processes.start("learner", ["-m", "sop", "learner", str(run.folder)], {})

    def check() -> None:
        for process in (*sites, learner):
            if process.popen.poll() is not None:
                process.expect("alive", 1.0)

    say(f"starting {options.actors} actors in {options.processes} processes, and the learner")
    started_s = time.monotonic()
    threads = sum(site.expect("ready", READY_S)["threads"] for site in sites)
    wait_for(lambda: reports.newest() is not None, READY_S, check)
    facts: dict[str, Any] = {"start_s": time.monotonic() - started_s, "threads": threads}

    actors = [psutil.Process(site.popen.pid) for site in sites]
    servers = {name: [process] for name, process in backends.processes.items()}
    watch = Watch({"learner": [psutil.Process(learner.popen.pid)], "actors": actors, **servers})
    say(f"recording: a period of {options.period_s:.0f} s to warm up, then {options.seconds:.0f} s that count")
    recording_s = time.monotonic()
    for site in sites:
        site.tell("record")
    wait_for(lambda: reports.last().learner_step >= WARM_STEPS, WARM_S, check)
    wait_for(lambda: time.monotonic() - recording_s >= options.period_s, options.period_s, check)
    facts["warm_up_s"] = time.monotonic() - recording_s
    before = reports.last()
    watch.follow(options.seconds, check)
    facts |= learner_facts(before, reports.last())

    say("recording is over; waiting until everything is indexed")
    stopped_s = time.monotonic()
    facts["recording_s"] = stopped_s - recording_s
    for site in sites:
        site.tell(f"drain {DRAIN_S}")
    drained = [site.expect("drained", DRAIN_S + 30) for site in sites]
    facts["per_robot_hour"] = per_robot_hour([said["traffic"] for said in drained], options, facts["recording_s"])
    facts["spooled_to_store_s"] = time.monotonic() - stopped_s
    late_s = [late_s for said in drained for late_s in said["late_s"]]
    facts["episode_end_late_s"] = {"p50": percentile(late_s, 50), "p99": percentile(late_s, 99)}
    wait_for(lambda: reports.last().online_episodes >= len(late_s), CATCH_UP_S, check)
    facts["caught_up_s"] = time.monotonic() - stopped_s
    say("stopping")
    processes.stop(learner, CATCH_UP_S)
    if learner.popen.returncode:
        learner.expect("end well", 1.0)
    for site in sites:
        site.tell("finish")
    for site in sites:
        site.expect("finished", 60.0)
    return watch, facts


def per_robot_hour(traffic: list[dict[str, int]], options: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Bytes of objects and events that an actor moved, and events that it sent, in an hour of this load; what TCP, TLS,
    HTTP and NATS add is not in it."""
    hours = options.actors * seconds / 3600
    return {name: sum(part[name] for part in traffic) / hours for name in traffic[0]}


def learner_facts(before: LearnerReported, after: LearnerReported) -> dict[str, Any]:
    """What the learner did while the fleet recorded."""
    seconds = (after.utc_ns - before.utc_ns) / 1e9
    return {
        "learner_steps_per_s": (after.learner_step - before.learner_step) / seconds,
        "learner_busy": after.busy,
        "publish_every_s": seconds / max(1, after.version - before.version),
    }


def measure(folder: Path, backends: Backends, options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark in a folder of its own; its result."""
    say("preparing a run with a base policy")
    begin_s = time.monotonic()
    run = prepare(folder, options, backends.place)
    prepare_s = time.monotonic() - begin_s
    processes = Processes(folder)
    try:
        with closing(LearnerReports(run)) as reports:
            watch, facts = run_fleet(run, processes, backends, reports, options)
    finally:
        processes.stop_all()
    say("closing the books")
    begin_s = time.monotonic()
    found = audit(folder)
    hops, swaps = hops_of(run)
    sampleable = [line["episode/sampleable_s"] for line in _metrics(folder) if "episode/sampleable_s" in line]
    groups = list(watch.groups)
    slopes = {name: watch.slope_mb_per_min(name) for name in groups}
    return {
        "actors": options.actors,
        "store": options.store,
        "bus": options.bus,
        "bus_connections": options.bus_connections,
        **found,
        "hops": hops,
        "sampleable_all_s": {"p50": percentile(sampleable, 50), "p99": percentile(sampleable, 99)},
        "rss_slope_mb_per_min": slopes["learner"] + slopes["actors"],
        "rss_slope_mb_per_min_of": slopes,
        "rss_mb": {name: {"start": watch.rss_mb[name][0], "end": watch.rss_mb[name][-1]} for name in groups},
        "rss_mb_every_10_s": {name: [round(value) for value in watch.rss_mb[name][::10]] for name in groups},
        "cores_used": {name: watch.cores(name) for name in groups},
        "episodes_per_s": found["recorded"] / facts["recording_s"],
        "swaps": swaps,
        "seconds": watch.wall_s,
        "period_s": options.period_s,
        "report_s": options.report_s,
        "processes": options.processes,
        "publish_every_steps": options.publish_every,
        "link": {"delay_ms": options.delay_ms, "mbit_per_process": options.mbit, "loss": options.loss},
        **facts,
        "prepare_s": prepare_s,
        "audit_s": time.monotonic() - begin_s,
    }


def _metrics(folder: Path) -> list[dict[str, float]]:
    return list(read_metrics(folder / "metrics" / "learner.jsonl"))


def print_result(result: dict[str, Any]) -> None:
    """The tables."""
    rows = [(name.replace("_", " "), hop["p50"], hop["p99"], hop["count"]) for name, hop in result["hops"].items()]
    harness.print_table(f"Freshness, {result['actors']} actors", ("hop", "P50 s", "P99 s", "count"), rows)
    harness.print_table("Books", ("", ""), [(name.replace("_", " "), result[name]) for name in BOOKS])
    rows = [
        (name, result["cores_used"][name], *result["rss_mb"][name].values(), result["rss_slope_mb_per_min_of"][name])
        for name in result["cores_used"]
    ]
    harness.print_table("Processes", ("", "cores used", "MB at first", "MB at last", "MB/min"), rows)
    moved = [(name.replace("_", " "), value) for name, value in result["per_robot_hour"].items()]
    harness.print_table("Bytes and events per robot-hour", ("", ""), moved)


def parse() -> argparse.Namespace:
    """Options; what is not given depends on `--quick`."""
    parser = harness.arguments("A fleet of protocol-true actors and one learner on this machine.")
    parser.add_argument("--actors", type=int, help="default 1000, quick 60")
    parser.add_argument("--processes", type=int, help="processes of actors (default 4, quick 2)")
    parser.add_argument("--seconds", type=float, help="how long the fleet records (default 120, quick 20)")
    parser.add_argument("--period-s", type=float, help="mean seconds per episode of an actor (default 60, quick 5)")
    parser.add_argument("--report-s", type=float, default=1.0, help="seconds between signs of life of an actor")
    parser.add_argument("--steps", type=int, default=100, help="steps per episode, two 64 px cameras each")
    parser.add_argument("--publish-every", type=int, help="learner steps per published policy (default 100, quick 20)")
    parser.add_argument(
        "--store", choices=("dir", "s3"), default="dir", help="a directory, or SeaweedFS on this machine"
    )
    parser.add_argument("--bus", choices=("sqlite", "nats"), default="sqlite", help="SQLite, or NATS on this machine")
    parser.add_argument(
        "--bus-connections",
        choices=("actor", "process"),
        help="who has a connection to the bus (default: each actor with nats, each process of actors with sqlite)",
    )
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one-way delay of the emulated link to the store")
    parser.add_argument(
        "--mbit", type=float, help="its bandwidth, shared by the actors of a process (default: no limit)"
    )
    parser.add_argument("--loss", type=float, default=0.0, help="share of its operations that fail half way")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of the run")
    parser.add_argument("--keep", action="store_true", help="keep the run's folder")
    options = parser.parse_args()
    options.bus_connections = options.bus_connections or ("actor" if options.bus == "nats" else "process")
    quick = options.quick
    for name, full, small in (
        ("actors", 1000, 60),
        ("processes", 4, 2),
        ("seconds", 120.0, 20.0),
        ("period_s", 60.0, 5.0),
        ("publish_every", 100, 20),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if quick else full)
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    folder = options.out / f"fleet_load-{os.getpid()}"
    try:
        with open_backends(folder, options.store, options.bus) as backends:
            result = measure(folder, backends, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print_result(result)
    usual = (options.store, options.bus) == ("dir", "sqlite")
    name = "fleet_load" if usual else f"fleet_load-{options.store}-{options.bus}"
    print(f"Numbers: {harness.write_result(name, result, options)}")


if __name__ == "__main__":
    main()
