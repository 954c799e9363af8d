"""What the URLs of a fleet's store and bus say, checked once."""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from sop.transport.cloud_engine import parse_place
from sop.transport.nats_subjects import check_namespace


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlace:
    """Where the store is."""

    scheme: str
    """s3, gs or az."""
    bucket: str
    """Of an `az` store: the container."""
    prefix: str
    """Empty, or ends in `/`."""
    host: str
    """Of an own server; empty for the cloud's."""
    tls: bool
    """Whether that server speaks TLS."""

    def key(self, key: str) -> str:
        """`bucket/prefix/key`; of the empty key `bucket/prefix/`, which is no other run's folder."""
        return f"{self.bucket}/{self.prefix}{key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BusPlace:
    """Where the bus is."""

    host: str
    port: int
    namespace: str


def store_place(url: str) -> StorePlace:
    """Read the URL of a fleet's store.

    Raises:
        ValueError: not a store that asks who one is, or `parse_place` refuses it.
    """
    if url.partition("://")[0] not in ("s3", "gs", "az"):
        raise ValueError(
            f"store {_shown(url)}: a fleet needs s3://bucket/prefix?endpoint=https://host:port, "
            "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix (a folder knows no identities)"
        )
    place = parse_place(url)
    server = urlsplit(place.endpoint)
    return StorePlace(
        scheme=place.scheme,
        bucket=place.bucket,
        prefix=place.prefix,
        host=server.hostname or "",
        tls=server.scheme == "https",
    )


def bus_place(url: str) -> BusPlace:
    """Read the URL of a fleet's bus.

    Raises:
        ValueError: not `tls://host:port/namespace`.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
        check_namespace(parts.path.removeprefix("/"))
    except ValueError as error:
        raise ValueError(f"bus {_shown(url)}: {error}") from error
    if parts.scheme != "tls" or not parts.hostname or not port or "@" in parts.netloc:
        raise ValueError(f"bus {_shown(url)}: a fleet needs tls://host:port/namespace, without a password")
    return BusPlace(host=parts.hostname, port=port, namespace=parts.path.removeprefix("/"))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(url: str) -> str:
    """A URL for a message: a password in it is not repeated."""
    scheme, _, rest = url.partition("://")
    return repr(f"{scheme}://{rest.rpartition('@')[2]}" if rest else url.rpartition("@")[2])
