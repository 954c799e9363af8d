"""What is measured of a published policy: does it tell its branches apart, and what comes of it?

separation       D = E||v(+) - v(null)||^2 / E||v(null)||^2     on fixed windows, noise and flow times
told_apart       mean |a(+) - a(-)| of sampled chunks, the same noise for both
noise            mean |a(+, noise 1) - a(+, noise 2)|           an effect of the indicator below it is no use
success          successes and episodes per task, on fixed seeds that nothing else uses
"""

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch

from sop.broadcast import fetch_policy
from sop.buffer import AdaptiveSampler, BatchLoader, EpisodeIndex, Payloads
from sop.buffer.rows import EpisodeRow
from sop.config import SamplerConfig
from sop.core.embodiment import Observation
from sop.core.errors import RunError
from sop.core.experience import Batch, StepLabels, StoredEpisode, Windows
from sop.core.policy import Conditioning
from sop.evaluation import PolicyDriver, evaluate_task
from sop.policies import ConditionedPolicy, TrainablePolicy, make_policy
from sop.robots import SimulatedRobot
from sop.transport import ObjectStore

WINDOW_SEED = 90210
"""Of the fixed windows, their noise and flow times."""
SEED_OFFSET = 2**21
"""Evaluations of experiments use scenes of their own: `evaluation.first_seed` plus this, and on."""
Counts = dict[str, list[int]]
"""Task -> [successes, episodes]."""


def fixed_windows(
    rows: Sequence[EpisodeRow],
    tasks: Sequence[str],
    payloads: Payloads,
    *,
    batches: int,
    size: int,
    horizon: int,
    seed: int = WINDOW_SEED,
) -> list[Batch]:
    """Batches of windows that depend on nothing but these rows and the seed (blocking).

    Args:
        rows: the episodes of all arms alike, in an order that is the same for all arms.
        tasks: of the run.
        payloads: of the episodes.
        batches, size: number of batches, and of windows in each.
        horizon: H.
        seed: of the draws.
    """
    index = EpisodeIndex(tasks)
    for row in rows:
        index.add(row)
    sampler = AdaptiveSampler(index, SamplerConfig(min_online_starts=1), seed=seed)
    with closing(BatchLoader(index, payloads, _everything, _no_draw, horizon=horizon, depth=1)) as loader:
        return [loader.load(sampler.draw(size)) for _ in range(batches)]


def load_policy(store: ObjectStore, version: int) -> TrainablePolicy:
    """A published policy, ready to act (blocking)."""
    manifest, weights = fetch_policy(store, version)
    policy = make_policy(manifest.spec)
    policy.load(weights, version)
    return policy


def separation(policy: object, batches: Sequence[Batch], seed: int = WINDOW_SEED) -> dict[str, float]:
    """D of the positive branch as `separation`, of the negative one as `separation_negative` (blocking).

    Raises:
        RunError: the policy has no branches.
    """
    if not isinstance(policy, ConditionedPolicy):
        raise RunError(f"{type(policy).__name__} has no branches to be told apart")
    generator = torch.Generator().manual_seed(seed)
    positive = negative = size = 0.0
    for batch in batches:
        velocity = policy.branch_velocities(batch, generator)
        positive += _squares(velocity.positive - velocity.null)
        negative += _squares(velocity.negative - velocity.null)
        size += _squares(velocity.null)
    size = max(size, 1e-30)
    return {"separation": positive / size, "separation_negative": negative / size}


def chunk_effect(policy: TrainablePolicy, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean absolute differences of sampled chunks, action units: `told_apart` and `noise` (blocking)."""
    apart: list[float] = []
    noise: list[float] = []
    for batch in batches:
        seen = [
            Observation({camera: images[place] for camera, images in batch.images.items()}, batch.state[place])
            for place in range(len(batch))
        ]

        def sample(indicator: bool, draw: int, seen: list[Observation] = seen, batch: Batch = batch) -> _Actions:
            generators = [np.random.default_rng((WINDOW_SEED, draw, place)) for place in range(len(seen))]
            return policy.infer_many(seen, batch.instruction, Conditioning(advantage_indicator=indicator), generators)

        good = sample(True, 1)
        apart.append(float(np.abs(good - sample(False, 1)).mean(dtype=np.float64)))
        noise.append(float(np.abs(good - sample(True, 2)).mean(dtype=np.float64)))
    return {"told_apart": float(np.mean(apart)), "noise": float(np.mean(noise))}


def success(
    robot: SimulatedRobot,
    policy: TrainablePolicy,
    conditioning: Conditioning,
    tasks: Sequence[str],
    seeds: Sequence[int],
) -> Counts:
    """Evaluate a policy under a condition: an episode per task and seed (blocking)."""
    driver = PolicyDriver(robot, policy, conditioning)
    found = {task: evaluate_task(robot, driver, task, seeds, reset_s=0.0) for task in tasks if seeds}
    return {task: [result.successes, result.episodes] for task, result in found.items()}


def added(first: Counts, second: Counts) -> Counts:
    """Two evaluations under the same condition on different seeds, as one."""
    tasks = [*first, *(task for task in second if task not in first)]
    return {
        task: [sum(pair) for pair in zip(first.get(task, [0, 0]), second.get(task, [0, 0]), strict=True)]
        for task in tasks
    }


_Actions = npt.NDArray[np.float32]


def _everything(episode: StoredEpisode) -> StepLabels:
    """Windows are compared as a whole, whoever drove."""
    steps = episode.num_steps
    return StepLabels(
        loss_weight=np.ones(steps, np.float32),
        segment=np.zeros(steps, np.int32),
        can_start=np.ones(steps, np.bool_),
    )


def _no_draw() -> Windows:
    raise AssertionError("the windows are given")


def _squares(values: npt.NDArray[np.float32]) -> float:
    return float(np.square(values, dtype=np.float64).sum())
