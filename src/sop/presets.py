"""Whole configurations with a name, and single values changed by `--set`.

| preset      | robots                          | takes                 | for                       |
|-------------|---------------------------------|-----------------------|---------------------------|
| `metaworld` | 4 simulated arms, two cameras   | 7 minutes, two cores  | the demo; the experiments |
| `debug`     | 2 toy robots, no MuJoCo         | half a minute         | tests; trying a change    |
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from sop.config import (
    EvaluationConfig,
    ExplorationConfig,
    FleetConfig,
    LearnerConfig,
    OperatorConfig,
    PolicyConfig,
    PretrainConfig,
    RobotConfig,
    RolloutConfig,
    RunConfig,
    SamplerConfig,
)
from sop.core.settings import suggestion

FROM_PEOPLE = ("hg_dagger", "bc", "offline_extra")
"""Algorithms that learn from nobody but people: what a policy tries teaches them nothing."""
FROM_OWN_ACTIONS = ("recap", "weighted_bc", "filtered_bc")
"""Algorithms that learn from what the policy did, too."""
ALGORITHM_NAMES = FROM_PEOPLE + FROM_OWN_ACTIONS
"""The names in `sop.algorithms.ALGORITHMS`, for whoever must not load torch to know them."""
_NO_REFLEX = {"handover_s": 0.0}
"""The stand-in has no reflex: its first action is a correction."""
_SMALL = {"value": {"steps": 20, "batch_size": 16, "num_bins": 21, "random_shift": 1}, "threshold_least": 20}
"""A value function that is fitted in a moment, and thresholds from a few short episodes."""
_ALGORITHM_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "metaworld": {
            "hg_dagger": _NO_REFLEX,
            "recap": _NO_REFLEX,
            "weighted_bc": _NO_REFLEX,
            "filtered_bc": _NO_REFLEX,
        },
        "debug": {
            "hg_dagger": _NO_REFLEX,
            "recap": {**_NO_REFLEX, **_SMALL, "warmup_max_steps": 25},
            "weighted_bc": {**_NO_REFLEX, **_SMALL},
            "filtered_bc": _NO_REFLEX,
        },
    }
)
_BY_OUTCOME = ("algorithm_settings.lookahead_s=6", "algorithm_settings.online_positive=0.6")
"""No episode lasts longer than the look-ahead; the base policy succeeds in two of three."""
_FASTER = ("exploration.tempo=0.2", "exploration.tempo_mean=0.15")
"""The policies' displacements are often at their bounds, so that a tempo of mean 0 slows them down."""
_ALONE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "metaworld": (
            "pretrain.steps=2000",  # a base that its demonstrations hardly improve any more
            "fleet.num_actors=2",
            "fleet.speed=0",
            "fleet.episodes=600",
            "fleet.time_factor=1.0",
            *_FASTER,
            "sampler.min_share=0.5",
            "sampler.max_share=0.8",
            "learner.cooldown_steps=500",
        )
    }
)
"""Vetted changes of a preset where nobody corrects ..."""
_ALONE_OF: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("metaworld", "recap"): (*_BY_OUTCOME, "algorithm_settings.negative_weight=0.2"),
        ("metaworld", "weighted_bc"): _BY_OUTCOME,
    }
)
"""... of an algorithm in it ..."""
_CORRECTED_OF: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {("metaworld", "recap"): ("exploration.kind=noise", *_FASTER, "algorithm_settings.negative_weight=0.2")}
)
"""... and where people correct."""


def algorithm_defaults(preset: str, algorithm: str) -> dict[str, Any]:
    """Vetted settings of an algorithm in a preset; what is not named keeps the algorithm's own default."""
    return copy.deepcopy(dict(_ALGORITHM_DEFAULTS.get(preset, {}).get(algorithm, {})))


def metaworld() -> RunConfig:
    """Four simulated arms learn four manipulation tasks; two more tasks are held out."""
    return RunConfig(
        preset="metaworld",
        robot=RobotConfig(
            kind="metaworld",
            fleet_tasks=("drawer-open", "door-open", "button-press-topdown", "window-open"),
            held_out_tasks=("drawer-close", "plate-slide"),
        ),
        algorithm_settings=algorithm_defaults("metaworld", "hg_dagger"),
        exploration=ExplorationConfig(tempo=0.3),  # of base rollouts, beside offsets
    )


def debug() -> RunConfig:
    """Two toy robots, a tiny policy, everything else as in the real thing."""
    return RunConfig(
        preset="debug",
        robot=RobotConfig(
            kind="toy", fleet_tasks=("touch-red", "touch-green"), held_out_tasks=("touch-blue",), image_size=24
        ),
        algorithm_settings=algorithm_defaults("debug", "hg_dagger"),
        operator=OperatorConfig(reaction_steps=3, stall_steps=12, min_steps=6, max_steps=20),
        fleet=FleetConfig(num_actors=2, speed=2.0, episodes=24, reset_s=0.2),
        rollouts=RolloutConfig(episodes_per_task=6),
        pretrain=PretrainConfig(demonstrations_per_task=6, steps=60, batch_size=16),
        policy=PolicyConfig(settings={"text_encoder": "hash", "channels": (8, 12, 16), "width": 32, "random_shift": 1}),
        sampler=SamplerConfig(min_online_starts=1),
        learner=LearnerConfig(
            batch_size=16, publish_every=10, checkpoint_every=20, cooldown_steps=20, offline_steps=60, ema=0.9
        ),
        evaluation=EvaluationConfig(episodes_per_task=10, progress_episodes_per_task=4, workers=1),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"metaworld": metaworld, "debug": debug}


def make_config(preset: str, changes: Iterable[str] = ()) -> RunConfig:
    """A preset with single values changed, e.g. `["seed=3", "learner.lr=1e-4"]`.

    Another `algorithm` comes with its own settings (`algorithm_defaults`), whatever the order of the changes.

    Raises:
        ValueError: unknown preset or field ("Did you mean"), or a value that its field does not take.
    """
    if preset not in PRESETS:
        raise ValueError(f"no preset is called {preset!r}. {suggestion(preset, PRESETS)}")
    values = config_to_dict(PRESETS[preset]())
    for change in sorted(changes, key=lambda change: not change.startswith("algorithm=")):
        name, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"--set takes name=value, got {change!r}")
        _assign(values, RunConfig, name, text)
        if name == "algorithm":
            values["algorithm_settings"] = algorithm_defaults(preset, values["algorithm"])
    return config_from_dict(values)


def vetted_changes(config: RunConfig, changes: Iterable[str] = ()) -> tuple[str, ...]:
    """What `sop run` changes of a preset, where the algorithm learns from what the policy did: the fleet explores
    where nobody corrects, for without it learns from what it does anyway, and what else was found to matter
    (docs/recap-on-any-base.md). Nothing in other runs.

    Args:
        config: the run as it would be without.
        changes: what somebody asked for himself, as for `make_config`: this is left to him.
    """
    of_algorithm = (config.preset, config.algorithm)
    if config.algorithm not in FROM_OWN_ACTIONS:
        return ()
    if config.operator.kind == "none":
        found = ("exploration.kind=noise", *_ALONE.get(config.preset, ()), *_ALONE_OF.get(of_algorithm, ()))
    else:
        found = _CORRECTED_OF.get(of_algorithm, ())
    asked = tuple(f"{change.partition('=')[0]}." for change in changes)
    return tuple(one for one in found if not f"{one.partition('=')[0]}.".startswith(asked))


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain JSON values of a configuration."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    return values


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run; types are checked and every part is validated.

    Raises:
        ValueError: names the field that is wrong.
    """
    try:
        return msgspec.convert(dict(values), RunConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"configuration: {error}") from error


def _assign(values: dict[str, Any], kind: Any, name: str, text: str) -> None:
    """Set the field with the dotted name to the value in `text` (JSON, or a plain string)."""
    *path, last = name.split(".")
    for part in (*path, last):
        if dataclasses.is_dataclass(kind):
            known = {field.name: field.type for field in dataclasses.fields(kind)}
            if part not in known:
                raise ValueError(f"--set {name}: no field is called {part!r}. {suggestion(part, known)}")
            kind = known[part]
    for part in path:
        values = values.setdefault(part, {})
    try:
        values[last] = json.loads(text)
    except json.JSONDecodeError:
        values[last] = text
