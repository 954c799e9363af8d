"""Ingest: every stored episode, checked once, reaches the index exactly once.

    bus: EpisodeCommitted(key) --+
                                 +-> get -> decode and check -> ready -> drain() -> index
    store: listing per actor   --+              |
    (at start, then every        bad: quarantine/<key>.json says why; the object stays
     `list_every_s`)

An event is a hint: lost, doubled or reordered events cost nothing, for the listing finds what is missing
and a key that is known is skipped. Runs in a thread of its own; the learner takes what is ready between two
steps, so the order of rows is decided in one place.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from sop.core import layout
from sop.core.codec import EncodedEpisode, content_hash, decode
from sop.core.episode import Episode
from sop.core.errors import AlreadyExists, InvalidRecord, NotFound, StoreUnavailable
from sop.core.events import TOPIC_EPISODES, EpisodeCommitted, decode_event
from sop.core.experience import Source
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.transport import Cursor, EventBus, ObjectStore
from sop.transport.retry import Backoff, get_retrying

_log = logging.getLogger(__name__)
_SOURCE = {layout.EPISODES: Source.ONLINE, layout.DEMONSTRATIONS: Source.OFFLINE}
_PAUSE_S = 1.0
"""Pause when the store does not answer; the next listing finds everything."""


@dataclass(frozen=True, slots=True)
class IngestedEpisode:
    """An episode that passed all checks and waits to be indexed."""

    key: EpisodeKey
    source: Source
    encoded: EncodedEpisode


class Ingest:
    """Finds, fetches and checks episodes in the background.

    Args:
        store: where episodes are.
        bus: where they are announced.
        run: tasks and embodiment that an episode has to match.
        list_every_s: seconds between two listings of the store while events flow.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: ObjectStore,
        bus: EventBus,
        run: RunManifest,
        *,
        list_every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._bus = bus
        self._run = run
        self._list_every_s = list_every_s
        self._clock = clock
        self._cursor: Cursor | None = None
        self._known: set[str] = set()
        self._progress: dict[tuple[str, str], SequenceProgress] = {}
        self._ready: queue.SimpleQueue[IngestedEpisode] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._listed_at: float | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="ingest", daemon=True)
        self.quarantined: dict[str, str] = {}
        """Key -> reason of every episode that was refused."""

    def start(self) -> None:
        """Begin to work in the background."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; idempotent. What is ready can still be drained."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def drain(self) -> list[IngestedEpisode]:
        """Take what is ready, never blocks.

        Raises:
            Exception: whatever ended the background thread.
        """
        if self._error is not None:
            raise self._error
        taken = []
        while True:
            try:
                taken.append(self._ready.get_nowait())
            except queue.Empty:
                return taken

    def finish(self) -> list[IngestedEpisode]:
        """Stop the thread, list the store a last time (blocking), and take everything that is ready.

        Raises:
            StoreUnavailable: the store does not answer; what was ready is still there for `drain`.
        """
        self.close()
        self.reconcile()
        return self.drain()

    def take(self, keys: Iterable[str]) -> list[IngestedEpisode]:
        """Fetch and check exactly these episodes now, in this order (blocking): resuming from a checkpoint.

        Raises:
            InvalidRecord, NotFound: an episode of the checkpoint is damaged or gone.
        """
        taken = []
        for key in keys:
            parsed = EpisodeKey.parse(key)
            taken.append(self._fetch(parsed))
            self._mark_known(parsed)
        return taken

    def missing(self) -> dict[str, list[int]]:
        """Actor -> sequence numbers that are missing although later ones arrived; empty when nothing is lost."""
        gaps = {actor_id: progress.missing() for (_, actor_id), progress in list(self._progress.items())}
        return {actor_id: numbers for actor_id, numbers in gaps.items() if numbers}

    def reconcile(self) -> int:
        """List the store and handle everything that is not known yet; returns how many were new (blocking)."""
        found = 0
        for folder in _SOURCE:
            for actor_id in list(actors(self._store, folder)):
                progress = self._progress.get((folder, actor_id), SequenceProgress())
                for key in self._store.keys(f"{folder}/{actor_id}/", after=progress.last_key):
                    found += self._handle(key)
        self._listed_at = self._clock()
        return found

    def poll(self, timeout_s: float) -> int:
        """Handle announced episodes; blocks at most `timeout_s` for the first; returns how many were new."""
        found = 0
        for cursor, data in self._bus.poll(TOPIC_EPISODES, self._cursor, timeout_s):
            try:
                found += self._handle(decode_event(data, EpisodeCommitted).key)
            except InvalidRecord as error:
                _log.warning("ignored an event on %r: %s", TOPIC_EPISODES, error)
            self._cursor = cursor
        return found

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    if self._listed_at is None or self._clock() - self._listed_at >= self._list_every_s:
                        self.reconcile()
                    self.poll(timeout_s=0.2)
                except StoreUnavailable as error:
                    _log.warning("ingest waits for the store: %s", error)
                    self._stop.wait(_PAUSE_S)
        except BaseException as error:  # noqa: BLE001 - handed to the owner, who raises it in drain()
            self._error = error

    def _handle(self, key: str) -> int:
        if key in self._known:
            return 0
        try:
            parsed = EpisodeKey.parse(key)
            ingested = self._fetch(parsed)
        except InvalidRecord as error:
            self._quarantine(key, str(error))
            return 0
        except NotFound:
            _log.warning("%s was announced but is not in the store; the next listing will find it", key)
            return 0
        self._mark_known(parsed)
        self._ready.put(ingested)
        return 1

    def _fetch(self, key: EpisodeKey) -> IngestedEpisode:
        data = get_retrying(self._store, str(key), attempts=4, backoff=Backoff(random.Random()), pause=self._stop.wait)
        if content_hash(data) != key.episode_id:
            raise InvalidRecord("episode_id", f"the bytes hash to {content_hash(data)}, the key says {key.episode_id}")
        episode = decode(data)
        self._check(key, episode)
        return IngestedEpisode(key, _SOURCE[key.folder], EncodedEpisode(data))

    def _check(self, key: EpisodeKey, episode: Episode) -> None:
        """Does the episode belong to this run, and is it the one that its key names?"""
        body = self._run.embodiment
        facts = {
            "actor_id": (episode.actor_id, key.actor_id),
            "sequence": (episode.sequence, key.sequence),
            "controller": (episode.num_steps, key.num_steps),
            "robot": (episode.robot, body.name),
            "state": (episode.state.shape[1], body.num_states),
            "action": (episode.action.shape[1], body.num_actions),
            "images": (
                {camera: images.shape[1:3] for camera, images in episode.images.items()},
                {camera: tuple(size) for camera, size in body.cameras.items()},
            ),
        }
        for field, (got, expected) in facts.items():
            if got != expected:
                raise InvalidRecord(field, f"got {got}, expected {expected}")
        if episode.task not in self._run.instructions:
            raise InvalidRecord("task", f"{episode.task!r} is not a task of this run")

    def _quarantine(self, key: str, reason: str) -> None:
        try:
            self._store.put(layout.quarantine(key), msgspec.json.encode({"key": key, "reason": reason}))
        except (AlreadyExists, ValueError) as error:
            _log.info("no new quarantine note for %s: %s", key, error)
        _log.warning("quarantined %s: %s", key, reason)
        self.quarantined[key] = reason
        try:
            self._mark_known(EpisodeKey.parse(key))
        except InvalidRecord:
            self._known.add(key)

    def _mark_known(self, key: EpisodeKey) -> None:
        self._known.add(str(key))
        self._progress.setdefault((key.folder, key.actor_id), SequenceProgress()).add(key.sequence, str(key))


class SequenceProgress:
    """Up to where the sequence numbers of one actor are complete."""

    def __init__(self) -> None:
        self.next_sequence = 0
        """First sequence number that is missing."""
        self.last_key: str | None = None
        """Key of the episode before it; listings start after it."""
        self._early: dict[int, str] = {}

    def add(self, sequence: int, key: str) -> None:
        """Note that an episode is known; idempotent, any order."""
        if sequence >= self.next_sequence:
            self._early[sequence] = key
        while self.next_sequence in self._early:
            self.last_key = self._early.pop(self.next_sequence)
            self.next_sequence += 1

    def missing(self) -> list[int]:
        """Sequence numbers that are missing although later ones are known."""
        return [
            number for number in range(self.next_sequence, max(self._early, default=0)) if number not in self._early
        ]


def actors(store: ObjectStore, folder: str) -> Iterator[str]:
    """Ids of the actors that have episodes in a folder, one short listing each."""
    after: str | None = None
    while True:
        key = next(iter(store.keys(f"{folder}/", after=after)), None)
        if key is None:
            return
        actor_id = key.split("/")[1]
        yield actor_id
        after = f"{folder}/{actor_id}0"  # '0' is the character after '/': skips all keys of this actor
