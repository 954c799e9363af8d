"""The order of a listing, whatever the server's.

Amazon, Google and Azure list keys in lexicographic order. Servers that keep folders list folder by folder, and begin
there: `-` and `.` sort before `/`, so that the two differ where a name continues another one.

    lexicographic          folder by folder
      a-b/x                  a/y
      a/y                    a-b/x

From either the same answer is made: begin early enough for both, hold the keys of one folder until the server is past
every name that could still come before them, and hand them out in order.
"""

import heapq
import logging
from collections.abc import Iterable, Iterator

from sop.core.errors import StoreUnavailable
from sop.transport.base import check_key

MAX_HELD_KEYS = 1 << 20
"""Bounds the memory that a folder (or a hostile server) can cost: about 200 MB. List larger ones folder by folder."""
_log = logging.getLogger(__name__)


def offset_for(prefix: str, after: str) -> str | None:
    """A place before every wanted key in both orders, to begin a listing of the prefix's folder behind; None for the
    beginning. Not far before: at worst the keys that share the name up to its first `-` or `.` are listed in vain."""
    folder = prefix[: prefix.rfind("/") + 1]
    wanted = max(after, prefix)
    if not wanted.startswith(folder):
        return None  # `after` is behind the whole folder; `in_order` drops what comes
    name = wanted[len(folder) :].rstrip("/")
    cut = min((name.index(mark) for mark in "-." if mark in name), default=len(name))
    end = max(cut - 1, 0)
    while end and "/" in name[end - 1 : end + 1]:  # the name of a folder would leave out what is in it
        end -= 1
    offset = folder + name[:end]
    try:
        check_key(offset)
    except ValueError:  # nothing left of it, or `after` is no key
        return None
    return offset


def in_order(listed: Iterable[str], prefix: str, after: str, place: str) -> Iterator[str]:
    """The keys of a listing that begin with `prefix` and are after `after`, in lexicographic order.

    Args:
        listed: keys of the prefix's folder in the server's order; read as far as needed.
        place: the server, for messages.

    Raises:
        StoreUnavailable: the listing is in neither order, or holds too many keys of one folder.
    """
    start = prefix.rfind("/") + 1
    held: list[str] = []
    last = ""
    for key in listed:
        if last and key <= last and key.split("/") <= last.split("/"):
            raise StoreUnavailable(f"{place} lists {key!r} after {last!r}: a server must list in order")
        last = key
        head, slash, _ = key[start:].partition("/")
        if key > prefix and not key.startswith(prefix) and not (slash and head < prefix[start:]):
            break
        if not key.startswith(prefix) or key <= after or not _is_key(key, place):
            continue
        bound = f"{key[:start]}{head}-" if slash else key
        while held and held[0] < bound:
            yield heapq.heappop(held)
        heapq.heappush(held, key)
        if len(held) > MAX_HELD_KEYS:
            raise StoreUnavailable(
                f"{place} has more than {MAX_HELD_KEYS} keys below {prefix!r}: list folder by folder"
            )
    while held:
        yield heapq.heappop(held)


def _is_key(key: str, place: str) -> bool:
    try:
        check_key(key)
    except ValueError as error:
        _log.warning("%s lists what is no key of ours, left out: %s", place, error)
        return False
    return True
