"""Weights at the speed of the machine: publish -> staged, against the floors and the peers; the codec; the stall.

    .venv/bin/python benchmarks/weights.py [--quick]

Writes runs/bench/weights.json. lerobot's push needs .venv-lerobot (benchmarks/peers.py); without it the same wire
shape is measured and named so: `push_over_ours.wire_shape`, and `push_over_ours.lerobot` is null.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import weights_delta
import weights_stall
from harness import arguments, medians, print_table, write_result
from weights_artifact import make_weights
from weights_push import ROBOTS, Lerobot, Machine, describe

ARTIFACT_MB, QUICK_ARTIFACT_MB = 780.0, 64.0
STALL_MB = {False: 400.0, True: 64.0}
INTERVALS = 3
WAYS = ("ours", "floor", "warm_floor", "raw_read", "safetensors")
"""Ways that are measured for every number of robots."""
ONE_PUSH_REACHES_TIMEOUT_S = 20.0


def main() -> None:
    """Command line."""
    parser = arguments("Publish -> staged on one machine, the delta codec, and what publishing costs the learner.")
    parser.add_argument("--megabytes", type=float, help=f"size of the artifact ({ARTIFACT_MB:.0f}; quick: 64)")
    parser.add_argument(
        "--only", choices=("push", "delta", "stall"), help="one part, for development; other keys stay out"
    )
    options = parser.parse_args()
    repeats = options.repeats or (2 if options.quick else 5)
    folder = Path(options.out) / "tmp" / f"weights-{time.monotonic_ns()}"
    found: dict[str, Any] = {"repeats": repeats}
    try:
        if options.only in (None, "push"):
            found |= push_part(folder, options, repeats)
        if options.only in (None, "stall"):
            found |= stall_part(folder, options, repeats)
        if options.only in (None, "delta"):
            found |= delta_part(options, repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"-> {write_result('weights', found, options)}")


def push_part(folder: Path, options: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """One policy to 1, 4 and 8 robots."""
    megabytes = options.megabytes or (QUICK_ARTIFACT_MB if options.quick else ARTIFACT_MB)
    weights = make_weights(megabytes)
    with Lerobot(megabytes) as peer:
        with Machine(folder, weights) as machine:
            seconds = medians({**machine.measurements(), peer.name: peer.push}, repeats)
            phases = {
                str(count): {name: statistics.median(values[1:]) for name, values in found.items()}
                for count, found in machine.phases.items()
            }
        serialise_s = statistics.median(peer.serialise_s[1:])
        name = peer.name
    reached = None
    if not options.quick:
        with Lerobot(megabytes, actors=4) as fleet:
            fleet.reached(ONE_PUSH_REACHES_TIMEOUT_S)
            reached = fleet.reached(ONE_PUSH_REACHES_TIMEOUT_S)
    found = {
        "artifact": describe(weights),
        "seconds": seconds,
        "phases_s": phases,
        "staged_over_floor": {str(n): seconds[f"ours.{n}"] / seconds[f"floor.{n}"] for n in ROBOTS},
        "staged_over_warm_floor": {str(n): seconds[f"ours.{n}"] / seconds[f"warm_floor.{n}"] for n in ROBOTS},
        "staged_over_raw_read": {str(n): seconds[f"ours.{n}"] / seconds[f"raw_read.{n}"] for n in ROBOTS},
        "staged_over_copy": {str(n): seconds[f"ours.{n}"] / seconds["copy"] for n in ROBOTS},
        "staged_over_copy_fsync": {str(n): seconds[f"ours.{n}"] / seconds["copy_fsync"] for n in ROBOTS},
        "safetensors_over_ours": {str(n): seconds[f"safetensors.{n}"] / seconds[f"ours.{n}"] for n in ROBOTS},
        "push_over_ours": {"lerobot": None, name: seconds[name] / seconds["ours.1"]},
        "peer": {"name": name, "serialise_s": serialise_s, "one_push_reaches_of_4": reached},
    }
    ratios = [key for key in found if key.startswith("staged_over_")]
    rows = [[n, *(seconds[f"{way}.{n}"] for way in WAYS), *(found[ratio][str(n)] for ratio in ratios)] for n in ROBOTS]
    columns = ["robots", *(f"{way} s" for way in WAYS), *(ratio.replace("staged_over_", "ours / ") for ratio in ratios)]
    print_table(f"publish -> staged, {found['artifact']['mb']:.0f} MB, one machine", columns, rows)
    print_table(
        "ours, seconds of each phase", ["robots", *phases["1"]], [[n, *phases[str(n)].values()] for n in ROBOTS]
    )
    print(
        f"copy {seconds['copy']:.3g} s, with fsync {seconds['copy_fsync']:.3g} s; {name} to one {seconds[name]:.3g} s: "
        f"{seconds[name] / seconds['ours.1']:.3g} times ours; of 4 actors one of its pushes reaches {reached}"
    )
    return found


def stall_part(folder: Path, options: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """The learner's thread while the publisher works."""
    quick = options.quick
    stall = weights_stall.measure(
        folder / "stall",
        make_weights(STALL_MB[quick]),
        step_s=0.05 if quick else 0.1,
        rounds=2 if quick else repeats + 1,
        encodings=("full",) if quick else ("full", "packed"),
    )
    rows = [[encoding, *values.values()] for encoding, values in stall.items()]
    print_table("training beside a publisher, one policy every 25 steps", ["encoding", *stall["full"]], rows)
    return {"training_rate_while_publishing": stall["full"]["rate"], "training": stall}


def delta_part(options: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Bytes and speed of the codec on two fine-tunes."""
    intervals = 1 if options.quick else INTERVALS
    rates = {
        rate: weights_delta.measure(weights_delta.fine_tune(rate, intervals, quick=options.quick), repeats)
        for rate in weights_delta.RATES
    }
    patterns = weights_delta.all_patterns_survive()
    both = [*rates.values(), *(found["fp32"] for found in rates.values())]
    keys = ("delta_percent", "entropy_bound_percent", "changed_percent", "keyframe_percent", "encode_gb_s_2_threads",
            "decode_gb_s_2_threads", "encode_gb_s_1_thread", "decode_gb_s_1_thread")  # fmt: skip
    rows = [[f"{rate}, bf16", *(found[key] for key in keys), found["bit_exact"]] for rate, found in rates.items()]
    rows += [
        [f"{rate}, fp32", *(found["fp32"].get(key) for key in keys), found["fp32"]["bit_exact"]]
        for rate, found in rates.items()
    ]
    columns = [
        "25 steps",
        "delta %",
        "bound %",
        "changed %",
        "keyframe %",
        "enc GB/s, 2",
        "dec, 2",
        "enc, 1",
        "dec, 1",
        "exact",
    ]
    millions = rates["lr1e-5"]["parameters"] / 1e6
    print_table(f"delta codec, a fine-tune of {millions:.0f} million parameters", columns, rows)
    print(f"all 65,536 bfloat16 patterns: {'bit-exact' if patterns else 'BROKEN'}")
    return {
        "delta_percent": {rate: found["delta_percent"] for rate, found in rates.items()},
        "delta_bound_percent": {rate: found["entropy_bound_percent"] for rate, found in rates.items()},
        "encode_gb_s": statistics.median(found["encode_gb_s_2_threads"] for found in rates.values()),
        "decode_gb_s": statistics.median(found["decode_gb_s_2_threads"] for found in rates.values()),
        "bit_exact": patterns and all(found["bit_exact"] for found in both),
        "delta": rates,
    }


if __name__ == "__main__":
    main()
