"""Where an advantage begins to count as positive: per task and buffer, so that a given fraction of the steps does.

Spec C.4, after appendix F of pi*0.6 ("about 40 % of each iteration's rollouts positive"). One threshold for all tasks
would call the steps of easy tasks positive and those of hard ones negative.

    add(task, source, advantages)    as episodes stream in: a ring of the last `window` values per task and source
    apply()                          before a learner step: thresholds that moved too far are replaced -> generation + 1
    get(task, source)                what labels are made with; constant between two `apply`
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.core.experience import Source

Key = tuple[str, Source]
_SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True, slots=True)
class Threshold:
    """What an advantage of one task and source is compared with."""

    value: float
    """Greater is positive."""
    spread: float
    """Standard deviation of the advantages, at least 1e-6."""


def threshold_for(values: npt.NDArray[np.float32], fraction: float) -> Threshold:
    """The threshold that `fraction` of the values exceed: exactly round(fraction * n) when all differ.

    Values that equal the threshold are not positive, so among equal values it may be fewer.

    Raises:
        ValueError: no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("a threshold needs at least one value")
    positive = int(fraction * count + 0.5)
    if positive >= count:
        value = float(np.nextafter(values.min(), np.float32(-np.inf)))
    else:
        place = count - positive - 1
        value = float(np.partition(values, place)[place])
    return Threshold(value, max(float(values.std(dtype=np.float64)), _SMALLEST_SPREAD))


class _Ring:
    """The last `window` values."""

    def __init__(self, window: int) -> None:
        self._values = np.zeros(window, np.float32)
        self._total = 0
        self.changed = False

    def __len__(self) -> int:
        return min(self._total, len(self._values))

    def add(self, values: npt.NDArray[np.float32]) -> None:
        window = len(self._values)
        newest = values[-window:]
        place = (self._total + len(values) - len(newest) + np.arange(len(newest))) % window
        self._values[place] = newest
        self._total += len(values)
        self.changed = True

    def content(self) -> npt.NDArray[np.float32]:
        """A copy, oldest first."""
        window = len(self._values)
        if self._total <= window:
            return self._values[: self._total].copy()
        return np.roll(self._values, -(self._total % window))


class PositiveFraction:
    """Thresholds of all tasks. `add`, `apply` and the state belong to one thread; `get` may be called by any.

    Args:
        fractions: per source, the part of the steps that is to be positive, in (0, 1).
        window: values per task and source that a threshold is made from; 4 bytes each.
        least: values before there is a threshold.
        tolerance: a threshold is replaced when it, or the spread, moved by more than this part of the spread.
    """

    def __init__(
        self, fractions: Mapping[Source, float], *, window: int = 10_000, least: int = 100, tolerance: float = 0.05
    ) -> None:
        self._fractions = dict(fractions)
        self._window = window
        self._least = least
        self._tolerance = tolerance
        self._rings: dict[Key, _Ring] = {}
        self._applied: dict[Key, Threshold] = {}
        self.generation = 0
        """How often `apply` changed something."""

    def add(self, task: str, source: Source, advantages: npt.NDArray[np.float32]) -> None:
        """Take note of the advantages of an episode's steps; NaN says that a step has none."""
        known = advantages[np.isfinite(advantages)]
        if len(known):
            self._rings.setdefault((task, source), _Ring(self._window)).add(known)

    def restart(self) -> None:
        """Forget all values, because what computed them has changed; `apply` then forgets the thresholds that too few
        new ones were added for."""
        self._rings.clear()

    def apply(self) -> bool:
        """Bring thresholds up to date; whether one is new, moved or gone. Costs nothing when nothing was added."""
        enough = {key: ring for key, ring in self._rings.items() if len(ring) >= self._least}
        applied = {key: threshold for key, threshold in self._applied.items() if key in enough}
        for key, ring in enough.items():
            if not ring.changed:
                continue
            ring.changed = False
            found, old = threshold_for(ring.content(), self._fractions[key[1]]), applied.get(key)
            if old is None or self._moved(old, found):
                applied[key] = found
        if applied == self._applied:
            return False
        self._applied = applied
        self.generation += 1
        return True

    def get(self, task: str, source: Source) -> Threshold | None:
        """The threshold of a task, None while too few steps are known."""
        return self._applied.get((task, source))

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>/threshold/<task>` and `<prefix>/positive_share/<task>` of the fleet's steps that are kept;
        `offline_threshold`, `offline_positive_share` of the others."""
        found: dict[str, float] = {}
        for key, threshold in self._applied.items():
            task, source = key
            name = "" if source is Source.ONLINE else "offline_"
            found[f"{prefix}/{name}threshold/{task}"] = threshold.value
            if key in self._rings:
                share = float((self._rings[key].content() > threshold.value).mean())
                found[f"{prefix}/{name}positive_share/{task}"] = share
        return found

    def state_dict(self) -> dict[str, Any]:
        """`thresholds` (JSON), and per ring an array `threshold/<number>`."""
        keys = sorted(self._rings.keys() | self._applied.keys())
        rows: list[list[Any]] = []
        state: dict[str, Any] = {}
        for number, key in enumerate(keys):
            threshold, ring = self._applied.get(key), self._rings.get(key)
            row = [key[0], int(key[1]), ring is not None and ring.changed]
            rows.append(row if threshold is None else [*row, threshold.value, threshold.spread])
            if ring is not None:
                state[f"threshold/{number:04d}"] = ring.content()
        return {"thresholds": {"generation": self.generation, "rows": rows}, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is not such a state.
        """
        saved = state["thresholds"]
        self._rings, applied = {}, {}
        for number, (task, source, changed, *threshold) in enumerate(saved["rows"]):
            key = (str(task), Source(source))
            if threshold:
                applied[key] = Threshold(*map(float, threshold))
            values = state.get(f"threshold/{number:04d}")
            if values is not None:
                ring = self._rings[key] = _Ring(self._window)
                ring.add(np.asarray(values, np.float32))
                ring.changed = bool(changed)
        self._applied = applied
        self.generation = int(saved["generation"])

    def _moved(self, old: Threshold, new: Threshold) -> bool:
        most = self._tolerance * new.spread
        return abs(new.value - old.value) > most or abs(new.spread - old.spread) > most
