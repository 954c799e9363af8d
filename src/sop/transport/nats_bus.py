"""A bus on a NATS server with JetStream: robots dial out, events survive the server, repeats are dropped.

    nats://127.0.0.1:4222/<namespace>    this machine only
    tls://host:4222/<namespace>          anywhere: mutual TLS 1.3 and the key pair of an identity

    publish     acknowledged by the stream; its id is `Nats-Msg-Id`, known for DUPLICATE_WINDOW_S
    poll        `nats_feed`: cursors are `<when the stream was made>:<sequence>`
    away        reconnects for ever; calls wait GRACE_S for a short outage, after that they raise

Files: `nats_subjects` (names, permissions), `nats_connection` (one connection), `nats_link` (the thread that keeps
one), `nats_stream` (what JetStream is asked), `nats_feed` (a topic). Needs nats-server 2.11 or later: direct gets
in batches.
"""

import time
import uuid
from collections.abc import Mapping
from urllib.parse import quote

from nats.aio.msg import Msg

from sop.core.errors import StoreUnavailable
from sop.transport.base import Cursor, check_event, check_topic, row_of
from sop.transport.identity import Identity
from sop.transport.nats_connection import Address, Lost, Session
from sop.transport.nats_feed import Feed
from sop.transport.nats_link import BusClosed, Link
from sop.transport.nats_stream import configuration, decode, require, status_of
from sop.transport.nats_subjects import ANYONE, MAKERS, TOPICS, subject_of

PUBLISH_S = 5.0
"""How long one publication may take, short outages included."""
_PLAIN = "/:@+=,;!~.-_"
_ID = "Nats-Msg-Id"


class NatsBus:
    """`EventBus` on a NATS server. Usable from several threads; after a fork, open another one.

    The constructor does not wait for the server: a robot starts without it.

    Args:
        url: see the module.
        owner: makes the streams of a run's topics whenever it connects, and gives existing ones the limits of today.
        keep_s: topic -> seconds after which its events are forgotten, for topics that repeat themselves (signs of
            life): these are kept in the server's memory. Other topics are kept on its disk, MAX_BYTES of each.
        identity: who we are; needed for `tls://`. Without one everybody may do everything, as the server lets them.

    Raises:
        ValueError: the URL, or a topic of `keep_s`.
        RunError: `tls://` without a complete identity.
    """

    def __init__(
        self,
        url: str,
        owner: bool = False,
        keep_s: Mapping[str, float] | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.address = Address.parse(url, identity)
        self.owner = owner
        self._keep_s = dict(keep_s or {})
        for topic in self._keep_s:
            check_topic(topic)
        sender = self.address.sender
        self._consumer = f"{ANYONE}-{uuid.uuid4().hex[:16]}" if identity is None else sender
        self._may_make = identity is None or identity.record.role in MAKERS
        self._feeds: dict[str, Feed] = {}
        self._link = Link(self.address, self._greet)

    def publish(self, topic: str, event: bytes, event_id: str) -> None:
        """See `EventBus.publish`. Acknowledged by the server when it returns, within PUBLISH_S.

        Raises:
            Forbidden: we may not speak on this topic, or are not let in.
        """
        check_topic(topic)
        check_event(event, event_id)
        self._link.run(lambda: self._publish(topic, event, event_id))

    def poll(self, topic: str, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
        """See `EventBus.poll`. While the server is away it waits for `timeout_s`, at least for what is left of
        GRACE_S, then raises. A topic that nobody has made yet is empty.

        Raises:
            Forbidden: we may not hear this topic, or are not let in.
        """
        check_topic(topic)
        row_of(after, "")
        entered = False

        async def poll() -> list[tuple[Cursor, bytes]]:
            nonlocal entered
            entered = True
            return await self._feed(topic).poll(after, timeout_s)

        try:
            return self._link.run(poll)
        except BusClosed:
            if entered:
                return []
            raise

    def close(self) -> None:
        """See `EventBus.close`."""
        self._link.close()

    async def _publish(self, topic: str, event: bytes, event_id: str) -> None:
        deadline_s = time.monotonic() + PUBLISH_S
        subject = subject_of(self.address.namespace, topic, self.address.sender)
        headers = {_ID: quote(event_id, safe=_PLAIN)}
        while True:
            session = await self._link.session(0.0)
            try:
                answer = await session.ask(
                    subject, event, headers=headers, timeout_s=max(0.1, deadline_s - time.monotonic())
                )
                missing = status_of(answer) == "503" and time.monotonic() < deadline_s
                if not missing or not await self._made(session, topic):
                    _require_stored(session, topic, answer)
                    return
            except Lost:  # it may have arrived; its id lets it in only once
                if time.monotonic() >= deadline_s:
                    raise

    async def _made(self, session: Session, topic: str) -> bool:
        """Whether the stream of the topic is there now."""
        return self._may_make and await self._feed(topic).know(session, again=True)

    def _feed(self, topic: str) -> Feed:
        if topic not in self._feeds:
            wanted = configuration(self.address.namespace, topic, self._keep_s.get(topic))
            make = self._may_make
            self._feeds[topic] = Feed(self._link, wanted, self._consumer, make=make, update=self.owner and make)
        return self._feeds[topic]

    async def _greet(self, session: Session) -> None:
        if self.owner and self._may_make:
            for topic in sorted({*TOPICS, *self._keep_s}):
                await self._feed(topic).know(session)


def _require_stored(session: Session, topic: str, answer: Msg) -> None:
    if status_of(answer) == "503":
        raise StoreUnavailable(
            f"bus {session.address}: nobody keeps the topic {topic!r} yet: the learner makes its stream when it starts"
        )
    require(session, decode(session, answer), f"publishing on {topic!r}")
