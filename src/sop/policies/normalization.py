"""Statistics that bring states and actions to order 1; computed once from demonstrations, then frozen in the spec."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Embodiment

SMALLEST_STD = 1e-4
"""Elements that vary less (e.g. a gripper that is never used) keep their unit: dividing would blow up noise."""
LARGEST_STATE = 10.0
"""Normalised states are clipped here: outside of it the demonstrations say nothing."""

_KEYS = ("state_mean", "state_std", "action_mean", "action_std")


def compute_normalization(
    states: Iterable[npt.NDArray[np.float32]], actions: Iterable[npt.NDArray[np.float32]]
) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation per element, for `PolicySpec.normalization`.

    Args:
        states: [T, S] per episode.
        actions: [T, A] per episode.

    Returns:
        `state_mean`, `state_std`, `action_mean`, `action_std`; a standard deviation below `SMALLEST_STD` becomes 1.

    Raises:
        ValueError: there is no step, or a value is not finite.
    """
    statistics: dict[str, tuple[float, ...]] = {}
    for name, arrays in (("state", list(states)), ("action", list(actions))):
        if not sum(len(array) for array in arrays):
            raise ValueError(f"normalization: there are no {name}s to compute statistics from")
        values = np.concatenate(arrays).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"normalization: the {name}s hold values that are not finite")
        std = values.std(axis=0)
        statistics[f"{name}_mean"] = tuple(values.mean(axis=0).tolist())
        statistics[f"{name}_std"] = tuple(np.where(std < SMALLEST_STD, 1.0, std).tolist())
    return statistics


def check_normalization(normalization: Mapping[str, tuple[float, ...]], embodiment: Embodiment) -> None:
    """Make sure that statistics are complete and fit the embodiment.

    Raises:
        ValueError: a statistic is missing, has a wrong length, is not finite or is not positive where it must be.
    """
    for key in _KEYS:
        if key not in normalization:
            raise ValueError(f"normalization: {key} is missing; make it with compute_normalization")
        values = np.asarray(normalization[key], dtype=np.float64)
        count = embodiment.num_states if key.startswith("state") else embodiment.num_actions
        if values.shape != (count,):
            raise ValueError(f"normalization: {key} needs {count} values for {embodiment.name}, got {values.size}")
        if not np.isfinite(values).all() or (key.endswith("std") and not (values > 0).all()):
            raise ValueError(f"normalization: {key} must be finite and, for std, positive, got {values.tolist()}")
