"""The contract of `sop.algorithms.base.Algorithm`, one function per rule.

Most rules of the contract look at an algorithm as the learner has it: prepared on a few demonstrations and base
rollouts, with some episodes indexed. A rule that fits something gets settings under which that takes a moment.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sop.algorithms.base import Algorithm
from sop.core.codec import EncodedEpisode, encode
from sop.core.embodiment import Embodiment
from sop.core.episode import Controller, Episode, Intervention, Outcome, human_runs
from sop.core.experience import Batch, Collection, Source, StepLabels, Windows
from sop.core.policy import Conditioning
from sop.testing.contracts import require, require_equal
from sop.testing.library import MemoryLibrary, tiny_policy

MakeAlgorithm = Callable[[], Algorithm]
"""Makes the algorithm under test for a robot with `CONTROL_HZ`; equal at every call."""

CONTROL_HZ = 20.0

BODY = Embodiment(
    name="sample",
    cameras={"front": (8, 8)},
    state_names=("x", "y"),
    action_names=("dx", "dy"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    hold_action=(0.0, 0.0),
    max_action_change=(None, None),
    control_hz=CONTROL_HZ,
)
"""The robot of the episodes here."""

PLAN = "P" * 30 + "H" * 25 + "P" * 15 + "H" * 20
"""Who controls an episode with two corrections."""


def sample_episode(
    controllers: str = PLAN,
    outcome: Outcome = Outcome.SUCCESS,
    *,
    demonstration: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Episode:
    """An episode of `BODY` with random content.

    Args:
        controllers: one letter per step, P for the policy and H for a person.
        outcome: how it ended.
        demonstration: no policy was loaded; needs a plan of H alone.
        seed: of states, actions and images; the episode's number.
        changes: any other field of `Episode`.
    """
    rng = np.random.default_rng(seed)
    steps = len(controllers)
    controller = np.array([Controller.HUMAN if who == "H" else Controller.POLICY for who in controllers], np.uint8)
    action = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
    fields: dict[str, Any] = {
        "actor_id": "lab-0" if demonstration else "robot-0",
        "sequence": seed,
        "robot": BODY.name,
        "task": "sample",
        "instruction": "do it",
        "policy_version": None if demonstration else 3,
        "images": {"front": rng.integers(0, 256, (steps, 8, 8, 3), np.uint8)},
        "state": rng.standard_normal((steps, 2), np.float32),
        "action": action,
        "policy_action": np.zeros_like(action) if demonstration else action + np.float32(0.1),
        "proposed": np.full(steps, not demonstration),
        "controller": controller,
        "monotonic_ns": np.arange(steps, dtype=np.int64) * int(1e9 / CONTROL_HZ),
        "start_utc_ns": 0,
        "end_utc_ns": int(steps * 1e9 / CONTROL_HZ),
        "outcome": outcome,
        "truncated": False,
        "interventions": tuple(Intervention(a, b, "operator", "deviation") for a, b in human_runs(controller)),
    }
    return Episode(**(fields | changes))


def sample_rollout(steps: int, outcome: Outcome, seed: int, task: str = "sample") -> Episode:
    """An episode of the base policy before the fleet started."""
    return sample_episode("P" * steps, outcome, seed=seed, task=task, actor_id="base-0", policy_version=0)


def sample_episodes() -> list[Episode]:
    """One episode of every sort; those of one actor have different numbers."""
    return [
        sample_episode(seed=0),
        sample_episode(outcome=Outcome.FAILURE, seed=1),
        sample_episode(outcome=Outcome.ABORTED, seed=2),
        sample_episode("P" * 40, seed=3),
        sample_episode("P" * 40, Outcome.FAILURE, seed=4),
        sample_episode("P", seed=5),
        sample_episode("H", seed=6),
        sample_episode("P" * 12, seed=7, task="unheard-of"),
        sample_episode("H" * 40, demonstration=True, seed=0),
        sample_episode("H" * 40, Outcome.ABORTED, demonstration=True, seed=1),
        sample_rollout(24, Outcome.SUCCESS, 0),
        sample_rollout(24, Outcome.ABORTED, 1),
    ]


def sample_library() -> MemoryLibrary:
    """An offline buffer with two demonstrations, and four base rollouts half of which failed."""
    demonstrations = [sample_episode("H" * 20, demonstration=True, seed=seed) for seed in (10, 11)]
    outcomes = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.SUCCESS, Outcome.FAILURE)
    return MemoryLibrary([*demonstrations, *(sample_rollout(16, end, 10 + n) for n, end in enumerate(outcomes))])


def prepared(make_algorithm: MakeAlgorithm) -> tuple[Algorithm, MemoryLibrary]:
    """An algorithm as the learner has it after a while, and what it has seen: prepared on `sample_library`, and with
    `sample_episodes` indexed and its labels brought up to date."""
    algorithm, library = make_algorithm(), sample_library()
    algorithm.prepare(library, tiny_policy(BODY))
    for episode in sample_episodes():
        source = Source.ONLINE if episode.actor_id.startswith("robot") else Source.OFFLINE
        library.add(episode, source)
        algorithm.indexed(episode, source)
    algorithm.refresh(1, library)
    return algorithm, library


def labels_fit_their_episode(make_algorithm: MakeAlgorithm) -> None:
    """One label per step; weights are finite and not negative; windows start where something is learned from."""
    algorithm, _ = prepared(make_algorithm)
    for episode in sample_episodes():
        labels = algorithm.annotate(episode)
        require_equal(len(labels.loss_weight), episode.num_steps, "labels of an episode")
        require(bool(np.isfinite(labels.loss_weight).all()), "a weight is not finite")
        require(bool((labels.loss_weight >= 0).all()), "a weight is negative")
        require(not bool((labels.can_start & (labels.loss_weight == 0)).any()), "a window starts without weight")


def a_segment_has_one_controller(make_algorithm: MakeAlgorithm) -> None:
    """What is learned from one segment was controlled by one: no window mixes policy and person."""
    algorithm, _ = prepared(make_algorithm)
    for episode in sample_episodes():
        labels = algorithm.annotate(episode)
        learned = labels.loss_weight > 0
        for segment in np.unique(labels.segment[learned]):
            controllers = np.unique(episode.controller[learned & (labels.segment == segment)])
            require_equal(len(controllers), 1, f"controllers in segment {segment}")


def an_aborted_episode_teaches_nothing(make_algorithm: MakeAlgorithm) -> None:
    """No weight and no start, whoever controlled it."""
    algorithm, _ = prepared(make_algorithm)
    for episode in sample_episodes():
        if episode.outcome is Outcome.ABORTED:
            labels = algorithm.annotate(episode)
            require(not labels.loss_weight.any() and not labels.can_start.any(), "an aborted episode has weight")


def a_stored_episode_gets_the_same_labels(make_algorithm: MakeAlgorithm) -> None:
    """Labels are deterministic, and those of an encoded episode are those of the episode."""
    (algorithm, _), (other, _) = prepared(make_algorithm), prepared(make_algorithm)
    for episode in sample_episodes():
        labels = algorithm.annotate(episode)
        _require_equal_labels(other.annotate(EncodedEpisode(encode(episode))), labels)


def labels_stay_until_refresh_says_otherwise(make_algorithm: MakeAlgorithm) -> None:
    """New episodes change no label by themselves; `refresh` tells when they do, and then once.

    Labels that have changed have another `label_version` than before, above 0: only then a draw keeps them.
    """
    algorithm, library = prepared(make_algorithm)
    episodes = sample_episodes()
    for step in range(2, 6):
        before = [algorithm.annotate(episode) for episode in episodes]
        for number in range(3):
            outcome = Outcome.SUCCESS if number else Outcome.FAILURE
            episode = sample_episode("P" * 20 * step, outcome, seed=100 * step + number)
            library.add(episode, Source.ONLINE)
            algorithm.indexed(episode, Source.ONLINE)
        for episode, labels in zip(episodes, before, strict=True):
            _require_equal_labels(algorithm.annotate(episode), labels)
        changed = algorithm.refresh(step, library)
        for episode, labels in zip(episodes, before, strict=True):
            now = algorithm.annotate(episode)
            if not changed:
                _require_equal_labels(now, labels)
            elif _differ(now, labels):
                require(now.label_version > 0, "labels changed, and their label_version is 0")
                require(now.label_version != labels.label_version, "labels changed, their label_version did not")
        require(not algorithm.refresh(step, library), "labels changed again, although nothing was new")


def nothing_moves_a_window(make_algorithm: MakeAlgorithm) -> None:
    """Segments, window starts and which weights are positive are the same before anything is learned and ever after."""
    fresh = make_algorithm()
    first = [fresh.annotate(episode) for episode in sample_episodes()]
    algorithm, library = prepared(make_algorithm)
    for step in (2, 10_000):
        for episode, labels in zip(sample_episodes(), first, strict=True):
            now = algorithm.annotate(episode)
            np.testing.assert_array_equal(now.segment, labels.segment, "segment")
            np.testing.assert_array_equal(now.can_start, labels.can_start, "can_start")
            np.testing.assert_array_equal(now.loss_weight > 0, labels.loss_weight > 0, "which weights are positive")
        algorithm.refresh(step, library)


def a_saved_state_restores_the_labels(make_algorithm: MakeAlgorithm) -> None:
    """`load_state_dict(state_dict())` gives an algorithm with the same opinions, fresh or prepared; the state is arrays
    that can be written to and keep what they hold, and JSON for the rest."""
    for algorithm in (make_algorithm(), prepared(make_algorithm)[0]):
        labels = [algorithm.annotate(episode) for episode in sample_episodes()]
        state = algorithm.state_dict()
        arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
        rest = json.loads(json.dumps({name: value for name, value in state.items() if name not in arrays}))
        require(all(value.flags.writeable for value in arrays.values()), "an array of the state is read-only")
        restored = make_algorithm()
        restored.load_state_dict({**rest, **{name: value.copy() for name, value in arrays.items()}})
        for value in arrays.values():
            value.fill(0)  # whoever has the state may do what it wants with it
        for episode, expected in zip(sample_episodes(), labels, strict=True):
            _require_equal_labels(restored.annotate(episode), expected)
            _require_equal_labels(algorithm.annotate(episode), expected)


def a_sidecar_has_a_number_per_step(make_algorithm: MakeAlgorithm) -> None:
    """Float32 columns [T]; an aborted episode has none."""
    algorithm, _ = prepared(make_algorithm)
    for episode in sample_episodes():
        sidecar = algorithm.sidecar(episode)
        if sidecar is None:
            continue
        require(episode.outcome is not Outcome.ABORTED, "an aborted episode has a sidecar")
        for name, column in sidecar.columns.items():
            require_equal((column.shape, column.dtype), ((episode.num_steps,), np.dtype(np.float32)), f"column {name}")


def metrics_are_numbers(make_algorithm: MakeAlgorithm) -> None:
    """Finite floats under names, before anything is known and after."""
    for algorithm in (make_algorithm(), prepared(make_algorithm)[0]):
        for name, value in algorithm.metrics().items():
            require(isinstance(name, str) and isinstance(value, float), f"not a name and a float: {name!r}, {value!r}")
            require(math.isfinite(value), f"{name} is {value}")


def a_loss_per_window_reaches_the_sampler(make_algorithm: MakeAlgorithm) -> None:
    """The algorithm asks the policy and returns one differentiable value per window."""
    algorithm, policy = make_algorithm(), _SquaredAction()
    rows = np.zeros(3, np.int32)
    batch = Batch(
        windows=Windows(rows.astype(np.int64), rows, rows, rows.astype(np.uint8)),
        images={},
        state=np.zeros((3, 2), np.float32),
        action=np.arange(3, dtype=np.float32).reshape(3, 1, 1),
        loss_weight=np.ones((3, 1), np.float32),
        instruction=("do it",) * 3,
        policy_version=rows.astype(np.int64),
    )
    losses = algorithm.loss(policy, batch, torch.Generator())
    require_equal(tuple(losses.shape), (3,), "shape of the loss")
    require(losses.requires_grad, "the loss cannot be differentiated")


def the_fleet_is_told_what_to_do(make_algorithm: MakeAlgorithm) -> None:
    """`collection` and `conditioning` are words of the vocabulary."""
    algorithm = make_algorithm()
    require(isinstance(algorithm.collection, Collection), f"not a Collection: {algorithm.collection!r}")
    require(isinstance(algorithm.conditioning(), Conditioning), f"not a Conditioning: {algorithm.conditioning()!r}")


def the_learner_is_told_what_comes_first(make_algorithm: MakeAlgorithm) -> None:
    """`needs_rollouts`, `warm_up` and `policy_settings` are known before anything is there; a warm-up needs rollouts,
    and the policy's settings are JSON."""
    algorithm = make_algorithm()
    require(isinstance(algorithm.needs_rollouts, bool), f"not a bool: {algorithm.needs_rollouts!r}")
    warm_up, settings = algorithm.warm_up, dict(algorithm.policy_settings)
    if warm_up is not None:
        require(algorithm.needs_rollouts, "a warm-up without rollouts of the base policy")
        require(warm_up.install in ("warmup", "cold"), f"install is {warm_up.install!r}")
        numbers = (warm_up.warmup_max_steps, warm_up.warmup_separation, warm_up.warmup_null_tolerance)
        require(all(number >= 0 for number in numbers), f"a number of the warm-up is negative: {numbers}")
    require_equal(json.loads(json.dumps(settings)), settings, "settings of the policy, through JSON")


class _SquaredAction:
    """The smallest policy with a loss."""

    def __init__(self) -> None:
        self.weight = torch.ones((), requires_grad=True)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        error: Tensor = (self.weight - torch.from_numpy(batch.action)).square().mean(dim=(1, 2))
        return error


def _differ(labels: StepLabels, others: StepLabels) -> bool:
    names = ("loss_weight", "advantage_indicator")
    return not all(np.array_equal(getattr(labels, name), getattr(others, name)) for name in names)


def _require_equal_labels(actual: StepLabels, expected: StepLabels) -> None:
    for field in dataclasses.fields(StepLabels):
        np.testing.assert_array_equal(getattr(actual, field.name), getattr(expected, field.name), field.name)


ALGORITHM_RULES = (
    labels_fit_their_episode,
    a_segment_has_one_controller,
    an_aborted_episode_teaches_nothing,
    a_stored_episode_gets_the_same_labels,
    labels_stay_until_refresh_says_otherwise,
    nothing_moves_a_window,
    a_saved_state_restores_the_labels,
    a_sidecar_has_a_number_per_step,
    metrics_are_numbers,
    a_loss_per_window_reaches_the_sampler,
    the_fleet_is_told_what_to_do,
    the_learner_is_told_what_comes_first,
)
"""What every algorithm keeps."""
