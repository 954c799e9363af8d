"""The whole demo behind TLS and identities, on real servers of this machine: two robots are revoked in the middle, two
new ones join.

    sop fleet: init, enroll -> nats.conf, s3.json, identities
        |                            |
        |   S3 (SeaweedFS), NATS  <--'  started with exactly these; every process shows who it is
        |        ^            ^
        |        |            `--- relays that count bytes <--- robot-4, robot-5   join when the others leave
        |        `---------------- sop run: learner, evaluator, robot-0 .. robot-3
        `-> revoke robot-2, robot-3 in the middle

Then the books are closed: every episode whose upload was acknowledged is indexed exactly once, and what the revoked
robots recorded afterwards waits on their disks.

    .venv/bin/python benchmarks/demo_over_tls.py [--preset metaworld] [--seed 1] [--compare runs/demo]
"""

import argparse
import os
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import demo_audit
import harness
from demo_fleet import BUCKET, MEMBERS, REVOKED, DemoFleet
from demo_robots import JOINED, Joined, Revocations, RunProcess, robot_pids
from fleet_load import say

from sop.testing.servers.nats import NatsServer
from sop.testing.servers.s3 import S3Server

REVOKE_AT = 1 / 3
"""Share of the fleet's episodes after which two robots are revoked and two join."""
LEAVE_AT = 0.75
"""Share after which the two that joined go home: the rest is their time to send what they have before the run ends,
which waits for its own robots only."""
SETTINGS = {"debug": ("fleet.speed=0.5", "fleet.episodes=80")}
"""Preset -> what is changed so that a robot that joins has time to start."""
PLENTY = 30.0
"""After so long a revocation that has not come into force has failed."""


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The whole demonstration in a folder of its own; its result (blocking, some minutes)."""
    begin_s = time.monotonic()
    say(f"making a fleet of {len(MEMBERS)} members")
    fleet = DemoFleet.make(folder / "fleet")
    with ExitStack() as stack:
        say("starting the store and the bus with the configurations of the fleet")
        servers = fleet.folder / "servers"
        pem = {"certificate": servers / "s3.pem", "key": servers / "s3.key"}
        s3 = S3Server(folder / "s3", identities=servers / "s3.json", port=fleet.store_port, **pem)
        stack.enter_context(s3)
        stack.enter_context(NatsServer(folder / "nats", config=servers / "nats.conf", port=fleet.bus_port))
        s3.shell(f"s3.bucket.create -name {BUCKET}")
        todo = fleet.apply()
        if todo:
            raise RuntimeError(f"`sop fleet apply` left something to do: {todo}")
        facts = {"prepare_s": time.monotonic() - begin_s}
        say(f"sop run {options.preset} --fleet {fleet.folder} --seed {options.seed}")
        run = stack.enter_context(RunProcess(folder, fleet, run_arguments(options)))
        facts |= play(run, fleet, stack, options)
        say("closing the books")
        return demo_audit.close_books(run.place, fleet, facts, options)


def play(run: RunProcess, fleet: DemoFleet, stack: ExitStack, options: argparse.Namespace) -> dict[str, Any]:
    """Wait for the fleet, revoke, join, wait for the end (blocking); what happened."""
    total = run.wait_for_episodes(REVOKE_AT, options.patience_s)
    say(f"a third of {total} episodes is there: revoking {' and '.join(REVOKED)}")
    revocations = Revocations(fleet, robot_pids(run.pid))
    revocations.strike()
    say(f"{' and '.join(JOINED)} join, over relays that count bytes")
    joined = [stack.enter_context(Joined(run.place.parents[1], fleet, name)) for name in JOINED]
    run.wait(lambda: revocations.settled() or revocations.age_s() > PLENTY, options.patience_s)
    run.wait_for_episodes(LEAVE_AT, options.patience_s, watch=revocations.look)
    revocations.note_alive()
    say("the two that joined go home; waiting for the end of the run")
    for robot in joined:
        robot.ask_to_go_home()
    for robot in joined:
        robot.wait_until_home()
    run.wait_for_end(options.patience_s, watch=revocations.look)
    return {
        "preset": options.preset,
        "seed": options.seed,
        "episodes_wanted": total,
        "revoked": revocations.result(),
        "joined": {robot.name: robot.result() for robot in joined},
        "restarts_of_revoked": run.restarts(REVOKED),
    }


def run_arguments(options: argparse.Namespace) -> list[str]:
    """Of `sop run`: what is asked for, and as many robots."""
    changes = (*SETTINGS.get(options.preset, ()), *options.set)
    settings = [word for setting in changes for word in ("--set", setting)]
    return [options.preset, "--seed", str(options.seed), "--actors", str(options.actors), *settings]


def print_result(result: dict[str, Any]) -> None:
    """The tables."""
    rows = [
        (
            name,
            facts["to_last_write_s"],
            facts["to_refused_s"],
            facts["to_bus_dropped_s"],
            facts["alive"],
            facts["waiting"],
        )
        for name, facts in result["revoked"].items()
    ]
    columns = ("robot", "to last write s", "to refusal s", "to bus dropped s", "runs on", "waiting")
    harness.print_table("Revoked in the middle", columns, rows)
    rows = [
        (name, facts["recorded"], facts["indexed"], facts["hours"] * 3600, facts["wire_up"], facts["wire_down"])
        for name, facts in result["joined"].items()
    ]
    harness.print_table(
        "Joined in the middle", ("robot", "recorded", "indexed", "seconds", "bytes up", "bytes down"), rows
    )
    harness.print_table("Books", ("", ""), [(name.replace("_", " "), result[name]) for name in demo_audit.BOOKS])
    moved = [(name.replace("_", " "), value) for name, value in result["per_robot_hour"].items()]
    harness.print_table("Bytes per robot-hour, on the wire", ("", ""), moved)
    success = [(name, *values) for name, values in result["success"].items()]
    harness.print_table("Success", ("run", "base", "final"), success)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = harness.arguments("The demo behind TLS and identities, with revocations in the middle.")
    parser.add_argument("--preset", default="metaworld", help="metaworld (default) or debug")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--actors", type=int, default=4, help="robots that `sop run` starts (default 4)")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="a plain run of the same preset and seed")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of the run")
    parser.add_argument(
        "--patience-s",
        type=float,
        default=1800.0,
        help="how long the run may take to its first episodes, and again from there to its end (default 1800)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Demonstrate, print, write; 1 when something that was acknowledged is not indexed once, or somebody stayed in."""
    options = parse(arguments)
    folder = options.out / f"tls-{os.getpid()}"
    try:
        result = measure(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print_result(result)
    print(f"Numbers: {harness.write_result('demo_over_tls', result, options)}")
    for violation in result["violations"]:
        print(f"VIOLATION: {violation}", file=sys.stderr)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
