"""The experience path: an index of one million episodes, random windows beside LeRobotDataset v3, the learner's time.

    .venv/bin/python benchmarks/experience.py [--quick] [--only index|windows|learner]

    index     memory, time of a draw, cold start from segments, rebuild without them      experience_index.py
    windows   random windows per second: ours, LeRobotDataset v3 (video, image)           experience_windows.py
    learner   busy share and step rate over the bare step while four actors stream        experience_learner.py

Writes runs/bench/experience.json. lerobot is measured in its own environment (`benchmarks/peers.py` makes it); its
numbers are null without it. What is read is written once and kept under runs/bench/cache (3 GB).
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import experience_index
import experience_learner
import experience_windows
from harness import arguments, print_table, write_result

PARTS = ("index", "windows", "learner")
_WINDOWS = {
    "ours": "ours, one process",
    "ours_float": "ours, one process, as float32 tensors [3, h, w] in [0, 1]",
    "ours_workers": f"ours, {experience_windows.WORKERS} decode workers",
    "lerobot_video": "lerobot video, dataset.__getitem__, one process",
    "lerobot_video_workers": f"lerobot video, DataLoader(num_workers={experience_windows.WORKERS})",
    "lerobot_image": "lerobot image, dataset.__getitem__, one process",
    "lerobot_image_workers": f"lerobot image, DataLoader(num_workers={experience_windows.WORKERS})",
    "lerobot_image_no_chunk": "lerobot image, one action instead of a chunk",
    "ours_image_chunk": "ours, images of all 16 steps",
    "lerobot_video_image_chunk": "lerobot video, images of all 16 steps",
    "lerobot_image_image_chunk": "lerobot image, images of all 16 steps",
}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; may be repeated")
    options = parser.parse_args()
    chosen = options.only or PARTS
    values: dict[str, Any] = {"seconds": {}}
    for part in PARTS:
        if part in chosen:
            measure, show = _PARTS[part]
            start = time.monotonic()
            found = measure(options)
            show(found)
            values |= found
            values["seconds"][part] = time.monotonic() - start
    name = "-".join(("experience", *(options.only or ())))
    print(f"wrote {write_result(name, values, options)}")


def _index(options: argparse.Namespace) -> dict[str, Any]:
    size = experience_index.QUICK if options.quick else experience_index.FULL
    return experience_index.measure(size, options.repeats or (1 if options.quick else 3))


def _windows(options: argparse.Namespace) -> dict[str, Any]:
    size = experience_windows.QUICK if options.quick else experience_windows.FULL
    return experience_windows.measure(size, options.repeats or size.repeats)


def _learner(options: argparse.Namespace) -> dict[str, Any]:
    size = experience_learner.QUICK if options.quick else experience_learner.FULL
    return experience_learner.measure(size, options.repeats)


def _show_index(found: Mapping[str, Any]) -> None:
    index = found["index"]
    rows = [
        ("memory of the index, MB (goal for 1 million: < 200)", found["index_mb"]),
        ("  per million episodes, MB", index["index_mb_per_million"]),
        ("  its arrays alone, MB", index["index_arrays_mb"]),
        ("  with freed memory that the C library keeps for reuse, MB", index["untrimmed_mb"]),
        ("  highest while it is read, MB", index["peak_rss_mb"]),
        (f"draw of {experience_index.BATCH} windows, ms (goal: < 0.2)", found["draw_ms"]),
        ("cold start, s", found["cold_start_s"]),
        ("  of these on the processor, s", index["cold_start_cpu_s"]),
        *((f"  {name}", index[name]) for name in ("import_s", "read_segments_s", "build_index_s", "list_and_fetch_s")),
        *((f"rebuild of 1,000 episodes, {name}, s", value) for name, value in index["rebuild_s_per_1000"].items()),
    ]
    print_table(f"Index of {index['episodes']:,} episodes", ("", "median"), rows)


def _show_windows(found: Mapping[str, Any]) -> None:
    rates = found["windows_per_s"]
    ours = rates["ours"]
    rows = []
    for name, text in _WINDOWS.items():
        if name in rates:
            beside = rates["ours_image_chunk"] if name.endswith("image_chunk") else ours
            ratio = None if rates[name] is None else beside / rates[name]
            rows.append((text, rates[name], ratio, found["windows_per_cpu_s"].get(name)))
    columns = ("", "windows/s", "ours over it", "windows per s of processor")
    print_table("Random windows per second, two cameras 224 x 224", columns, rows)
    for name, facts in found["windows_facts"]["lerobot"].items():
        if name in experience_windows.KINDS:
            print(f"lerobot {facts['lerobot']} {name}: {facts['backend']}, {facts['mb']:.0f} MB, ", end="")
            print(f"pictures {facts['grey_levels_off']:.2f} grey levels off")
    ours_facts = found["windows_facts"]["ours"]
    print(f"ours: {ours_facts['mb']:.0f} MB, pictures {ours_facts['grey_levels_off']:.2f} grey levels off")


def _show_learner(found: Mapping[str, Any]) -> None:
    learner = found["learner"]
    rows = [
        ("busy: 1 - waiting for batches / time (goal: >= 0.97)", found["learner_busy"]),
        ("steps per second over the bare step's (goal: >= 0.97)", found["step_rate_over_bare"]),
        ("  learner, steps/s", learner["steps_per_s"]),
        ("  bare step, steps/s", learner["bare_steps_per_s"]),
        ("  processor time per step: learner's training thread, ms", learner["cpu_s_per_step"] * 1e3),
        ("  all threads of the learner's process, ms", learner["process_cpu_s_per_step"] * 1e3),
        ("  bare step, ms", learner["bare_cpu_s_per_step"] * 1e3),
    ]
    title = f"Learner beside {learner['actors']} streaming actors ({learner['robot']}), batch {learner['batch_size']}"
    print_table(title, ("", "median"), rows)


_PARTS: Mapping[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[[Mapping[str, Any]], None]]] = {
    "index": (_index, _show_index),
    "windows": (_windows, _show_windows),
    "learner": (_learner, _show_learner),
}


if __name__ == "__main__":
    main()
