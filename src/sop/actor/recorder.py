"""The recorder: collects the steps of one episode and closes it into an `Episode`."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sop.core.clock import Clock
from sop.core.embodiment import Embodiment, Observation
from sop.core.episode import Controller, Episode, Intervention, Outcome, PolicyTimes, SafetyCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFacts:
    """What is known of an episode before its first step."""

    robot: str
    task: str
    instruction: str
    policy_version: int | None
    policy_times: PolicyTimes | None
    start_utc_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """One step as it will be in the episode; who keeps it does not change its arrays."""

    images: Mapping[str, npt.NDArray[np.uint8]]
    state: npt.NDArray[np.float32]
    executed: npt.NDArray[np.float32]
    proposal: npt.NDArray[np.float32] | None
    """None when there was none that is finite."""
    operator: tuple[str, str] | None
    monotonic_ns: int


class EpisodeRecorder:
    """Holds the steps of the running episode in memory. Used by the control loop; never does I/O.

    Args:
        actor_id: who records.
        embodiment: of the robot.
        clock: stamps steps and ends.
    """

    def __init__(self, actor_id: str, embodiment: Embodiment, clock: Clock) -> None:
        self._actor_id = actor_id
        self._embodiment = embodiment
        self._clock = clock
        self.begin("", "", None)

    def begin(
        self, task: str, instruction: str, policy_version: int | None, policy_times: PolicyTimes | None = None
    ) -> None:
        """Start an episode; what was recorded before and not closed is forgotten."""
        self._task = task
        self._instruction = instruction
        self._policy_version = policy_version
        self._policy_times = policy_times
        self._images: dict[str, list[npt.NDArray[np.uint8]]] = {camera: [] for camera in self._embodiment.cameras}
        self._states: list[npt.NDArray[np.float32]] = []
        self._actions: list[npt.NDArray[np.float32]] = []
        self._proposals: list[npt.NDArray[np.float32] | None] = []
        self._controllers: list[Controller] = []
        self._operators: list[tuple[str, str] | None] = []
        self._monotonic_ns: list[int] = []
        self._interventions: list[Intervention] = []
        self._start_utc_ns = self._clock.utc_ns()

    @property
    def facts(self) -> EpisodeFacts:
        """Of the running episode."""
        return EpisodeFacts(
            robot=self._embodiment.name,
            task=self._task,
            instruction=self._instruction,
            policy_version=self._policy_version,
            policy_times=self._policy_times,
            start_utc_ns=self._start_utc_ns,
        )

    @property
    def num_steps(self) -> int:
        """Steps recorded since `begin`."""
        return len(self._controllers)

    def append(
        self,
        observation: Observation,
        executed: npt.NDArray[np.float32],
        proposal: npt.NDArray[np.float32] | None,
        operator: tuple[str, str] | None,
    ) -> None:
        """Record one step: what was seen, what was executed, what the policy proposed.

        Args:
            observation: before the action.
            executed: [A] after the safety gate.
            proposal: [A] before the gate; None when no policy runs. A proposal that is not finite is
                recorded as none (the gate has held the robot).
            operator: (name, reason) when a person controlled the step; the last reason of a run of such steps
                is the one that its mark keeps.
        """
        step = self.num_steps
        for camera, images in self._images.items():
            images.append(observation.images[camera])
        self._states.append(np.array(observation.state, np.float32))
        self._actions.append(np.array(executed, np.float32))
        finite = proposal is not None and bool(np.isfinite(proposal).all())
        self._proposals.append(np.array(proposal, np.float32) if finite else None)
        self._monotonic_ns.append(self._clock.monotonic_ns())
        self._controllers.append(Controller.POLICY if operator is None else Controller.HUMAN)
        self._operators.append(operator)
        if operator is None:
            return
        marks = self._interventions
        if marks and marks[-1].stop == step:
            marks[-1] = Intervention(marks[-1].start, step + 1, *operator)
        else:
            marks.append(Intervention(step, step + 1, *operator))

    def executed(self, action: npt.NDArray[np.float32]) -> None:
        """The last step's action [A] as the robot itself says that it was executed."""
        self._actions[-1] = np.array(action, np.float32)

    def last_step(self) -> RecordedStep:
        """The step that was recorded last."""
        return RecordedStep(
            images={camera: images[-1] for camera, images in self._images.items()},
            state=self._states[-1],
            executed=self._actions[-1],
            proposal=self._proposals[-1],
            operator=self._operators[-1],
            monotonic_ns=self._monotonic_ns[-1],
        )

    def finish(
        self, sequence: int, outcome: Outcome, *, truncated: bool, safety: SafetyCounts | None = None
    ) -> Episode:
        """Close the episode under the given sequence number, with what the safety gate counted.

        Raises:
            InvalidRecord: what was recorded is not a valid episode.
        """
        zero = np.zeros(self._embodiment.num_actions, np.float32)
        proposals = [zero if proposal is None else proposal for proposal in self._proposals]
        return Episode(
            actor_id=self._actor_id,
            sequence=sequence,
            robot=self._embodiment.name,
            task=self._task,
            instruction=self._instruction,
            policy_version=self._policy_version,
            images={camera: np.stack(images) for camera, images in self._images.items()},
            state=np.stack(self._states),
            action=np.stack(self._actions),
            policy_action=np.stack(proposals),
            proposed=np.asarray([proposal is not None for proposal in self._proposals], np.bool_),
            controller=np.asarray(self._controllers, np.uint8),
            monotonic_ns=np.asarray(self._monotonic_ns, np.int64),
            start_utc_ns=self._start_utc_ns,
            end_utc_ns=max(self._clock.utc_ns(), self._start_utc_ns),
            outcome=outcome,
            truncated=truncated,
            interventions=tuple(self._interventions),
            policy_times=self._policy_times,
            safety=safety,
        )
