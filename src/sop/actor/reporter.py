"""The reporter: tells the bus once a second what the actor does, so that the control loop need not."""

import logging
import queue
import threading
from typing import TYPE_CHECKING, Protocol

from sop.core.clock import Clock
from sop.core.errors import Forbidden, StoreUnavailable
from sop.core.events import TOPIC_ACTORS, ActorReported, PolicySwapped, encode_event
from sop.transport import EventBus

if TYPE_CHECKING:
    from sop.actor.lifecycle import ActorState
    from sop.actor.settings import ActorCounts, ActorSettings
    from sop.actor.source import PolicySource
    from sop.actor.spool import EpisodeSpool
    from sop.actor.uploader import Uploader

_log = logging.getLogger(__name__)


class Reported(Protocol):
    """What a report tells of an actor; read from the reporter's thread while the actor works."""

    @property
    def settings(self) -> "ActorSettings":
        """Whose report it is."""
        ...

    @property
    def counts(self) -> "ActorCounts":
        """What it has done."""
        ...

    @property
    def state(self) -> "ActorState":
        """What it does now."""
        ...

    @property
    def task(self) -> str:
        """What it works on; empty before the first episode."""
        ...

    @property
    def policy_version(self) -> int | None:
        """The version that acts."""
        ...

    @property
    def problem(self) -> str:
        """Why it holds; empty while it works."""
        ...

    @property
    def refusal(self) -> str:
        """Why the last policy could not be loaded; empty when it could."""
        ...


class ActorReporter:
    """Publishes `ActorReported` periodically and `PolicySwapped` at once, from a thread of its own.

    Reports are hints for whoever watches: when the bus does not answer or lets us not in they are dropped, which is
    said once per reason.

    Args:
        bus: where reports go.
        clock: stamps them.
        every_s: seconds between two reports.
    """

    def __init__(self, bus: EventBus, clock: Clock, *, every_s: float = 1.0) -> None:
        self._bus = bus
        self._clock = clock
        self._every_s = every_s
        self._swaps: queue.SimpleQueue[PolicySwapped | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def swapped(self, event: PolicySwapped) -> None:
        """Pass on a swap; never blocks."""
        self._swaps.put(event)

    def start(
        self, actor: Reported, spool: "EpisodeSpool", uploader: "Uploader", subscriber: "PolicySource | None"
    ) -> None:
        """Begin to report on this actor."""
        arguments = (actor, spool, uploader, subscriber)
        self._thread = threading.Thread(target=self._loop, args=arguments, name="reporter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Report a last time and stop; idempotent."""
        if self._thread is not None and self._thread.is_alive():
            self._swaps.put(None)
            self._thread.join()

    def _loop(
        self, actor: Reported, spool: "EpisodeSpool", uploader: "Uploader", subscriber: "PolicySource | None"
    ) -> None:
        sent, dropped = 0, ""
        going_on = True
        while going_on:
            try:
                event = self._swaps.get(timeout=self._every_s)
                going_on = event is not None
            except queue.Empty:
                event = None
            try:
                if event is not None:
                    event_id = f"{event.actor_id}/swap/{event.version}/{event.swapped_utc_ns}"
                    self._bus.publish(TOPIC_ACTORS, encode_event(event), event_id=event_id)
                report = self._report(actor, spool, uploader, subscriber)
                event_id = f"{report.actor_id}/report/{report.utc_ns}/{sent}"
                self._bus.publish(TOPIC_ACTORS, encode_event(report), event_id=event_id)
                sent, dropped = sent + 1, ""
            except (StoreUnavailable, Forbidden) as error:
                if str(error) != dropped:
                    _log.warning("reports are dropped: %s", error)
                dropped = str(error)

    def _report(
        self, actor: Reported, spool: "EpisodeSpool", uploader: "Uploader", subscriber: "PolicySource | None"
    ) -> ActorReported:
        counts = actor.counts
        refusals = {} if subscriber is None else subscriber.refusals
        refused = f"refused policy {max(refusals)}: {refusals[max(refusals)]}" if refusals else ""
        link = "" if subscriber is None else subscriber.problem
        problems = (actor.problem, uploader.problem, link, uploader.refused, actor.refusal, refused)
        return ActorReported(
            actor_id=actor.settings.actor_id,
            state=actor.state,
            task=actor.task,
            policy_version=actor.policy_version,
            newest_version=None if subscriber is None else subscriber.newest_version,
            episodes=counts.episodes,
            successes=counts.successes,
            interventions=counts.interventions,
            human_steps=counts.human_steps,
            steps=counts.steps,
            spooled=len(spool.pending()),
            overruns=counts.overruns,
            gated=counts.gated,
            nonfinite=counts.nonfinite,
            stops=counts.stops,
            problem=next((text for text in problems if text), ""),
            utc_ns=self._clock.utc_ns(),
        )
