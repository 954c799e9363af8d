"""An actor with everything around it, for tests of the control loop: real parts, fake time and policy."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from sop.actor import Actor, ActorSettings, EpisodeSpool, Exploration, SpoolWriter
from sop.broadcast import PolicyFacts, Publisher, Subscriber, prepare_with
from sop.core.codec import decode
from sop.core.embodiment import Observation
from sop.core.episode import Episode
from sop.core.events import PolicySwapped
from sop.core.policy import Conditioning, PolicySpec
from sop.testing.clock import FakeClock
from sop.testing.episodes import TOY_BODY
from sop.testing.memory import MemoryBus, MemoryStore
from sop.testing.policy import FakePolicy


class CountingRobot(gymnasium.Env[Any, Any]):
    """Succeeds after a fixed number of steps; keeps every action that it was given."""

    def __init__(self, steps: int = 6, on_step: Callable[[int], None] = lambda _: None) -> None:
        self.steps = steps
        self.on_step = on_step
        self.actions: list[list[npt.NDArray[np.float32]]] = []
        self.resets: list[tuple[int | None, dict[str, Any] | None]] = []

    def _seen(self) -> dict[str, Any]:
        step = len(self.actions[-1])
        return {
            "images": {"front": np.full((16, 16, 3), step, np.uint8)},
            "state": np.asarray([step, 0], np.float32),
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.resets.append((seed, options))
        self.actions.append([])
        return self._seen(), {}

    def step(self, action: npt.NDArray[np.float32]) -> Any:
        self.actions[-1].append(action)
        self.on_step(len(self.actions[-1]))
        done = len(self.actions[-1]) == self.steps
        return self._seen(), 0.0, done, False, {"success": done}


class ScriptedOperator:
    """Takes over at given steps of every episode with a constant action."""

    name = "anna"
    reason = "because"

    def __init__(self, steps: range | tuple[int, ...] = ()) -> None:
        self.steps = steps
        self.count = 0
        self.seen: list[npt.NDArray[np.float32] | None] = []

    def reset(self, task: str, seed: int) -> None:
        self.count = 0

    def correct(
        self, observation: Observation, proposed: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float32] | None:
        self.seen.append(proposed)
        self.count += 1
        return np.asarray([-0.25, 0.5], np.float32) if self.count - 1 in self.steps else None


SPEC = PolicySpec(kind="fake", config={}, embodiment=TOY_BODY, action_horizon=8, execution_horizon=4)


class Bench:
    """An actor with everything around it."""

    def __init__(
        self,
        folder: Path,
        robot: CountingRobot,
        operator: ScriptedOperator,
        *,
        policy: FakePolicy | None,
        exploration: Exploration | None = None,
    ) -> None:
        self.store, self.bus, self.clock = MemoryStore(), MemoryBus(), FakeClock(tick_ns=1000)
        self.robot, self.policies = robot, [] if policy is None else [policy]
        self.made: list[FakePolicy] = []
        self.spool = EpisodeSpool(folder, "episodes", "robot-0")
        self.writer = SpoolWriter(self.spool, lambda _: None)
        self.publisher = Publisher(self.store, self.bus, keep_policies=5)
        self.subscriber: Subscriber | None = None
        if policy is not None:
            self.publish()
            prepare = prepare_with(self.make_policy)
            self.subscriber = Subscriber(self.store, self.bus, TOY_BODY, poll_s=0.01, prepare=prepare)
        self.swaps: list[PolicySwapped] = []
        self.actor = Actor(
            ActorSettings(
                actor_id="robot-0",
                tasks=("push", "pull"),
                instructions={"push": ("push it", "shove it"), "pull": ("pull it",)},
                seed=1,
                speed=1.0,
                reset_s=2.0,
                end_sequence=3,
            ),
            robot,
            TOY_BODY,
            operator,
            self.writer,
            next_sequence=self.spool.next_sequence(),
            clock=self.clock,
            subscriber=self.subscriber,
            exploration=exploration,
            on_swap=self.swaps.append,
        )

    def make_policy(self, _spec: PolicySpec) -> FakePolicy:
        """The given policy first, then others like it."""
        self.made.append(self.policies.pop() if self.policies else policy())
        return self.made[-1]

    def wait_until_staged(self, version: int) -> None:
        subscriber = self.subscriber
        assert subscriber is not None
        with subscriber._changed:
            assert subscriber._changed.wait_for(lambda: subscriber._current == version, 30)

    def publish(self) -> int:
        facts = PolicyFacts(
            learner_step=0,
            algorithm="test",
            spec=SPEC,
            conditioning=Conditioning(),
            online_episodes=0,
            offline_episodes=0,
            config_hash="",
            code_version="",
        )
        return self.publisher.publish_now({"w": np.zeros(1, np.float32)}, facts)

    def run(self) -> list[Episode]:
        self.actor.run(threading.Event())
        return self.finish()

    def finish(self) -> list[Episode]:
        self.writer.close()
        self.publisher.close()
        if self.subscriber is not None:
            self.subscriber.close()
        return [decode(self.spool.read(key)) for key in self.spool.pending()]


def policy() -> FakePolicy:
    return FakePolicy(TOY_BODY, action_horizon=8, execution_horizon=4)
