"""The actor: one process, one robot, one control loop that never waits for disk, network or learner."""

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from sop.actor.chunk import ChunkPlayback
from sop.actor.exploration import Exploration
from sop.actor.journal import StepJournal
from sop.actor.lifecycle import ActorState, move
from sop.actor.recorder import EpisodeRecorder
from sop.actor.safety import Gate, SafetyGate, SafetyTally
from sop.actor.settings import ActorCounts, ActorSettings, training_seed
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
REST_S = 10.0
"""Longest time to come to rest before an episode ends that is broken off, robot seconds."""


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
        gate: has the last word on every command; None makes one from the embodiment alone.
        journal: keeps the steps of the running episode on disk; None keeps them in memory only.
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
        gate: Gate | None = None,
        journal: StepJournal | None = None,
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
        self._gate: Gate = SafetyGate(embodiment) if gate is None else gate
        self._journal = journal
        self._tally = SafetyTally()
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
        self.aborted = ""
        """Why the last episode that ended as ABORTED by itself did; empty when none did."""

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
        """Act until `stop` is set or `end_sequence` is reached. A running episode then ends as ABORTED, and so does
        one whose policy must be left or whose gate closes: at once, but not before the robot stands."""
        if self._subscriber is not None and not self._wait_for_policy(stop):
            return self._move(ActorState.STOPPED)
        self._move(ActorState.RESETTING)
        while not stop.is_set() and self._sequence != self.settings.end_sequence:
            self._swap_if_staged()
            if problem := self._must_hold():
                self._hold(problem, stop)
                continue
            observation = self._reset()
            if not self._gate.located:
                self._hold("the robot does not say where it is, so that no target means standing still", stop)
                continue
            self.problem = ""
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
        self._gate.refresh()
        if self._gate.closed:
            return f"stopped for safety, until a person clears it: {self._gate.closed}"
        if self._writer.full:
            return self._writer.full
        if leave := self._must_leave():
            return f"policy {self.policy_version} may not act any more: {leave}"
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
        self._gate.reset(observation.state)
        if self._policy is not None and self._playback is not None:
            if instruction not in self._read:  # a new sentence may have to be encoded: not in the control loop
                self._playback.next(observation, instruction)
                self._read.add(instruction)
            self._policy.reset(seed, 0.0 if self._exploration is None else self._exploration.coherence)
            self._playback.drop()
        if self._exploration is not None:
            self._exploration.reset(seed, number)
        self._tally = SafetyTally()
        self._recorder.begin(self.task, instruction, self.policy_version, self._policy_times)
        if self._journal is not None:
            self._journal.begin(number, self._recorder.facts)
        self._instruction = instruction
        self._deadline_ns = self._clock.monotonic_ns()
        return observation

    def _act(self, observation: Observation, stop: threading.Event) -> tuple[Outcome, bool]:
        """The control loop of one episode: observe, propose, explore, correct, gate, record, step, keep time."""
        human, leave, who = False, "", None
        while not stop.is_set() and not (leave := self._must_leave() or self._gate.closed):
            proposal, command = self._propose(observation, explore=not human)
            correction = self._operator.correct(observation, command)
            if human != (correction is not None):
                human = not human
                self._drop_plan()
                if not human:  # handed back: act on a plan from what is seen now, not from during the correction
                    proposal, command = self._propose(observation, explore=True)
            command = command if correction is None else correction
            who = (self._operator.name, self._operator.reason) if human else None
            observation, ended = self._step(observation, command, proposal, who)
            if ended is not None:
                return ended
        if leave:
            self.aborted = leave
            _log.error("%s ends episode %d: %s", self.settings.actor_id, self._sequence, leave)
        return self._come_to_rest(observation, who)

    def _come_to_rest(self, observation: Observation, who: tuple[str, str] | None) -> tuple[Outcome, bool]:
        """Brake within the limits until the robot stands: an episode that is broken off leaves none in motion.

        The steps are recorded as of `who` was in control until then.
        """
        for _ in range(round(REST_S * self._embodiment.control_hz)):
            if self._gate.at_rest or not self._recorder.num_steps:
                return Outcome.ABORTED, False
            observation, ended = self._step(observation, None, None, who)
            if ended is not None:
                return ended
        _log.error("%s did not come to rest within %g s: look at it", self.settings.actor_id, REST_S)
        return Outcome.ABORTED, False

    def _step(
        self,
        observation: Observation,
        command: npt.NDArray[np.float32] | None,
        proposal: npt.NDArray[np.float32] | None,
        who: tuple[str, str] | None,
    ) -> tuple[Observation, tuple[Outcome, bool] | None]:
        """Gate, record, execute one command (None brakes); what is seen then, and how the episode ended if it did."""
        state = observation.state
        gated = self._gate.brake(state=state) if command is None else self._gate.check(command, state)
        self.counts.gated += bool(gated.reason)
        self._tally.add(gated.verdict)
        self._recorder.append(observation, gated.action, proposal, who)
        raw, _, terminated, truncated, info = self._robot.step(gated.action)
        if "executed" in info:  # the robot has a gate of its own
            self._recorder.executed(info["executed"])
            self._tally.merge(info["safety"])
        if self._journal is not None:
            self._journal.append(self._recorder.last_step())
        self._keep_time()
        ended = None
        if info["success"]:
            ended = (Outcome.SUCCESS, False)
        elif terminated or truncated:
            ended = (Outcome.FAILURE, bool(truncated))
        return Observation(raw["images"], raw["state"]), ended

    def _must_leave(self) -> str:
        """Why the acting policy must not take another step; empty when it may."""
        return "" if self._subscriber is None else self._subscriber.must_leave

    def _propose(
        self, observation: Observation, *, explore: bool
    ) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.float32] | None]:
        """What the policy proposes [A], and what would be executed [A] if nobody corrects it; None without a policy."""
        if self._playback is None:
            return None, None
        new_chunk, began_ns = self._playback.plans_next, self._clock.monotonic_ns()
        proposal = self._playback.next(observation, self._instruction)
        if new_chunk and self._policy is not None:
            share_ns = self._policy.spec.execution_horizon / self._embodiment.control_hz * 1e9
            self._tally.late += self._clock.monotonic_ns() - began_ns > share_ns
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
        episode = self._recorder.finish(self._sequence, outcome, truncated=truncated, safety=self._tally.counts())
        if self._journal is not None:
            self._journal.end(episode)
        self._sequence += 1
        self.counts.add(episode)
        self._writer.submit(episode)

    def _move(self, to: ActorState) -> None:
        self._state = move(self._state, to)
