"""Encoded episodes at hand: mapped from this machine's disk, or fetched once and kept within a bound.

    store is a directory here      nothing is kept twice: files are mapped, the page cache serves     LocalPayloads
    store is somewhere else        fetched, checked, kept as files under the run's folder             CachedPayloads
    no disk to spare               fetched, checked, kept in memory                                   PayloadCache

Ingest has the bytes in hand anyway and gives them away with `put`, so a fresh episode is not fetched twice.
"""

import logging
import mmap
import os
import random
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock
from typing import Protocol

from sop.buffer.disk_cache import DiskCache
from sop.core.codec import MAX_EPISODE_BYTES, EncodedEpisode, content_hash
from sop.core.errors import InvalidRecord, NotFound, StoreUnavailable
from sop.core.layout import EpisodeKey
from sop.transport import DirectoryStore, ObjectStore
from sop.transport.base import check_key
from sop.transport.retry import Answer, Backoff, get_retrying, retrying

_log = logging.getLogger(__name__)
MAX_OPEN_FILES = 400
"""Episodes that a process keeps mapped; each costs a file descriptor, of which 1024 are common."""
ATTEMPTS = 8
"""Times that a store which is away is asked for an episode, within 6 to 13 s."""
MAX_UNWRITTEN_BYTES = 256 << 20
"""Of what `put` was given and is not on disk yet; more is dropped and fetched again when a window needs it."""


class Payloads(Protocol):
    """Where the batch loader gets episodes from; thread-safe. Its use of it:

    payloads.put(key, encoded)                         # ingest has it in hand
    payloads.get(key).frame("front", 7)                # a thread of the learner decodes
    with payloads.holding(keys) as paths: ...          # worker processes open the files
    """

    @property
    def on_disk(self) -> bool:
        """Whether there are files that another process can open."""
        ...

    def get(self, key: str) -> EncodedEpisode:
        """The episode under `key`; blocks for a fetch when it is not at hand.

        Raises:
            InvalidRecord: it is not what it was at ingest.
            NotFound, StoreUnavailable: the store does not give it.
        """
        ...

    def put(self, key: str, episode: EncodedEpisode) -> None:
        """Take an episode that passed all checks. Never blocks, idempotent; keeping it is not promised."""
        ...

    def holding(self, keys: Sequence[str]) -> AbstractContextManager[Sequence[Path]]:
        """Files of these episodes, in order, which stay inside the `with`. Blocks for fetches; raises like `get`."""
        ...

    def close(self) -> None:
        """Finish what is being written. Idempotent."""
        ...


def open_payloads(store: ObjectStore, folder: Path, *, memory_bytes: int, disk_bytes: int) -> Payloads:
    """The right `Payloads` for a store.

    Args:
        store: holds the episodes.
        folder: of the cache on disk; made when it is needed.
        memory_bytes: bound of what is kept in memory, used when `disk_bytes` is 0.
        disk_bytes: bound of the cache on disk; 0 keeps none. A directory store needs neither.
    """
    if isinstance(store, DirectoryStore):
        return LocalPayloads(store)

    def fetch(key: str) -> bytes:
        data = get_retrying(store, key, attempts=ATTEMPTS, backoff=Backoff(random.Random()), pause=time.sleep)
        if content_hash(data) != EpisodeKey.parse(key).episode_id:
            raise InvalidRecord("episode_id", f"the store gives back other bytes for {key} than at ingest")
        return data

    return CachedPayloads(fetch, DiskCache(folder, disk_bytes)) if disk_bytes else PayloadCache(fetch, memory_bytes)


class PayloadCache:
    """`Payloads` in memory: encoded episodes, least recently used out first, at most `max_bytes`.

    Args:
        fetch: reads the bytes of an episode (blocking); the bytes passed `decode` at ingest.
        max_bytes: bound of the encoded bytes that are kept; one episode is kept whatever its size.
    """

    on_disk = False

    def __init__(self, fetch: Callable[[str], bytes], max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self._fetch = fetch
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[str, EncodedEpisode] = OrderedDict()
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Encoded bytes that are kept now."""
        return self._num_bytes

    def get(self, key: str) -> EncodedEpisode:
        """See `Payloads.get`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry
        entry = EncodedEpisode(self._fetch(key))
        self.put(key, entry)
        return entry

    def put(self, key: str, episode: EncodedEpisode) -> None:
        """See `Payloads.put`."""
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = episode
            self._num_bytes += episode.num_bytes
            while self._num_bytes > self._max_bytes and len(self._entries) > 1:
                _, oldest = self._entries.popitem(last=False)
                self._num_bytes -= oldest.num_bytes

    def holding(self, keys: Sequence[str]) -> AbstractContextManager[Sequence[Path]]:
        """There are no files.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{len(keys)} episodes are kept in memory only: use a cache on disk")

    def close(self) -> None:
        """Nothing to finish."""


class LocalPayloads:
    """`Payloads` of a store that is a directory of this machine: nothing is copied, nothing is kept.

    The bytes were hashed at ingest and are not hashed again: reading a whole episode to show one window of it
    costs a hundred times the window. Every access checks its own bounds instead (see `EncodedEpisode`).

    Args:
        store: holds the episodes. When its folder is not there (unmounted, moved), whoever asks waits.
        pause: waits for so many seconds.
    """

    on_disk = True

    def __init__(self, store: DirectoryStore, pause: Callable[[float], object] = time.sleep) -> None:
        self._store = store
        self._pause = pause
        self._files = OpenFiles()

    def get(self, key: str) -> EncodedEpisode:
        """See `Payloads.get`; never fetches."""
        path = self._path(key)

        def read() -> EncodedEpisode:
            try:
                return self._files.get(path)
            except NotFound:
                self._store.require_root()
                raise

        return self._patiently(read)

    def put(self, key: str, episode: EncodedEpisode) -> None:
        """Nothing: the file is there."""

    @contextmanager
    def holding(self, keys: Sequence[str]) -> Iterator[Sequence[Path]]:
        """See `Payloads.holding`; immediate while the store is there. Whether files are, is found by who opens them."""
        self._patiently(self._store.require_root)
        yield [self._path(key) for key in keys]

    def close(self) -> None:
        """Nothing to finish."""

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._store.root / key

    def _patiently(self, read: Callable[[], Answer]) -> Answer:
        return retrying(read, attempts=ATTEMPTS, backoff=Backoff(random.Random()), pause=self._pause)


class CachedPayloads:
    """`Payloads` of a store that is somewhere else: what was fetched once is a file of `disk`.

    Args:
        fetch: reads the bytes of an episode (blocking) and checks that they are what its key says.
        disk: keeps them.
    """

    on_disk = True

    def __init__(self, fetch: Callable[[str], bytes], disk: DiskCache) -> None:
        self._fetch = fetch
        self._disk = disk
        self._files = OpenFiles()
        self._unwritten: dict[str, EncodedEpisode] = {}
        self._unwritten_bytes = 0
        self._lock = Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="payload-writer")

    def get(self, key: str) -> EncodedEpisode:
        """See `Payloads.get`."""
        with self._lock:
            episode = self._unwritten.get(key)
        if episode is not None:
            return episode
        with self.holding((key,)) as (path,):
            return self._files.get(path)

    def put(self, key: str, episode: EncodedEpisode) -> None:
        """See `Payloads.put`; a thread of its own writes."""
        with self._lock:
            room = self._unwritten_bytes + episode.num_bytes <= MAX_UNWRITTEN_BYTES
            if key in self._unwritten or not room or EpisodeKey.parse(key).episode_id in self._disk:
                return
            self._unwritten[key] = episode
            self._unwritten_bytes += episode.num_bytes
        self._writer.submit(self._write, key, episode)

    @contextmanager
    def holding(self, keys: Sequence[str]) -> Iterator[Sequence[Path]]:
        """See `Payloads.holding`. Held files may exceed the bound of the disk cache until they are let go."""
        ids = [EpisodeKey.parse(key).episode_id for key in keys]
        with self._disk.holding(ids):
            yield [self._ensure(key, episode_id) for key, episode_id in zip(keys, ids, strict=True)]

    def close(self) -> None:
        """See `Payloads.close`."""
        self._writer.shutdown(wait=True)

    def _ensure(self, key: str, episode_id: str) -> Path:
        path = self._disk.path(episode_id)
        if path is not None:
            return path
        with self._lock:
            episode = self._unwritten.get(key)
        return self._disk.put(episode_id, self._fetch(key) if episode is None else episode.data)

    def _write(self, key: str, episode: EncodedEpisode) -> None:
        try:
            self._disk.put(EpisodeKey.parse(key).episode_id, episode.data)
        except StoreUnavailable as error:
            _log.warning("%s is not kept on disk: %s", key, error)
        finally:
            with self._lock:
                del self._unwritten[key]
                self._unwritten_bytes -= episode.num_bytes


class OpenFiles:
    """Episodes mapped from files, the last `max_files` of them. Thread-safe."""

    def __init__(self, max_files: int = MAX_OPEN_FILES) -> None:
        self._max_files = max_files
        self._open: OrderedDict[Path, EncodedEpisode] = OrderedDict()
        self._lock = Lock()

    def get(self, path: Path) -> EncodedEpisode:
        """The episode in a file; see `open_episode`."""
        with self._lock:
            episode = self._open.get(path)
            if episode is not None:
                self._open.move_to_end(path)
                return episode
        episode = open_episode(path)
        with self._lock:
            self._open[path] = episode
            while len(self._open) > self._max_files:
                self._open.popitem(last=False)
        return episode


def open_episode(path: Path) -> EncodedEpisode:
    """Map a file that holds an episode. Reads the container's tables; frames and columns are read when they are used.

    Raises:
        NotFound: no such file.
        StoreUnavailable: it cannot be read.
        InvalidRecord: it is no episode.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or not 0 < facts.st_size <= MAX_EPISODE_BYTES:
                raise InvalidRecord("episode", f"{path} is no file of 1 to {MAX_EPISODE_BYTES} bytes")
            mapped = mmap.mmap(descriptor, facts.st_size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise NotFound(f"no file {path}: was the store or the cache cleared?") from error
    except OSError as error:
        raise StoreUnavailable(f"cannot read {path}: {error.strerror or error}") from error
    mapped.madvise(mmap.MADV_RANDOM)
    return EncodedEpisode(memoryview(mapped))
