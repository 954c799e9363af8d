"""Stored episodes for learning rules that read whole ones: keys from somewhere, payloads from the cache.

    IndexLibrary   what is indexed, which grows while the learner runs
    StoreLibrary   a list of keys, for a rule that is prepared before anything is indexed

Both implement `sop.core.experience.Library`. A rule decodes what it looks at and keeps what it needs; nothing is
kept here.
"""

from collections.abc import Collection, Iterable, Sequence

from sop.buffer.cache import Payloads
from sop.buffer.index import EpisodeIndex
from sop.buffer.rows import FOLDERS
from sop.core.codec import EncodedEpisode
from sop.core.experience import Source
from sop.core.layout import EpisodeKey


class IndexLibrary:
    """All episodes of an index. For the learner's thread, which owns the index.

    Args:
        index: names them.
        payloads: where they are.
        excluded: keys that no learning rule reads, e.g. `Ingest.flagged`; looked at in every call.
    """

    def __init__(self, index: EpisodeIndex, payloads: Payloads, excluded: Collection[str] = frozenset()) -> None:
        self._index = index
        self._excluded = excluded
        self._payloads = payloads

    def keys(self, source: Source) -> Sequence[str]:
        """Keys of the episodes of a buffer as it is now, in the order of the index, without the excluded."""
        keys = self._index.keys_in(source)
        return [key for key in keys if key not in self._excluded] if self._excluded else keys

    def get(self, key: str) -> EncodedEpisode:
        """The episode under a key; blocks for a fetch when it is not at hand.

        Raises:
            InvalidRecord, NotFound, StoreUnavailable: it cannot be had.
        """
        return self._payloads.get(key)


class StoreLibrary:
    """The episodes under some keys.

    Args:
        keys: of episodes, in the order in which they are given back; each folder is a buffer.
        payloads: where they are.

    Raises:
        InvalidRecord: on construction, when one is not the key of an episode.
    """

    def __init__(self, keys: Iterable[str], payloads: Payloads) -> None:
        self._payloads = payloads
        self._keys: dict[str, list[str]] = {folder: [] for folder in FOLDERS.values()}
        for key in keys:
            self._keys[EpisodeKey.parse(key).folder].append(key)

    def keys(self, source: Source) -> Sequence[str]:
        """Keys of the episodes of a buffer, in the given order."""
        return tuple(self._keys[FOLDERS[source]])

    def get(self, key: str) -> EncodedEpisode:
        """The episode under a key; see `IndexLibrary.get`."""
        return self._payloads.get(key)
