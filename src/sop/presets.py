"""Whole configurations with a name, and single values changed by `--set`.

| preset      | robots                          | takes                 | for                       |
|-------------|---------------------------------|-----------------------|---------------------------|
| `metaworld` | 4 simulated arms, two cameras   | 7 minutes, two cores  | the demo; the experiments |
| `debug`     | 2 toy robots, no MuJoCo         | half a minute         | tests; trying a change    |
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from sop.config import (
    EvaluationConfig,
    FleetConfig,
    LearnerConfig,
    OperatorConfig,
    PolicyConfig,
    PretrainConfig,
    RobotConfig,
    RunConfig,
    SamplerConfig,
)
from sop.core.settings import suggestion


def metaworld() -> RunConfig:
    """Four simulated arms learn four manipulation tasks; two more tasks are held out."""
    return RunConfig(
        preset="metaworld",
        robot=RobotConfig(
            kind="metaworld",
            fleet_tasks=("drawer-open", "door-open", "button-press-topdown", "window-open"),
            held_out_tasks=("drawer-close", "plate-slide"),
        ),
        algorithm_settings={"handover_s": 0.0},  # the stand-in has no reflex: its first action is a correction
    )


def debug() -> RunConfig:
    """Two toy robots, a tiny policy, everything else as in the real thing."""
    return RunConfig(
        preset="debug",
        robot=RobotConfig(
            kind="toy", fleet_tasks=("touch-red", "touch-green"), held_out_tasks=("touch-blue",), image_size=24
        ),
        algorithm_settings={"handover_s": 0.0},
        operator=OperatorConfig(reaction_steps=3, stall_steps=12, min_steps=6, max_steps=20),
        fleet=FleetConfig(num_actors=2, speed=2.0, episodes=24, reset_s=0.2),
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

    Raises:
        ValueError: unknown preset or field ("Did you mean"), or a value that its field does not take.
    """
    if preset not in PRESETS:
        raise ValueError(f"no preset is called {preset!r}. {suggestion(preset, PRESETS)}")
    values = config_to_dict(PRESETS[preset]())
    for change in changes:
        name, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"--set takes name=value, got {change!r}")
        _assign(values, RunConfig, name, text)
    return config_from_dict(values)


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
        values = values[part]
    try:
        values[last] = json.loads(text)
    except json.JSONDecodeError:
        values[last] = text
