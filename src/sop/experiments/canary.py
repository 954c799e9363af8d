"""`sop experiment canary`: does the canary catch what it must, and leave alone what is good?

    five candidates    15 points lower success; twice the velocity; one that freezes; not a number at step 200; a good
                       one: really acted, with real control loops, safety gates, stored episodes and signed states
    50 promotions      of policies that are equal, or were trained a little further: robots' episodes are drawn from
                       pools of really acted ones

Required: four caught, one of them before any robot moves, the good one promoted, and no good policy rolled back.
"""

import argparse
import itertools
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sop.broadcast import PolicyFacts, Publisher
from sop.core import layout
from sop.core.channel import PolicyRef
from sop.core.codec import EncodedEpisode, content_hash, encode
from sop.core.errors import PolicyRefused
from sop.core.policy import Conditioning
from sop.experiments.canary_fleet import (
    CLEAR_S,
    RESET_S,
    START_UTC_NS,
    ActingRobot,
    Finished,
    PublishedPolicies,
    SimClock,
    Trial,
    make_trust,
    run_trial,
)
from sop.experiments.canary_policies import TASKS, Trainer
from sop.experiments.canary_pool import Pool, PooledFleet, pooled_ref
from sop.experiments.canary_report import write_report
from sop.rollout import Canary, CanarySettings, Limits, StoredEpisodes, replay
from sop.rollout.signed import SignedChannel, policy_ref
from sop.transport import open_bus, open_store

RUN = "canary"
FAULTS = {1: "unreliable", 2: "fast", 3: "frozen", 4: "nan", 5: ""}
"""Version -> fault; version 0 is the stable policy, 6 and up were trained further."""
NAMES = {1: "15 points lower", 2: "twice the velocity", 3: "freezes", 4: "not a number", 5: "good"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Numbers of the experiment. The full one takes about fifteen minutes of one core."""

    seed: int = 0
    demonstrations: int = 100
    """Per task."""
    train_steps: int = 350
    further_steps: tuple[int, ...] = (25, 50)
    """Gradient steps of the policies that were trained a little further."""
    robots: int = 20
    lost_points: float = 0.15
    """Success that the unreliable candidate loses."""
    pool_episodes: int = 400
    """Per policy."""
    promotions: int = 50
    poll_s: float = 60.0
    """Simulated seconds between two steps of the controller."""
    max_episodes: int = 60_000
    """Of one trial, both arms."""
    settings: CanarySettings = field(default_factory=CanarySettings)


FULL = Plan()
QUICK = Plan(
    demonstrations=50,
    train_steps=200,
    further_steps=(5,),
    robots=8,
    lost_points=0.4,
    pool_episodes=24,
    promotions=3,
    settings=CanarySettings(alpha=0.05, beta=0.2, min_pairs=5, limits=Limits(margin=0.25)),
)
"""A few minutes less of everything, to see that it works; its numbers mean nothing."""


def run_command(options: argparse.Namespace) -> int:
    """`sop experiment canary [--quick] [--out FOLDER]`; 1 when a requirement is not met."""
    plan = QUICK if options.quick else FULL
    summary = run_experiment(plan, options.out or Path("runs/canary"))
    print((summary["folder"] / "table.md").read_text())
    return 0 if summary["passed"] else 1


def run_experiment(plan: Plan, out: Path) -> dict[str, Any]:
    """Do all of it and write `summary.json`, `table.md` and `canary.png` into a folder (blocking). The store of the
    trials lies in a new folder `store-N` beside them: nothing of an earlier experiment is counted. From here on PyTorch
    computes in one thread in this process: several that wait for a core cost a hundred times what they gain."""
    torch.set_num_threads(1)
    began = time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    place = next(out / f"store-{number}" for number in itertools.count() if not (out / f"store-{number}").exists())
    lab = _Lab(plan, place)
    trials = {NAMES[version]: lab.try_out(version) for version in FAULTS}
    promotions = lab.promotions()
    lab.close()
    summary = {
        "plan": asdict(plan),
        "stable": dict(lab.stable_rates),
        "candidates": trials,
        "promotions": promotions,
        "cpu_s": round(time.process_time() - began, 1),
    }
    return write_report(summary, out)


class _Lab:
    """Store, channel, policies and robots of the experiment."""

    def __init__(self, plan: Plan, place: Path) -> None:
        self._plan = plan
        self._clock = SimClock()
        self._store = open_store(str(place / "store"))
        self._bus = open_bus(f"sqlite://{place.absolute()}/bus.sqlite", owner=True)
        signer, root = make_trust()
        self._channel = SignedChannel(self._store, self._bus, signer, root, RUN)
        self._pooled = SignedChannel(open_store(str(place / "pooled")), self._bus, signer, root, RUN)
        self._pooled_store = open_store(str(place / "pooled"))
        self._lost = plan.lost_points
        self._publish(Trainer(plan.seed, plan.demonstrations))
        self._robots = {
            f"robot-{number:02d}": ActingRobot(f"robot-{number:02d}", number, TASKS, self._policies)
            for number in range(plan.robots)
        }
        self._pool = Pool(ActingRobot("lab-pool", 900, TASKS, self._policies), 0, plan.pool_episodes)
        self.stable_rates = self._pool.rates
        mean = sum(self.stable_rates.values()) / len(TASKS)
        self._policies.lost = min(1.0, plan.lost_points / max(0.01, mean))
        self._canary = self._controller(self._channel, self._store, StoredEpisodes(self._store))
        self._canary.promote(policy_ref(self._store, 0), "the first policy")
        self._recorded = [self._gate_episode(number) for number in range(12)]

    def close(self) -> None:
        """Let go of the bus."""
        self._bus.close()

    def try_out(self, version: int) -> dict[str, Any]:
        """One injected candidate, from the gate to its end (blocking)."""
        began = time.process_time()
        candidate = policy_ref(self._store, version)
        result: dict[str, Any] = {"version": version, "offline_gate": ""}
        try:
            self._canary.begin(candidate, self._gate)
        except PolicyRefused as error:
            return result | asdict(Trial()) | {"robots": 0, "offline_gate": str(error), "why": "offline gate"}
        trial = run_trial(
            self._canary, self._channel, self._act, self._clock,
            poll_s=self._plan.poll_s, max_episodes=self._plan.max_episodes,
        )  # fmt: skip
        print(f"{NAMES[version]}: {trial.why}", flush=True)
        return result | _told(trial) | {"cpu_s": round(time.process_time() - began, 1)}

    def promotions(self) -> dict[str, Any]:
        """Good policies, one after the other, every other one equal to the stable one (blocking). A policy that was
        trained further and loses the margin on some task of its pool is not good and is left out, before any trial."""
        plan = self._plan
        further = range(max(FAULTS) + 1, max(FAULTS) + 1 + len(plan.further_steps))
        pools = [
            self._pool,
            *(Pool(ActingRobot("lab-pool", 901, TASKS, self._policies), version, plan.pool_episodes)
              for version in further),
        ]  # fmt: skip
        kinds = ["equal", *(f"{steps} steps further" for steps in plan.further_steps)]
        good = [
            kind for kind, pool in enumerate(pools) if kind and _loses(self._pool, pool) < plan.settings.limits.margin
        ]
        told = []
        for number in range(plan.promotions):
            kind = good[number // 2 % len(good)] if number % 2 and good else 0
            stable, candidate = 2 * number, 2 * number + 1
            fleet = PooledFleet(TASKS, {stable: self._pool, candidate: pools[kind]}, START_UTC_NS, plan.seed + number)
            canary = self._controller(self._pooled, self._pooled_store, fleet)
            canary.promote(pooled_ref(stable), "the policy until now")
            canary.begin(pooled_ref(candidate), lambda _: "")
            trial = run_trial(
                canary, self._pooled, fleet.act, self._clock, poll_s=plan.poll_s, max_episodes=plan.max_episodes
            )
            told.append({"kind": kinds[kind], **_told(trial)})
        rates = {kind: dict(pool.rates) for kind, pool in zip(kinds, pools, strict=True)}
        return {
            "trials": told,
            "pools": rates,
            "left_out": [kinds[kind] for kind in range(1, len(pools)) if kind not in good],
        }

    def _controller(self, channel: SignedChannel, store: Any, episodes: Any) -> Canary:
        names = [f"robot-{number:02d}" for number in range(self._plan.robots)]
        return Canary(
            RUN, channel, store, episodes, tasks=TASKS, robots=lambda: names,
            execution_horizon=self._policies.staged(0).manifest.spec.execution_horizon,
            utc_ns=self._clock.utc_ns, settings=self._plan.settings,
        )  # fmt: skip

    def _publish(self, trainer: Trainer) -> None:
        weights = trainer.train(self._plan.train_steps, 2e-3)
        publisher = Publisher(self._store, self._bus, keep_policies=50)
        facts = PolicyFacts(
            learner_step=trainer.steps, algorithm="bc", spec=trainer.spec, conditioning=Conditioning(),
            online_episodes=0, offline_episodes=len(TASKS) * self._plan.demonstrations,
            config_hash=content_hash(b"canary"), code_version="experiment",
        )  # fmt: skip
        for _ in (0, *FAULTS):
            publisher.publish_now(weights, facts)
        for steps in self._plan.further_steps:
            publisher.publish_now(trainer.train(steps, 3e-4), facts)
        publisher.close()
        self._policies = PublishedPolicies(self._store, FAULTS, self._plan.lost_points)

    def _gate_episode(self, number: int) -> EncodedEpisode:
        robot = ActingRobot("lab-gate", 950 + number, TASKS, self._policies)
        return EncodedEpisode(encode(robot.act(0, SimClock())))

    def _gate(self, candidate: PolicyRef) -> str:
        manifest, policy = self._policies.fresh(candidate.version)
        return replay(policy, manifest.conditioning, self._recorded, now=time.process_time).problem

    def _act(self, robot: str, version: int, now_ns: int) -> Finished:
        """One really acted episode; stored when it is sent."""
        clock, acting = SimClock(now_ns), self._robots[robot]
        episode = acting.act(version, clock)
        cleared = acting.clear()
        data = encode(episode)
        key = layout.EpisodeKey("episodes", robot, episode.sequence, episode.num_steps, content_hash(data))
        ready = clock.now_ns + int((RESET_S + cleared * CLEAR_S) * 1e9)
        return Finished(
            episode.outcome == "success", clock.now_ns, ready, lambda: self._store.put(str(key), data, durable=False)
        )


def _told(trial: Trial) -> dict[str, Any]:
    """A trial in numbers, with the failures that the control arm would not have had."""
    told = asdict(trial) | {"robots": len(trial.robots)}
    share = trial.control_failures / max(1, trial.control_episodes)
    return told | {"failures_beyond_control": round(trial.failures - share * trial.episodes, 1)}


def _loses(stable: Pool, candidate: Pool) -> float:
    """Success that the candidate loses on its worst task: exact, for these pools are what is drawn from."""
    return round(max(rate - candidate.rates[task] for task, rate in stable.rates.items()), 6)
