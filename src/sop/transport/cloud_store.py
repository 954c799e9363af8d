"""An object store behind a URL, through obstore: Amazon S3 and what speaks its protocol, Google Cloud Storage, Azure.

    s3://bucket/prefix?endpoint=https://host:port&region=name     gs://bucket/prefix     az://container/prefix

    put    one conditional request (If-None-Match: *), whatever the size: the server creates the whole object or nothing
    get    a range of bytes, read piece by piece, never more than was asked for
    keys   pages of a listing from an offset on, put into lexicographic order where the server's is another

Large objects are one request too, up to MAX_PUT_BYTES. A multipart upload would need a conditional completion, which
S3 has and obstore does not offer; the way around it (multipart to a temporary key, then a conditional copy) needs
permission to write the temporary key, moves the bytes twice and leaves litter behind a writer that dies. A request that
is cut short has fewer bytes than its Content-Length and a body that breaks its signed hash: servers drop it.

Nothing is tried again in here. A second attempt inside of a create-only put could find what the first one made and
report a stranger's object; `sop.transport.retry` settles that by comparing.

Tested against SeaweedFS 4.48, plain and over TLS. For `gs` and `az` only the construction is tested.
"""

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

from obstore.exceptions import BaseError

from sop.core.errors import Forbidden, NotFound, StoreUnavailable
from sop.transport.base import Data, check_folder, check_key, check_prefix, parts_of, resolve_span
from sop.transport.cloud_engine import CloudPlace, make_engine, parse_place, require_unforked, status_of, translate
from sop.transport.cloud_listing import in_order, offset_for
from sop.transport.identity import Identity

ANSWER_S = 30.0
"""A request that moves no bytes to speak of is given up after so long."""
MIN_BYTES_PER_S = 256 << 10
"""What a link must carry for an object to get through: bytes add to the time a request may take at this rate."""
MAX_PUT_BYTES = 5 << 30
"""Largest object of one PUT on S3; Azure's limit is about the same, Google's is larger."""
_RANGE_NOT_SATISFIABLE = 416
_LISTING_PAGE = 1000


class CloudStore:
    """`ObjectStore` in a bucket. Safe to use from several threads, and from processes that were not forked from a user
    of it (spawn is fine).

    A request blocks for at most `timeout_s`; one that moves bytes for at most twice the sum of `timeout_s` and what
    they need at MIN_BYTES_PER_S. The first `put` into a folder makes one more, and `keys` one for each page.

    An identity gives the credentials and the only certificates that are believed. Of S3 the secret is read when it is
    needed, so that a new one is taken up; of the others obstore keeps it. Without an identity the usual places of each
    cloud are looked up: environment, files, the machine's metadata.

    S3 itself could keep `a` and `a/b` at once. A `put` below an object is refused after one look per folder; a `put`
    under the name of a folder is refused when this object has put something into that folder, and by servers that
    keep folders (there as AlreadyExists).

    Args:
        url: see the module.
        identity: who we are; None on one's own machine, or where the cloud knows the machine.
        timeout_s: patience with an answer, seconds.

    Raises:
        ValueError: a URL that names no bucket, has a bad prefix or unknown options, carries a password, or asks for
            plain http anywhere but on this machine.
        RunError: the identity has no certificates to believe. From every method: in a forked child.
    """

    def __init__(self, url: str, identity: Identity | None = None, *, timeout_s: float = ANSWER_S) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self._place: CloudPlace = parse_place(url)
        self._identity = identity
        self._timeout_s = timeout_s
        self._engines: dict[tuple[float, float | None], Any] = {}
        self._folders: set[str] = set()
        self._lock = threading.Lock()
        self._engine(timeout_s)  # so that a bad certificate or option is found now

    def __repr__(self) -> str:
        return f"CloudStore({str(self._place)!r})"

    def put(self, key: str, data: Data, *, durable: bool = True) -> None:  # noqa: ARG002  see below
        """See `ObjectStore.put`. Parts are sent from where they lie, never joined.

        Always as durable as the server makes what it has acknowledged; `durable` changes nothing.

        Raises:
            AlreadyExists, StoreUnavailable: see `ObjectStore.put`.
            Forbidden: we may not write this key.
            ValueError: also for more than MAX_PUT_BYTES.
        """
        check_key(key)
        parts = parts_of(data)
        size = sum(part.nbytes for part in parts)
        if size > MAX_PUT_BYTES:
            raise ValueError(f"{key!r} has {size} bytes, one object holds at most {MAX_PUT_BYTES}: split it")
        self._check_folders(key)
        with self._errors("put", key):
            self._engine(self._patience_s(size)).put(
                self._place.prefix + key, parts or b"", mode="create", use_multipart=False
            )

    def get(self, key: str, span: slice | None = None) -> bytes:
        """See `ObjectStore.get`. A server that sends more, less or something else than was asked for is refused.

        Raises:
            NotFound, StoreUnavailable: see `ObjectStore.get`.
            Forbidden: we may not read this key.
        """
        check_key(key)
        start, stop = resolve_span(span)
        if start == stop:
            self._head(key)
            return b""
        options: dict[str, Any] = {}
        if stop is not None:
            options["range"] = (start, stop)
        elif start:
            options["range"] = {"offset": start}
        try:
            answer = self._reader().get(self._place.prefix + key, options=options)
            return self._collect(key, answer, start, stop)
        except (BaseError, OSError) as error:
            if options and status_of(error) == _RANGE_NOT_SATISFIABLE:
                return b""  # the object is there and ends before the span begins
            raise translate(error, "get", key, self._place) from None

    def keys(self, prefix: str, after: str | None = None) -> Iterator[str]:
        """See `ObjectStore.keys`. Lists from an offset on, so that what is before `after` is not transferred.

        Keys that `ObjectStore` does not allow were made by others: they are left out with a line in the log. To put the
        answer of a server that lists folder by folder in order, the keys of one folder are held at a time.

        Raises:
            StoreUnavailable: also for a server whose answer is out of any order or from another place.
            Forbidden: we may not list this prefix.
        """
        check_prefix(prefix)
        return in_order(self._listed(prefix, after or ""), prefix, after or "", str(self._place))

    def folders(self, prefix: str) -> Iterator[str]:
        """See `ObjectStore.folders`. All pages are read before the first name is handed out.

        Raises:
            StoreUnavailable: see `ObjectStore.folders`.
            Forbidden: we may not list this prefix.
        """
        check_folder(prefix)
        place = self._place.prefix + prefix
        with self._errors("list", prefix):
            found = self._engine(self._timeout_s).list_with_delimiter(place or None)
        names = set()
        for name in found["common_prefixes"]:
            with contextlib.suppress(ValueError):  # made by others
                check_key(name.removeprefix(place).strip("/"))
                names.add(name.removeprefix(place).strip("/"))
        return iter(sorted(name for name in names if "/" not in name))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`.

        Raises:
            StoreUnavailable: see `ObjectStore.delete`.
            Forbidden: we may not delete this key.
        """
        check_key(key)
        with contextlib.suppress(NotFound), self._errors("delete", key):
            self._engine(self._timeout_s).delete(self._place.prefix + key)

    def _listed(self, prefix: str, after: str) -> Iterator[str]:
        """Keys from somewhere before the first one wanted, in the order of the server."""
        folder = prefix[: prefix.rfind("/") + 1]
        place, offset = self._place.prefix + folder, offset_for(prefix, after)
        with self._errors("list", prefix):
            pages = self._engine(self._timeout_s).list(
                place or None, offset=self._place.prefix + offset if offset else None, chunk_size=_LISTING_PAGE
            )
            for page in pages:
                for entry in page:
                    if not entry["path"].startswith(place):
                        raise StoreUnavailable(f"{self._place} answers a listing of {prefix!r} with other places")
                    yield entry["path"].removeprefix(self._place.prefix)

    def _collect(self, key: str, answer: Any, start: int, stop: int | None) -> bytes:
        first, end = answer.range
        if first != start or (stop is not None and end > stop):
            raise StoreUnavailable(f"{self._place} answers bytes {first} to {end} of {key!r}, others were asked for")
        buffer, started_s = io.BytesIO(), time.monotonic()
        for piece in answer.stream(min_chunk_size=1):
            if buffer.tell() + len(piece) > end - first:
                raise StoreUnavailable(f"{self._place} sends more of {key!r} than it announced")
            buffer.write(piece)
            if time.monotonic() - started_s > self._patience_s(buffer.tell()):
                raise StoreUnavailable(
                    f"{self._place} sends {key!r} too slowly: {buffer.tell()} bytes in {self._patience_s(0):.0f} s"
                )
        if buffer.tell() != end - first:
            raise StoreUnavailable(f"{self._place} sends {buffer.tell()} of {end - first} bytes of {key!r}")
        return buffer.getvalue()

    def _head(self, key: str) -> None:
        with self._errors("get", key):
            self._engine(self._timeout_s).head(self._place.prefix + key)

    def _check_folders(self, key: str) -> None:
        """Refuse a key below an object, or under the name of a folder. Each folder is looked at once per store."""
        if key in self._folders:
            raise ValueError(f"key {key!r} is a folder of other objects")
        folder, _, _ = key.rpartition("/")
        while folder and folder not in self._folders:
            with contextlib.suppress(NotFound, Forbidden):
                self._head(folder)
                raise ValueError(f"key {key!r} is below {folder!r}, which is an object")
            self._folders.add(folder)
            folder, _, _ = folder.rpartition("/")

    def _patience_s(self, num_bytes: int) -> float:
        """Seconds that so many bytes may take: `timeout_s` and what they need on the slowest link, rounded up to a
        power of two times `timeout_s` so that few clients are made."""
        patience_s = self._timeout_s
        while patience_s < self._timeout_s + num_bytes / MIN_BYTES_PER_S:
            patience_s *= 2
        return patience_s

    def _reader(self) -> Any:
        """The client of `get`: its patience is with each read; `_collect` watches over the whole."""
        return self._engine(self._patience_s(MAX_PUT_BYTES), self._timeout_s)

    def _engine(self, total_s: float, idle_s: float | None = None) -> Any:
        """The client whose requests may take so long, and each read `idle_s`; made at first use."""
        require_unforked()
        with self._lock:
            if (total_s, idle_s) not in self._engines:
                self._engines[total_s, idle_s] = make_engine(self._place, self._identity, total_s, idle_s)
            return self._engines[total_s, idle_s]

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise translate(error, action, key, self._place) from None
