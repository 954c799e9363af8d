"""`sop policy`: what robots at work run, and how that changes.

sop policy list RUN                      published versions, and which of them are stable, on trial or banned
sop policy status RUN                    the newest state, and how the trial stands
sop policy promote RUN V                 every robot, without a trial
sop policy canary RUN V [--follow]       offline gate, then a few robots; --follow goes on to the end
sop policy canary RUN --follow           go on with the trial that is under way
sop policy rollback RUN [--why WORDS]    back to the policy before, and ban this one
sop policy rollback --robot FOLDER       at the robot, without a network
sop policy ban RUN V --why WORDS
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sop.core.errors import RunError

if TYPE_CHECKING:
    from sop.core.channel import PolicyRef
    from sop.rollout.canary import Canary
    from sop.runs import Run

ACTIVE_S = 24 * 3600.0
"""A robot takes part in a trial when its newest episode is not older than this."""
GATE_EPISODES = 20
"""Newest episodes per robot that the offline gate replays."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `sop policy` to the command line."""
    policy = commands.add_parser("policy", help="what robots at work run: promote, try out, roll back, ban")
    orders = policy.add_subparsers(required=True, metavar="ORDER")
    for name, text in (("list", "published versions and what they are"), ("status", "the channel and the trial")):
        _add(orders, name, text).set_defaults(command=_list if name == "list" else _status)
    promote = _add(orders, "promote", "every robot runs a version, without a trial")
    promote.add_argument("version", type=int)
    promote.add_argument("--why", default="promoted by hand", help="for people")
    promote.set_defaults(command=_promote)
    canary = _add(orders, "canary", "a version is judged offline, then on a few robots beside others")
    canary.add_argument("version", type=int, nargs="?", help="left out: go on with the trial that is under way")
    canary.add_argument("--follow", action="store_true", help="widen, promote or roll back, until the trial is over")
    canary.add_argument("--every", type=float, default=10.0, metavar="S", help="seconds between looks (default 10)")
    canary.add_argument("--robots", help="comma-separated; default: those with an episode of the last day")
    canary.set_defaults(command=_canary)
    rollback = orders.add_parser("rollback", help="back to the policy before")
    rollback.add_argument("run", nargs="?", help="folder of the run, or URL of its store")
    rollback.add_argument("--bus", help="URL of the bus (default: beside the store)")
    rollback.add_argument("--robot", type=Path, metavar="FOLDER", help="at the robot: folder of its last good policies")
    rollback.add_argument("--why", default="rolled back by hand", help="for people")
    rollback.add_argument("--now", action="store_true", help="robots hold and change at once, not after their episode")
    rollback.set_defaults(command=_rollback)
    ban = _add(orders, "ban", "no robot ever runs a version")
    ban.add_argument("version", type=int)
    ban.add_argument("--why", required=True, help="for people")
    ban.set_defaults(command=_ban)


def _add(
    orders: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    order = orders.add_parser(name, help=text)
    order.add_argument("run", help="folder of the run, or URL of its store")
    order.add_argument("--bus", help="URL of the bus (default: beside the store)")
    return order


def _list(options: argparse.Namespace) -> int:
    from sop.broadcast import published_versions

    with _Desk(options) as desk:
        state = desk.channel.newest()
        for version in published_versions(desk.run.store):
            ref, what = desk.ref(version), []
            if state is not None:
                what += ["stable"] * (ref == state.stable) + ["on trial"] * (ref == state.candidate)
                what += [f"banned: {state.banned[ref.manifest_hash]}"] if ref.manifest_hash in state.banned else []
            print(f"{version:8d}  {ref.manifest_hash}  {', '.join(what)}".rstrip())
    return 0


def _status(options: argparse.Namespace) -> int:
    with _Desk(options) as desk:
        state = desk.channel.newest()
        if state is None:
            print("nothing is promoted yet: `sop policy promote RUN V`")
            return 0
        stable = "-" if state.stable is None else state.stable.version
        print(f"state {state.sequence}: policy {stable}; {state.reason}")
        comparison = desk.canary().comparison()
        if comparison is not None:
            for name, arm, robots in (
                ("candidate", comparison.candidate, state.candidate_robots),
                ("control", comparison.control, state.control_robots),
            ):
                print(
                    f"  {name:9s}  {len(robots)} robot(s)  {arm.successes} of {arm.episodes} succeeded, "
                    f"{arm.interventions} with interventions, {arm.clamped} of {arm.steps} steps clamped, "
                    f"{arm.stops} stops, {arm.late} late"
                )
            test = comparison.success
            print(f"  pairs {dict(test.pairs)}, worse {test.log_e_worse:.1f} nats, not {test.log_e_not_worse:.1f}")
    return 0


def _promote(options: argparse.Namespace) -> int:
    with _Desk(options) as desk:
        state = desk.canary().promote(desk.ref(options.version), options.why)
        print(f"state {state.sequence}: {state.reason}")
    return 0


def _ban(options: argparse.Namespace) -> int:
    with _Desk(options) as desk:
        print(f"state {desk.canary().ban(desk.ref(options.version), options.why).sequence}: banned")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    if (options.robot is None) == (options.run is None):
        raise ValueError("name a run, or a robot's folder with --robot")
    if options.robot is not None:
        from sop.broadcast.last_good import LastGood

        if not options.robot.is_dir():
            raise RunError(f"{options.robot} is no folder: name the one with the robot's last good policies")
        print(f"policy {LastGood(options.robot).rollback().version} from the next look on")
        return 0
    with _Desk(options) as desk:
        state = desk.canary().roll_back(options.why, immediate=options.now)
        print(f"state {state.sequence}: {state.reason}")
    return 0


def _canary(options: argparse.Namespace) -> int:
    with _Desk(options) as desk:
        canary, robots = desk.canary(), tuple(options.robots.split(",")) if options.robots else None
        if robots is not None:
            canary = desk.canary(robots)
        if options.version is not None:
            state = canary.begin(desk.ref(options.version), desk.gate)
            print(f"state {state.sequence}: {state.reason}: {', '.join(state.candidate_robots)}")
        elif not options.follow:
            raise ValueError("name a version, or go on with --follow")
        said = ""
        while options.follow:
            decision = canary.step()
            if decision is None:
                break
            if decision.why != said:
                print(f"{decision.action}: {decision.why}", flush=True)
                said = decision.why
            time.sleep(options.every)
        state_now = desk.channel.newest()
        print("" if state_now is None else f"state {state_now.sequence}: {state_now.reason}")
    return 0


class _Desk:
    """An open run with its channel, for one order."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options

    def __enter__(self) -> Self:
        from sop.rollout.signed import SignedChannel
        from sop.runs import open_run
        from sop.transport.identity import own_identity
        from sop.trust import SigningKey, TrustRoot

        identity = own_identity()
        if identity is None:
            raise RunError("orders are signed: name the folder of an identity in SOP_IDENTITY (`sop fleet init`)")
        self.run: Run = open_run(self._options.run, self._options.bus)
        key = SigningKey.load(identity.signing_key) if identity.signing_key.exists() else None
        self._bus = self.run.bus()
        root, name = TrustRoot.load(identity.trust), self.run.manifest.name
        self.channel: SignedChannel = SignedChannel(self.run.store, self._bus.__enter__(), key, root, name)
        return self

    def __exit__(self, *error: object) -> None:
        self._bus.__exit__(None, None, None)

    def ref(self, version: int) -> "PolicyRef":
        """A published version."""
        from sop.rollout.signed import policy_ref

        return policy_ref(self.run.store, version)

    def canary(self, robots: tuple[str, ...] | None = None) -> "Canary":
        """The controller."""
        from sop.rollout.canary import Canary
        from sop.rollout.evidence import StoredEpisodes

        chosen = self._active if robots is None else lambda: robots
        return Canary(
            self.run.manifest.name, self.channel, self.run.store, StoredEpisodes(self.run.store),
            tasks=self.run.manifest.fleet_tasks, robots=chosen,
            execution_horizon=self.run.config.policy.execution_horizon, utc_ns=time.time_ns,
        )  # fmt: skip

    def gate(self, candidate: "PolicyRef") -> str:
        """The offline gate: the candidate plans for the newest stored episodes; why it must not act, or nothing."""
        from sop.broadcast import fetch_policy
        from sop.core import layout
        from sop.core.codec import EncodedEpisode
        from sop.policies import make_policy
        from sop.rollout.replay import replay

        store = self.run.store
        folders = (f"{layout.EPISODES}/", f"{layout.DEMONSTRATIONS}/")
        keys = (list(store.keys(f"{top}{name}/"))[-GATE_EPISODES:] for top in folders for name in store.folders(top))
        newest = list(itertools.islice(itertools.chain.from_iterable(keys), GATE_EPISODES))
        if not newest:
            return "there is no recorded episode to replay"
        manifest, weights = fetch_policy(store, candidate.version)
        policy = make_policy(manifest.spec)
        policy.load(weights, candidate.version)
        episodes = [EncodedEpisode(store.get(key), trusted=False) for key in newest]
        return replay(policy, manifest.conditioning, episodes).problem

    def _active(self) -> list[str]:
        """Robots with an episode of the last day."""
        from sop.core import layout
        from sop.rollout.evidence import StoredEpisodes

        episodes, oldest = StoredEpisodes(self.run.store), time.time_ns() - int(ACTIVE_S * 1e9)
        found = []
        for robot in self.run.store.folders(f"{layout.EPISODES}/"):
            newest = list(episodes.read(robot, episodes.next_sequence(robot) - 1))
            if newest and newest[-1].end_utc_ns >= oldest and not layout.before_fleet(robot):
                found.append(robot)
        return found
