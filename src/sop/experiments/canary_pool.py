"""Many promotions at the price of few: episodes that were really acted, drawn again and again.

    act N episodes per policy and task -> pool -> a robot's next episode is one of the pool, with replacement

What a draw decides is an episode's outcome, length and safety counts; controller, tests, rounds, stages, signatures
and the fleet's clocks are the real ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sop.core.channel import PolicyRef
from sop.core.codec import content_hash
from sop.core.episode import Episode, Outcome
from sop.experiments.canary_fleet import RESET_S, ActingRobot, Finished, SimClock
from sop.rollout import EpisodeFacts


def facts_of(episode: Episode) -> EpisodeFacts:
    """What a canary reads of an episode."""
    aborted = episode.outcome is Outcome.ABORTED
    return EpisodeFacts(
        robot=episode.actor_id,
        sequence=episode.sequence,
        version=episode.policy_version,
        task=episode.task,
        success=None if aborted else episode.outcome is Outcome.SUCCESS and not episode.interventions,
        intervened=bool(episode.interventions),
        steps=episode.num_steps,
        safety=episode.safety,
        end_utc_ns=episode.end_utc_ns,
    )


class Pool:
    """Episodes of one policy, by task.

    Args:
        robot: acts them; has a scene of its own for each.
        version: the policy.
        episodes: how many, over all tasks.
    """

    def __init__(self, robot: ActingRobot, version: int, episodes: int) -> None:
        clock = SimClock()
        self.by_task: dict[str, list[tuple[EpisodeFacts, int]]] = {}
        for _ in range(episodes):
            began = clock.now_ns
            facts = facts_of(robot.act(version, clock))
            robot.clear()
            self.by_task.setdefault(facts.task, []).append((facts, clock.now_ns - began))

    @property
    def rates(self) -> Mapping[str, float]:
        """Task -> share of episodes that succeeded."""
        return {
            task: sum(facts.success is True for facts, _ in drawn) / len(drawn)
            for task, drawn in sorted(self.by_task.items())
        }


class PooledFleet:
    """Robots whose episodes are drawn. Implements `EpisodeSource`; `act` is what `run_trial` calls.

    Args:
        tasks: in turns.
        pools: version -> where its episodes come from.
        clock_utc_ns: UTC of simulated time 0.
        seed: of the draws.
    """

    def __init__(self, tasks: Sequence[str], pools: Mapping[int, Pool], clock_utc_ns: int, seed: int) -> None:
        self._tasks = tuple(tasks)
        self._pools = pools
        self._utc_ns = clock_utc_ns
        self._rng = np.random.default_rng(seed)
        self._sent: dict[str, list[EpisodeFacts]] = {}
        self._acted: dict[str, int] = {}

    def next_sequence(self, robot: str) -> int:
        """See `EpisodeSource`."""
        return len(self._sent.get(robot, ()))

    def read(self, robot: str, first: int) -> Iterator[EpisodeFacts]:
        """See `EpisodeSource`."""
        return iter(self._sent.get(robot, [])[first:])

    def act(self, robot: str, version: int, now_ns: int) -> Finished:
        """One drawn episode."""
        sequence = self._acted.get(robot, 0)
        self._acted[robot] = sequence + 1
        drawn = self._pools[version].by_task[self._tasks[(sequence + len(robot)) % len(self._tasks)]]
        facts, lasted_ns = drawn[int(self._rng.integers(len(drawn)))]
        end = now_ns + lasted_ns
        mine = replace(facts, robot=robot, sequence=sequence, version=version, end_utc_ns=self._utc_ns + end)

        def store() -> None:
            self._sent.setdefault(robot, []).append(mine)

        return Finished(facts.success is True, end, end + int(RESET_S * 1e9), store)


def pooled_ref(version: int) -> PolicyRef:
    """Name of a policy that is only drawn from: no such manifest is stored."""
    return PolicyRef(version, content_hash(f"pooled {version}".encode()))
