"""One arm's process: train, measure, leave `result.json`. A result that is there is never made again.

<out>/setup.json                      plan, streams
<out>/seed1/values/                   the frozen value function's opinion, shared by the arms
<out>/seed1/base-embed/store          a tuned base policy
<out>/seed1/plain-embed-warm/         store, metrics, result.json
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from sop.algorithms.critic import ValueModel
from sop.algorithms.segmentation import steps_in
from sop.broadcast import fetch_manifest
from sop.buffer import Payloads, open_payloads
from sop.buffer.rows import EpisodeRow
from sop.buffer.windows import start_runs
from sop.core import layout
from sop.core.errors import RunError
from sop.core.experience import Batch
from sop.core.policy import Conditioning
from sop.experiments.lookahead import moments, signed_advantage
from sop.experiments.measures import (
    SEED_OFFSET,
    Counts,
    added,
    chunk_effect,
    fixed_windows,
    load_policy,
    separation,
    success,
)
from sop.experiments.plan import ARMS, BASES, Arm, Plan, evaluated
from sop.experiments.rules import GivenValues, make_rule
from sop.experiments.stream import Stream, load, open_stream
from sop.experiments.training import STORE, train_arm, train_base
from sop.policies import TrainablePolicy
from sop.robots import SimulatedRobot, make_robot
from sop.transport import ObjectStore, open_store

RESULT = "result.json"
SETUP = "setup.json"
PAIR_OFFSET = 2**19
"""Look-aheads begin in other scenes than evaluations: seeds that much further on, others for every training seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all processes of an experiment have to know."""

    plan: Plan
    streams: Mapping[str, str]
    """Seed, e.g. `seed1` -> place of its stream."""

    def continues(self, before: "Setup") -> bool:
        """Whether results of an earlier setup are results of this one, too: arms and seeds may differ, nothing else."""
        same_plan = replace(before.plan, arms=self.plan.arms) == self.plan
        return same_plan and all(self.streams.get(seed, place) == place for seed, place in before.streams.items())

    def joined(self, before: "Setup") -> "Setup":
        """With the arms and seeds of an earlier setup that this one continues; arms in the order of `ARMS`."""
        arms = tuple(name for name in ARMS if name in {*before.plan.arms, *self.plan.arms})
        return Setup(plan=replace(self.plan, arms=arms), streams={**before.streams, **self.streams})

    def save(self, out: Path) -> None:
        """Write `setup.json` (atomic)."""
        write(out / SETUP, msgspec.json.format(msgspec.json.encode(self), indent=2))

    @classmethod
    def read(cls, out: Path) -> "Setup":
        """Read it.

        Raises:
            RunError: there is none, or it is damaged.
        """
        try:
            return msgspec.json.decode((out / SETUP).read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.DecodeError) as error:
            raise RunError(
                f"{out / SETUP} is not the setup of an experiment ({error}): start it without --arm"
            ) from error


def run_job(out: Path, job: str) -> None:
    """Do one job of an experiment in this process, e.g. `seed1/plain-embed-warm` or `seed1/base-embed` (blocking).

    Raises:
        RunError: no such job, or it cannot be done.
    """
    torch.set_num_threads(1)
    setup = Setup.read(out)
    seed, _, name = job.partition("/")
    if seed not in setup.streams or (name not in ARMS and name not in BASES):
        raise RunError(f"no job is called {job!r}: seeds {sorted(setup.streams)}, arms {sorted([*ARMS, *BASES])}")
    folder = out / seed / name
    if (folder / RESULT).exists():
        return
    stream, plan, values = open_stream(setup.streams[seed], setup.plan.episodes), setup.plan, out / seed / "values"
    began = time.monotonic()
    if name in BASES:
        trained = train_base(stream, BASES[name], plan, folder, values)
        result: dict[str, Any] = {"steps": trained.steps}
    else:
        arm = ARMS[name]
        base = stream.run.store if arm.base is None else open_store(str(out / seed / arm.base / STORE))
        trained = train_arm(stream, arm, plan, folder, base=base, values=values)
        trained_s = time.monotonic() - began
        store = open_store(str(folder / STORE))
        result = measure(stream, arm, plan, store, versions=trained.versions, values=values)
        result |= {"warmup_steps": trained.warmup_steps, "steps": trained.steps, "train_s": round(trained_s, 1)}
        _prune(store, trained.versions)
    result |= {"seed": seed, "arm": name, "wall_s": round(time.monotonic() - began, 1)}
    write(folder / RESULT, msgspec.json.format(msgspec.json.encode(result), indent=2))


def measure(
    stream: Stream, arm: Arm, plan: Plan, store: ObjectStore, *, versions: Sequence[int], values: Path
) -> dict[str, Any]:
    """Everything that is measured of an arm (blocking): see `sop.experiments.measures` and `lookahead`."""
    run = stream.run
    robot_config, first = run.config.robot, run.config.evaluation.first_seed + SEED_OFFSET
    rule = make_rule(arm, plan, run.config.algorithm_settings, run.manifest.embodiment.control_hz)
    rule.use_values(stream.rule_state, values)
    acts = Conditioning(advantage_indicator=None if arm.kind is None else True)
    payloads = open_payloads(run.store, values / "cache", memory_bytes=1 << 30, disk_bytes=0)
    with closing(payloads), closing(make_robot(robot_config)) as robot:
        batches = _windows(stream, plan, rule, payloads) if arm.kind is not None else []
        curve = []
        for number in evaluated(len(versions)):
            manifest = fetch_manifest(store, versions[number])
            policy = load_policy(store, manifest.version)
            seeds = range(first, first + plan.curve_episodes)
            point: dict[str, Any] = {
                "publish": number,
                "last": number == len(versions) - 1,
                "learner_step": manifest.learner_step,
                "online_episodes": manifest.online_episodes,
                "success": success(robot, policy, acts, robot_config.fleet_tasks, seeds),
            }
            if arm.kind is not None:
                point |= separation(policy, batches) | chunk_effect(policy, batches)
            curve.append(point)
        final = _final(robot, policy, arm, plan, stream=stream, known=curve[-1]["success"])
        if arm == Arm():  # begins with the base policy as it was made
            policy = load_policy(store, versions[0])
            final["base"] = _final(robot, policy, arm, plan, stream=stream, known=curve[0]["success"])
        if arm.kind is not None:
            function = rule.values
            if function is None:
                raise RunError("there is no value function")
            lookahead = max(1, steps_in(rule.settings.lookahead_s, run.manifest.embodiment.control_hz))
            final["signed"] = _signed(robot, policy, function, lookahead, plan=plan, stream=stream)
    return {"settings": asdict(arm), "curve": curve, "final": final}


def conditions_of(arm: Arm, plan: Plan) -> dict[str, Conditioning]:
    """What a last policy is asked for: nothing without an indicator; else good actions with every beta of the plan and
    with 1, as in the fleet, and bad ones (`negative`)."""
    if arm.kind is None:
        return {"beta 0": Conditioning()}
    found = {
        f"beta {beta:g}": Conditioning(advantage_indicator=True, guidance=beta) if beta else Conditioning()
        for beta in sorted({*plan.betas, 1.0})
    }
    return {**found, "negative": Conditioning(advantage_indicator=False)}


def _final(
    robot: SimulatedRobot, policy: TrainablePolicy, arm: Arm, plan: Plan, *, stream: Stream, known: Counts
) -> dict[str, Any]:
    """Success of the last policy under every condition; `known` is the first seeds' under its own."""
    config, first = stream.run.config.robot, stream.run.config.evaluation.first_seed + SEED_OFFSET
    seeds = range(first, first + plan.final_episodes)
    conditions = conditions_of(arm, plan)
    own = "beta 0" if arm.kind is None else "beta 1"
    found: dict[str, Any] = {}
    for name, conditioning in conditions.items():
        if name == own and plan.curve_episodes <= plan.final_episodes:
            rest = success(robot, policy, conditioning, config.fleet_tasks, seeds[plan.curve_episodes :])
            found[name] = added(known, rest)
        else:
            found[name] = success(robot, policy, conditioning, config.fleet_tasks, seeds)
    held_out = range(first, first + plan.held_out_episodes)
    return {
        "own": own,
        "conditions": found,
        "held_out": success(robot, policy, conditions[own], config.held_out_tasks, held_out),
    }


def _signed(
    robot: SimulatedRobot, policy: TrainablePolicy, function: ValueModel, lookahead: int, *, plan: Plan, stream: Stream
) -> dict[str, Any]:
    """Differences of advantages, one per moment that is reached."""
    config = stream.run.config
    first = config.evaluation.first_seed + SEED_OFFSET + PAIR_OFFSET + config.seed * plan.pair_seeds
    begins = moments(config.robot.fleet_tasks, range(first, first + plan.pair_seeds), plan.pair_chunks)
    found = [signed_advantage(robot, policy, function, lookahead, moment) for moment in begins]
    reached = [(moment, one) for moment, one in zip(begins, found, strict=True) if one is not None]
    return {
        "lookahead_steps": lookahead,
        "task": [moment.task for moment, _ in reached],
        "seed": [moment.seed for moment, _ in reached],
        "chunks": [moment.chunks for moment, _ in reached],
        "difference": [one for _, one in reached],
    }


def _windows(stream: Stream, plan: Plan, rule: GivenValues, payloads: Payloads) -> list[Batch]:
    """The fixed windows of a seed: of everything that its arms learn from."""
    horizon = stream.horizon
    rows = [_row(key, rule, payloads, horizon) for key in (*stream.offline, *stream.online)]
    tasks = stream.run.config.robot.all_tasks
    return fixed_windows(
        rows, tasks, payloads, batches=plan.window_batches, size=plan.windows_per_batch, horizon=horizon
    )


def _row(key: str, rule: GivenValues, payloads: Payloads, horizon: int) -> EpisodeRow:
    one = load(key, payloads)
    return EpisodeRow(
        episode_id=one.key.episode_id,
        actor_id=one.key.actor_id,
        sequence=one.key.sequence,
        task=one.encoded.task,
        source=one.source,
        num_steps=one.encoded.num_steps,
        human_steps=0,
        num_interventions=len(one.encoded.interventions),
        policy_version=one.encoded.policy_version,
        outcome=one.encoded.outcome,
        start_runs=tuple(start_runs(rule.annotate(one.encoded), horizon)),
        end_utc_ns=one.encoded.header.end_utc_ns,
        indexed_utc_ns=0,
    )


def _prune(store: ObjectStore, versions: Sequence[int]) -> None:
    """Only the tensors of policies that were measured are kept."""
    kept = {versions[number] for number in evaluated(len(versions))}
    for version in versions:
        if version not in kept:
            store.delete(layout.policy_weights(version))


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)
