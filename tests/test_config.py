"""Configurations: checked when made, changed by name, and the same after a trip through run.json."""

import dataclasses

import pytest

from sop import cli
from sop.algorithms import ALGORITHMS
from sop.commands import run
from sop.config import (
    EvaluationConfig,
    ExplorationConfig,
    FleetConfig,
    LearnerConfig,
    RobotConfig,
    RolloutConfig,
    RunConfig,
    SamplerConfig,
)
from sop.presets import (
    ALGORITHM_NAMES,
    FROM_OWN_ACTIONS,
    FROM_PEOPLE,
    PRESETS,
    algorithm_defaults,
    config_from_dict,
    config_to_dict,
    make_config,
    vetted_changes,
)
from sop.runs import check_names


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
        (["exploration.kind=sometimes"], "exploration.kind"),
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
        (ExplorationConfig, {"kind": "gaussian"}, "none, offset or noise, got 'gaussian'"),
        (ExplorationConfig, {"std": -0.1}, "std must be 0 or more and finite, got -0.1"),
        (ExplorationConfig, {"tempo": float("inf")}, "tempo must be 0 or more and finite, got inf"),
        (ExplorationConfig, {"tempo_mean": -2.0}, r"tempo_mean must be in \[-1, 1\], got -2.0"),
        (ExplorationConfig, {"probability": 1.5}, r"probability must be in \[0, 1\], got 1.5"),
        (ExplorationConfig, {"final_share": -1}, "final_share"),
        (ExplorationConfig, {"hold_chunks": 0}, "hold_chunks must be at least 1, got 0"),
        (ExplorationConfig, {"elements": ()}, r"elements from 0 on, got \(\)"),
        (ExplorationConfig, {"elements": (0, -1)}, r"elements from 0 on, got \(0, -1\)"),
        (ExplorationConfig, {"schedule": "cosine"}, "constant or linear, got 'cosine'"),
        (ExplorationConfig, {"schedule": "linear"}, "over_episodes must be at least 1 for a linear schedule, got None"),
        (RolloutConfig, {"episodes_per_task": 0}, "rollouts.episodes_per_task must be at least 1, got 0"),
        (RolloutConfig, {"workers": 0}, "rollouts.workers must be at least 1, got 0"),
    ],
)
def test_every_part_is_validated(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_configurations_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config("debug").seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("algorithm", FROM_PEOPLE)
def test_who_learns_from_nobody_but_people_does_not_explore(algorithm: str) -> None:
    check_names(make_config("debug", [f"algorithm={algorithm}"]))
    with pytest.raises(ValueError, match=f"'offset', but {algorithm} learns from nobody but people"):
        check_names(make_config("debug", [f"algorithm={algorithm}", "exploration.kind=offset"]))


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
def test_where_nobody_corrects_a_preset_has_vetted_changes_that_a_user_may_change_again(
    preset: str, algorithm: str
) -> None:
    asked = [f"algorithm={algorithm}", "operator.kind=none", "exploration.coherence=0.5"]
    alone = vetted_changes(make_config(preset, asked))
    if algorithm in FROM_PEOPLE:
        assert alone == ()
        return
    config = make_config(preset, [*alone, *asked])
    check_names(config)
    assert (config.exploration.kind, config.exploration.coherence) == ("noise", 0.5)
    assert make_config(preset, [*alone, *asked, "exploration.kind=none"]).exploration.kind == "none"
    assert "exploration.kind=noise" not in vetted_changes(config, ["exploration.kind=offset"])
    assert not any(one.startswith("exploration.") for one in vetted_changes(config, ["exploration={}"]))


def test_recap_alone_judges_by_outcomes_goes_faster_and_weighs_bad_steps_less() -> None:
    asked = ["algorithm=recap", "operator.kind=none"]
    config = make_config("metaworld", [*vetted_changes(make_config("metaworld", asked)), *asked])
    assert config.algorithm_settings["negative_weight"] == 0.2
    assert config.algorithm_settings["lookahead_s"] == 6
    assert config.algorithm_settings["handover_s"] == 0.0, "the preset's own"
    assert (config.exploration.tempo, config.exploration.tempo_mean) == (0.2, 0.15)
    assert (config.pretrain.steps, config.fleet.episodes, config.fleet.speed) == (2000, 600, 0)


def test_where_people_correct_only_recap_explores_in_metaworld_unless_told_otherwise() -> None:
    for preset in PRESETS:
        for algorithm in ALGORITHM_NAMES:
            found = vetted_changes(make_config(preset, [f"algorithm={algorithm}"]))
            assert bool(found) == ((preset, algorithm) == ("metaworld", "recap")), (preset, algorithm)
    corrected = make_config("metaworld", ["algorithm=recap"])
    config = make_config("metaworld", [*vetted_changes(corrected), "algorithm=recap"])
    assert config.exploration == ExplorationConfig(kind="noise", tempo=0.2, tempo_mean=0.15)
    assert config.algorithm_settings == {"handover_s": 0.0, "negative_weight": 0.2}
    assert (config.pretrain, config.fleet, config.sampler) == (corrected.pretrain, corrected.fleet, corrected.sampler)
    asked = ["algorithm=recap", "exploration.kind=none", "exploration.tempo=0", "algorithm_settings={}"]
    assert vetted_changes(corrected, asked) == ("exploration.tempo_mean=0.15",)


def test_rollouts_explore_with_the_runs_exploration_at_full_strength_also_when_the_fleet_does_not() -> None:
    assert make_config("debug").rollout_exploration == ExplorationConfig(kind="offset")
    assert make_config("debug", ["rollouts.explore=false"]).rollout_exploration.kind == "none"
    fading = ["exploration.over_episodes=5", "exploration.kind=offset", "exploration.std=0.1"]
    constant = make_config("debug", fading)
    linear = make_config("debug", [*fading, "exploration.schedule=linear"])
    assert constant.rollout_exploration == linear.rollout_exploration == ExplorationConfig(kind="offset", std=0.1)
    assert linear.exploration != linear.rollout_exploration
    assert make_config("debug", ["exploration.kind=noise"]).rollout_exploration == ExplorationConfig(kind="noise")


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm_comes_with_settings_that_it_knows(preset: str, algorithm: str) -> None:
    config = make_config(preset, [f"algorithm={algorithm}"])
    assert config.algorithm_settings == algorithm_defaults(preset, algorithm)
    check_names(config)


def test_the_command_line_knows_all_algorithms() -> None:
    assert set(ALGORITHM_NAMES) == set(ALGORITHMS)


def test_a_presets_settings_belong_to_its_algorithm_and_single_ones_are_changed_on_top_in_any_order() -> None:
    assert make_config("debug").algorithm_settings == {"handover_s": 0.0}
    assert make_config("debug", ["algorithm=bc"]).algorithm_settings == {}
    changes = ["algorithm_settings.mode=iwr", "algorithm=hg_dagger"]
    for order in (changes, changes[::-1]):
        assert make_config("debug", order).algorithm_settings == {"handover_s": 0.0, "mode": "iwr"}
    assert algorithm_defaults("debug", "hg_dagger") == {"handover_s": 0.0}, "the defaults themselves never change"
    assert algorithm_defaults("mine", "hg_dagger") == {}


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> RunConfig:
    """The configuration that `sop run debug ...` starts."""
    seen: list[RunConfig] = []

    def choose(_options: object, config: RunConfig) -> None:
        seen.append(config)
        raise ValueError("that is all")

    monkeypatch.setattr(run, "_choose_run", choose)
    assert cli.main(["run", "debug", *arguments]) == 2
    return seen[0]


@pytest.mark.parametrize("algorithm", FROM_OWN_ACTIONS)
def test_a_fleet_that_nobody_corrects_explores_unless_told_not_to(
    algorithm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ("--algorithm", algorithm, "--operators", "none")
    assert started(monkeypatch, *alone).exploration == ExplorationConfig(kind="noise")
    assert f"{algorithm} learns from what the fleet tries" in capsys.readouterr().out
    assert started(monkeypatch, *alone, "--set", "exploration.coherence=0.5").exploration.kind == "noise"
    capsys.readouterr()
    for refused in (("--exploration", "none"), ("--set", "exploration.kind=none")):
        assert started(monkeypatch, *alone, *refused).exploration.kind == "none"
    assert started(monkeypatch, "--algorithm", algorithm).exploration.kind == "none"
    assert started(monkeypatch, "--algorithm", algorithm, "--exploration", "offset").exploration.kind == "offset"
    assert capsys.readouterr().out == ""


def test_who_learns_from_people_does_not_explore_when_they_are_away(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, "--operators", "none").exploration.kind == "none"
