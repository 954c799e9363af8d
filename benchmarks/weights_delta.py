"""The delta codec on a real fine-tune: bytes against the entropy bound, speed, and that no bit is lost."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import delta_workload
import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from harness import RESULTS, medians, timed

from sop.broadcast.delta import decode_packed, encode_packed
from sop.broadcast.manifest import DTYPES, TensorEntry

EVERY = 25
"""Optimizer steps between two published policies: the paper's cadence."""
QUICK_LAYERS = 3
"""A smaller model (14 million parameters): 25 steps of the large one take half a minute here."""
RATES = {"lr1e-5": 1e-5, "lr5e-5": 5e-5}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Arrays = dict[str, npt.NDArray[Any]]


def fine_tune(rate: str, intervals: int, *, quick: bool, seed: int = 0) -> list[Path]:
    """Files of `intervals` + 1 snapshots in fp32, EVERY steps apart; made when runs/bench/cache does not have them."""
    if quick:
        delta_workload.LAYERS = QUICK_LAYERS
    model = f"{delta_workload.LAYERS}x{delta_workload.WIDTH}"
    folder = RESULTS / "cache" / f"fine-tune-{model}-{rate}-every{EVERY}-seed{seed}{'-quick' if quick else ''}"
    found = [folder / f"{number}.safetensors" for number in range(intervals + 1)]
    if not all(path.exists() for path in found):
        folder.mkdir(parents=True, exist_ok=True)
        made = delta_workload.snapshots(RATES[rate], EVERY, intervals, quick=quick, seed=seed, dtype="F32")
        for path, weights in zip(found, made, strict=True):
            part = path.with_suffix(f".{os.getpid()}.part")
            safetensors.numpy.save_file(weights, part)
            part.replace(path)
    return found


def load_bfloat16(path: Path) -> Arrays:
    """A snapshot as it is published: rounded to the nearest bfloat16, ties to even."""
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in load_float32(path).items()}


def load_float32(path: Path) -> Arrays:
    """A snapshot as the optimizer holds it."""
    found: Arrays = safetensors.numpy.load_file(path)
    return found


def measure(files: Sequence[Path], repeats: int) -> dict[str, Any]:
    """Percent of dense and speeds over all intervals of a fine-tune, for bfloat16 and, of the first one, fp32."""
    pairs = [one_pair(load_bfloat16(old), load_bfloat16(new), repeats) for old, new in pairwise(files)]
    found = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
    found["bit_exact"] = all(pair["bit_exact"] for pair in pairs)
    old, new = load_bfloat16(files[0]), load_bfloat16(files[1])
    found["entropy_bound_percent"] = delta_workload.entropy_bound_percent(old, new)
    found["changed_percent"] = delta_workload.changed_percent(old, new)
    found["intervals"] = len(pairs)
    found["parameters"] = sum(array.size for array in new.values())
    found["fp32"] = one_pair(load_float32(files[0]), load_float32(files[1]), 1)
    return found


def one_pair(old: Arrays, new: Arrays, repeats: int) -> dict[str, Any]:
    """One version after another: sizes in percent of dense, GB of dense weights per second, the bits compared."""
    dense = sum(array.nbytes for array in new.values())
    expected = {name: TensorEntry(NAMES[array.dtype], array.shape, "0" * 32) for name, array in new.items()}
    delta, keyframe = encode_packed(new, old), encode_packed(new, None)
    data, alone = b"".join(delta.parts), b"".join(keyframe.parts)
    found: dict[str, Any] = {
        "delta_percent": 100 * delta.num_bytes / dense,
        "keyframe_percent": 100 * keyframe.num_bytes / dense,
        "bit_exact": same_bits(decode_packed(data, old, expected, "bench"), new)
        and same_bits(decode_packed(alone, None, expected, "bench"), new),
    }
    for threads in (1, 2):
        suffix = f"_gb_s_{threads}_thread{'s' * (threads > 1)}"
        work: dict[str, Callable[[], object]] = {
            "encode": partial(encode_packed, new, old, threads=threads),
            "decode": partial(decode_packed, data, old, expected, "bench", threads=threads),
            "keyframe_encode": partial(encode_packed, new, None, threads=threads),
            "keyframe_decode": partial(decode_packed, alone, None, expected, "bench", threads=threads),
        }
        for name, seconds in medians({name: partial(timed, call) for name, call in work.items()}, repeats).items():
            found[name + suffix] = dense / 1e9 / seconds
    return found


def all_patterns_survive(seed: int = 0) -> bool:
    """All 65,536 bfloat16 patterns as new values, each against sixteen old ones of any pattern."""
    rng = np.random.default_rng(seed)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    new = np.tile(patterns, 16).view(ml_dtypes.bfloat16)
    old = np.concatenate([rng.permutation(patterns) for _ in range(16)]).view(ml_dtypes.bfloat16)
    near = (new.view(np.uint16) ^ rng.integers(0, 4, new.size, np.uint16)).view(ml_dtypes.bfloat16)
    weights: Arrays = {"any": new, "near": new}
    before: Arrays = {"any": old, "near": near}
    expected = {name: TensorEntry("BF16", array.shape, "0" * 32) for name, array in weights.items()}
    for base in (before, None):
        packed = encode_packed(weights, base)
        if not same_bits(decode_packed(b"".join(packed.parts), base, expected, "bench"), weights):
            return False
    return True


def same_bits(found: Mapping[str, npt.NDArray[Any]], wanted: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether every tensor has the same shape and the same bytes."""
    return found.keys() == wanted.keys() and all(
        found[name].shape == array.shape
        and np.array_equal(found[name].reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8))
        for name, array in wanted.items()
    )
