"""Screening: is a valid episode fit to learn from? Rules about the recording, never about the robot's skill.

    dropped_frames       more than 5 % of the control steps are missing between the recorded ones
    frozen_camera        one second of identical images while the robot moves
    black_images         5 % of a camera's images, two at least, show nothing
    success_after_stop   the outcome says success, the safety gate says that it stopped the robot: one of them is wrong

A flagged episode keeps its place in the store and in the index, but no window of it is sampled and no learning rule
reads it: `screened/<key>.json` says why, for people who review it. A flag is an opinion: it is computed from the
episode, again after every restart, and no part of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import msgspec
import numpy as np

from sop.core import layout
from sop.core.codec import EncodedEpisode
from sop.core.embodiment import Embodiment
from sop.core.episode import Outcome
from sop.core.errors import InvalidRecord
from sop.transport import ObjectStore

MAX_LOOKED_AT = 12
"""Black images of a camera that are enough, however long the episode is."""
_OTHERS = 1
"""Images that are not black although they have as few bytes."""
MAX_NOTE_BYTES = 64 << 10
_ROWS = 8
"""Of an image every 8th row is looked at."""
_MIN_FROZEN = 5
_MIN_BLACK = 2


class Rule(StrEnum):
    """What may be wrong with a recording."""

    DROPPED_FRAMES = "dropped_frames"
    FROZEN_CAMERA = "frozen_camera"
    BLACK_IMAGES = "black_images"
    SUCCESS_AFTER_STOP = "success_after_stop"


@dataclass(frozen=True, slots=True)
class Flag:
    """One rule that an episode breaks."""

    rule: Rule
    detail: str
    """What was found, with numbers; for people."""


@dataclass(frozen=True, slots=True)
class _Note:
    key: str
    flags: tuple[Flag, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """Limits of the rules.

    Raises:
        ValueError: one is out of range.
    """

    max_dropped_share: float = 0.05
    """Largest share of control steps that may be missing; 1 allows any."""
    frozen_s: float = 1.0
    """Robot time of identical images that makes a camera frozen; `inf` allows any."""
    black_share: float = 0.05
    """Share of black images that makes a camera blind; an image is black when its mean is at most `black_level`."""
    black_level: float = 4.0
    """Mean grey value out of 255; a covered camera has 0 to 3."""

    def __post_init__(self) -> None:
        if not (0 <= self.max_dropped_share <= 1 and 0 < self.black_share <= 1):
            raise ValueError(f"screening: shares must be in [0, 1], got {self.max_dropped_share}, {self.black_share}")
        if not (self.frozen_s > 0 and self.black_level >= 0):
            raise ValueError(f"screening: limits must be positive, got {self.frozen_s}, {self.black_level}")


SIMULATED = Screening(max_dropped_share=1.0, frozen_s=math.inf)
"""For simulated robots: their world waits for a late step, and an image in which nothing moves is the same image."""


def limits_for(simulated: bool) -> Screening:
    """The limits of a run of simulated or of real robots (`RunManifest.simulated`)."""
    return SIMULATED if simulated else Screening()


def screen(episode: EncodedEpisode, embodiment: Embodiment, limits: Screening | None = None) -> tuple[Flag, ...]:
    """The rules that a valid episode breaks; () when it may be learned from.

    Decodes two images per camera of a good episode, at most `MAX_LOOKED_AT` + 1.

    Raises:
        InvalidRecord: an image cannot be decoded.
    """
    limits = limits or Screening()
    found = [_dropped(episode, embodiment, limits), _contradiction(episode)]
    for camera in episode.cameras:
        found += [_frozen(episode, camera, embodiment, limits), _black(episode, camera, limits)]
    return tuple(flag for flag in found if flag is not None)


def encode_note(key: str, flags: tuple[Flag, ...]) -> bytes:
    """JSON of the note about a flagged episode; `decode_note` is its inverse."""
    return msgspec.json.encode(_Note(key, flags))


def decode_note(data: bytes) -> tuple[str, tuple[Flag, ...]]:
    """Read a note: the key of the episode, and why it is not learned from.

    Raises:
        InvalidRecord: too large, or not a note.
    """
    if len(data) > MAX_NOTE_BYTES:
        raise InvalidRecord("screened", f"a note has at most {MAX_NOTE_BYTES} bytes")
    try:
        note = msgspec.json.decode(data, type=_Note)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRecord("screened", str(error)) from error
    return note.key, note.flags


def flagged_keys(store: ObjectStore) -> Iterator[str]:
    """Keys of the episodes that have a note, by one listing (blocking)."""
    prefix = f"{layout.SCREENED}/"
    return (key.removeprefix(prefix).removesuffix(".json") for key in store.keys(prefix))


def notes(store: ObjectStore) -> Iterator[tuple[str, tuple[Flag, ...]]]:
    """All notes, for review: key of the episode and what was found (blocking, one read each).

    Raises:
        InvalidRecord: one is damaged.
    """
    for key in store.keys(f"{layout.SCREENED}/"):
        yield decode_note(store.get(key, slice(0, MAX_NOTE_BYTES + 1)))


def _dropped(episode: EncodedEpisode, embodiment: Embodiment, limits: Screening) -> Flag | None:
    """Missing control steps. A robot that is slower as a whole (its usual interval is longer) drops none."""
    intervals_s = np.diff(episode.column("monotonic_ns")) / 1e9
    if not len(intervals_s):
        return None
    usual_s = max(1 / embodiment.control_hz, float(np.median(intervals_s)))
    missing = int(np.maximum(np.rint(intervals_s / usual_s) - 1, 0).sum())
    share = missing / (missing + episode.num_steps)
    if share <= limits.max_dropped_share:
        return None
    return Flag(Rule.DROPPED_FRAMES, f"{missing} of {missing + episode.num_steps} steps are missing ({share:.1%})")


def _contradiction(episode: EncodedEpisode) -> Flag | None:
    safety = episode.header.safety
    if safety is None or not safety.stops or episode.outcome is not Outcome.SUCCESS:
        return None
    return Flag(Rule.SUCCESS_AFTER_STOP, f"the outcome is success, yet the safety gate made {safety.stops} stops")


def _frozen(episode: EncodedEpisode, camera: str, embodiment: Embodiment, limits: Screening) -> Flag | None:
    """The first run of equal images that is long enough. Images of one length are compared, others differ."""
    least = max(limits.frozen_s * embodiment.control_hz, _MIN_FROZEN)
    changed = np.diff(episode.frame_bytes(camera)) != 0
    for step in np.flatnonzero(~changed).tolist():
        changed[step] = bytes(episode.jpeg(camera, step)) != bytes(episode.jpeg(camera, step + 1))
    edges = [0, *(np.flatnonzero(changed) + 1).tolist(), episode.num_steps]
    for first, stop in pairwise(edges):
        if stop - first >= least and np.ptp(episode.state[first:stop], axis=0).max(initial=0) > 0:
            return Flag(Rule.FROZEN_CAMERA, f"{camera}: steps {first} to {stop - 1} show one image, the robot moves")
    return None


def _black(episode: EncodedEpisode, camera: str, limits: Screening) -> Flag | None:
    """Black images are found among those with the fewest bytes: nothing compresses better."""
    needed = max(_MIN_BLACK, math.ceil(limits.black_share * episode.num_steps))
    smallest = np.argsort(episode.frame_bytes(camera), kind="stable")[: min(needed, MAX_LOOKED_AT) + _OTHERS].tolist()
    black: list[int] = []
    for place, step in enumerate(smallest):
        if episode.frame(camera, step)[::_ROWS].mean() <= limits.black_level:
            black.append(step)
        if len(black) == min(needed, MAX_LOOKED_AT):
            return Flag(
                Rule.BLACK_IMAGES, f"{camera}: {len(black)} images or more are black, as that of step {min(black)}"
            )
        if place + 1 - len(black) > _OTHERS:
            return None
    return None
