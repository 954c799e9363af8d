"""The monitor: gathers what actors, learner and evaluator say into one view, and writes the fleet's metrics.

It only listens: stopping it changes nothing for the run. `sop.live` draws the view, `sop.report` reads the
metrics afterwards.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sop.buffer.sequences import SequenceProgress
from sop.core import layout
from sop.core.episode import Outcome
from sop.core.errors import InvalidRecord, NotFound, StoreUnavailable
from sop.core.evaluation import EvaluationResult
from sop.core.events import (
    TOPIC_ACTORS,
    TOPIC_EPISODES,
    TOPIC_LEARNER,
    TOPIC_POLICIES,
    ActorReported,
    EpisodeCommitted,
    LearnerReported,
    PolicyPublished,
    PolicySwapped,
    decode_event,
)
from sop.core.layout import EpisodeKey
from sop.core.run import RunManifest
from sop.metrics import MetricSink
from sop.transport import Cursor, EventBus, ObjectStore

_log = logging.getLogger(__name__)
FLEET_METRICS_EVERY_S = 2.0
LIST_EVALUATIONS_EVERY_S = 2.0


@dataclass(slots=True)
class RunView:
    """What is known of a run at this moment; drawn by `sop.live`."""

    run: RunManifest
    phase: str = "starting"
    """What the run is doing: `demonstrations`, `pretraining`, `base evaluation`, `fleet`, ..."""
    phase_progress: tuple[int, int] | None = None
    """(done, total) of the phase where that is known."""
    time_left_s: float | None = None
    """Estimate for the whole run, seconds."""
    actors: dict[str, ActorReported] = field(default_factory=dict)
    learner: LearnerReported | None = None
    collected: int = 0
    """Episodes that the fleet has committed; aborted ones, the lab's and base rollouts not counted."""
    published: int = 0
    """Policies published since the monitor started."""
    publish_to_swap_s: list[float] = field(default_factory=list)
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict)
    """Store key -> result, in order of arrival."""
    notes: list[str] = field(default_factory=list)
    """Events worth a line: processes restarted, policies refused."""


class Monitor:
    """Keeps a `RunView` up to date.

    Args:
        store: evaluations are read from here.
        bus: actors and learner report here.
        run: the run that is watched.
        metrics: gets `fleet/...`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: ObjectStore,
        bus: EventBus,
        run: RunManifest,
        metrics: MetricSink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.view = RunView(run)
        self._store = store
        self._bus = bus
        self._metrics = metrics
        self._clock = clock
        self._cursors: dict[str, Cursor | None] = {}
        self._counted: dict[tuple[str, str], SequenceProgress] = {}
        self._logged_at = self._listed_at = clock() - 3600
        self._started_utc_ns = self._fleet_began_utc_ns = time.time_ns()

    def begin_fleet(self) -> None:
        """The fleet starts now. How long older policies took to reach it is not freshness, they waited for it; and what
        an earlier learner said of itself (of a run that is resumed) is not true of the next one."""
        self._fleet_began_utc_ns = time.time_ns()
        self.poll()
        self.view.learner = None

    def poll(self) -> RunView:
        """Take what is new (does not wait) and return the view; a store or bus that is away is noted."""
        try:
            self._take_news()
        except StoreUnavailable as error:
            if not self.view.notes or self.view.notes[-1] != str(error):
                self.view.notes.append(str(error))
        return self.view

    def _take_news(self) -> None:
        for topic, handle in (
            (TOPIC_ACTORS, self._on_actor),
            (TOPIC_LEARNER, self._on_learner),
            (TOPIC_POLICIES, self._on_policy),
            (TOPIC_EPISODES, self._on_episode),
        ):
            for cursor, data in self._bus.poll(topic, self._cursors.get(topic), timeout_s=0):
                try:
                    handle(data)
                except InvalidRecord as error:
                    _log.warning("ignored an event on %r: %s", topic, error)
                self._cursors[topic] = cursor
        now = self._clock()
        if now - self._listed_at >= LIST_EVALUATIONS_EVERY_S:
            self._listed_at = now
            self._read_evaluations()
        if now - self._logged_at >= FLEET_METRICS_EVERY_S:
            self._logged_at = now
            self._log_fleet()

    def _on_actor(self, data: bytes) -> None:
        if b'"PolicySwapped"' in data[:64]:
            self._on_swap(decode_event(data, PolicySwapped))
            return
        report = decode_event(data, ActorReported)
        before = self.view.actors.get(report.actor_id)
        if report.problem and (before is None or before.problem != report.problem):
            self.view.notes.append(f"{report.actor_id}: {report.problem}")
        self.view.actors[report.actor_id] = report

    def _on_swap(self, swap: PolicySwapped) -> None:
        if swap.version == 0 or swap.published_utc_ns < self._fleet_began_utc_ns:
            return
        to_swap_s = (swap.swapped_utc_ns - swap.published_utc_ns) / 1e9
        to_staged_s = (swap.staged_utc_ns - swap.published_utc_ns) / 1e9
        self.view.publish_to_swap_s.append(to_swap_s)
        self._metrics.log(
            {"fleet/publish_to_swap_s": to_swap_s, "fleet/publish_to_staged_s": to_staged_s}, swap.version
        )

    def _on_learner(self, data: bytes) -> None:
        self.view.learner = decode_event(data, LearnerReported)

    def _on_episode(self, data: bytes) -> None:
        event = decode_event(data, EpisodeCommitted)
        key = EpisodeKey.parse(event.key)
        actor = key.folder, key.actor_id
        if key.sequence in self._counted.get(actor, ()):  # an event may come twice
            return
        if not self._is_stored(event.key):
            raise InvalidRecord("key", f"{event.key!r} is announced and not in the store")
        self._counted.setdefault(actor, SequenceProgress()).add(key.sequence, event.key)
        self.view.collected += not layout.from_lab(event.key) and event.outcome != Outcome.ABORTED

    def _is_stored(self, key: str) -> bool:
        """Events are hints: who invents some cannot end a collection early."""
        try:
            self._store.get(key, slice(0, 1))
        except NotFound:
            return False
        return True

    def _on_policy(self, data: bytes) -> None:
        event = decode_event(data, PolicyPublished)
        self.view.published += event.published_utc_ns >= self._started_utc_ns

    def _read_evaluations(self) -> None:
        for key in self._store.keys(f"{layout.EVALUATIONS}/"):
            if key not in self.view.evaluations:
                self.view.evaluations[key] = EvaluationResult.from_json(self._store.get(key))

    def _log_fleet(self) -> None:
        actors = [actor for name, actor in self.view.actors.items() if not layout.before_fleet(name)]
        if not actors:
            return
        values = {
            "fleet/episodes": float(sum(actor.episodes for actor in actors)),
            "fleet/successes": float(sum(actor.successes for actor in actors)),
            "fleet/interventions": float(sum(actor.interventions for actor in actors)),
            "fleet/spooled": float(sum(actor.spooled for actor in actors)),
            "fleet/overruns": float(sum(actor.overruns for actor in actors)),
            "fleet/gated": float(sum(actor.gated for actor in actors)),
            "fleet/steps": float(sum(actor.steps for actor in actors)),
            "fleet/human_steps": float(sum(actor.human_steps for actor in actors)),
        }
        step = 0 if self.view.learner is None else self.view.learner.learner_step
        for actor in actors:
            if actor.policy_version is not None and actor.newest_version is not None:
                values[f"fleet/staleness/{actor.actor_id}"] = float(actor.newest_version - actor.policy_version)
        self._metrics.log(values, step)
