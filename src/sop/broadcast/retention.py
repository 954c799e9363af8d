"""Which published tensors stay in the store. The keys alone say what builds on what."""

import logging
import re
from collections.abc import Collection, Iterable, Sequence

from sop.broadcast.manifest import BASE_VERSION
from sop.core import layout
from sop.core.errors import StoreUnavailable
from sop.transport.base import ObjectStore

_log = logging.getLogger(__name__)
_FORM = re.compile(
    rf"{layout.POLICIES}/\d{{8}}/(weights\.safetensors|keyframe\.packed|delta-(?P<base>\d{{8}})\.packed)"
)


class Retention:
    """Deletes tensors of old versions, never what a kept one needs. Manifests and lineages are kept for ever.

    A kept version whose only form is a delta keeps the versions before it down to the newest keyframe; a
    version with tensors that are the base's keeps version 0.

    Args:
        store: is listed once, here: folders without a manifest count too.
        keep: newest published versions that are kept, at least 1.
        protected: versions that are kept too.

    Raises:
        StoreUnavailable: the store cannot be listed.
    """

    def __init__(self, store: ObjectStore, keep: int, protected: Collection[int]) -> None:
        self._store = store
        self._keep = keep
        self._protected = frozenset(protected)
        self._forms: dict[int, dict[str, int | None]] = {}  # version -> key -> base
        self._on_base: set[int] = set()
        self.next_version = 0
        """First version above everything in the store."""
        for key in store.keys(f"{layout.POLICIES}/"):
            folder = key.split("/")[1]
            if folder.isdecimal():
                self.next_version = max(self.next_version, int(folder) + 1)
                self.begun(int(folder), [key], on_base=True)  # only its manifest knows; a copy of the base is cheap

    def begun(self, version: int, keys: Iterable[str], *, on_base: bool) -> None:
        """These objects of a version may be in the store from now on; `on_base`: it needs version 0 too."""
        if on_base:
            self._on_base.add(version)
        for key in keys:
            match = _FORM.fullmatch(key)
            if match is not None:
                base = match["base"]
                self._forms.setdefault(version, {})[key] = None if base is None else int(base)

    def apply(self, published: Sequence[int]) -> None:
        """Delete what is not needed any more; what fails is tried next time. Blocks.

        Args:
            published: versions that have a manifest, ascending, at least one.
        """
        oldest_kept = published[-self._keep :][0]
        needed = self._needed(published[-self._keep :])
        for version in sorted(self._forms.keys() - needed):
            if version >= oldest_kept:
                return
            for key in list(self._forms[version]):
                try:
                    self._store.delete(key)
                except StoreUnavailable as error:
                    _log.warning("tensors of policy %d are not deleted yet: %s", version, error)
                    return
                del self._forms[version][key]
            del self._forms[version]
            self._on_base.discard(version)

    def _needed(self, kept: Iterable[int]) -> set[int]:
        needed: set[int] = set()
        open_ends = [*kept, *self._protected]
        while open_ends:
            version = open_ends.pop()
            if version in needed:
                continue
            needed.add(version)
            bases = self._forms.get(version, {}).values()
            open_ends += [base for base in bases if base is not None] if None not in bases else []
            if version in self._on_base:
                open_ends.append(BASE_VERSION)
        return needed
