"""A run: one store, one bus, one configuration; created once, opened by every process that takes part."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sop.actor.exploration import make_exploration
from sop.algorithms import make_algorithm
from sop.broadcast import published_versions
from sop.broadcast.vouching import Vouching
from sop.config import RunConfig
from sop.core import layout
from sop.core.codec import content_hash
from sop.core.errors import AlreadyExists, NotFound, RunError, StoreUnavailable
from sop.core.events import TOPIC_ACTORS, TOPIC_LEARNER
from sop.core.run import RunManifest
from sop.operators import check_operator
from sop.places import STORE, Place, find_place, is_run, keep_place
from sop.policies import check_policy
from sop.presets import FROM_PEOPLE, config_from_dict, config_to_dict
from sop.robots import SimulatedRobot, make_robot
from sop.transport import EventBus, ObjectStore, open_bus, open_store, own_identity, probe
from sop.transport.durable import write_durably
from sop.trust import SigningKey

STATUS_KEEP_S = 600.0
"""Seconds after which the bus forgets signs of life."""


@dataclass(frozen=True, slots=True)
class Run:
    """An open run: where it is, what it is, and its store."""

    place: str
    """What was given on the command line; child processes are given the same."""
    folder: Path
    """Local files of this machine: spools, logs, metrics, report."""
    store: ObjectStore
    bus_url: str
    manifest: RunManifest
    config: RunConfig

    @property
    def address(self) -> tuple[str, ...]:
        """Arguments that tell a process on another machine which run it is; a store in a folder is for this one."""
        place = find_place(self.place, self.bus_url)
        in_folder = Path(place.store) == self.folder / STORE
        return (str(self.folder.resolve()),) if in_folder else (place.store, "--bus", place.bus)

    @contextmanager
    def bus(self, *, owner: bool = False) -> Iterator[EventBus]:
        """A connection to the bus, closed at the end."""
        keep_s = {TOPIC_ACTORS: STATUS_KEEP_S, TOPIC_LEARNER: STATUS_KEEP_S}
        bus = open_bus(self.bus_url, owner=owner, keep_s=keep_s)
        try:
            yield bus
        finally:
            bus.close()


def create_run(folder: Path, config: RunConfig, place: Place | None = None) -> Run:
    """Make the store of a new run and write `run.json`; the store is probed first.

    Args:
        folder: of this machine's own files.
        config: the run.
        place: where store and bus are; None keeps them in the folder.

    Raises:
        RunError: there is a run already.
        ValueError: a task that the robot does not know, or an action element that it does not have.
    """
    check_names(config)
    robot = make_robot(config.robot)
    needs_rollouts = make_algorithm(config.algorithm, config.algorithm_settings, control_hz=1.0).needs_rollouts
    for exploration in (config.exploration, *((config.rollout_exploration,) if needs_rollouts else ())):
        make_exploration(exploration, robot.embodiment)
    store = open_store(str(folder / STORE) if place is None else place.store)
    probe(store)
    tasks = config.robot.all_tasks
    manifest = RunManifest(
        name=folder.name,
        created_utc_ns=time.time_ns(),
        embodiment=robot.embodiment,
        instructions={task: robot.instructions[task] for task in tasks},
        fleet_tasks=config.robot.fleet_tasks,
        held_out_tasks=config.robot.held_out_tasks,
        config=config_to_dict(config),
        simulated=isinstance(robot, SimulatedRobot),
    )
    robot.close()
    try:
        store.put(layout.RUN, manifest.to_json())
    except AlreadyExists as error:
        where = folder if place is None else place.store
        raise RunError(f"{where} holds a run already: resume it or choose another name") from error
    if place is not None:
        keep_place(folder, place)
    return open_run(str(folder))


def check_names(config: RunConfig) -> None:
    """Make sure that everything a configuration names exists and fits together, before anything is made.

    Raises:
        ValueError: unknown algorithm, operator, policy, or a setting of theirs; suggests the nearest. Or exploration
            for an algorithm that learns from nobody but people.
    """
    make_algorithm(config.algorithm, config.algorithm_settings, control_hz=1.0)
    check_policy(config.policy.kind, config.policy.settings)
    check_operator(config.operator.kind)
    if config.exploration.kind != "none" and config.algorithm in FROM_PEOPLE:
        raise ValueError(
            f"exploration.kind is {config.exploration.kind!r}, but {config.algorithm} learns from nobody but people: "
            "what the policy tries would only make its attempts worse; take exploration.kind=none"
        )


def open_run(given: str, bus_url: str | None = None) -> Run:
    """Open a run by its folder (`runs/demo`) or by the URL of its store.

    Raises:
        RunError: there is no run, or its `place.json` is damaged.
        ValueError: no bus is named, and there is none beside the store.
    """
    place = find_place(given, bus_url)
    store = open_store(place.store)
    manifest = RunManifest.from_json(_run_json(store, place, Path(given)))
    config = config_from_dict(manifest.config)
    local = Path(given) if is_run(Path(given)) else Path("runs") / manifest.name
    return Run(given, local, store, place.bus, manifest, config)


def _run_json(store: ObjectStore, place: Place, folder: Path) -> bytes:
    """`run.json`: says which run this is, so a process with an identity believes the first one that it saw and no
    other, and needs the store only once.

    Raises:
        RunError: there is no run, or it is not the one that was seen here.
    """
    if own_identity() is None:
        return _stored_run_json(store, place)
    root = folder if is_run(folder) else Path("runs")
    pin = root / f".run-{content_hash(place.store.encode())}.json"
    try:
        data = _stored_run_json(store, place)
    except StoreUnavailable:
        if not pin.exists():
            raise
        return pin.read_bytes()
    if not pin.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_durably(pin, data)
    if pin.read_bytes() != data:
        raise RunError(
            f"{place.store}: its {layout.RUN} is not the one that was seen here ({pin}); delete that to follow"
        )
    return data


def _stored_run_json(store: ObjectStore, place: Place) -> bytes:
    try:
        return store.get(layout.RUN)
    except NotFound as error:
        raise RunError(f"{place.store} holds no run ({layout.RUN} is missing): start one with `sop run`") from error


def newest_run(runs: Path, preset: str) -> Run:
    """The run of a preset that was created last.

    Raises:
        RunError: there is none.
    """
    found = [open_run(str(folder)) for folder in sorted(runs.glob("*")) if is_run(folder)]
    chosen = [run for run in found if run.config.preset == preset]
    if not chosen:
        raise RunError(f"{runs} holds no run of the preset {preset!r}: start one without --resume")
    return max(chosen, key=lambda run: run.manifest.created_utc_ns)


def take_base(run: Run, source: Run) -> None:
    """Copy demonstrations, base policy and its evaluations from another run of the same base settings.

    Base rollouts too, when this run needs some and would have recorded the same.

    Raises:
        RunError: the two runs would not have made the same base policy.
    """
    for part in ("robot", "pretrain", "policy", "evaluation", "seed"):
        mine, theirs = run.manifest.config[part], source.manifest.config[part]
        if mine != theirs:
            raise RunError(f"cannot take the base of {source.place}: its {part} is {theirs}, this run has {mine}")
    prefixes = (
        f"{layout.DEMONSTRATIONS}/{layout.LAB_ACTOR}",
        *((f"{layout.DEMONSTRATIONS}/{layout.BASE_ACTOR}",) if _same_rollouts(run.config, source.config) else ()),
        f"{layout.policy_folder(0)}/",
        layout.evaluation(0, "base"),
        layout.evaluation(0, "expert"),
        layout.evaluation(0, "progress"),
    )
    signature, manifest = layout.policy_signature(0), layout.policy_manifest(0)
    for prefix in prefixes:
        for key in source.store.keys(prefix):
            if key not in (signature, manifest):
                run.store.put(key, source.store.get(key))
    vouching = Vouching(own_signer(), run.manifest.name, None, time.time_ns)  # for this run: theirs is for the other
    if 0 in published_versions(source.store):
        for key, data in vouching.objects(0, source.store.get(manifest)):
            run.store.put(key, data)


def own_signer() -> SigningKey | None:
    """What this process signs policies with; None when its identity has no key: they are not signed."""
    identity = own_identity()
    if identity is None or not identity.signing_key.exists():
        return None
    return SigningKey.load(identity.signing_key)


def _same_rollouts(mine: RunConfig, theirs: RunConfig) -> bool:
    """Whether two runs with the same base policy record the same base rollouts, and the first one needs them."""
    needed = make_algorithm(mine.algorithm, mine.algorithm_settings, control_hz=1.0).needs_rollouts
    same_length = mine.fleet.time_factor == theirs.fleet.time_factor
    same = mine.rollouts == theirs.rollouts and mine.rollout_exploration == theirs.rollout_exploration
    return needed and same and same_length
