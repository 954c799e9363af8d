"""The episode: the immutable record of one attempt of one robot at one task.

An episode holds facts only. What a learning rule thinks of it (masks, returns, advantages) is computed
from it as `StepLabels` and can be computed again.

Shapes: T steps, S state elements, A action elements, [h, w, 3] RGB images.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from sop.core.errors import InvalidRecord

SCHEMA_VERSION = 1
"""Raised when the meaning or layout of a field changes; a decoder refuses versions that it does not know."""


ACTOR_ID = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
"""Regular expression of an actor's id: it names a folder of the store."""


class Controller(IntEnum):
    """Who controlled a step."""

    POLICY = 0
    HUMAN = 1


class Outcome(StrEnum):
    """How an episode ended. A time-out is a FAILURE with `truncated`."""

    SUCCESS = "success"
    FAILURE = "failure"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Intervention:
    """A maximal run of HUMAN steps `[start, stop)`, with who took over and why."""

    start: int
    stop: int
    operator: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTimes:
    """How the acting policy came to the robot: UTC nanoseconds, each by the clock of the machine where it happened."""

    published_utc_ns: int
    """The learner handed the weights over to be published (the learner's clock)."""
    staged_utc_ns: int
    """The robot had verified it."""
    swapped_utc_ns: int
    """The robot began to act with it, perhaps many episodes ago."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyCounts:
    """What the safety gate and the deadline watch did during one episode, in control steps (inferences for `late`).

    Raises:
        InvalidRecord: a count is negative.
    """

    clamped: int = 0
    """Commands that were changed to stay within a limit."""
    nonfinite: int = 0
    """Commands that were not finite or of a wrong shape: the robot held instead."""
    stops: int = 0
    """Controlled stops; after one the gate stays closed until a person clears it."""
    late: int = 0
    """Inferences that took longer than the steps they planned for execution."""

    def __post_init__(self) -> None:
        for name in ("clamped", "nonfinite", "stops", "late"):
            if getattr(self, name) < 0:
                raise InvalidRecord(f"safety.{name}", f"must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One attempt, from reset to end. Checked on construction; arrays are made read-only.

    Row t of every array belongs to step t: the observation *before* the action, the action that was
    executed, and who decided it. One episode has one policy version (policies are swapped between
    episodes only).

    Raises:
        InvalidRecord: on construction, naming the field and the step that break the contract.
    """

    actor_id: str
    """The process that acted; matches `ACTOR_ID`."""
    sequence: int
    """0, 1, 2, ... per actor without gaps: a missing episode is visible."""
    robot: str
    """`Embodiment.name` of the robot that acted."""
    task: str
    """Task id, used for balancing."""
    instruction: str
    """The text that the policy read."""
    policy_version: int | None
    """The version that drove or proposed; None for a demonstration (no policy was loaded)."""
    images: Mapping[str, npt.NDArray[np.uint8]]
    """Camera -> [T, h, w, 3], seen before the action."""
    state: npt.NDArray[np.float32]
    """[T, S] proprioception before the action."""
    action: npt.NDArray[np.float32]
    """[T, A] the action that was executed, after the safety gate."""
    policy_action: npt.NDArray[np.float32]
    """[T, A] the policy's own proposal, before the safety gate; zeros where `proposed` is False."""
    proposed: npt.NDArray[np.bool_]
    """[T] whether the policy made a proposal at this step."""
    controller: npt.NDArray[np.uint8]
    """[T] `Controller` values."""
    monotonic_ns: npt.NDArray[np.int64]
    """[T] the actor's monotonic clock when the step's action was decided: strictly increasing."""
    start_utc_ns: int
    """UTC time of step 0 in nanoseconds since the epoch."""
    end_utc_ns: int
    """UTC time when the episode ended."""
    outcome: Outcome
    truncated: bool
    """The episode ran out of time."""
    interventions: tuple[Intervention, ...] = ()
    """One entry per maximal run of HUMAN steps, in order."""
    policy_times: PolicyTimes | None = None
    """How `policy_version` came to the robot; None for demonstrations."""
    safety: SafetyCounts | None = None
    """What the safety gate did; None in episodes of programs that did not count it."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_names(self)
        _check_arrays(self)
        _check_times(self)
        _check_interventions(self)
        for array in (*self.images.values(), *(getattr(self, name) for name in _ARRAYS)):
            array.flags.writeable = False

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.controller)

    @property
    def is_demonstration(self) -> bool:
        """Whether people controlled every step and no policy was loaded."""
        return self.policy_version is None

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras."""
        return tuple(self.images)

    def frame(self, camera: str, step: int) -> npt.NDArray[np.uint8]:
        """One image [h, w, 3], read-only.

        Raises:
            InvalidRecord: no such camera or step.
        """
        if camera not in self.images or not 0 <= step < self.num_steps:
            raise InvalidRecord(f"images.{camera}", "no such camera or step", step=step)
        frame: npt.NDArray[np.uint8] = self.images[camera][step]
        return frame


_ARRAYS: dict[str, tuple[Any, int]] = {
    "state": (np.float32, 2),
    "action": (np.float32, 2),
    "policy_action": (np.float32, 2),
    "proposed": (np.bool_, 1),
    "controller": (np.uint8, 1),
    "monotonic_ns": (np.int64, 1),
}
"""Array fields with their dtype and number of dimensions."""


def human_runs(controller: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Maximal runs `[start, stop)` of HUMAN steps, in order."""
    human = np.concatenate(([False], controller == Controller.HUMAN, [False]))
    edges = np.flatnonzero(human[1:] != human[:-1])
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _check_names(episode: Episode) -> None:
    if episode.schema_version != SCHEMA_VERSION:
        raise InvalidRecord("schema_version", f"this program reads {SCHEMA_VERSION}, got {episode.schema_version}")
    if not re.fullmatch(ACTOR_ID, episode.actor_id):
        raise InvalidRecord("actor_id", f"letters, digits, '-', '_', '.' only, not first '.', got {episode.actor_id!r}")
    if episode.sequence < 0:
        raise InvalidRecord("sequence", f"must be 0 or more, got {episode.sequence}")


def _check_arrays(episode: Episode) -> None:
    steps = len(episode.controller)
    if steps == 0:
        raise InvalidRecord("controller", "an episode needs at least one step")
    for name, (dtype, ndim) in _ARRAYS.items():
        array = getattr(episode, name)
        if array.dtype != dtype or array.ndim != ndim or len(array) != steps:
            expected = f"{np.dtype(dtype).name} with {ndim} dimension(s) and {steps} steps"
            raise InvalidRecord(name, f"must be {expected}, got {array.dtype.name} {array.shape}")
        if dtype is np.float32:
            bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
            if bad.size:
                raise InvalidRecord(name, f"not finite: {array[bad[0]]}", step=int(bad[0]))
    if episode.policy_action.shape != episode.action.shape:
        raise InvalidRecord("policy_action", f"shape {episode.policy_action.shape} is not {episode.action.shape}")
    for camera, images in episode.images.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != steps or images.shape[3] != 3:
            raise InvalidRecord(
                f"images.{camera}", f"must be uint8 [{steps}, h, w, 3], got {images.dtype.name} {images.shape}"
            )


def _check_times(episode: Episode) -> None:
    backwards = np.flatnonzero(np.diff(episode.monotonic_ns) <= 0)
    if backwards.size:
        raise InvalidRecord("monotonic_ns", "time does not run forwards", step=int(backwards[0]) + 1)
    if episode.end_utc_ns < episode.start_utc_ns:
        raise InvalidRecord("end_utc_ns", f"{episode.end_utc_ns} is before start_utc_ns {episode.start_utc_ns}")


def _check_interventions(episode: Episode) -> None:
    unknown = np.flatnonzero(episode.controller > max(Controller))
    if unknown.size:
        step = int(unknown[0])
        raise InvalidRecord("controller", f"no controller has the value {episode.controller[step]}", step=step)
    if episode.is_demonstration:
        drove = np.flatnonzero(episode.controller != Controller.HUMAN)
        if drove.size:
            raise InvalidRecord("controller", "a policy drove but policy_version is None", step=int(drove[0]))
    marked = [(mark.start, mark.stop) for mark in episode.interventions]
    runs = human_runs(episode.controller)
    if marked != runs:
        raise InvalidRecord("interventions", f"marks {marked} are not the runs of HUMAN steps {runs}")
