"""What the tests of the rollout share: facts of episodes, a source of them, and a channel in memory."""

from collections.abc import Iterator, Sequence

from sop.core.channel import PROD, ChannelState, PolicyRef
from sop.core.episode import SafetyCounts
from sop.core.errors import RunError
from sop.rollout import Canary, CanarySettings, EpisodeFacts
from sop.testing.clock import FakeClock
from sop.testing.memory import MemoryStore

STABLE, CANDIDATE, OTHER = (PolicyRef(version, f"{version:032x}") for version in (3, 7, 9))
ROBOTS = tuple(f"r{number:02d}" for number in range(10))
TASKS = ("push", "pull")


def facts(robot: str, sequence: int, version: int | None, **changes: object) -> EpisodeFacts:
    """One success of 20 steps without anything special; tasks take turns."""
    fields: dict[str, object] = {
        "robot": robot,
        "sequence": sequence,
        "version": version,
        "task": TASKS[sequence % 2],
        "success": True,
        "intervened": False,
        "steps": 20,
        "safety": SafetyCounts(),
        "end_utc_ns": 0,
    }
    return EpisodeFacts(**(fields | changes))  # type: ignore[arg-type]


class Episodes:
    """`EpisodeSource` in memory."""

    def __init__(self) -> None:
        self.sent: dict[str, list[EpisodeFacts]] = {}

    def next_sequence(self, robot: str) -> int:
        return len(self.sent.get(robot, []))

    def read(self, robot: str, first: int) -> Iterator[EpisodeFacts]:
        return iter(self.sent.get(robot, [])[first:])

    def add(self, robot: str, version: int, count: int = 1, **changes: object) -> None:
        for _ in range(count):
            self.sent.setdefault(robot, []).append(facts(robot, self.next_sequence(robot), version, **changes))


class Channel:
    """`ChannelPort` in memory: a number is taken once."""

    def __init__(self) -> None:
        self.states: list[ChannelState] = []

    def newest(self) -> ChannelState | None:
        return self.states[-1] if self.states else None

    def read(self, sequence: int) -> ChannelState | None:
        return self.states[sequence - 1] if sequence <= len(self.states) else None

    def publish(self, state: ChannelState) -> None:
        if state.sequence != len(self.states) + 1:
            raise RunError(f"state {state.sequence} is taken")
        self.states.append(state)


class Fleet:
    """Ten robots, a channel, a store, and as many controllers as a test wants."""

    def __init__(self, settings: CanarySettings | None = None, robots: Sequence[str] = ROBOTS) -> None:
        self.robots = list(robots)
        self.channel, self.store, self.episodes, self.clock = Channel(), MemoryStore(), Episodes(), FakeClock()
        self.settings = settings or CanarySettings(min_pairs=3)
        self.canary = self.controller()
        self.canary.promote(STABLE, "first")

    def controller(self) -> Canary:
        return Canary(
            "run",
            self.channel,
            self.store,
            self.episodes,
            tasks=TASKS,
            robots=lambda: self.robots,
            execution_horizon=5,
            utc_ns=self.clock.utc_ns,
            settings=self.settings,
        )

    def begin(self) -> ChannelState:
        self.canary.begin(CANDIDATE, lambda _: "")
        self.canary.step()  # the stage's record
        return self.state

    @property
    def state(self) -> ChannelState:
        state = self.channel.newest()
        assert state is not None
        assert state.channel == PROD
        return state

    def act(self, rounds: int, *, candidate: dict[str, object] | None = None, **control: object) -> None:
        """Every robot of both arms acts as the newest state says."""
        state = self.state
        for _ in range(rounds):
            for robot in (*state.candidate_robots, *state.control_robots):
                policy = state.policy_of(robot)
                assert policy is not None
                changes = (candidate or {}) if robot in state.candidate_robots else control
                now = {"end_utc_ns": self.clock.utc_ns()}
                self.episodes.add(robot, policy.version, **{**now, **changes})
