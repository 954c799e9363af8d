"""Ingest: every stored episode, checked once, reaches the index exactly once.

    bus: EpisodeCommitted(key) --+
                                 +-> get -> decode and check -> ready -> drain() -> index
    store: listing per actor   --+              |
    (at start, then every        bad: quarantine/<key>.json says why; the object stays
     `list_every_s`)             unfit: screened/<key>.json says why; indexed, never sampled
                                 too many of one actor: left where they are until its quota has room

An event is a hint: lost, doubled or reordered events cost nothing, for the listing finds what is missing
and an episode that is known is skipped. Runs in a thread of its own; the learner takes what is ready between two
steps, so the order of rows is decided in one place.

An episode is known by its content hash, which covers actor and sequence number: 16 bytes are remembered of each.
Bytes that are known are not fetched again under another key.
"""

import contextlib
import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from sop.buffer.admission import Admission
from sop.buffer.ids import IdSet
from sop.buffer.quota import SPEEDUP, ActorQuota
from sop.buffer.rows import FOLDERS, RowBlock
from sop.buffer.screening import Flag, Rule, Screening, encode_note, flagged_keys
from sop.buffer.sequences import SequenceProgress, known_runs
from sop.core import layout
from sop.core.codec import EncodedEpisode, content_hash
from sop.core.errors import AlreadyExists, InvalidRecord, NotFound, StoreUnavailable
from sop.core.events import TOPIC_EPISODES, EpisodeCommitted, decode_event
from sop.core.experience import Source
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.transport import Cursor, EventBus, ObjectStore
from sop.transport.retry import Backoff, retrying

_log = logging.getLogger(__name__)
_SOURCE = {folder: source for source, folder in FOLDERS.items()}
_PAUSE_S = 1.0
"""Pause when the store does not answer; the next listing finds everything."""
_FULL_PAUSE_S = 0.05
MAX_READY_BYTES = 512 << 20
"""Encoded episodes that wait to be indexed; beyond, the background thread waits for the learner."""
MAX_REASONS = 1000
"""Refused episodes whose reason is kept in memory; the store has the notes on all."""


@dataclass(frozen=True, slots=True)
class IngestedEpisode:
    """An episode that passed all checks and waits to be indexed."""

    key: EpisodeKey
    source: Source
    encoded: EncodedEpisode
    spooled_utc_ns: int | None = None
    """When it was durable on the robot's disk; None when no event told."""
    uploaded_utc_ns: int | None = None
    """When the store had it; None when no event told."""
    flags: tuple[Flag, ...] = ()
    """Why it is not learned from: to be indexed without window starts, and kept from the learning rule."""


class Ingest:
    """Finds, fetches and checks episodes in the background.

    Args:
        store: where episodes are.
        bus: where they are announced.
        run: tasks and embodiment that an episode has to match.
        list_every_s: seconds between two listings of the store while events flow.
        clock: monotonic seconds.
        screening: limits of the rules for what is valid and yet not learned from; None takes the defaults.
        speedup: seconds of robot time per second that one actor may deliver (`ActorQuota`).
    """

    def __init__(
        self,
        store: ObjectStore,
        bus: EventBus,
        run: RunManifest,
        *,
        list_every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        screening: Screening | None = None,
        speedup: float = SPEEDUP,
    ) -> None:
        self._store = store
        self._bus = bus
        self._admission = Admission(run, screening or Screening())
        self._quota = ActorQuota(run.embodiment.control_hz, clock, speedup=speedup)
        self._list_every_s = list_every_s
        self._clock = clock
        self._cursor: Cursor | None = None
        self._known = IdSet()
        self._refused = IdSet()
        self._progress: dict[tuple[str, str], SequenceProgress] = {}
        self._with_gaps: set[tuple[str, str]] = set()
        self._ready: deque[IngestedEpisode] = deque()
        self._ready_bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._listed_at: float | None = None
        self._started_at = clock()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="ingest", daemon=True)
        self.num_quarantined = 0
        """Episodes that were refused."""
        self.quarantined: dict[str, str] = {}
        """Key -> reason of the last MAX_REASONS of them."""
        self.flagged: set[str] = set()
        """Keys of the episodes that are not learned from."""
        self.flags: Counter[Rule] = Counter()
        """How many episodes this process flagged by each rule."""
        self.over_quota: dict[str, int] = {}
        """Folder of an actor that delivers too much -> how often an episode had to wait; gone when all are in."""

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
        with self._lock:
            taken = list(self._ready)
            self._ready.clear()
            self._ready_bytes = 0
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
        """Fetch and check exactly these episodes now, in this order (blocking). Call before `start`.

        Raises:
            InvalidRecord, NotFound: one of them is damaged or gone.
        """
        taken = []
        for key in keys:
            parsed = EpisodeKey.parse(key)
            taken.append(self._fetch(parsed))
            self._mark_known(parsed)
        return taken

    def resume(self, blocks: Sequence[RowBlock]) -> None:
        """These rows are indexed already: look only for what is newer. Call before `start`; fetches nothing."""
        self.flagged.update(flagged_keys(self._store))
        if not blocks:
            return
        high, low = (np.concatenate([block.columns[name] for block in blocks]) for name in ("id_high", "id_low"))
        self._known.update(high, low)
        for name, runs in known_runs(blocks).items():
            self._progress.setdefault(name, SequenceProgress()).extend(runs)
            self._note_gaps(name)

    def everything(self) -> Iterator[IngestedEpisode]:
        """Fetch and check all that is not known yet, one by one, in the order of folder, actor and number (blocking).

        To rebuild the index; call before `start`. What is bad is quarantined.
        """
        for _ in self._listing(limited=False):
            yield from self.drain()

    def missing(self) -> dict[str, list[range]]:
        """Actor -> sequence numbers that are missing although later ones arrived; empty when nothing is lost."""
        gaps: dict[str, list[range]] = {}
        for folder, actor_id in list(self._with_gaps):
            gaps.setdefault(actor_id, []).extend(self._progress[folder, actor_id].missing())
        return {actor_id: ranges for actor_id, ranges in gaps.items() if ranges}

    def reconcile(self) -> int:
        """List the store and handle everything that is not known yet; returns how many were new (blocking)."""
        return sum(self._listing())

    def poll(self, timeout_s: float) -> int:
        """Handle announced episodes; blocks at most `timeout_s` for the first; returns how many were new."""
        found = 0
        for cursor, data in self._bus.poll(TOPIC_EPISODES, self._cursor, timeout_s):
            try:
                event = decode_event(data, EpisodeCommitted)
                found += self._handle(event.key, event)
            except InvalidRecord as error:
                _log.warning("ignored an event on %r: %s", TOPIC_EPISODES, error)
            self._cursor = cursor
        return found

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    found = self.poll(timeout_s=0.2 if self._listed_at is not None else 0)
                    if self._listing_is_due(after_events=found == 0):
                        for _ in self._listing():
                            if self._stop.is_set():
                                return
                except StoreUnavailable as error:
                    _log.warning("ingest waits for the store: %s", error)
                    self._stop.wait(_PAUSE_S)
        except BaseException as error:  # noqa: BLE001 - handed to the owner, who raises it in drain()
            self._error = error

    def _listing_is_due(self, *, after_events: bool) -> bool:
        """Events first, as long as they come: they carry times that a listing does not. Then twice as long at most."""
        if self._listed_at is None:
            return after_events or self._clock() - self._started_at >= self._list_every_s
        return self._clock() - self._listed_at >= self._list_every_s * (1 if after_events else 2)

    def _listing(self, *, limited: bool = True) -> Iterator[int]:
        """Handle what is listed and not known yet: 1 for each new episode, 0 for what is none.

        Args:
            limited: an actor over its quota is left where it is; the next listing goes on there.
        """
        for folder in _SOURCE:
            for actor_id in self._store.folders(f"{folder}/"):
                progress = self._progress.get((folder, actor_id), SequenceProgress())
                waited = self.over_quota.get(f"{folder}/{actor_id}", 0)
                for key in self._store.keys(f"{folder}/{actor_id}/", after=progress.last_key):
                    yield self._handle(key, limited=limited)
                    if self.over_quota.get(f"{folder}/{actor_id}", 0) > waited:
                        break
                else:
                    self.over_quota.pop(f"{folder}/{actor_id}", None)
        self._listed_at = self._clock()

    def _handle(self, key: str, event: EpisodeCommitted | None = None, *, limited: bool = True) -> int:
        refused = int(content_hash(key.encode()), 16)
        if refused in self._refused:
            return 0
        try:
            parsed = EpisodeKey.parse(key)
            if int(parsed.episode_id, 16) in self._known:
                self._mark_known(parsed)
                return 0
            if limited and not self._quota.take(parsed.actor_id, parsed.num_steps):
                self._note_waiting(f"{parsed.folder}/{parsed.actor_id}")
                return 0
            ingested = self._fetch(parsed, event)
        except InvalidRecord as error:
            self._quarantine(key, str(error))
            self._refused.add(refused)
            return 0
        except NotFound:
            _log.warning("%s was announced but is not in the store; the next listing will find it", key)
            return 0
        self._mark_known(parsed)
        self._hand_over(ingested)
        return 1

    def _note_waiting(self, folder: str) -> None:
        if folder not in self.over_quota:
            _log.warning("%s delivers more than a robot can: the rest waits in the store", folder)
        self.over_quota[folder] = self.over_quota.get(folder, 0) + 1

    def _hand_over(self, episode: IngestedEpisode) -> None:
        """Make an episode ready; in the background it waits for room first."""
        behind = threading.current_thread() is self._thread
        while behind and self._ready_bytes > MAX_READY_BYTES and not self._stop.is_set():
            self._stop.wait(_FULL_PAUSE_S)
        with self._lock:
            self._ready.append(episode)
            self._ready_bytes += episode.encoded.num_bytes

    def _fetch(self, key: EpisodeKey, event: EpisodeCommitted | None = None) -> IngestedEpisode:
        self._admission.check_key(key)
        span = slice(0, self._admission.max_bytes(key) + 1)
        data = retrying(
            lambda: self._store.get(str(key), span), attempts=4, backoff=Backoff(random.Random()), pause=self._stop.wait
        )
        encoded, flags = self._admission.read(key, data)
        spooled, uploaded = (None, None) if event is None else (event.spooled_utc_ns, event.committed_utc_ns)
        if flags:
            self._flag(str(key), flags)
        return IngestedEpisode(key, _SOURCE[key.folder], encoded, _time(spooled), _time(uploaded), flags)

    def _flag(self, key: str, flags: tuple[Flag, ...]) -> None:
        self._leave_note(layout.screened(key), encode_note(key, flags))
        _log.warning("not learned from: %s: %s", key, "; ".join(flag.detail for flag in flags))
        self.flagged.add(key)
        self.flags.update(flag.rule for flag in flags)

    def _leave_note(self, place: str, note: bytes) -> None:
        try:
            self._store.put(place, note)
        except (AlreadyExists, ValueError) as error:
            _log.info("no new note %s: %s", place, error)

    def _quarantine(self, key: str, reason: str) -> None:
        self._leave_note(layout.quarantine(key), msgspec.json.encode({"key": key, "reason": reason}))
        _log.warning("quarantined %s: %s", key, reason)
        self.num_quarantined += 1
        self.quarantined[key] = reason
        if len(self.quarantined) > MAX_REASONS:
            del self.quarantined[next(iter(self.quarantined))]
        with contextlib.suppress(InvalidRecord):
            self._note(EpisodeKey.parse(key))

    def _mark_known(self, key: EpisodeKey) -> None:
        self._known.add(int(key.episode_id, 16))
        self._note(key)

    def _note(self, key: EpisodeKey) -> None:
        """The listing need not come back to this number."""
        name = (key.folder, key.actor_id)
        self._progress.setdefault(name, SequenceProgress()).add(key.sequence, str(key))
        self._note_gaps(name)

    def _note_gaps(self, name: tuple[str, str]) -> None:
        if self._progress[name].has_gaps:
            self._with_gaps.add(name)
        else:
            self._with_gaps.discard(name)


def _time(utc_ns: int | None) -> int | None:
    """A time from outside, None when it is none."""
    return utc_ns if utc_ns is not None and 0 <= utc_ns < 1 << 63 else None
