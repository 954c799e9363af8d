"""The recorder: collects the steps of one episode and closes it into an `Episode`."""

import numpy as np
import numpy.typing as npt

from sop.core.clock import Clock
from sop.core.embodiment import Embodiment, Observation
from sop.core.episode import Controller, Episode, Intervention, Outcome, PolicyTimes


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
        self._monotonic_ns: list[int] = []
        self._interventions: list[Intervention] = []
        self._start_utc_ns = self._clock.utc_ns()

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
            operator: (name, reason) when a person controlled the step.
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
        if operator is None:
            return
        marks = self._interventions
        if marks and marks[-1].stop == step:
            marks[-1] = Intervention(marks[-1].start, step + 1, marks[-1].operator, marks[-1].reason)
        else:
            marks.append(Intervention(step, step + 1, *operator))

    def finish(self, sequence: int, outcome: Outcome, *, truncated: bool) -> Episode:
        """Close the episode under the given sequence number.

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
        )
