"""Who may take over from the policy, and what a stand-in for a person is allowed to know."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from sop.core.embodiment import Observation

Action = npt.NDArray[np.float32]
"""[A] one action, in action units."""


class Operator(Protocol):
    """May take over at any step. The control loop's use of it:

    operator.reset(task, seed)                                   # before the first step
    correction = operator.correct(observation, proposed)         # at every control step, in order
    action = proposed if correction is None else correction
    mark(operator.name, operator.reason)                         # where an intervention begins
    """

    @property
    def name(self) -> str:
        """Who it is; goes into `Intervention.operator`."""
        ...

    @property
    def reason(self) -> str:
        """Why it has control now; goes into `Intervention.reason`. Empty while the policy drives."""
        ...

    def reset(self, task: str, seed: int) -> None:
        """An episode begins: forget the last one. An equal seed makes an equal operator."""
        ...

    def correct(self, observation: Observation, proposed: Action | None) -> Action | None:
        """Decide who drives this step. Called once per control step, must not block.

        Args:
            observation: what the robot sees before the action.
            proposed: the policy's action [A] for this step, None when it has none.

        Returns:
            The person's action [A], or None: the policy drives.
        """
        ...


class Oracle(Protocol):
    """What a stand-in knows and a person sees: every simulated robot is one (`sop.robots.base.SimulatedRobot`)."""

    @property
    def num_displacements(self) -> int:
        """D: the first D action elements move the hand, the others drive grippers (there may be none)."""
        ...

    def expert_action(self) -> Action:
        """What a skilled person does in the current state, [A]."""
        ...

    def progress(self) -> float:
        """How far the task has got; larger is better."""
        ...


class Nobody:
    """Never takes over: the policy is on its own."""

    name = "nobody"
    reason = ""

    def reset(self, task: str, seed: int) -> None:
        """Nothing to forget."""

    def correct(self, observation: Observation, proposed: Action | None) -> Action | None:  # noqa: ARG002
        """Always None."""
        return None
