"""The contract of `sop.algorithms.base.Algorithm`, one function per rule."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sop.algorithms.base import Algorithm
from sop.core.codec import EncodedEpisode, encode
from sop.core.episode import Controller, Episode, Intervention, Outcome, human_runs
from sop.core.experience import Batch, Collection, StepLabels, Windows
from sop.core.policy import Conditioning
from sop.testing.contracts import require, require_equal

MakeAlgorithm = Callable[[], Algorithm]
"""Makes the algorithm under test for a robot with `CONTROL_HZ`; equal at every call."""

CONTROL_HZ = 20.0

PLAN = "P" * 30 + "H" * 25 + "P" * 15 + "H" * 20
"""Who controls an episode with two corrections."""


def sample_episode(
    controllers: str = PLAN, outcome: Outcome = Outcome.SUCCESS, *, demonstration: bool = False, seed: int = 0
) -> Episode:
    """An episode of `CONTROL_HZ` with random content.

    Args:
        controllers: one letter per step, P for the policy and H for a person.
        outcome: how it ended.
        demonstration: no policy was loaded; needs a plan of H alone.
        seed: of states, actions and images.
    """
    rng = np.random.default_rng(seed)
    steps = len(controllers)
    controller = np.array([Controller.HUMAN if who == "H" else Controller.POLICY for who in controllers], np.uint8)
    action = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
    return Episode(
        actor_id="robot-0",
        sequence=seed,
        robot="sample",
        task="sample",
        instruction="do it",
        policy_version=None if demonstration else 3,
        images={"front": rng.integers(0, 256, (steps, 8, 8, 3), np.uint8)},
        state=rng.standard_normal((steps, 2), np.float32),
        action=action,
        policy_action=np.zeros_like(action) if demonstration else action + np.float32(0.1),
        proposed=np.full(steps, not demonstration),
        controller=controller,
        monotonic_ns=np.arange(steps, dtype=np.int64) * int(1e9 / CONTROL_HZ),
        start_utc_ns=0,
        end_utc_ns=int(steps * 1e9 / CONTROL_HZ),
        outcome=outcome,
        truncated=False,
        interventions=tuple(Intervention(a, b, "operator", "deviation") for a, b in human_runs(controller)),
    )


def sample_episodes() -> list[Episode]:
    """One episode of every sort."""
    return [
        sample_episode(),
        sample_episode(outcome=Outcome.FAILURE),
        sample_episode(outcome=Outcome.ABORTED),
        sample_episode("P" * 40),
        sample_episode("P" * 40, Outcome.FAILURE),
        sample_episode("H" * 40, demonstration=True),
        sample_episode("H" * 40, Outcome.ABORTED, demonstration=True),
        sample_episode("P"),
        sample_episode("H"),
    ]


def labels_fit_their_episode(make_algorithm: MakeAlgorithm) -> None:
    """One label per step; weights are finite and not negative; windows start where something is learned from."""
    algorithm = make_algorithm()
    for episode in sample_episodes():
        labels = algorithm.annotate(episode)
        require_equal(len(labels.loss_weight), episode.num_steps, "labels of an episode")
        require(bool(np.isfinite(labels.loss_weight).all()), "a weight is not finite")
        require(bool((labels.loss_weight >= 0).all()), "a weight is negative")
        require(not bool((labels.can_start & (labels.loss_weight == 0)).any()), "a window starts without weight")


def a_segment_has_one_controller(make_algorithm: MakeAlgorithm) -> None:
    """What is learned from one segment was controlled by one: no window mixes policy and person."""
    algorithm = make_algorithm()
    for episode in sample_episodes():
        labels = algorithm.annotate(episode)
        learned = labels.loss_weight > 0
        for segment in np.unique(labels.segment[learned]):
            controllers = np.unique(episode.controller[learned & (labels.segment == segment)])
            require_equal(len(controllers), 1, f"controllers in segment {segment}")


def an_aborted_episode_teaches_nothing(make_algorithm: MakeAlgorithm) -> None:
    """No weight and no start, whoever controlled it."""
    algorithm = make_algorithm()
    for episode in sample_episodes():
        if episode.outcome is Outcome.ABORTED:
            labels = algorithm.annotate(episode)
            require(not labels.loss_weight.any() and not labels.can_start.any(), "an aborted episode has weight")


def a_stored_episode_gets_the_same_labels(make_algorithm: MakeAlgorithm) -> None:
    """Labels are deterministic, and those of an encoded episode are those of the episode."""
    algorithm, other = make_algorithm(), make_algorithm()
    for episode in sample_episodes():
        labels = algorithm.annotate(episode)
        _require_equal_labels(other.annotate(EncodedEpisode(encode(episode))), labels)


def a_saved_state_restores_the_labels(make_algorithm: MakeAlgorithm) -> None:
    """`load_state_dict(state_dict())` gives an algorithm with the same opinions."""
    algorithm, restored = make_algorithm(), make_algorithm()
    restored.load_state_dict(algorithm.state_dict())
    for episode in sample_episodes():
        _require_equal_labels(restored.annotate(episode), algorithm.annotate(episode))


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


class _SquaredAction:
    """The smallest policy with a loss."""

    def __init__(self) -> None:
        self.weight = torch.ones((), requires_grad=True)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        error: Tensor = (self.weight - torch.from_numpy(batch.action)).square().mean(dim=(1, 2))
        return error


def _require_equal_labels(actual: StepLabels, expected: StepLabels) -> None:
    for field in dataclasses.fields(StepLabels):
        np.testing.assert_array_equal(getattr(actual, field.name), getattr(expected, field.name), field.name)


ALGORITHM_RULES = (
    labels_fit_their_episode,
    a_segment_has_one_controller,
    an_aborted_episode_teaches_nothing,
    a_stored_episode_gets_the_same_labels,
    a_saved_state_restores_the_labels,
    a_loss_per_window_reaches_the_sampler,
    the_fleet_is_told_what_to_do,
)
"""What every algorithm keeps."""
