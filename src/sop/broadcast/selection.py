"""Which published policy a robot goes for next: the newest, or the one that its channel names."""

from collections import deque
from typing import Protocol

from sop.broadcast.fetch import published_versions
from sop.broadcast.vetting import PolicyVetting
from sop.core.channel import PolicyRef
from sop.transport.base import ObjectStore

MAX_CANDIDATES = 10_000
"""The newest versions of a listing that are held; a store that lists more is hiding something or lying."""


class Selection(Protocol):
    """How the subscriber uses it; on one thread:

    selection.look(store, have)                           # now and then
    selection.announced(version, published_utc_ns)        # when an event says so
    while (version := selection.best(have)) is not None:
        ...                                               # fetch, check, stage
        selection.settle(version)
    """

    def look(self, store: ObjectStore, have: PolicyRef | None) -> int | None:
        """List what there is; the newest version found, if any. Blocks; raises StoreUnavailable."""
        ...

    def announced(self, version: int, published_utc_ns: int) -> None:
        """An event says that a version was published: a hint."""
        ...

    def best(self, have: PolicyRef | None) -> int | None:
        """The version to try next instead of the one at hand; None when there is none better."""
        ...

    def published_utc_ns(self, version: int) -> int | None:
        """When an event said that it was published; None without one."""
        ...

    def settle(self, version: int) -> None:
        """The version was tried; until the next look or event there is nothing more to say about it."""
        ...

    def give_up(self) -> None:
        """Nothing can be had until the next look."""
        ...


class NewestPublished:
    """Every version is better than those before it.

    Args:
        vetting: bounds the listing at the start by what this robot has accepted before; None lists everything.
    """

    def __init__(self, vetting: PolicyVetting | None) -> None:
        self._vetting = vetting
        self._candidates: dict[int, int | None] = {}  # version -> published_utc_ns; None when found by listing

    def look(self, store: ObjectStore, have: PolicyRef | None) -> int | None:
        """See `Selection.look`."""
        floor = None if self._vetting is None else self._vetting.floor
        after = have.version if have is not None else floor - 1 if floor else None
        found = deque(published_versions(store, after), maxlen=MAX_CANDIDATES)
        for version in found:
            self._candidates.setdefault(version, None)
        return found[-1] if found else None

    def announced(self, version: int, published_utc_ns: int) -> None:
        """See `Selection.announced`."""
        self._candidates[version] = published_utc_ns

    def best(self, have: PolicyRef | None) -> int | None:
        """See `Selection.best`."""
        version = max(self._candidates, default=None)
        if version is not None and have is not None and version <= have.version:
            self._candidates.clear()
            return None
        return version

    def published_utc_ns(self, version: int) -> int | None:
        """See `Selection.published_utc_ns`."""
        return self._candidates.get(version)

    def settle(self, version: int) -> None:
        """See `Selection.settle`."""
        self._candidates.pop(version, None)

    def give_up(self) -> None:
        """See `Selection.give_up`."""
        self._candidates.clear()


class ChannelStates:
    """The one policy that the newest state of the channel names for this robot, whatever its number.

    Args:
        vetting: knows the newest state.
    """

    def __init__(self, vetting: PolicyVetting) -> None:
        self._vetting = vetting
        self._settled: PolicyRef | None = None

    def look(self, store: ObjectStore, have: PolicyRef | None) -> int | None:  # noqa: ARG002  the vetting has looked
        """See `Selection.look`."""
        self._settled = None
        wanted = self._vetting.wanted
        return None if wanted is None else wanted.version

    def announced(self, version: int, published_utc_ns: int) -> None:
        """See `Selection.announced`: published is not promoted."""

    def best(self, have: PolicyRef | None) -> int | None:
        """See `Selection.best`."""
        wanted = self._vetting.wanted
        return None if wanted is None or wanted in (have, self._settled) else wanted.version

    def published_utc_ns(self, version: int) -> int | None:  # noqa: ARG002  nobody said
        """See `Selection.published_utc_ns`."""
        return None

    def settle(self, version: int) -> None:  # noqa: ARG002  there is only one
        """See `Selection.settle`."""
        self._settled = self._vetting.wanted

    def give_up(self) -> None:
        """See `Selection.give_up`."""
        self._settled = self._vetting.wanted
