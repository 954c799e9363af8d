"""The `train` channel's gate: what the learner checks before each publish, so that no robot gets a broken version.

    finite weights -> size of the update -> actions on golden observations -> bounds -> inference time

It knows nothing of success: a version of 25 steps is too little to be judged by episodes. A refused version is not
published and the training goes on; the next snapshot is compared with the last that was published, so a training that
has run away stays refused. After `max_refusals` in a row the run ends, rather than train what nobody gets.

Cost per publish: one pass over the weights, 0.14 s of one core for 780 MB (measured, 0.018 s per 100 MB), and one
inference for all golden observations (64 on the toy robot: 0.03 s).
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sop.core.errors import RunError
from sop.core.policy import PolicySpec, Weights

GOLDEN_OBSERVATIONS = 64
"""How many observations `infer` is meant to answer."""
_CHUNK = 1 << 18
"""Elements that are compared at a time: the differences stay in the processor's cache."""

Infer = Callable[[Weights], npt.NDArray[np.float32]]
"""Weights -> [N, H, A]: the planned actions for the golden observations, with the same noise at every call. Blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishGateSettings:
    """Limits of the gate."""

    update_factor: float = 5.0
    """Largest norm of an update, over the running median of those that were published."""
    window: int = 50
    """Published updates that the median is taken of."""
    least_updates: int = 5
    """Published updates before the norm is judged at all."""
    action_change: float = 0.3
    """Largest mean change of an action element from one published version to the next, in halves of its range.
    Measured on the toy robot: 0.31 for the first 25 steps of random weights, 0.10 to 0.04 for the next 200; the same
    weights shuffled within each tensor: 0.45. A run begins with a trained base, so 0.3 leaves it three times what it
    needs."""
    margin: float = 0.5
    """How far an action may lie beyond its bounds, in halves of its range."""
    outside_share: float = 0.05
    """Share of the actions that may lie further out: single golden observations may be strange."""
    time_share: float = 0.5
    """Longest inference, as a share of the time that the steps it plans take on the robot."""
    max_refusals: int = 10
    """Refusals in a row that end the run."""

    def __post_init__(self) -> None:
        for name in ("update_factor", "action_change", "margin", "outside_share", "time_share"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"publish_gate.{name} must be positive and finite, got {value}")
        for name in ("window", "least_updates", "max_refusals"):
            if getattr(self, name) < 1:
                raise ValueError(f"publish_gate.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate says about one version."""

    reasons: tuple[str, ...]
    """Why it must not be published, in words; empty when it may be."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """For the metrics: `update_norm`, `update_ratio`, `action_change`, `outside_share`, `infer_s`, as far as known."""

    @property
    def ok(self) -> bool:
        """Whether it may be published."""
        return not self.reasons


class _Saved(msgspec.Struct):
    """Form of `state_dict`."""

    norms: list[float]
    refusals: int


class PublishGate:
    """Checks versions one after the other. Not thread-safe.

    Args:
        settings: the limits.
        spec: of the policy: bounds, horizon and beat of the robot.
        infer: plans for the golden observations with given weights.
        now: seconds, for the inference time.
    """

    def __init__(
        self,
        settings: PublishGateSettings,
        spec: PolicySpec,
        infer: Infer,
        *,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._settings = settings
        self._spec = spec
        self._infer = infer
        self._now = now
        self._norms: deque[float] = deque(maxlen=settings.window)
        self._last: Weights | None = None
        self._actions: npt.NDArray[np.float32] | None = None
        self.refusals = 0
        """In a row."""

    def start_from(self, weights: Weights) -> None:
        """The policy that the training goes on from: the base, or the last that was published (blocking).

        Without it the first version is judged by its own actions alone. Tensors that are missing later are taken as
        unchanged. The arrays are kept and must not be written to.
        """
        self._last = weights
        self._actions = self._infer(weights)

    def check(self, weights: Weights) -> Verdict:
        """Judge the next version (blocking). What passes is taken as published.

        Args:
            weights: may lack tensors that have not changed; kept when they pass: they must not be written to.

        Raises:
            RunError: refused, and so were the ones before: `max_refusals` in a row.
        """
        measures: dict[str, float] = {}
        reasons = self._check_weights(weights, measures)
        actions = None
        if not reasons:
            whole = {**self._last, **weights} if self._last is not None else dict(weights)
            began = self._now()
            actions = self._infer(whole)
            measures["infer_s"] = (self._now() - began) / len(actions)
            reasons = self._check_actions(actions, measures)
        if reasons:
            return self._refuse(reasons, measures)
        self.refusals = 0
        if "update_norm" in measures:
            self._norms.append(measures["update_norm"])
        self._last, self._actions = whole, actions
        return Verdict(reasons=(), measures=measures)

    def state_dict(self) -> dict[str, Any]:
        """Norms of published updates and refusals in a row, as JSON values; for a checkpoint."""
        return {"norms": list(self._norms), "refusals": self.refusals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the weights come with `start_from`.

        Raises:
            ValueError: not such a state.
        """
        try:
            saved = msgspec.convert(state, _Saved)
        except msgspec.ValidationError as error:
            raise ValueError(f"not a state of the publish gate: {error}") from error
        self._norms.clear()
        self._norms.extend(saved.norms)
        self.refusals = saved.refusals

    def _refuse(self, reasons: list[str], measures: Mapping[str, float]) -> Verdict:
        self.refusals += 1
        if self.refusals >= self._settings.max_refusals:
            raise RunError(
                f"{self.refusals} versions in a row were refused, the last one because {'; '.join(reasons)}. The "
                "robots keep the last good version. Go back to an earlier checkpoint with a lower learner.lr"
            )
        return Verdict(reasons=tuple(reasons), measures=measures)

    def _check_weights(self, weights: Weights, measures: dict[str, float]) -> list[str]:
        square = 0.0
        for name, tensor in weights.items():
            if not _is_float(tensor):
                continue
            part = _square_distance(tensor, None if self._last is None else self._last.get(name))
            if part is None:
                return [f"{name} is not finite"]
            square += part
        if self._last is None:
            return []
        norm = measures["update_norm"] = math.sqrt(square)
        if len(self._norms) < self._settings.least_updates:
            return []
        usual = statistics.median(self._norms)
        if usual <= 0:
            return []
        ratio = measures["update_ratio"] = norm / usual
        if ratio <= self._settings.update_factor:
            return []
        return [f"the update is {ratio:.1f} times as large as usual, {self._settings.update_factor:g} are allowed"]

    def _check_actions(self, actions: npt.NDArray[np.float32], measures: dict[str, float]) -> list[str]:
        settings, body = self._settings, self._spec.embodiment
        bad = np.flatnonzero(~np.isfinite(actions).all(axis=(1, 2)))
        if bad.size:
            return [f"its action is not finite on golden observation {bad[0]}"]
        reasons = []
        low, high = np.asarray(body.action_low, np.float32), np.asarray(body.action_high, np.float32)
        half = (high - low) / 2
        if self._actions is not None:
            change = measures["action_change"] = float(np.abs((actions - self._actions) / half).mean())
            if change > settings.action_change:
                reasons.append(f"actions change by {change:.2f} of half the range, {settings.action_change:g} allowed")
        beyond = np.maximum(low - actions, actions - high) > settings.margin * half
        outside = measures["outside_share"] = float(beyond.any(axis=2).mean())
        if outside > settings.outside_share:
            reasons.append(f"{100 * outside:.0f} % of its actions are far outside of the robot's bounds")
        budget_s = settings.time_share * self._spec.execution_horizon / body.control_hz
        if measures["infer_s"] > budget_s:
            reasons.append(f"an inference takes {1e3 * measures['infer_s']:.0f} ms, {1e3 * budget_s:.0f} ms allowed")
        return reasons


def _is_float(tensor: npt.NDArray[Any]) -> bool:
    return tensor.dtype.kind == "f" or tensor.dtype.name == "bfloat16"


def _square_distance(new: npt.NDArray[Any], old: npt.NDArray[Any] | None) -> float | None:
    """Squared distance of two tensors in one pass; 0 without an old one; None when the new one is not finite."""
    flat, total = new.reshape(-1), 0.0
    before = None if old is None or old.shape != new.shape else old.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float32, copy=False)
        if before is not None:
            part = part - before[start : start + _CHUNK].astype(np.float32, copy=False)
        with np.errstate(all="ignore"):
            square = float(np.dot(part, part))  # the one number that says whether all of them are finite
        if not math.isfinite(square):
            return None
        total += square
    return 0.0 if before is None else total
