"""Episodes for the load generator to replay: recorded once from the toy robot, as large as real ones."""

from pathlib import Path

import numpy as np

from sop.actor import EpisodeRecorder
from sop.core.codec import encode
from sop.core.embodiment import Observation
from sop.core.episode import Episode, Outcome
from sop.robots import DEPLOYMENT, make_robot
from sop.runs import Run
from sop.testing.clock import FakeClock


def make_recordings(folder: Path, run: Run, *, number: int, num_steps: int) -> None:
    """Record `number` episodes of about `num_steps` steps into a folder (blocking)."""
    folder.mkdir(parents=True)
    for index in range(number):
        episode = _record(run, run.manifest.fleet_tasks[index % len(run.manifest.fleet_tasks)], index, num_steps)
        (folder / f"{index:03d}.arrow").write_bytes(encode(episode))


def _record(run: Run, task: str, seed: int, num_steps: int) -> Episode:
    """The policy wanders about and finds nothing; for the last steps a person takes over and finishes. The light
    flickers: a camera that shows one image while the robot moves would be taken for a broken one."""
    robot, clock, rng = make_robot(run.config.robot), FakeClock(), np.random.default_rng(seed)
    body = robot.embodiment
    recorder = EpisodeRecorder("recording", body, clock)
    recorder.begin(task, run.manifest.instructions[task][0], 0)
    raw, _ = robot.reset(seed=seed, options={"task": task, "scene": DEPLOYMENT, "time_factor": 100.0})
    success, step = False, 0
    while not success and step < 2 * num_steps:
        images = {camera: np.minimum(image, 252) + np.uint8(step % 4) for camera, image in raw["images"].items()}
        observation = Observation(images, raw["state"])
        proposal = rng.uniform(-0.3, 0.3, body.num_actions).astype(np.float32)
        human = step >= num_steps - 15
        action = robot.expert_action() if human else proposal
        recorder.append(observation, action, proposal, ("stand-in", "stall") if human else None)
        raw, _, success, _, _ = robot.step(action)
        clock.advance(1 / body.control_hz)
        step += 1
    robot.close()
    return recorder.finish(0, Outcome.SUCCESS if success else Outcome.FAILURE, truncated=not success)
