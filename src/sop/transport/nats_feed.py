"""One topic of a NATS bus in one process: what its polls share, so that a thousand of them cost what one does.

    cursor before the window ..... a page of the stream by direct gets
    cursor in the window ......... from memory
    cursor at its end ............ look (direct get), then wait: one consumer delivers for all who wait

The window holds everything the stream has in (low, high], its end follows the stream: by messages of the consumer while
somebody waits, by a look otherwise. The consumer only tells early: what it leaves out (somebody of the same identity
took it, the server forgot it) the next look finds, every LOOK_EVERY_S, and sooner once that has happened.

Everything here runs in the event loop of a `Link`, except the constructor.
"""

import asyncio
import contextlib
import time
from bisect import bisect_right

from nats.aio.msg import Msg

from sop.core.errors import StoreError
from sop.transport.base import MAX_EVENTS_PER_POLL, Cursor, row_of
from sop.transport.nats_connection import Lost, Session
from sop.transport.nats_link import GRACE_S, Link
from sop.transport.nats_stream import Event, api, ensure_consumer, ensure_stream, fits, pull, read, require, sequence_of

LOOK_EVERY_S = 5.0
"""How often the stream is looked at while its consumer is silent."""
SHARED_LOOK_EVERY_S = 0.5
"""The same, for SHARED_S after something did not come to us by the consumer."""
SHARED_S = 60.0
MISSING_EVERY_S = 1.0
"""How often a poll looks for a stream that nobody has made yet."""
WINDOW_EVENTS = 2 * MAX_EVENTS_PER_POLL
WINDOW_BYTES = 4 << 20
_AGAIN_S = 0.05
"""Pause before a poll that lost its session or its stream tries again."""
_LONG_S = 0.03
"""A poll that may wait this long leaves the look to the consumer that delivers already."""


class Feed:
    """A topic, followed.

    Args:
        link: gives sessions.
        wanted: configuration of its stream.
        consumer: name of our consumer; durable when we have an identity.
        make: whether to make the stream when it is missing.
        update: whether to change the stream if it is otherwise than wanted.
    """

    def __init__(self, link: Link, wanted: dict[str, object], consumer: str, *, make: bool, update: bool) -> None:
        self.stream = str(wanted["name"])
        self._link = link
        self._wanted = wanted
        self._consumer = consumer
        self._durable = link.address.identity is not None
        self._make = make
        self._update = update
        self._known: Session | None = None
        self._history = ""
        self._low = self._high = 0
        self._window: list[Event] = []
        self._window_bytes = 0
        self._looking = asyncio.Lock()
        self._asked = self._answered = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._tail: asyncio.Task[None] | None = None
        self._live = False
        self._shared_until_s = 0.0
        self._replies: dict[int, str] = {}
        self._looks: set[asyncio.Task[None]] = set()

    async def poll(self, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
        """See `EventBus.poll`."""
        deadline_s = time.monotonic() + timeout_s
        until_s = max(deadline_s, time.monotonic() + GRACE_S)
        while True:
            session = await self._link.session(deadline_s)
            try:
                if not await self.know(session):
                    found = await self._await_stream(deadline_s)
                else:
                    found = await self._after(session, after, deadline_s)
            except Lost:
                self._known = None
                if time.monotonic() >= until_s:
                    raise
                await asyncio.sleep(_AGAIN_S)
                continue
            if found is not None:
                return [(f"{self._history}:{sequence}", event) for sequence, event in found]

    async def know(self, session: Session, again: bool = False) -> bool:
        """Learn what became of the stream, once per session or `again`. False when it is missing and is not ours to
        make."""
        if self._known is session and not again:
            return True
        async with self._looking:
            if self._known is session and not again:
                return True
            found = await ensure_stream(session, self._wanted, make=self._make, update=self._update)
            if found is None:
                return False
            history = "".join(character for character in found.created if character.isdecimal()) or "0"
            if history != self._history or found.state.last_seq < self._high:
                self._history = history
                self._jump(found.state.last_seq)
            self._known = session
            return True

    async def _await_stream(self, deadline_s: float) -> list[Event] | None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return []
        await asyncio.sleep(min(left_s, MISSING_EVERY_S))
        return None

    async def _after(self, session: Session, after: Cursor | None, deadline_s: float) -> list[Event] | None:
        """Events behind a cursor; [] when there are none until the deadline; None: begin again."""
        row = row_of(after, self._history)
        live = self._live and row == self._high and deadline_s - time.monotonic() >= _LONG_S
        if not live and row >= self._high:
            await self._look(session)
            if row > self._high and row > await self._measure(session):
                row = 0  # the stream was rolled back: begin again
        while True:
            if row < self._low:
                page = await read(session, self.stream, row + 1)
                if page.events:
                    return page.events
                row = page.last if page.more else self._low
                continue
            if row < self._high:
                found = self._window[bisect_right(self._window, row, key=_sequence) :][:MAX_EVENTS_PER_POLL]
                if found:
                    return found
                row = self._high  # nothing but what was dropped
            await self._acknowledge(session, row)
            if not await self._grow(session, deadline_s):
                return []

    async def _grow(self, session: Session, deadline_s: float) -> bool:
        """Wait until the window may have grown; False at the deadline."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return False
        grown = asyncio.get_running_loop().create_future()
        self._waiting.add(grown)
        if self._tail is None:
            self._tail = asyncio.create_task(self._follow(session))
        try:
            async with asyncio.timeout(left_s):
                await grown
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(grown)
        return True

    async def _follow(self, session: Session) -> None:
        """Have the consumer deliver as long as somebody waits; what goes wrong is told to all who wait."""
        try:
            await self._look(session)
            await ensure_consumer(session, self.stream, self._consumer, self._high + 1, durable=self._durable)
            while self._waiting:
                shared = time.monotonic() < self._shared_until_s
                lasting_s = SHARED_LOOK_EVERY_S if shared else LOOK_EVERY_S
                pulling = asyncio.create_task(
                    pull(session, self.stream, self._consumer, lasting_s, lambda message: self._take(session, message))
                )
                try:
                    await self._look(session)  # what came before the pull; from now on all is delivered
                    self._live = True
                    ended = await pulling
                finally:
                    self._live = False
                    pulling.cancel()
                    with contextlib.suppress(StoreError, asyncio.CancelledError):
                        await pulling
                if ended not in ("", "408"):
                    raise Lost(f"bus {self._link.address}: the consumer of {self.stream} ended with status {ended}")
        except StoreError as error:
            for waiting in self._waiting:
                if not waiting.done():
                    waiting.set_exception(error)
            if not isinstance(error, Lost):
                return
            self._known = None
        finally:
            self._tail = None

    def _take(self, session: Session, message: Msg) -> None:
        """A message of the consumer."""
        sequence = sequence_of(message.reply)
        self._replies[sequence] = message.reply
        if sequence == self._high + 1:
            self._append(sequence, message.data if fits(message, self.stream, sequence) else None)
            self._wake()
        elif sequence > self._high:
            self._look_soon(session)

    def _look_soon(self, session: Session) -> None:
        """Something before a delivered message was not delivered to us."""
        self._shared_until_s = time.monotonic() + SHARED_S

        async def look() -> None:
            with contextlib.suppress(StoreError):  # the poll that follows meets it again
                await self._look(session)

        task = asyncio.create_task(look())
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)

    async def _look(self, session: Session) -> None:
        """Bring the end of the window to the end of the stream. Who asks while a look is under way gets the next one,
        together with all others who do."""
        self._asked += 1
        ticket = self._asked
        async with self._looking:
            if self._answered >= ticket:
                return
            answering = self._asked
            page = await read(session, self.stream, self._high + 1)
            if page.more:
                self._jump(await self._last(session))
            else:
                for sequence, event in page.events:
                    if sequence > self._high:  # else the consumer brought it meanwhile
                        self._append(sequence, event)
                self._high = max(self._high, page.last)
            self._answered = answering
            if page.last:
                self._wake()

    async def _measure(self, session: Session) -> int:
        """Last sequence that the stream gave away, also when what it gave it to is gone."""
        last = await self._last(session)
        if last > self._high:
            self._jump(last)
        return last

    async def _last(self, session: Session) -> int:
        answer = await api(session, f"STREAM.INFO.{self.stream}")
        return require(session, answer, f"stream {self.stream}").state.last_seq

    async def _acknowledge(self, session: Session, row: int) -> None:
        """Somebody asks for what follows `row`: he has dealt with everything before it."""
        dealt = [sequence for sequence in self._replies if sequence <= row]
        if dealt:
            await session.tell(self._replies[max(dealt)])  # and all before it
        for sequence in dealt:
            del self._replies[sequence]

    def _append(self, sequence: int, event: bytes | None) -> None:
        self._high = sequence
        if event is None:
            return
        self._window.append((sequence, event))
        self._window_bytes += len(event)
        if len(self._window) > WINDOW_EVENTS or self._window_bytes > WINDOW_BYTES:
            half = (len(self._window) + 1) // 2
            self._low = self._window[half - 1][0]
            del self._window[:half]
            self._window_bytes = sum(len(event) for _, event in self._window)

    def _jump(self, last: int) -> None:
        """Go on behind `last`; what lies before it is read from the stream."""
        self._low = self._high = last
        self._window.clear()
        self._window_bytes = 0
        self._replies.clear()

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)


def _sequence(event: Event) -> int:
    return event[0]
