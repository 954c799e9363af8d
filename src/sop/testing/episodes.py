"""Episodes and robots for tests: small, valid, and with every field chosen by the test that needs it."""

from typing import Any

import numpy as np

from sop.core.embodiment import Embodiment
from sop.core.episode import Controller, Episode, Intervention, Outcome, human_runs

TOY_BODY = Embodiment(
    name="test-robot",
    cameras={"front": (16, 16)},
    state_names=("x", "y"),
    action_names=("dx", "gripper"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    hold_action=(0.0, None),
    max_action_change=(0.5, None),
    control_hz=10.0,
)
"""Two actions: a displacement that can be stopped, a gripper that keeps its place."""


def make_episode(controllers: str = "pppp", **changes: Any) -> Episode:
    """A valid episode with one step per letter: `p` the policy drove, `h` a person did.

    Values are functions of the step, so that a test can recognise them: `state[t] = (t, -t)`,
    `action[t] = (t / 100, 1)`; frame t is grey level `5 t`.

    Args:
        controllers: who drove each step; all `h` together with `policy_version=None` is a demonstration.
        changes: any other field of `Episode`.
    """
    steps = len(controllers)
    controller = np.asarray([Controller.HUMAN if who == "h" else Controller.POLICY for who in controllers], np.uint8)
    time = np.arange(steps, dtype=np.float32)
    fields: dict[str, Any] = {
        "actor_id": "robot-0",
        "sequence": 0,
        "robot": TOY_BODY.name,
        "task": "push",
        "instruction": "push the block",
        "policy_version": 3,
        "images": {
            "front": np.broadcast_to((5 * time[:, None, None, None]).astype(np.uint8), (steps, 16, 16, 3)).copy()
        },
        "state": np.stack([time, -time], axis=1),
        "action": np.stack([time / 100, np.ones(steps, np.float32)], axis=1),
        "policy_action": np.stack([-time / 100, np.ones(steps, np.float32)], axis=1),
        "proposed": np.ones(steps, np.bool_),
        "controller": controller,
        "monotonic_ns": np.arange(steps, dtype=np.int64) * 100_000_000,
        "start_utc_ns": 1_700_000_000_000_000_000,
        "end_utc_ns": 1_700_000_001_000_000_000,
        "outcome": Outcome.SUCCESS,
        "truncated": False,
        "interventions": tuple(Intervention(a, b, "tester", "because") for a, b in human_runs(controller)),
    }
    return Episode(**(fields | changes))
