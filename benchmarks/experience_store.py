"""The scenes of `experience_scenes.py` as episodes of this project: what our side of the benchmark stores."""

import numpy as np
from experience_scenes import CAMERAS, FPS, HORIZON, INSTRUCTION, NUM_ACTIONS, NUM_STATES, SIZE, TASK, Scene

from sop.buffer import EpisodeRow
from sop.buffer.rows import FOLDERS
from sop.buffer.windows import start_runs
from sop.core import layout
from sop.core.codec import EncodedEpisode, content_hash, encode
from sop.core.embodiment import Embodiment
from sop.core.episode import Controller, Episode, Intervention, Outcome
from sop.core.experience import Source, StepLabels
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest

TASKS = (TASK, *(f"{TASK}-{number}" for number in range(1, 6)))
"""Six tasks; the scenes themselves are all of the first."""
ROBOT = "scenes"


def scene_manifest(size: int = SIZE) -> RunManifest:
    """A run of robots that record scenes with images `size` pixels high and wide."""
    names = tuple(f"action_{number}" for number in range(NUM_ACTIONS))
    return RunManifest(
        name="bench",
        created_utc_ns=0,
        embodiment=Embodiment(
            name=ROBOT,
            cameras=dict.fromkeys(CAMERAS, (size, size)),
            state_names=tuple(f"state_{number}" for number in range(NUM_STATES)),
            action_names=names,
            action_low=(-1.0,) * NUM_ACTIONS,
            action_high=(1.0,) * NUM_ACTIONS,
            hold_action=(0.0,) * NUM_ACTIONS,
            max_action_change=(None,) * NUM_ACTIONS,
            control_hz=float(FPS),
        ),
        instructions=dict.fromkeys(TASKS, (INSTRUCTION,)),
        fleet_tasks=TASKS,
        held_out_tasks=(),
        config={},
    )


def scene_object(scene: Scene, actor_id: str, sequence: int) -> tuple[str, bytes]:
    """Key and bytes of a scene that a person demonstrated. Actors that are not of the lab belong to the fleet."""
    steps = len(scene.state)
    episode = Episode(
        actor_id=actor_id,
        sequence=sequence,
        robot=ROBOT,
        task=TASK,
        instruction=INSTRUCTION,
        policy_version=None,
        images=scene.images,
        state=scene.state,
        action=scene.action,
        policy_action=np.zeros_like(scene.action),
        proposed=np.zeros(steps, np.bool_),
        controller=np.full(steps, Controller.HUMAN, np.uint8),
        monotonic_ns=np.arange(steps, dtype=np.int64) * (1_000_000_000 // FPS),
        start_utc_ns=0,
        end_utc_ns=steps * (1_000_000_000 // FPS),
        outcome=Outcome.SUCCESS,
        truncated=False,
        interventions=(Intervention(0, steps, "scenes", "demonstration"),),
    )
    data = encode(episode)
    source = Source.OFFLINE if actor_id.startswith(layout.LAB_ACTOR) else Source.ONLINE
    return str(EpisodeKey(FOLDERS[source], actor_id, sequence, steps, content_hash(data))), data


def annotate(episode: EncodedEpisode) -> StepLabels:
    """Every step counts, and a window may start at every step that has enough steps after it."""
    return _labels(episode.num_steps)


def scene_row(key: EpisodeKey) -> EpisodeRow:
    """The row of a scene, from its key alone."""
    return EpisodeRow(
        episode_id=key.episode_id,
        actor_id=key.actor_id,
        sequence=key.sequence,
        task=TASK,
        source=Source.OFFLINE if key.folder == layout.DEMONSTRATIONS else Source.ONLINE,
        num_steps=key.num_steps,
        human_steps=key.num_steps,
        num_interventions=1,
        policy_version=None,
        outcome=Outcome.SUCCESS,
        start_runs=tuple(start_runs(_labels(key.num_steps), HORIZON)),
        end_utc_ns=0,
        indexed_utc_ns=0,
    )


def _labels(steps: int) -> StepLabels:
    return StepLabels(
        loss_weight=np.ones(steps, np.float32),
        segment=np.zeros(steps, np.int32),
        can_start=np.ones(steps, np.bool_),
    )
