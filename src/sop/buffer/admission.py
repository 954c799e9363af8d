"""Admission: what bytes from the store have to be before the learner believes them.

    size by the key and the robot -> hash -> container and header -> is it what its key and the run say?
      -> every number -> every image, one at a time -> screening

Nothing is allocated by what the bytes claim: the number of steps is checked against the key, the size of an image
against the robot's camera, and one image is held at a time, however long the episode is.
"""

import numpy as np
import numpy.typing as npt

from sop.buffer.screening import Flag, Screening, screen
from sop.core import layout
from sop.core.codec import MAX_EPISODE_BYTES, EncodedEpisode, content_hash
from sop.core.episode import Episode
from sop.core.errors import InvalidRecord
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest

_MAX_VERSION = 10**8
"""A version's number has 8 digits in the store."""
_SPARE_BYTES = 1 << 20
"""Header, schema and footer of a file: far more than any has."""
_STEP_BYTES = 4096
"""Of every image of a step, beyond twice its pixels, and of its numbers: a JPEG of noise is a little above."""
_BOUNDS_SLACK = 1e-3
"""Share of the range by which an executed action may leave its bounds: rounding, not another unit."""


class Admission:
    """Checks episodes of one run. Any thread.

    Args:
        run: tasks and embodiment that an episode has to match.
        screening: limits of the rules for what is valid and yet not to be learned from.
    """

    def __init__(self, run: RunManifest, screening: Screening) -> None:
        self._run = run
        self._screening = screening
        body = run.embodiment
        self._low = np.asarray(body.action_low)
        self._high = np.asarray(body.action_high)
        self._slack = _BOUNDS_SLACK * (self._high - self._low)
        pixels = sum(height * width * 3 for height, width in body.cameras.values())
        self._step_bytes = 2 * pixels + _STEP_BYTES * (1 + len(body.cameras))

    def max_bytes(self, key: EpisodeKey) -> int:
        """What the episode under a key can have at most: larger objects are refused without reading them whole."""
        return min(MAX_EPISODE_BYTES, _SPARE_BYTES + key.num_steps * self._step_bytes)

    def check_key(self, key: EpisodeKey) -> None:
        """Refuse by the key alone.

        Raises:
            InvalidRecord: an actor of before the fleet in the fleet's folder.
        """
        if key.folder == layout.EPISODES and layout.before_fleet(key.actor_id):
            raise InvalidRecord("actor_id", f"{key.actor_id} recorded before the fleet started: not in {key.folder}/")

    def read(self, key: EpisodeKey, data: bytes) -> tuple[EncodedEpisode, tuple[Flag, ...]]:
        """Check the bytes under a key; blocks for the decoding of every image.

        Args:
            key: where they were found.
            data: at most `max_bytes(key) + 1` of them.

        Returns:
            The episode, and why it is not to be learned from: () when it is.

        Raises:
            InvalidRecord: names the field and, where there is one, the step.
        """
        if len(data) > self.max_bytes(key):
            raise InvalidRecord("episode", f"more than {self.max_bytes(key)} bytes for {key.num_steps} steps")
        if (found := content_hash(data)) != key.episode_id:
            raise InvalidRecord("episode_id", f"the bytes hash to {found}, the key says {key.episode_id}")
        encoded = EncodedEpisode(data, trusted=False)
        if encoded.num_steps != key.num_steps:
            raise InvalidRecord("controller", f"{encoded.num_steps} steps, the key says {key.num_steps}")
        episode = encoded.without_images()
        self._check_facts(key, episode)
        self._check_numbers(episode)
        self._check_images(encoded)
        return encoded, screen(encoded, self._run.embodiment, self._screening)

    def _check_facts(self, key: EpisodeKey, episode: Episode) -> None:
        """Does the episode belong to this run, and is it the one that its key names?"""
        facts = {
            "actor_id": (episode.actor_id, key.actor_id),
            "sequence": (episode.sequence, key.sequence),
            "robot": (episode.robot, self._run.embodiment.name),
            "state": (episode.state.shape[1], self._run.embodiment.num_states),
            "action": (episode.action.shape[1], self._run.embodiment.num_actions),
        }
        for field, (got, expected) in facts.items():
            if got != expected:
                raise InvalidRecord(field, f"got {got}, expected {expected}")
        if episode.task not in self._run.instructions:
            raise InvalidRecord("task", f"{episode.task!r} is not a task of this run")
        if episode.instruction not in self._run.instructions[episode.task]:
            raise InvalidRecord("instruction", f"{episode.instruction[:200]!r} is no phrasing of task {episode.task!r}")

    def _check_numbers(self, episode: Episode) -> None:
        if episode.policy_version is not None and not 0 <= episode.policy_version < _MAX_VERSION:
            raise InvalidRecord("policy_version", f"{episode.policy_version} is not a version")
        if not 0 <= episode.end_utc_ns < 1 << 63:
            raise InvalidRecord("end_utc_ns", f"{episode.end_utc_ns} is not a time in nanoseconds")
        outside = (episode.action < self._low - self._slack) | (episode.action > self._high + self._slack)
        if outside.any():
            step, place = (int(number[0]) for number in np.nonzero(outside))
            name = self._run.embodiment.action_names[place]
            low, high = self._low[place], self._high[place]
            raise InvalidRecord(
                "action",
                f"{name} is {episode.action[step, place]:g}, the robot takes {low:g} to {high:g}: another unit, or not "
                "what was executed",
                step=step,
            )

    def _check_images(self, encoded: EncodedEpisode) -> None:
        cameras = {camera: tuple(size) for camera, size in self._run.embodiment.cameras.items()}
        if set(encoded.cameras) != set(cameras):
            raise InvalidRecord("images", f"cameras {sorted(encoded.cameras)}, expected {sorted(cameras)}")
        for camera, size in cameras.items():
            image = _image(size)
            for step in range(encoded.num_steps):
                encoded.frame_into(camera, step, image)


def _image(size: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Room for one image [h, w, 3], 16 bytes beyond a multiple of 64: JPEGs decode a quarter faster into such a place
    than to a multiple of 64, where a small array lies by chance (measured: 5.2 against 6.9 ms for 200 images)."""
    num_bytes = size[0] * size[1] * 3
    room = np.empty(num_bytes + 64, np.uint8)
    start = (16 - room.ctypes.data) % 64
    return room[start : start + num_bytes].reshape(*size, 3)
