"""The thread of a NATS bus: an event loop that stays connected for ever, and how other threads have work done in it.

caller's thread            link's thread
run(coroutine) ----------> coroutine -- session(deadline) --> questions to the server
     ^ blocked                 |
     `------- result ----------'          connect -> lost -> pause 0.05 .. 5 s -> connect -> ...
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from sop.core.errors import Forbidden, StoreError, StoreUnavailable
from sop.transport.nats_connection import CONNECT_S, Address, Session, refusal

GRACE_S = 2.0
"""A connection that is away for less is waited for; after that, who may not wait is told at once."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
"""Between two attempts to connect; doubled from the first to the longest, each drawn between half and all of it."""
_log = logging.getLogger(__name__)
T = TypeVar("T")


class BusClosed(ValueError):
    """A call came after `close`, or in a process that did not open the bus."""


class Link:
    """Stays connected from its construction until `close`. Never blocks in the constructor.

    Args:
        address: of the server.
        on_session: awaited in the link's thread with every new session; its StoreErrors are logged.
    """

    def __init__(self, address: Address, on_session: Callable[[Session], Awaitable[None]]) -> None:
        self.address = address
        self._on_session = on_session
        self._session: Session | None = None
        self._problem = "not connected yet"
        self._refused = False
        self._lost_s = time.monotonic()
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="bus-nats", daemon=True)
        self._thread.start()

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of a coroutine in the link's thread. Blocks.

        Raises:
            BusClosed: before it began, or while it ran.
            Whatever the coroutine raises.
        """
        with self._lock:
            self._require_open()
            future = asyncio.run_coroutine_threadsafe(make(), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise BusClosed(f"the bus {self.address} was closed") from error
        except BaseException:
            future.cancel()  # the caller was interrupted; nothing if the coroutine has ended
            raise

    async def session(self, deadline_s: float) -> Session:
        """The session that works, now or until a monotonic time; at least GRACE_S after the last one was lost.

        Raises:
            Forbidden: the server does not let us in.
            StoreUnavailable: there was none.
        """
        until_s = max(deadline_s, self._lost_s + GRACE_S)
        while self._session is None:
            try:
                async with asyncio.timeout(until_s - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                raise self._absence() from None
        return self._session

    def close(self) -> None:
        """Cancel what runs, end the thread. Blocks for a moment. Idempotent. In a forked child nothing is done."""
        if self._process != os.getpid():
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _require_open(self) -> None:
        if self._process != os.getpid():
            raise BusClosed(f"the bus {self.address} was opened by another process: open it after the fork")
        if self._closed:
            raise BusClosed(f"the bus {self.address} is closed")

    def _absence(self) -> StoreError:
        if self._refused:
            return Forbidden(
                f"bus {self.address}: the server does not let {self.address.sender!r} in ({self._problem}): "
                "revoked, or not enrolled there"
            )
        return StoreUnavailable(f"bus {self.address}: no connection ({self._problem})")

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # cancels what is left and closes the loop
            runner.run(self._main())

    async def _main(self) -> None:
        connecting = asyncio.create_task(self._stay_connected())
        await self._stop.wait()
        connecting.cancel()
        await asyncio.wait({connecting})

    async def _stay_connected(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            session = Session(self.address)
            try:
                if await self._open(session):
                    pause_s = FIRST_PAUSE_S
                    await self._use(session)
            finally:
                await session.close()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _open(self, session: Session) -> bool:
        try:
            async with asyncio.timeout(2 * CONNECT_S):
                await session.open()
        except Exception as error:  # noqa: BLE001 - top level of the thread: a server can have the library raise anything
            known = self._problem
            self._problem = str(error) if str(error).strip() and "no servers" not in str(error) else session.problem
            self._problem = self._problem.removeprefix("nats: ") or type(error).__name__
            self._refused = refusal(error, session.problem)
            if self._problem != known:
                _log.warning("%s", self._absence())
            return False
        return True

    async def _use(self, session: Session) -> None:
        self._refused = False
        self._session = session
        self._changed.set()
        greeting = asyncio.create_task(self._greet(session))
        try:
            await session.until_lost()
        finally:
            self._session = None
            self._changed.clear()
            self._lost_s = time.monotonic()
            self._problem = session.problem or "the connection was lost"
            await session.close()  # first: the library may swallow a cancellation, a question that failed ends it
            greeting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await greeting
        _log.warning("bus %s: %s; connecting again", self.address, self._problem)

    async def _greet(self, session: Session) -> None:
        try:
            await self._on_session(session)
        except StoreError as error:
            _log.warning("%s", error)
