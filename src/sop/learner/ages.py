"""How old the policies are whose episodes the learner learns from: a histogram per report."""

import numpy as np
import numpy.typing as npt

from sop.metrics import percentile

EDGES = (0, 1, 2, 4, 8, 16, 32)
"""Smallest age of each bucket, in versions; the last is open."""
NAMES = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32+")


class PolicyAges:
    """Collects, per batch, newest published version minus the version that acted; demonstrations have none."""

    def __init__(self) -> None:
        self._counts = np.zeros(int(np.iinfo(np.uint16).max), np.int64)

    def add(self, policy_version: npt.NDArray[np.int64], newest_version: int | None) -> None:
        """Take the versions [B] that acted in the windows of a batch, -1 for demonstrations."""
        if newest_version is None:
            return
        age = newest_version - policy_version[policy_version >= 0]
        np.add.at(self._counts, np.clip(age, 0, len(self._counts) - 1), 1)

    def take(self) -> dict[str, float]:
        """Median, 99 % and share of each bucket since the last call, as `batch/...`; empty without windows."""
        total = int(self._counts.sum())
        if not total:
            return {}
        ages = np.repeat(np.arange(len(self._counts)), self._counts).tolist()
        shares = np.add.reduceat(self._counts, EDGES) / total
        self._counts[:] = 0
        return {
            "batch/policy_age_p50": percentile(ages, 50),
            "batch/policy_age_p99": percentile(ages, 99),
            **{f"batch/policy_age/{name}": float(share) for name, share in zip(NAMES, shares, strict=True)},
        }
