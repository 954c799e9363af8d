"""A topic's stream on a NATS server: made and looked after, read from any place, followed by a consumer.

    streams    file, kept, bounded in bytes; topics that repeat themselves (`keep_s`): memory, bounded in age
    read       direct gets: no state in the server, from any sequence
    follow     a pull consumer, which says at once when there is something

The functions ask through a `Session` and raise what `Session.converse` raises.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from nats.aio.msg import Msg

from sop.core.errors import StoreUnavailable
from sop.transport.base import MAX_EVENT_BYTES, MAX_EVENTS_PER_POLL
from sop.transport.nats_connection import Lost, Session
from sop.transport.nats_subjects import stream_of, subject_of

REQUEST_S = 2.0
"""How long the server may take to answer."""
DUPLICATE_WINDOW_S = 3600.0
"""How long the server knows an event's id; a repeat that comes later is an event again."""
MAX_BYTES = 256 << 20
"""Of a stream that is kept: some 900 thousand events. The oldest go first; they are in the store anyway."""
MAX_STATUS_BYTES = 64 << 20
"""Of a stream with `keep_s`, in the server's memory."""
MAX_HEADER_BYTES = 16 << 10
PAGE_BYTES = 8 << 20
"""Most that one read brings."""
PULL = 500
"""Messages that one pull asks for."""
ACK_WAIT_S = 30.0
"""What nobody has acknowledged by then is delivered again."""
MAX_UNACKNOWLEDGED = 1000
DURABLE_KEEP_S = 86400.0
"""A consumer of an identity that nobody uses for so long is removed; it would only count lag."""
EPHEMERAL_KEEP_S = 60.0
"""The same for one without an identity."""
STREAM_NOT_FOUND = 10059
STREAM_EXISTS = 10058
CONSUMER_NOT_FOUND = 10014
_S = 1_000_000_000
_log = logging.getLogger(__name__)

Event = tuple[int, bytes]
"""Sequence in the stream, bytes."""


class _Problem(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _State(msgspec.Struct):
    last_seq: int = 0
    consumer_count: int = 0


class _Delivered(msgspec.Struct):
    stream_seq: int = 0


class Answer(msgspec.Struct):
    """What the server says about a stream, a consumer or a publication."""

    error: _Problem | None = None
    created: str = ""
    """When the stream was made: its history. A stream made anew has another one."""
    config: dict[str, object] = {}
    state: _State = msgspec.field(default_factory=_State)
    delivered: _Delivered = msgspec.field(default_factory=_Delivered)
    num_ack_pending: int = 0

    @property
    def problem(self) -> int:
        """The server's number of what went wrong; 0 when nothing did."""
        return 0 if self.error is None else self.error.err_code or -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What one read found."""

    events: list[Event]
    """In order; what is too large to be an event is left out."""
    last: int
    """Everything up to this sequence was seen; 0 when there was nothing."""
    more: bool
    """The stream goes on behind `last`."""


async def api(session: Session, subject: str, body: object = None) -> Answer:
    """Ask JetStream `subject` (without its prefix). The answer may be a problem."""
    payload = b"" if body is None else msgspec.json.encode(body)
    message = await session.ask(f"$JS.API.{subject}", payload, timeout_s=REQUEST_S)
    return decode(session, message)


def decode(session: Session, message: Msg) -> Answer:
    """Read an answer of JetStream.

    Raises:
        Lost: nobody answers on the subject: the stream is missing.
        StoreUnavailable: not an answer.
    """
    if status_of(message) == "503":
        raise Lost(f"bus {session.address}: the server has no such stream, or no JetStream")
    try:
        return msgspec.json.decode(message.data, type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreUnavailable(f"bus {session.address}: unreadable answer: {error}") from error


def require(session: Session, answer: Answer, what: str) -> Answer:
    """The answer, if it is not a problem.

    Raises:
        Lost: the stream or consumer is gone.
        StoreUnavailable: anything else that the server says.
    """
    if answer.error is None:
        return answer
    kind = Lost if answer.problem in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND) else StoreUnavailable
    raise kind(f"bus {session.address}: {what}: {answer.error.description} ({answer.problem})")


def status_of(message: Msg) -> str:
    """Status code of an answer without content; empty for a message."""
    return "" if message.headers is None else message.headers.get("Status", "")


def configuration(namespace: str, topic: str, keep_s: float | None) -> dict[str, object]:
    """How the stream of a topic has to be."""
    window_s = DUPLICATE_WINDOW_S if keep_s is None else min(DUPLICATE_WINDOW_S, keep_s)
    return {
        "name": stream_of(namespace, topic),
        "subjects": [subject_of(namespace, topic, "*")],
        "storage": "file" if keep_s is None else "memory",
        "max_age": 0 if keep_s is None else int(keep_s * _S),
        "max_bytes": MAX_BYTES if keep_s is None else MAX_STATUS_BYTES,
        "max_msg_size": MAX_EVENT_BYTES + MAX_HEADER_BYTES,
        "discard": "old",
        "duplicate_window": int(window_s * _S),
        "allow_direct": True,
    }


async def ensure_stream(session: Session, wanted: dict[str, object], *, make: bool, update: bool) -> Answer | None:
    """The stream as it is; None when it is missing and may not be made.

    Args:
        session: asks.
        wanted: `configuration`.
        make: make it when it is missing.
        update: change what differs, as far as a stream can be changed (its storage cannot).
    """
    name = wanted["name"]
    found = await api(session, f"STREAM.INFO.{name}")
    if found.problem == STREAM_NOT_FOUND:
        if not make:
            return None
        made = await api(session, f"STREAM.CREATE.{name}", wanted)
        if made.problem != STREAM_EXISTS:  # else somebody was faster
            return require(session, made, f"making the stream {name}")
        found = await api(session, f"STREAM.INFO.{name}")
    require(session, found, f"stream {name}")
    changes = {key: value for key, value in wanted.items() if key != "storage" and found.config.get(key) != value}
    if update and changes:
        changed = await api(session, f"STREAM.UPDATE.{name}", {**found.config, **changes})
        require(session, changed, f"changing the stream {name}")
    return found


async def read(session: Session, stream: str, start: int, limit: int = MAX_EVENTS_PER_POLL) -> Page:
    """At most `limit` events and PAGE_BYTES from a sequence on."""
    events: list[Event] = []
    last = 0
    more = False

    def take(message: Msg) -> bool:
        nonlocal last, more
        headers = message.headers or {}
        status = status_of(message)
        if status in ("204", "404"):
            more = int(headers.get("Nats-Num-Pending", "0")) > 0
            return True
        if status == "503":
            raise Lost(f"bus {session.address}: the server has no stream {stream}")
        if status:
            raise StoreUnavailable(f"bus {session.address}: reading {stream}: status {status}")
        sequence = int(headers["Nats-Sequence"])
        if sequence < max(start, last + 1) or len(events) >= limit:
            raise StoreUnavailable(f"bus {session.address}: reading {stream}: sequence {sequence} out of place")
        last = sequence
        if fits(message, stream, sequence):
            events.append((sequence, message.data))
        return False

    body = {"seq": start, "batch": limit, "max_bytes": PAGE_BYTES, "next_by_subj": ">"}
    await session.converse(
        f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(body), take, timeout_s=REQUEST_S + PAGE_BYTES / 2**20
    )
    return Page(events=events, last=last, more=more)


def fits(message: Msg, stream: str, sequence: int) -> bool:
    """Whether a message is small enough to be an event; one that is not is logged."""
    if len(message.data) <= MAX_EVENT_BYTES:
        return True
    _log.warning("%s: event %d has %d bytes and is dropped", stream, sequence, len(message.data))
    return False


async def ensure_consumer(session: Session, stream: str, name: str, start: int, *, durable: bool) -> None:
    """A pull consumer that delivers from sequence `start` on, or from before it.

    One that exists and lies more than MAX_UNACKNOWLEDGED messages back is made anew: it would deliver what was read.
    """
    subject = f"{stream}.{name}"
    found = await api(session, f"CONSUMER.INFO.{subject}")
    if found.error is None and start - found.delivered.stream_seq > MAX_UNACKNOWLEDGED:
        await api(session, f"CONSUMER.DELETE.{subject}")
    elif found.problem != CONSUMER_NOT_FOUND:
        require(session, found, f"consumer {subject}")
        return
    config: dict[str, object] = {
        "name": name,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": start,
        "ack_policy": "all",
        "ack_wait": int(ACK_WAIT_S * _S),
        "max_ack_pending": MAX_UNACKNOWLEDGED,
        "inactive_threshold": int((DURABLE_KEEP_S if durable else EPHEMERAL_KEEP_S) * _S),
        "mem_storage": not durable,
    }
    if durable:
        config["durable_name"] = name
    made = await api(session, f"CONSUMER.CREATE.{subject}", {"stream_name": stream, "config": config, "action": ""})
    require(session, made, f"making the consumer {subject}")


async def pull(session: Session, stream: str, name: str, lasting_s: float, take: Callable[[Msg], None]) -> str:
    """Have messages delivered as they come, for `lasting_s` or until PULL of them came.

    Returns:
        The status with which it ended: 408 after its time, empty when PULL messages came, anything else: the consumer
        is gone.
    """
    ended = ""
    left = PULL

    def receive(message: Msg) -> bool:
        nonlocal ended, left
        ended = status_of(message)
        if ended:
            return ended != "100"
        left -= 1
        take(message)
        return left == 0

    body = {"batch": PULL, "expires": int(lasting_s * _S)}
    await session.receive(
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}",
        msgspec.json.encode(body),
        receive,
        timeout_s=lasting_s + REQUEST_S,
    )
    return ended


def sequence_of(reply: str) -> int:
    """Sequence in the stream of a delivered message, from the subject of its acknowledgement.

    Raises:
        ValueError: not such a subject.
    """
    parts: Sequence[str] = reply.split(".")
    if len(parts) != 9 or parts[:2] != ["$JS", "ACK"] or not parts[5].isdecimal() or len(parts[5]) > 18:
        raise ValueError(f"{reply[:200]!r} is not the subject of an acknowledgement")
    return int(parts[5])
