"""Configurations: checked when made, changed by name, and the same after a trip through run.json."""

import dataclasses

import pytest

from sop.config import EvaluationConfig, FleetConfig, LearnerConfig, RobotConfig, SamplerConfig
from sop.presets import PRESETS, config_from_dict, config_to_dict, make_config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_the_same_after_a_trip_through_json(name: str) -> None:
    config = make_config(name)
    assert config_from_dict(config_to_dict(config)) == config


def test_values_are_changed_by_their_dotted_names() -> None:
    config = make_config("debug", ["seed=7", "learner.lr=1e-4", "algorithm=bc", "fleet.episodes=null"])
    assert (config.seed, config.learner.lr, config.algorithm, config.fleet.episodes) == (7, 1e-4, "bc", None)
    config = make_config(
        "debug", ['robot.fleet_tasks=["touch-blue"]', "robot.held_out_tasks=[]", "policy.settings.width=64"]
    )
    assert config.robot.fleet_tasks == ("touch-blue",)
    assert config.policy.settings["width"] == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["learner.lrr=1"], "Did you mean 'lr'"),
        (["lerner.lr=1"], "Did you mean 'learner'"),
        (["seed"], "name=value"),
        (["seed=abc"], "seed"),
        (["learner.lr=-1"], "learner.lr must be positive, got -1"),
        (["sampler.scale=log"], "scale"),
        (["fleet.speed=-2"], "fleet.speed must be 0 or more, got -2"),
    ],
)
def test_a_wrong_change_is_refused_by_name(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config("debug", changes)


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'metaworld'"):
        make_config("metaword")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (RobotConfig, {"kind": "toy", "fleet_tasks": ()}, "at least one task"),
        (RobotConfig, {"kind": "toy", "fleet_tasks": ("a",), "held_out_tasks": ("a",)}, "in both"),
        (FleetConfig, {"time_factor": 0.5}, "at least 1, got 0.5"),
        (SamplerConfig, {"min_share": 0.9, "max_share": 0.1}, "0.9, 0.1"),
        (LearnerConfig, {"publish_every": 0}, "publish_every must be at least 1, got 0"),
        (LearnerConfig, {"ema": 1.0}, r"\[0, 1\)"),
        (EvaluationConfig, {"first_seed": 2**31}, "first_seed"),
    ],
)
def test_every_part_is_validated(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_configurations_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config("debug").seed = 3  # type: ignore[misc]
