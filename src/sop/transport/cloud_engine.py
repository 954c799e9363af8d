"""What `CloudStore` knows of obstore: where a URL leads, who we are there, and what an error means."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import obstore.store
from obstore.exceptions import AlreadyExistsError, PermissionDeniedError, UnauthenticatedError

from sop.core.errors import AlreadyExists, Forbidden, NotFound, RunError, StoreError, StoreUnavailable
from sop.transport.base import check_key
from sop.transport.identity import Identity

CREDENTIALS_FOR_S = 60.0
"""The secret is read again after so long: a new one in the folder is used without a restart."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_ROOTS = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_environment = threading.Lock()
_PROCESS: list[int] = []
"""The process that made the first client: obstore's threads live in it alone."""
_STATUS = re.compile(r"status code: (\d{3}) ?([A-Za-z ]*)")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_TEMPORARY = ("RequestTimeTooSkewed", "ExpiredToken", "RequestExpired", "TokenRefreshRequired")
"""Refusals that pass: when the clock is set right, when new credentials are there."""
_REASONS = {
    "UnknownIssuer": "its certificate is not from whom we believe",
    "NotValidForName": "its certificate is for another name",
    "Expired": "its certificate has expired",
    "InvalidCertificate": "its certificate is not valid",
    "ConnectionRefused": "nobody listens there",
    "TimedOut": "no answer in time",
    "BadScheme": "plain http is only for this machine",
}
"""What is looked for in the details of an error without a status -> what it says, first match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudPlace:
    """Where a URL leads; nothing in it is secret."""

    scheme: str
    bucket: str
    prefix: str
    """Before every key: empty or ending in `/`."""
    endpoint: str
    """Base URL of the server; empty for the cloud's own."""
    region: str

    def __str__(self) -> str:
        path = f"{self.bucket}/{self.prefix}".rstrip("/")
        return f"{self.scheme}://{path}" + (f" at {self.endpoint}" if self.endpoint else "")


def parse_place(url: str) -> CloudPlace:
    """Read a URL of `cloud_store`. For `s3` without `endpoint` the one of the environment is taken, if any.

    Raises:
        ValueError: says what is wrong; a password in the URL is not repeated.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError(f"a {parts.scheme} URL must not carry credentials: they come from the identity folder")
    if not _BUCKET.fullmatch(parts.netloc):
        raise ValueError(f"store {url!r}: {parts.netloc!r} is not the name of a bucket")
    prefix = parts.path.strip("/")
    if prefix:
        check_key(prefix)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - ({"endpoint", "region"} if parts.scheme == "s3" else set()))
    if unknown or parts.fragment:
        raise ValueError(
            f"store {parts.scheme}://{parts.netloc}: unknown {unknown or ['#']}; s3 knows endpoint, region"
        )
    endpoint = options.get("endpoint", "")
    if parts.scheme == "s3" and not endpoint:
        endpoint = next(filter(None, map(os.environ.get, _S3_ENDPOINTS)), "")
    if endpoint:
        _check_endpoint(endpoint)
    return CloudPlace(
        scheme=parts.scheme,
        bucket=parts.netloc,
        prefix=f"{prefix}/" if prefix else "",
        endpoint=endpoint.rstrip("/"),
        region=options.get("region", ""),
    )


def make_engine(place: CloudPlace, identity: Identity | None, total_s: float, idle_s: float | None) -> Any:
    """An obstore client that tries once, and believes only the identity's certificates when there is one.

    Args:
        total_s: longest request, from the connection to the last byte of the answer.
        idle_s: longest wait for the next bytes of an answer; None for `total_s`.

    Raises:
        RunError: the identity has no certificates.
        ValueError: obstore knows better.
    """
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=total_s),
        "connect_timeout": timedelta(seconds=min(total_s, 5.0)),
        "allow_http": place.endpoint.startswith("http://"),
    }
    if idle_s is not None:
        client["read_timeout"] = timedelta(seconds=idle_s)
    options: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": 0}}
    has_credentials = identity is not None and bool(identity.record.access_key)
    with _believing_only(identity):
        if place.scheme == "s3":
            options["disable_bulk_delete"] = True  # an error of one key is then an error
            options |= {name: value for name in ("endpoint", "region") if (value := getattr(place, name))}
            if place.endpoint:
                options["virtual_hosted_style_request"] = False
            if identity is not None and has_credentials:
                options["credential_provider"] = _s3_credentials(identity)
            return obstore.store.S3Store(place.bucket, **options)
        if place.scheme == "gs":
            if identity is not None and has_credentials:
                options["service_account_key"] = identity.store_secret()
            return obstore.store.GCSStore(place.bucket, **options)
        if identity is not None and has_credentials:
            options |= {"account_name": identity.record.access_key, "account_key": identity.store_secret()}
        return obstore.store.AzureStore(place.bucket, **options)


def require_unforked() -> None:
    """Refuse to work in a forked child of a process that has used obstore: its calls would wait for ever there.

    Raises:
        RunError: says how to start the process instead.
    """
    if not _PROCESS:
        _PROCESS.append(os.getpid())
    if _PROCESS[0] != os.getpid():
        raise RunError(
            "a cloud store does not survive a fork: start this process with spawn or as a command of its own"
        )


def status_of(error: BaseException) -> int | None:
    """HTTP status that an error of obstore is about, None when there was no answer."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def translate(error: BaseException, action: str, key: str, place: CloudPlace) -> StoreError:
    """An error of obstore in our words. Only the status and its code are taken over: a server's answer may repeat the
    headers of the request, and the text of a hostile one may hold anything."""
    text = str(error)
    found, code = _STATUS.search(text), _CODE.search(text)
    status = int(found[1]) if found else 0
    said = " ".join(filter(None, (found[1], found[2].strip(), code[1] if code else ""))) if found else _reason(text)
    what = f"cannot {action} {key!r} in {place}: {said}"
    name = code[1] if code else ""
    if name in _TEMPORARY:
        return StoreUnavailable(f"{what}; set this machine's clock, or wait for new credentials")
    if status in (401, 403) or isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return Forbidden(f"{what}; ask who runs the store for permission")
    if name in ("NoSuchBucket", "ContainerNotFound"):
        return StoreUnavailable(f"{what}; create it")
    if status == 404 or isinstance(error, FileNotFoundError):
        return NotFound(f"no object {key!r} in {place}")
    if status == 412 or name == "BlobAlreadyExists" or (isinstance(error, AlreadyExistsError) and status != 409):
        return AlreadyExists(f"{key!r} exists already in {place} and is never replaced")
    return StoreUnavailable(f"{what}; try again")


def _reason(text: str) -> str:
    for sign, reason in _REASONS.items():
        if sign in text:
            return reason
    return "the connection failed"


def _s3_credentials(identity: Identity) -> Callable[[], dict[str, Any]]:
    def credentials() -> dict[str, Any]:
        return {
            "access_key_id": identity.record.access_key,
            "secret_access_key": identity.store_secret(),
            "token": None,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS_FOR_S),
        }

    return credentials


@contextmanager
def _believing_only(identity: Identity | None) -> Iterator[None]:
    """Certificates of the identity as the only roots of the clients made inside.

    obstore can add roots but not leave out the system's, which it takes from where these two variables say when a
    client is made. They are set for that moment, in which no other client is made.
    """
    if identity is None:
        with _environment:
            yield
        return
    if not identity.ca.is_file() or not identity.ca.stat().st_size:
        raise RunError(f"{identity.ca} is missing or empty: whom to believe is not known")
    with _environment:
        before = {name: os.environ.get(name) for name in _ROOTS}
        try:
            os.environ.pop("SSL_CERT_DIR", None)
            os.environ["SSL_CERT_FILE"] = str(identity.ca.absolute())
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if "@" in parts.netloc:
        raise ValueError("an endpoint must not carry credentials: they come from the identity folder")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"endpoint {endpoint!r} must be https://host:port")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError(f"endpoint {endpoint!r}: plain http is only for this machine (127.0.0.1), use https")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
