"""A policy of a given size to publish: the tensors of a transformer, and what goes with them into a manifest."""

import time
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sop.broadcast import PolicyFacts, Publisher
from sop.core.embodiment import Embodiment
from sop.core.policy import Conditioning, PolicySpec, Weights

BFLOAT16: npt.DTypeLike = ml_dtypes.bfloat16
PATIENCE_S = 300.0
LAYERS = 20
"""With 15 tensors each: 300 tensors, as in a policy of the paper's size."""
ROBOT = Embodiment(
    name="bench",
    cameras={"front": (224, 224)},
    state_names=("x", "gripper"),
    action_names=("dx", "gripper"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    hold_action=(0.0, None),
    max_action_change=(0.5, None),
    control_hz=20.0,
)


def shapes(megabytes: float) -> dict[str, tuple[int, ...]]:
    """Tensors of a transformer whose bfloat16 weights have about so many MB: four projections, an MLP of two layers
    four times as wide, biases and two normalisations per layer."""
    width = max(8, round((megabytes * 1e6 / 2 / (12 * LAYERS)) ** 0.5 / 8) * 8)
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        prefix = f"layers.{layer:02d}"
        for name in ("query", "key", "value", "output"):
            found[f"{prefix}.{name}.weight"] = (width, width)
        found[f"{prefix}.up.weight"] = (4 * width, width)
        found[f"{prefix}.down.weight"] = (width, 4 * width)
        for name in ("query", "key", "value", "output", "down"):
            found[f"{prefix}.{name}.bias"] = (width,)
        found[f"{prefix}.up.bias"] = (4 * width,)
        for name in ("norm_in.weight", "norm_mlp.weight", "norm_mlp.bias"):
            found[f"{prefix}.{name}"] = (width,)
    return found


def make_weights(megabytes: float, seed: int = 0) -> dict[str, npt.NDArray[np.generic]]:
    """bfloat16 arrays, N(0, 0.02) drawn for one tensor and shifted for the others: what is measured with them depends
    on their number and sizes, not on their values."""
    wanted = shapes(megabytes)
    largest = max(int(np.prod(shape)) for shape in wanted.values())
    noise = np.random.default_rng(seed).standard_normal(largest + len(wanted), np.float32) * np.float32(0.02)
    bits = noise.astype(BFLOAT16)
    return {
        name: bits[number : number + int(np.prod(shape))].reshape(shape).copy()
        for number, (name, shape) in enumerate(wanted.items())
    }


def change_every_tensor(weights: Mapping[str, npt.NDArray[np.generic]], turn: int) -> None:
    """Give every tensor other bytes in place, as 25 optimizer steps do; `turn` is what they hold afterwards."""
    for array in weights.values():
        array.reshape(-1).view(np.uint16)[0] = turn % 0x7F00


def disturbed(weights: Mapping[str, npt.NDArray[np.generic]], seed: int = 0) -> dict[str, npt.NDArray[np.generic]]:
    """bfloat16 weights of which two thirds differ by one to three units in the last place, up or down."""
    largest = max(array.size for array in weights.values())
    steps = np.random.default_rng(seed).choice(
        np.array([-3, -2, -1, 0, 1, 2, 3], np.int16), largest, p=[0.03, 0.08, 0.22, 0.34, 0.22, 0.08, 0.03]
    )
    return {
        name: (array.reshape(-1).view(np.int16) + steps[: array.size]).view(array.dtype).reshape(array.shape)
        for name, array in weights.items()
    }


def wait_published(publisher: Publisher, version: int) -> None:
    """Block until the publisher's thread has published a version.

    Raises:
        RuntimeError: it has not within PATIENCE_S; closing the publisher says why.
    """
    deadline = time.monotonic() + PATIENCE_S
    while publisher.last_published != version:
        if time.monotonic() > deadline:
            raise RuntimeError(f"policy {version} was not published within {PATIENCE_S:.0f} s")
        time.sleep(0.01)


def total_bytes(weights: Weights) -> int:
    """Bytes of all tensors."""
    return sum(array.nbytes for array in weights.values())


def facts(step: int = 0) -> PolicyFacts:
    """What the learner says about a snapshot."""
    spec = PolicySpec(kind="bench", config={}, embodiment=ROBOT, action_horizon=16, execution_horizon=8)
    return PolicyFacts(
        learner_step=step,
        algorithm="hg_dagger",
        spec=spec,
        conditioning=Conditioning(),
        online_episodes=0,
        offline_episodes=0,
        config_hash="bench",
        code_version="bench",
    )
