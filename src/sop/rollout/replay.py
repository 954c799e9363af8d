"""The offline gate of `prod`: a candidate plans for recorded episodes, in its own process, before any robot moves.

It sees what robots saw, step after step, through the same chunk playback as on a robot, for longer than any episode
lasts. What it would have done is looked at, never how well it would have worked: that only robots can tell.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from sop.core.codec import EncodedEpisode
from sop.core.embodiment import Embodiment, Observation
from sop.core.policy import Conditioning, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayLimits:
    """What a candidate must keep in the replay."""

    steps: int = 1000
    """Control steps that are replayed, through the episodes again and again."""
    margin: float = 0.5
    """How far beyond the action bounds a proposal may lie, in halves of the range: the safety gate cuts the rest off,
    but a policy that is far outside does not mean what it was trained for."""
    outside_share: float = 0.01
    """Proposals that may lie beyond the margin."""
    time_share: float = 0.5
    """Median inference time, as a share of the time that its steps take on the robot."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"replay.steps must be at least 1, got {self.steps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayVerdict:
    """What the replay has shown."""

    problem: str
    """Why the candidate stays in the lab; empty when it passes."""
    steps: int
    """Replayed until the end or the first problem that ended it."""
    outside: int
    """Proposals beyond the margin."""
    infer_s: float
    """Median time of an inference: one that the machine held up says nothing of the policy."""


def replay(
    policy: Policy,
    conditioning: Conditioning,
    episodes: Sequence[EncodedEpisode],
    limits: ReplayLimits | None = None,
    *,
    now: Callable[[], float] = time.perf_counter,
) -> ReplayVerdict:
    """Let a policy plan for what was recorded (blocking, seconds to minutes). The policy is reset once, before the
    first step: what goes wrong late in an episode goes wrong here.

    Args:
        policy: loaded with the candidate's weights.
        conditioning: from its manifest.
        episodes: recorded on robots of its kind; read through again and again.
        limits: None takes the defaults.
        now: seconds, for the inference time.

    Raises:
        ValueError: no episodes.
        InvalidRecord: an episode's frame cannot be read.
    """
    limits = limits or ReplayLimits()
    if not episodes:
        raise ValueError("a replay needs at least one recorded episode")
    policy.reset(0)
    body, horizon = policy.spec.embodiment, policy.spec.execution_horizon
    seen, outside, steps, took = 0, 0, 0, list[float]()
    while steps < limits.steps:
        episode = episodes[seen % len(episodes)]
        seen += 1
        for step in range(0, episode.num_steps, horizon):
            observation = _observation(episode, step, policy.spec.embodiment.cameras)
            began = now()
            chunk = policy.infer(observation, episode.instruction, conditioning)[:horizon]
            took.append(now() - began)
            bad = np.flatnonzero(~np.isfinite(chunk).all(axis=1))
            if bad.size:
                at = steps + int(bad[0])
                return _verdict(f"its action is not finite at step {at} of the replay", at, outside, median(took))
            outside += int(_beyond(chunk, body, limits.margin).sum())
            steps += len(chunk)
            if steps >= limits.steps:
                break
    infer_s, budget_s = median(took), limits.time_share * horizon / body.control_hz
    problem = ""
    if outside > limits.outside_share * steps:
        problem = f"{outside} of {steps} actions are far outside of the robot's bounds"
    elif infer_s > budget_s:
        problem = f"an inference takes {1e3 * infer_s:.1f} ms, {1e3 * budget_s:.1f} ms are allowed"
    return _verdict(problem, steps, outside, infer_s)


def _verdict(problem: str, steps: int, outside: int, infer_s: float) -> ReplayVerdict:
    return ReplayVerdict(problem=problem, steps=steps, outside=outside, infer_s=infer_s)


def _observation(episode: EncodedEpisode, step: int, cameras: Mapping[str, tuple[int, int]]) -> Observation:
    return Observation({camera: episode.frame(camera, step) for camera in cameras}, np.array(episode.state[step]))


def _beyond(chunk: npt.NDArray[np.float32], body: Embodiment, margin: float) -> npt.NDArray[np.bool_]:
    """[H] whether an action lies further beyond its bounds than the margin."""
    low, high = np.asarray(body.action_low, np.float32), np.asarray(body.action_high, np.float32)
    spare = margin * (high - low) / 2
    return np.asarray(((chunk < low - spare) | (chunk > high + spare)).any(axis=1))
