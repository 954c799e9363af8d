"""One process of the load generator: many protocol-true actors that replay recorded episodes. See `fleet_load.py`.

    recording --+
    the clock --+-> episode -> SpoolWriter -> EpisodeSpool -> Uploader -> (link) -> store, bus
                                                            Subscriber <- (link) <- store, bus
                                                         ActorReporter ---------------------> bus

Everything right of the episode is the robot's own code, one of each per actor. What is missing is the control loop at
20 Hz, its inference and its robot: one thread plays the ends of all episodes of the process, each at its time.

Talks with its parent in lines: it says `ready`, is told `record`, `drain`, `finish`, and says `drained`, `finished`.
"""

import gc
import heapq
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from sop.actor import ActorReporter, ActorSettings, EpisodeSpool, SpoolWriter, Uploader
from sop.actor.lifecycle import ActorState
from sop.actor.settings import ActorCounts
from sop.broadcast import Subscriber
from sop.core import layout
from sop.core.clock import SystemClock
from sop.core.codec import decode
from sop.core.episode import Episode, Outcome, PolicyTimes
from sop.core.events import PolicySwapped
from sop.core.run import RunManifest
from sop.processes import stop_with_parent
from sop.testing.link import LinkStore
from sop.transport import Cursor, EventBus, MapsObjects, ObjectStore, open_bus, open_store

STACK_BYTES = 1 << 20
"""Stack of a thread; only what is touched costs memory."""
SWITCH_S = 0.05
"""How long a thread that wants the interpreter's lock waits before it asks for it, 5 ms usually: hundreds that ask so
often take the processor from the one that has it."""
_CLOSERS = 64
"""Threads that close actors at the end; each close waits for threads of its actor."""
POLL_S = 2.0
"""Longest wait of a subscriber for an event. Longer than a robot's (0.5 s): a thousand that wake up for nothing cost
a tenth of a core, and an event wakes them all the same."""
JITTER = 0.25
"""An episode lasts the period, more or less by this share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteConfig:
    """What one process of actors does; travels as JSON."""

    run: str
    """Folder of the run."""
    store: str
    """URL."""
    bus: str
    """URL."""
    own_bus: bool
    """Whether each actor has a connection to the bus of its own; else all of the process share one."""
    recordings: str
    """Folder of encoded episodes."""
    actor_ids: tuple[str, ...]
    period_s: float
    """Mean seconds between the ends of two episodes of an actor."""
    report_s: float
    """Seconds between two signs of life of an actor."""
    seed: int
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    loss: float = 0.0


class ReplayActor:
    """An actor without a robot: its episodes are copies of recorded ones, stamped with who, when and which policy.

    Args:
        actor_id: unique in the run.
        folder: of its spool.
        manifest: of the run where it takes part.
        store: of the run, perhaps behind a link.
        bus: of the run; its own, or shared by the actors of the process.
        recordings: episodes that it replays in turn.
        report_s: seconds between two signs of life.
        seed: of its jitter.
    """

    def __init__(
        self,
        actor_id: str,
        folder: Path,
        manifest: RunManifest,
        store: ObjectStore,
        bus: EventBus,
        *,
        recordings: tuple[Episode, ...],
        report_s: float,
        seed: int,
    ) -> None:
        self.settings = ActorSettings(
            actor_id=actor_id, tasks=manifest.fleet_tasks, instructions=manifest.instructions, seed=seed
        )
        self.counts = ActorCounts()
        self.state = ActorState.WAITING
        self.task = ""
        self.problem = self.refusal = ""
        self.policy_version: int | None = None
        self._policy_times: PolicyTimes | None = None
        self._recordings = recordings
        self._clock = SystemClock()
        self.rng = random.Random(seed)
        self.spool = EpisodeSpool(folder, layout.EPISODES, actor_id)
        self._sequence = self.spool.next_sequence()  # the run is new: the store has nothing of this actor
        self.uploader = Uploader(self.spool, store, bus, self._clock, seed=seed)
        self.writer = SpoolWriter(self.spool, lambda _: self.uploader.wake())
        self._subscriber = Subscriber(store, bus, manifest.embodiment, poll_s=POLL_S, rng=random.Random(seed))
        self._reporter = ActorReporter(bus, self._clock, every_s=report_s)
        self.uploader.start()
        self._reporter.start(self, self.spool, self.uploader, self._subscriber)

    def swap_if_staged(self) -> bool:
        """Take the staged policy, as between two episodes; whether one acts now. Never blocks."""
        staged = self._subscriber.take()
        if staged is not None:
            self.policy_version = staged.version
            self._policy_times = PolicyTimes(
                published_utc_ns=staged.published_utc_ns,
                staged_utc_ns=staged.staged_utc_ns,
                swapped_utc_ns=self._clock.utc_ns(),
            )
            actor_id = self.settings.actor_id
            event = PolicySwapped(actor_id=actor_id, version=staged.version, **asdict(self._policy_times))
            self._reporter.swapped(event)
        return self.policy_version is not None

    def end_episode(self) -> None:
        """The running episode ends now: hand it to the spool's writer, then swap as an actor does."""
        recording = self._recordings[(self._sequence + self.settings.seed) % len(self._recordings)]
        ended_utc_ns = self._clock.utc_ns()
        started_utc_ns = ended_utc_ns - int(recording.monotonic_ns[-1] - recording.monotonic_ns[0])
        episode = replace(
            recording,
            actor_id=self.settings.actor_id,
            sequence=self._sequence,
            policy_version=self.policy_version,
            policy_times=self._policy_times,
            start_utc_ns=started_utc_ns,
            end_utc_ns=ended_utc_ns,
        )
        self._sequence += 1
        self.task = episode.task
        self.writer.submit(episode)
        self.counts.episodes += 1
        self.counts.successes += episode.outcome is Outcome.SUCCESS
        self.counts.interventions += len(episode.interventions)
        self.counts.human_steps += int(np.count_nonzero(episode.controller))
        self.counts.steps += episode.num_steps
        self.swap_if_staged()

    def close(self) -> None:
        """Stop all of its threads (blocking); raises what ended one of them."""
        self.state = ActorState.STOPPED
        self.writer.close()
        self.uploader.close()
        self._reporter.close()
        self._subscriber.close()


class CountedBus:
    """A bus, and the bytes of the events that went through it. Safe to use from several threads, but for the counts,
    which may miss some."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self.sent_bytes = 0
        self.received_bytes = 0
        self.sent_events = 0

    def publish(self, topic: str, event: bytes, event_id: str) -> None:
        """See `EventBus.publish`."""
        self._bus.publish(topic, event, event_id)
        self.sent_events += 1
        self.sent_bytes += len(event) + len(event_id)

    def poll(self, topic: str, after: Cursor | None, timeout_s: float) -> list[tuple[Cursor, bytes]]:
        """See `EventBus.poll`."""
        found = self._bus.poll(topic, after, timeout_s)
        self.received_bytes += sum(len(event) for _, event in found)
        return found

    def close(self) -> None:
        """See `EventBus.close`."""
        self._bus.close()


class Site:
    """The actors of this process, and the one thread that plays the ends of their episodes."""

    def __init__(self, config: SiteConfig, stack: ExitStack) -> None:
        self._config = config
        store = open_store(config.store)
        manifest = RunManifest.from_json(store.get(layout.RUN))
        spools = Path(config.run) / "actors"
        self.link: LinkStore | None = None
        """Counts the bytes of objects; None for a directory without an emulated link, whose objects are mapped."""
        if config.delay_s or config.bytes_per_s is not None or config.loss or not isinstance(store, MapsObjects):
            store = self.link = LinkStore(
                store, delay_s=config.delay_s, bytes_per_s=config.bytes_per_s, loss=config.loss, seed=config.seed
            )
        connections = len(config.actor_ids) if config.own_bus else 1
        self.buses = [stack.enter_context(closing(CountedBus(open_bus(config.bus)))) for _ in range(connections)]
        paths = sorted(Path(config.recordings).glob("*.arrow"))
        recordings = tuple(decode(path.read_bytes()) for path in paths)
        self.actors = [
            ReplayActor(
                actor_id,
                spools / actor_id / "spool",
                manifest,
                store,
                self.buses[number % connections],
                recordings=recordings,
                report_s=config.report_s,
                seed=config.seed * 100_000 + number,
            )
            for number, actor_id in enumerate(config.actor_ids)
        ]
        self.late_s: list[float] = []
        """How late each episode ended, compared with its plan: the load of this process."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._record, name="episodes", daemon=True)
        self.error: BaseException | None = None

    def traffic(self) -> dict[str, int]:
        """Bytes of objects and events until now, without what protocols add; no objects where they are mapped."""
        objects = (
            {} if self.link is None else {"store_up": self.link.sent_bytes, "store_down": self.link.received_bytes}
        )
        return {
            **objects,
            "bus_up": sum(bus.sent_bytes for bus in self.buses),
            "bus_down": sum(bus.received_bytes for bus in self.buses),
            "bus_events_up": sum(bus.sent_events for bus in self.buses),
        }

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Block until every actor acts with a policy; False after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        waiting = self.actors
        while waiting and time.monotonic() < deadline_s:
            waiting = [actor for actor in waiting if not actor.swap_if_staged()]
            self._stop.wait(0.05)
        return not waiting

    def start_recording(self) -> None:
        """From now on the actors record."""
        self._thread.start()

    def drain(self, timeout_s: float) -> int:
        """Stop recording and wait until the spools are empty; returns how many episodes still wait after the time."""
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error
        deadline_s = time.monotonic() + timeout_s
        for_each(self.actors, lambda actor: actor.writer.close())
        while (waiting := sum(len(actor.spool.pending()) for actor in self.actors)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return waiting

    def _record(self) -> None:
        """Each actor's first episode ends anywhere in its first period, the next ones a period later each."""
        try:
            period_s, now_s = self._config.period_s, time.monotonic()
            for actor in self.actors:
                actor.state = ActorState.ACTING
            due = [(now_s + actor.rng.random() * period_s, number) for number, actor in enumerate(self.actors)]
            heapq.heapify(due)
            while not self._stop.wait(max(0.0, due[0][0] - time.monotonic())):
                due_s, number = due[0]
                actor = self.actors[number]
                self.late_s.append(time.monotonic() - due_s)
                actor.end_episode()
                heapq.heapreplace(due, (due_s + period_s * (1 + JITTER * (2 * actor.rng.random() - 1)), number))
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            self.error = error


def for_each(actors: Iterable[ReplayActor], do: Callable[[ReplayActor], None]) -> None:
    """Do something that waits to all actors, many at a time; raises the first error."""
    with ThreadPoolExecutor(_CLOSERS) as pool:
        list(pool.map(do, actors))


def main() -> int:
    """Serve one site until the parent says `finish`, or goes."""
    logging.basicConfig(level=logging.ERROR)
    stop_with_parent()
    threading.stack_size(STACK_BYTES)
    sys.setswitchinterval(SWITCH_S)
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=SiteConfig)
    with ExitStack() as stack:
        site = Site(config, stack)
        gc.freeze()  # what lives until the end need not be looked at in every collection
        ready = site.wait_until_ready(120.0)
        before = site.traffic()
        say("ready" if ready else "no policy", threads=threading.active_count())
        for line in sys.stdin:
            word, _, argument = line.strip().partition(" ")
            if word == "record":
                site.start_recording()
            elif word == "drain":
                waiting = site.drain(float(argument))
                traffic = {name: value - before[name] for name, value in site.traffic().items()}
                say("drained", waiting=waiting, traffic=traffic, late_s=[round(value, 4) for value in site.late_s])
            elif word == "finish":
                break
        for_each(site.actors, ReplayActor.close)
        say("finished")
    return 0


def say(word: str, **facts: object) -> None:
    """One line for the parent."""
    print(json.dumps({"is": word, **facts}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
