"""One connection to a NATS server: who may be there, how questions are asked, and what a hostile server is refused.

    Address     nats://host:port/namespace or tls://..., checked; who we are; what TLS believes
    Session     one connection from its handshake to its loss: never repaired, replaced by the next one (`nats_link`)

A question has a reply subject of its own below our inbox; it ends with an answer, with the server's refusal of the
subject (`Forbidden`), or with the session. So nothing waits for an answer that cannot come.
"""

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

from sop.core.errors import Forbidden, RunError, StoreError, StoreUnavailable
from sop.transport.identity import Identity
from sop.transport.nats_subjects import ANYONE, check_namespace, inbox_of, name_token

CONNECT_S = 5
"""How long one attempt to connect may take."""
PING_EVERY_S = 5
"""A server that answers none of three pings is gone."""
MAX_FRAME_BYTES = 1 << 20
"""Longest message that is read; a server that announces a longer one is left."""
_DEFAULT_PORT = 4222
_MAX_LINE_BYTES = 64 << 10
_VIOLATION = re.compile(r'permissions violation for \w+ to "([^"]+)"', re.IGNORECASE)
_log = logging.getLogger(__name__)

Take = Callable[[Msg], bool]
"""Gets the answers to a question, one by one; True after the last one."""


class Lost(StoreUnavailable):
    """The session or the stream went away in the middle of a question; ask again on the next one."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a bus is, and who we are there."""

    host: str
    port: int
    tls: bool
    namespace: str
    identity: Identity | None

    @classmethod
    def parse(cls, url: str, identity: Identity | None) -> "Address":
        """Read the URL of a bus.

        Raises:
            ValueError: not `nats://host:port/namespace` or `tls://host:port/namespace`; says which part. What may be
                a password is not repeated.
            RunError: `tls` without an identity, or an identity that lacks a file.
        """
        parts = urlsplit(url)
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("the URL of a bus is scheme://host:port/namespace: no user, password, query or fragment")
        try:
            port = parts.port or _DEFAULT_PORT
        except ValueError as error:
            raise ValueError(f"bus {url!r}: {error}") from error
        if parts.scheme not in ("nats", "tls") or not parts.hostname:
            raise ValueError(f"bus {url!r} must be nats://host:port/namespace or tls://host:port/namespace")
        check_namespace(parts.path.removeprefix("/"))
        tls = parts.scheme == "tls"
        if not tls and not _is_loopback(parts.hostname):
            raise ValueError(f"bus {url!r}: nats:// is for this machine only (127.0.0.1); write tls:// and enroll")
        if tls and identity is None:
            raise RunError(f"bus {url!r} needs an identity: set SOP_IDENTITY to the folder of `sop fleet enroll`")
        if tls and identity is not None:
            for path in (identity.ca, identity.certificate, identity.key, identity.bus_seed):
                if not path.is_file():
                    raise RunError(f"bus {url!r}: {path} is missing: enroll again")
        return cls(parts.hostname, port, tls, parts.path.removeprefix("/"), identity)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'nats'}://{host}:{self.port}/{self.namespace}"

    @property
    def sender(self) -> str:
        """Our token in subjects."""
        return ANYONE if self.identity is None else name_token(self.identity.record.name)

    def security(self) -> ssl.SSLContext | None:
        """TLS 1.3 in both directions, believing the identity's authority alone; None without TLS.

        Raises:
            OSError: a file is damaged.
        """
        if not self.tls or self.identity is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(self.identity.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.identity.certificate, self.identity.key)
        return context

    def seed(self) -> str | None:
        """Secret of our key pair; None when we have none. Reads the file at each call."""
        if self.identity is None or not self.identity.bus_seed.exists():
            return None
        return self.identity.bus_seed.read_text().strip()


class _BoundedParser(Parser):
    """Refuses a message or a line that is too long as soon as its beginning was read."""

    async def parse(self, data: bytes = b"") -> None:
        await super().parse(data)
        in_line = self.state == AWAITING_CONTROL_LINE
        if (len(self.buf) > _MAX_LINE_BYTES) if in_line else (self.needed > MAX_FRAME_BYTES):
            _log.warning("the bus's server sent more than is read at once: leaving it")
            raise nats.errors.ProtocolError


class _Client(Client):
    """nats-py, that goes where it was sent and nowhere else, encrypted if it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = _BoundedParser(self)

    async def _process_info(self, info: Any, initial_connection: bool = False) -> None:
        if not isinstance(info, dict) or not isinstance(info.get("max_payload", 0), int):
            raise nats.errors.ProtocolError
        if initial_connection and "tls" in self.options and not info.get("tls_required"):
            raise nats.errors.SecureConnWantedError  # else the library would go on in the clear
        info.pop("connect_urls", None)  # other servers that this one would like us to use
        await super()._process_info(info, initial_connection)

    async def until_lost(self) -> None:
        """Returns when nothing will be read any more, whatever the reason."""
        reading = self._reading_task
        if reading is not None:
            await asyncio.wait({reading})


class _Question:
    __slots__ = ("done", "subject", "take")

    def __init__(self, subject: str, take: Take) -> None:
        self.subject = subject
        self.take = take
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Session:
    """A connection that works until it is lost. For the event loop in which it was made. `open` makes one."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.problem = ""
        """What the server or the network said last."""
        self._client = _Client()
        self._inbox = f"{inbox_of(address.sender)}.{self._client._nuid.next().decode()}"
        self._numbers = itertools.count()
        self._questions: dict[str, _Question] = {}

    async def open(self) -> None:
        """Connect once.

        Raises:
            OSError, nats.errors.Error, ValueError: it did not work.
        """
        address = self.address
        await self._client.connect(
            servers=f"nats://{str(address).partition('://')[2].partition('/')[0]}",
            name=address.sender,
            tls=address.security(),
            nkeys_seed_str=address.seed(),
            inbox_prefix=inbox_of(address.sender),
            error_cb=self._note,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=CONNECT_S,
            ping_interval=PING_EVERY_S,
        )
        await self._client.subscribe(f"{self._inbox}.*", cb=self._answer)

    async def until_lost(self) -> None:
        """Returns when the connection is gone; whoever still waits for an answer gets `Lost`."""
        await self._client.until_lost()

    async def close(self) -> None:
        """Give the connection back. Idempotent; never raises because of the network."""
        for question in list(self._questions.values()):
            question.fail(Lost(f"bus {self.address}: the connection was lost"))
        with contextlib.suppress(OSError, nats.errors.Error):
            await self._client.close()

    async def ask(
        self, subject: str, payload: bytes = b"", *, headers: dict[str, str] | None = None, timeout_s: float
    ) -> Msg:
        """The one answer to a question.

        Raises:
            Forbidden, Lost, StoreUnavailable: see `converse`.
        """
        answers: list[Msg] = []

        def take(message: Msg) -> bool:
            answers.append(message)
            return True

        await self.converse(subject, payload, take, headers=headers, timeout_s=timeout_s)
        return answers[0]

    async def converse(
        self, subject: str, payload: bytes, take: Take, *, headers: dict[str, str] | None = None, timeout_s: float
    ) -> None:
        """Ask, and give every answer to `take` until it says that it was the last one.

        Raises:
            Forbidden: the server does not let us use the subject.
            Lost: the connection went away.
            StoreUnavailable: no last answer in time, or the server takes no message of this size.
        """
        token = str(next(self._numbers))
        question = self._questions[token] = _Question(subject, take)
        try:
            await self._client.publish(subject, payload, reply=f"{self._inbox}.{token}", headers=headers)
            await asyncio.wait_for(question.done, timeout_s)
        except TimeoutError as error:
            raise StoreUnavailable(f"bus {self.address}: no answer within {timeout_s:.1f} s") from error
        except (nats.errors.ConnectionClosedError, nats.errors.OutboundBufferLimitError, OSError) as error:
            raise Lost(f"bus {self.address}: the connection was lost") from error
        except nats.errors.Error as error:
            raise StoreUnavailable(f"bus {self.address}: {_in_words(error)}") from error
        finally:
            del self._questions[token]

    async def receive(self, subject: str, payload: bytes, take: Take, *, timeout_s: float) -> None:
        """As `converse`, for answers that keep the subject on which they were published: messages of a consumer."""
        token = f"{next(self._numbers)}-own"
        question = self._questions[token] = _Question(subject, take)

        async def answer(message: Msg) -> None:
            self._give(question, message)

        inbox = f"{self._inbox}-own.{token}"
        try:
            subscription = await self._client.subscribe(inbox, cb=answer)
            try:
                await self._client.publish(subject, payload, reply=inbox)
                await asyncio.wait_for(question.done, timeout_s)
            finally:
                if not self._client.is_closed:
                    await subscription.unsubscribe()
        except TimeoutError as error:
            raise StoreUnavailable(f"bus {self.address}: no answer within {timeout_s:.1f} s") from error
        except (nats.errors.Error, OSError) as error:
            raise Lost(f"bus {self.address}: the connection was lost") from error
        finally:
            del self._questions[token]

    async def tell(self, subject: str) -> None:
        """Send an empty message and expect nothing."""
        with contextlib.suppress(OSError, nats.errors.Error):
            await self._client.publish(subject)

    async def _answer(self, message: Msg) -> None:
        question = self._questions.get(message.subject.rpartition(".")[2])
        if question is not None:
            self._give(question, message)

    def _give(self, question: _Question, message: Msg) -> None:
        if question.done.done():
            return
        try:
            finished = question.take(message)
        except StoreError as error:
            question.fail(error)
            return
        except (ValueError, KeyError) as error:  # an answer that is none
            _log.warning("bus %s: unreadable answer: %s", self.address, error)
            question.fail(StoreUnavailable(f"bus {self.address}: unreadable answer: {error}"))
            return
        if finished:
            question.done.set_result(None)

    async def _note(self, error: Exception) -> None:
        self.problem = _in_words(error)
        violation = _VIOLATION.search(self.problem)
        if violation is None:
            return
        refused = [
            question for question in self._questions.values() if question.subject.lower() == violation[1].lower()
        ]
        for question in refused:
            question.fail(
                Forbidden(
                    f"bus {self.address}: {self.address.sender!r} may not use {question.subject!r}; "
                    "if it should, change its role and enroll again"
                )
            )
        if not refused:
            _log.warning("bus %s: %s", self.address, self.problem)


def refusal(error: BaseException, problem: str) -> bool:
    """Whether a failed attempt to connect means that the server knows us and does not let us in."""
    text = f"{error} {problem}".lower()
    return "authorization" in text or "authentication" in text


def _in_words(error: BaseException) -> str:
    return str(error).removeprefix("nats: ") or type(error).__name__


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
