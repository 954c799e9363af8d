"""A fleet of simulated robots on the `prod` channel, in one process and without waiting for anybody's time.

Every robot has its own clock. The one whose clock is behind acts next: it sends its last episode, obeys the channel's
newest state, and acts for one episode; the controller takes a step whenever its own clock is due.

    robot    send -> newest state, signature checked -> swap -> actor.run for one episode -> put the scene back -> ...
    control  Canary.step() every `poll_s`

An order therefore reaches a robot at the end of its episode, also an immediate one: times to be back are upper bounds.
Robots in no arm of a trial would not change any number and are not simulated while it runs.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from sop.actor.actor import Actor
from sop.actor.latch import SafetyLatch
from sop.actor.safety import SafetyGate
from sop.actor.settings import ActorSettings
from sop.broadcast import PolicyManifest, StagedPolicy, fetch_policy
from sop.broadcast.fetch import ReadCost
from sop.core.channel import ChannelState
from sop.core.episode import Episode
from sop.core.errors import RunError
from sop.core.policy import Policy
from sop.experiments.canary_policies import TIME_FACTOR, build, toy_limits
from sop.operators.base import Nobody
from sop.robots import DEPLOYMENT
from sop.robots.toy import ToyRobot
from sop.rollout import Canary
from sop.rollout.signed import SignedChannel
from sop.transport import ObjectStore
from sop.trust import Role, SigningKey, TrustRoot
from sop.trust.root import ROLES

T = TypeVar("T")
RESET_S = 10.0
"""Robot time between two episodes."""
CLEAR_S = 120.0
"""Time until a person has looked at a robot that stopped for safety and cleared its latch."""
START_UTC_NS = 1_750_000_000_000_000_000
YEAR_NS = 365 * 86400 * 10**9


class SimClock:
    """Simulated time. Implements `Clock`: what is computed takes none, each reading moves it by a microsecond."""

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns

    def monotonic_ns(self) -> int:
        """See `Clock`."""
        self.now_ns += 1000
        return self.now_ns

    def utc_ns(self) -> int:
        """See `Clock`."""
        return START_UTC_NS + self.now_ns

    def sleep_until(self, monotonic_ns: int) -> None:
        """See `Clock`; instant."""
        self.now_ns = max(self.now_ns, monotonic_ns)


class PublishedPolicies:
    """Policies of the store, each loaded once: the robots of one process share it.

    Args:
        store: where they are published.
        faults: version -> fault of `Faulty`.
        lost: share of the episodes that an unreliable one spoils.
    """

    def __init__(self, store: ObjectStore, faults: Mapping[int, str], lost: float) -> None:
        self._store = store
        self._faults = faults
        self.lost = lost
        self._staged: dict[int, StagedPolicy] = {}

    def fresh(self, version: int) -> tuple[PolicyManifest, Policy]:
        """A policy of one's own, as the offline gate makes it."""
        manifest, weights = fetch_policy(self._store, version)
        return manifest, build(manifest.spec, weights, version, self._faults.get(version, ""), self.lost)

    def staged(self, version: int) -> StagedPolicy:
        """Ready to act."""
        if version not in self._staged:
            manifest, policy = self.fresh(version)
            self._staged[version] = StagedPolicy(
                manifest=manifest, weights={}, policy=policy, published_utc_ns=manifest.created_utc_ns,
                staged_utc_ns=manifest.created_utc_ns, cost=ReadCost(), prepare_s=0.0,
            )  # fmt: skip
        return self._staged[version]


class _One:
    """`PolicySource` with the policy of one episode."""

    problem, must_leave = "", ""

    def __init__(self, staged: StagedPolicy) -> None:
        self._staged: StagedPolicy | None = staged
        self.newest_version: int | None = staged.version
        self.refusals: Mapping[int, str] = {}

    def take(self, instead_of: Policy | None = None) -> StagedPolicy | None:  # noqa: ARG002
        """See `PolicySource`."""
        staged, self._staged = self._staged, None
        return staged


class _Keep:
    """Stands for the spool's writer: keeps the episode."""

    full = ""

    def __init__(self) -> None:
        self.episodes: list[Episode] = []

    def submit(self, episode: Episode) -> None:
        """Take a finished episode."""
        self.episodes.append(episode)


class ActingRobot:
    """A toy robot with the real control loop, the real safety gate and its own limits.

    Args:
        name: actor id.
        number: decides the scenes.
        tasks: in turns.
        policies: what it may run.
        latch: folder of the latch's record; None keeps it in memory.
    """

    def __init__(
        self, name: str, number: int, tasks: Sequence[str], policies: PublishedPolicies, latch: Path | None = None
    ) -> None:
        self.name = name
        self.sequence = 0
        self._number = number
        self._tasks = tuple(tasks)
        self._policies = policies
        self._robot = ToyRobot()
        self._latch_path = latch
        self._latch: SafetyLatch | None = None

    def act(self, version: int, clock: SimClock) -> Episode:
        """One episode; the clock then shows its end. A latch that it closed is still closed."""
        latch = self._latch = self._latch or SafetyLatch(clock, self._latch_path)
        writer: Any = _Keep()
        settings = ActorSettings(
            actor_id=self.name,
            tasks=self._tasks,
            instructions=self._robot.instructions,
            seed=1000 + self._number,
            first_task=self._number,
            reset_options={"scene": DEPLOYMENT, "time_factor": TIME_FACTOR},
            speed=1.0,
            end_sequence=self.sequence + 1,
        )
        body = self._robot.embodiment
        Actor(
            settings, self._robot, body, Nobody(), writer, next_sequence=self.sequence, clock=clock,
            subscriber=_One(self._policies.staged(version)), gate=SafetyGate(body, toy_limits(self._robot), latch),
        ).run(Event())  # fmt: skip
        self.sequence += 1
        episode: Episode = writer.episodes[0]
        return episode

    def clear(self) -> bool:
        """A person clears the latch; whether it was closed."""
        if self._latch is None or not self._latch.reason:
            return False
        self._latch.clear("technician")
        return True


@dataclass(frozen=True, slots=True)
class Finished:
    """One episode, as the fleet sees it."""

    success: bool
    end_ns: int
    ready_ns: int
    """When the robot can act again."""
    store: Callable[[], None]
    """Makes it visible to the controller."""


Act = Callable[[str, int, int], Finished]
"""(robot, version, simulated time) -> one episode."""


@dataclass(slots=True)
class Trial:
    """What a fleet went through while a candidate was on trial."""

    robots: set[str] = field(default_factory=set)
    """That acted with the candidate."""
    episodes: int = 0
    """With the candidate, until the last robot left it."""
    failures: int = 0
    """Of these, aborted ones included."""
    control_episodes: int = 0
    control_failures: int = 0
    seconds: float = 0.0
    """Simulated, from the first canary to the end of the trial."""
    back_s: float | None = None
    """Simulated time from the order to go back until the last canary had left the candidate; None when promoted."""
    why: str = ""
    promoted: bool = False
    rolled_back: bool = False
    """The candidate is banned; neither of the two: it was withdrawn."""
    immediate: bool = False


def run_trial(
    canary: Canary, channel: SignedChannel, act: Act, clock: SimClock, *, poll_s: float, max_episodes: int
) -> Trial:
    """Let the robots act until the trial that has begun is over and every canary has left the candidate (blocking).

    Args:
        canary: the controller; uses `clock`.
        channel: what robots obey.
        act: one episode of one robot.
        clock: the controller's; moves on.
        poll_s: between two steps of the controller.
        max_episodes: of candidate and control, after which it is given up (RunError).
    """
    trial, began = Trial(), clock.now_ns
    begun = _require(channel.newest())
    tried = _require(begun.candidate)
    candidate = tried.version
    sending: dict[str, Finished] = {}
    running: dict[str, int] = {}
    queue = [(began, robot) for robot in _arms(begun)]
    due, ended_ns = began, None
    while queue:
        now, robot = heapq.heappop(queue)
        while due <= now and ended_ns is None:
            clock.now_ns = max(clock.now_ns, due)
            before, decision = channel.newest(), canary.step()
            state, due = _require(channel.newest()), due + int(poll_s * 1e9)
            if state.candidate is None:
                ended_ns = clock.now_ns
                trial.why = "" if decision is None else decision.why
                trial.promoted, trial.immediate = state.stable == tried, state.immediate
                trial.rolled_back = tried.manifest_hash in state.banned
            elif before is not state:
                queue += [(now, name) for name in _arms(state) if name != robot and name not in _waiting(queue)]
                heapq.heapify(queue)
        state = _require(channel.newest())
        if robot in sending:
            sending.pop(robot).store()
        version = _require(state.policy_of(robot)).version
        if ended_ns is not None:
            if running.get(robot) == candidate and not trial.promoted:
                trial.back_s = max(trial.back_s or 0.0, (now - ended_ns) / 1e9)
            continue
        if robot not in _arms(state):
            continue
        finished = act(robot, version, now)
        sending[robot], running[robot] = finished, version
        heapq.heappush(queue, (finished.ready_ns, robot))
        _count(trial, robot, finished, with_candidate=version == candidate)
        if trial.episodes + trial.control_episodes > max_episodes:
            raise RunError(f"no verdict after {max_episodes} episodes: {trial}")
    trial.seconds = ((ended_ns or clock.now_ns) - began) / 1e9
    return trial


def _count(trial: Trial, robot: str, finished: Finished, *, with_candidate: bool) -> None:
    if with_candidate:
        trial.robots.add(robot)
        trial.episodes += 1
        trial.failures += not finished.success
    else:
        trial.control_episodes += 1
        trial.control_failures += not finished.success


def _arms(state: ChannelState) -> tuple[str, ...]:
    return (*state.candidate_robots, *state.control_robots)


def _waiting(queue: Sequence[tuple[int, str]]) -> set[str]:
    return {robot for _, robot in queue}


def _require(value: T | None) -> T:
    if value is None:
        raise RunError("the channel has no such state")
    return value


def make_trust() -> tuple[SigningKey, TrustRoot]:
    """A key that may sign everything, and the root that says so."""
    key = SigningKey.generate()
    role = Role(key_ids=(key.key_id,), threshold=1)
    roles = dict.fromkeys(ROLES, role)
    expires = START_UTC_NS + 100 * YEAR_NS
    return key, TrustRoot(fleet="canary", version=1, expires_utc_ns=expires, keys={key.key_id: key.public}, roles=roles)
