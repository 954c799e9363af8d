"""The actor: one process, one robot, one control loop that never waits for disk, network or learner."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from sop.actor.chunk import ChunkPlayback
from sop.actor.exploration import Exploration
from sop.actor.lifecycle import ActorState, move
from sop.actor.recorder import EpisodeRecorder
from sop.actor.safety import SafetyGate
from sop.actor.source import PolicySource
from sop.actor.spool import SpoolWriter
from sop.core.clock import Clock
from sop.core.embodiment import Embodiment, Observation
from sop.core.episode import Outcome, PolicyTimes
from sop.core.errors import RunError
from sop.core.events import PolicySwapped
from sop.core.policy import Policy
from sop.operators import Operator

_log = logging.getLogger(__name__)
MAX_VERSION_LAG = 40
"""A robot that runs a policy this many publishes old holds between episodes until it has a newer one."""


def training_seed(seed: int, sequence: int) -> int:
    """Seed of an actor's episode: 2^31 or more, so that evaluations (below 2^31) never share one."""
    return int(np.random.SeedSequence([seed, sequence]).generate_state(1)[0]) | 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorSettings:
    """What an actor does, episode after episode."""

    actor_id: str
    tasks: tuple[str, ...]
    """Episode i works on tasks[(first_task + i) mod n], i counted by the actor's sequence numbers."""
    instructions: Mapping[str, tuple[str, ...]]
    """Phrasings per task; episodes take turns."""
    seed: int
    """Episode i is reset with a seed derived from this and i."""
    first_task: int = 0
    """Shifts the order of tasks, so that the robots of a fleet do not all work on the same one."""
    reset_options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the robot's `reset` beside the task."""
    reset_s: float = 0.0
    """Robot seconds between two episodes."""
    speed: float = 1.0
    """Robot seconds per wall-clock second, 0 for no pacing (simulation only)."""
    end_sequence: int | None = None
    """Stop when the next episode would have this number; None for no end."""


@dataclass(slots=True)
class ActorCounts:
    """What an actor has done since it started."""

    episodes: int = 0
    successes: int = 0
    interventions: int = 0
    human_steps: int = 0
    steps: int = 0
    overruns: int = 0
    gated: int = 0


class Actor:
    """Runs episodes until told to stop.

    Args:
        settings: what to do.
        robot: observation `{"images": {camera: uint8 [h, w, 3]}, "state": float32 [S]}`, `info["success"]`.
        embodiment: of the robot.
        operator: may take over at any step.
        writer: takes finished episodes.
        next_sequence: number of the first episode.
        clock: paces the control loop and stamps steps.
        subscriber: stages policies ready to act (it has `prepare`); None when no policy is used (demonstrations).
        exploration: changes what the policy proposes; None executes the proposals as they are.
        on_swap: told of every swap; must not block.
    """

    def __init__(
        self,
        settings: ActorSettings,
        robot: gymnasium.Env[Any, Any],
        embodiment: Embodiment,
        operator: Operator,
        writer: SpoolWriter,
        *,
        next_sequence: int,
        clock: Clock,
        subscriber: PolicySource | None,
        exploration: Exploration | None = None,
        on_swap: Callable[[PolicySwapped], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self._robot = robot
        self._embodiment = embodiment
        self._operator = operator
        self._writer = writer
        self._sequence = next_sequence
        self._clock = clock
        self._subscriber = subscriber
        self._exploration = exploration
        self._on_swap = on_swap
        self._gate = SafetyGate(embodiment)
        self._recorder = EpisodeRecorder(settings.actor_id, embodiment, clock)
        self._policy: Policy | None = None
        self._playback: ChunkPlayback | None = None
        self._state = ActorState.STARTING
        self._deadline_ns = 0
        self._instruction = ""
        self._policy_times: PolicyTimes | None = None
        self._read: set[str] = set()
        self.counts = ActorCounts()
        self.task = ""
        self.problem = ""
        """Why the robot holds; empty while it works."""

    @property
    def refusal(self) -> str:
        """Why a policy newer than the acting one was refused; empty when none was."""
        refusals = {} if self._subscriber is None else self._subscriber.refusals
        newest = max(refusals, default=-1)
        return refusals[newest] if newest > (-1 if self.policy_version is None else self.policy_version) else ""

    @property
    def state(self) -> ActorState:
        """What the actor is doing now; may be read from another thread."""
        return self._state

    @property
    def policy_version(self) -> int | None:
        """Version that acts now."""
        return None if self._policy is None else self._policy.version

    def run(self, stop: threading.Event) -> None:
        """Act until `stop` is set or `end_sequence` is reached; a running episode then ends as ABORTED."""
        if self._subscriber is not None and not self._wait_for_policy(stop):
            return self._move(ActorState.STOPPED)
        self._move(ActorState.RESETTING)
        while not stop.is_set() and self._sequence != self.settings.end_sequence:
            self._swap_if_staged()
            if problem := self._must_hold():
                self._hold(problem, stop)
                continue
            self.problem = ""
            observation = self._reset()
            self._move(ActorState.ACTING)
            outcome, truncated = Outcome.ABORTED, False
            try:
                outcome, truncated = self._act(observation, stop)
            finally:  # also when robot, policy or operator fail: what was recorded until then is kept
                self._move(ActorState.RESETTING)
                self._close_episode(outcome, truncated)
        return self._move(ActorState.STOPPED)

    def _wait_for_policy(self, stop: threading.Event) -> bool:
        self._move(ActorState.WAITING)
        while not stop.is_set() and self._policy is None:
            self._swap_if_staged()
            stop.wait(0.05)
        return self._policy is not None

    def _swap_if_staged(self) -> None:
        """Exchange policies; called between two episodes only, so an episode has one version.

        Two pointers: the staged policy is loaded already, the one that acted until now is loaded next.
        """
        staged = None if self._subscriber is None else self._subscriber.take(self._policy)
        if staged is None:
            return
        if staged.policy is None:
            raise RunError(f"policy {staged.version} is staged, but not loaded: make the subscriber with `prepare`")
        self._policy = staged.policy
        self._playback = ChunkPlayback(staged.policy, staged.manifest.conditioning)
        self._read.clear()  # the sentences that the other policy has read
        self._policy_times = PolicyTimes(
            published_utc_ns=staged.manifest.created_utc_ns,
            staged_utc_ns=staged.staged_utc_ns,
            swapped_utc_ns=self._clock.utc_ns(),
        )
        self._on_swap(
            PolicySwapped(actor_id=self.settings.actor_id, version=staged.version, **asdict(self._policy_times))
        )

    def _must_hold(self) -> str:
        if self._writer.full:
            return self._writer.full
        newest = None if self._subscriber is None else self._subscriber.newest_version
        if newest is not None and self.policy_version is not None and newest - self.policy_version > MAX_VERSION_LAG:
            return f"policy {self.policy_version} is {newest - self.policy_version} versions behind: check the link"
        return ""

    def _hold(self, problem: str, stop: threading.Event) -> None:
        if problem != self.problem:
            _log.error("%s holds: %s", self.settings.actor_id, problem)
        self.problem = problem
        self._move(ActorState.HOLDING)
        stop.wait(0.2)
        self._move(ActorState.RESETTING)

    def _reset(self) -> Observation:
        """Put the scene back, and prepare everything that an episode needs."""
        settings, number = self.settings, self._sequence
        self.task = settings.tasks[(settings.first_task + number) % len(settings.tasks)]
        phrasings = settings.instructions[self.task]
        instruction = phrasings[(number // len(settings.tasks)) % len(phrasings)]
        seed = training_seed(settings.seed, number)
        if settings.speed > 0:
            self._clock.sleep_until(self._clock.monotonic_ns() + int(settings.reset_s / settings.speed * 1e9))
        raw, _ = self._robot.reset(seed=seed, options={"task": self.task, **settings.reset_options})
        observation = Observation(raw["images"], raw["state"])
        self._operator.reset(self.task, seed)
        self._gate.reset()
        if self._policy is not None and self._playback is not None:
            if instruction not in self._read:  # a new sentence may have to be encoded: not in the control loop
                self._playback.next(observation, instruction)
                self._read.add(instruction)
            self._policy.reset(seed)
            self._playback.drop()
        if self._exploration is not None:
            self._exploration.reset(seed, number)
        self._recorder.begin(self.task, instruction, self.policy_version, self._policy_times)
        self._instruction = instruction
        self._deadline_ns = self._clock.monotonic_ns()
        return observation

    def _act(self, observation: Observation, stop: threading.Event) -> tuple[Outcome, bool]:
        """The control loop of one episode: observe, propose, explore, correct, gate, record, step, keep time."""
        human = False
        while not stop.is_set():
            proposal, command = self._propose(observation, explore=not human)
            correction = self._operator.correct(observation, command)
            if human != (correction is not None):
                human = not human
                self._drop_plan()
                if not human:  # handed back: act on a plan from what is seen now, not from during the correction
                    proposal, command = self._propose(observation, explore=True)
            command = command if correction is None else correction
            gated = self._gate.check(command if command is not None else self._gate.hold())
            self.counts.gated += bool(gated.reason)
            who = (self._operator.name, self._operator.reason) if human else None
            self._recorder.append(observation, gated.action, proposal, who)
            raw, _, terminated, truncated, info = self._robot.step(gated.action)
            observation = Observation(raw["images"], raw["state"])
            self._keep_time()
            if info["success"]:
                return Outcome.SUCCESS, False
            if terminated or truncated:
                return Outcome.FAILURE, bool(truncated)
        return Outcome.ABORTED, False

    def _propose(
        self, observation: Observation, *, explore: bool
    ) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.float32] | None]:
        """What the policy proposes [A], and what would be executed [A] if nobody corrects it; None without a policy."""
        if self._playback is None:
            return None, None
        new_chunk = self._playback.plans_next
        proposal = self._playback.next(observation, self._instruction)
        if self._exploration is None or not explore:
            return proposal, proposal
        return proposal, self._exploration.explore(proposal, new_chunk=new_chunk)

    def _drop_plan(self) -> None:
        """Control changes hands: neither the rest of the chunk nor its offset is meant for what comes now."""
        if self._playback is not None:
            self._playback.drop()
        if self._exploration is not None:
            self._exploration.drop()

    def _keep_time(self) -> None:
        """Sleep until the next control step is due; a late step is counted and the beat starts anew."""
        if self.settings.speed <= 0:
            return
        self._deadline_ns += int(1e9 / (self._embodiment.control_hz * self.settings.speed))
        late_ns = self._clock.monotonic_ns() - self._deadline_ns
        if late_ns > 0:
            self.counts.overruns += 1
            self._deadline_ns += late_ns
        else:
            self._clock.sleep_until(self._deadline_ns)

    def _close_episode(self, outcome: Outcome, truncated: bool) -> None:
        if not self._recorder.num_steps:
            return
        episode = self._recorder.finish(self._sequence, outcome, truncated=truncated)
        self._sequence += 1
        self._writer.submit(episode)
        self.counts.episodes += outcome is not Outcome.ABORTED
        self.counts.successes += outcome is Outcome.SUCCESS
        self.counts.interventions += len(episode.interventions)
        self.counts.human_steps += int(episode.controller.sum())
        self.counts.steps += episode.num_steps

    def _move(self, to: ActorState) -> None:
        self._state = move(self._state, to)
