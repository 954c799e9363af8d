"""Value functions: how well things stand in an episode, learned from all that was recorded, failures included.

distribution   bins, two-hot targets, expectation
returns        what came of every step; N-step advantages that stop at a takeover
frames         which steps a fit sees
network        the policy's encoder with a head over the bins
function       fit, predict, save
calibration    rank correlation, calibration error, separation, drift
outcomes       whether there is anything to learn from

`distribution`, `network` and `function` need torch; they are loaded when one of their names is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sop.values.calibration import (
    Calibration,
    CalibrationPoint,
    Drift,
    ValuedEpisode,
    calibrate,
    calibration_error,
    drift,
    rank_correlation,
    separation,
)
from sop.values.outcomes import missing_outcomes, require_outcomes
from sop.values.returns import (
    ReturnSettings,
    advantages,
    ends_in_success,
    longest_episodes,
    policy_runs,
    returns,
    value_runs,
)

if TYPE_CHECKING:
    from sop.values.distribution import bin_centres, expectation, two_hot
    from sop.values.function import FitReport, ValueFunction
    from sop.values.network import ValueSettings

_NEED_TORCH = {
    "bin_centres": "distribution",
    "expectation": "distribution",
    "two_hot": "distribution",
    "FitReport": "function",
    "ValueFunction": "function",
    "ValueSettings": "network",
}

__all__ = [
    "Calibration",
    "CalibrationPoint",
    "Drift",
    "FitReport",
    "ReturnSettings",
    "ValueFunction",
    "ValueSettings",
    "ValuedEpisode",
    "advantages",
    "bin_centres",
    "calibrate",
    "calibration_error",
    "drift",
    "ends_in_success",
    "expectation",
    "longest_episodes",
    "missing_outcomes",
    "policy_runs",
    "rank_correlation",
    "require_outcomes",
    "returns",
    "separation",
    "two_hot",
    "value_runs",
]


def __getattr__(name: str) -> object:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
