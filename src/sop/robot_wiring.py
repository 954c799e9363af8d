"""What an actor runs on: every constructor of the robot's side, called in one place (`sop.wiring`: the learner's).

spool    <folder>/actors/<id>/spool            episodes until the store has them, and the running one's journal
safety   <folder>/actors/<id>/latch            what a person has to clear; limits from a file of this robot
policy   <folder>/actors/<id>/policies, trust  what was verified, and what was seen, across restarts
"""

import logging
import zlib
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from sop.actor import (
    ActorSettings,
    EpisodeSpool,
    PinnedPolicy,
    SafetyGate,
    SafetyLatch,
    Uploader,
    load_limits,
    recover_interrupted,
)
from sop.actor.uploader import next_stored_sequence
from sop.broadcast import LastGood, PolicyVetting, Subscriber, prepare_with
from sop.core import layout
from sop.core.channel import CHANNELS, TRAIN
from sop.core.clock import Clock
from sop.core.embodiment import Embodiment
from sop.core.errors import Forbidden, StoreUnavailable
from sop.policies import make_policy
from sop.robots import DEPLOYMENT, LAB
from sop.runs import Run
from sop.transport import EventBus, own_identity
from sop.trust import TrustMemory

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorOptions:
    """How one actor of a run differs from the others."""

    actor_id: str
    """Unique in the run; with the same id and folder an actor goes on where it stopped."""
    demonstrate: bool = False
    """Let the expert drive in the lab instead of the policy; episodes go to the offline buffer."""
    rollout: bool = False
    """Act with the base policy alone, whatever else is published; nobody corrects; to the offline buffer."""
    speed: float | None = None
    """Robot seconds per second; None takes the run's."""
    end_sequence: int | None = None
    """Stop before the episode with this number."""
    channel: str = TRAIN
    """`train`: the newest policy that is vouched for. `prod`: what the channel's newest signed state names."""
    limits: Path | None = None
    """Limits of this robot, checked at every step (`sop.actor.limits`); None for the bounds of the action alone."""

    def __post_init__(self) -> None:
        if self.rollout != self.actor_id.startswith(layout.BASE_ACTOR):
            raise ValueError(f"ids that begin with {layout.BASE_ACTOR} are for --rollout alone, got {self.actor_id!r}")
        if not self.demonstrate and self.actor_id.startswith(layout.LAB_ACTOR):
            raise ValueError(
                f"ids that begin with {layout.LAB_ACTOR} are for --demonstrate alone: no {self.actor_id!r}"
            )
        if self.channel not in CHANNELS:
            raise ValueError(f"--channel must be one of {', '.join(CHANNELS)}, got {self.channel!r}")


def actor_folder(run: Run, actor_id: str) -> Path:
    """This machine's folder of an actor."""
    return run.folder / "actors" / actor_id


def open_spool(run: Run, options: ActorOptions, embodiment: Embodiment) -> tuple[EpisodeSpool, int]:
    """The actor's spool and its next sequence number; the store knows it too, should the disk be new.

    An episode that a power cut interrupted becomes a waiting one that ended as ABORTED.
    """
    folder = layout.DEMONSTRATIONS if options.demonstrate or options.rollout else layout.EPISODES
    spool = EpisodeSpool(actor_folder(run, options.actor_id) / "spool", folder, options.actor_id)
    recover_interrupted(spool, embodiment)
    mine = spool.next_sequence()
    try:
        return spool, max(mine, next_stored_sequence(run.store, folder, options.actor_id))
    except (StoreUnavailable, Forbidden):
        if not mine:  # a new disk: the store alone knows which numbers are taken
            raise
        return spool, mine


def open_gate(run: Run, options: ActorOptions, embodiment: Embodiment, clock: Clock) -> SafetyGate:
    """The robot's action gate; its latch survives restarts.

    Raises:
        ValueError: the limits do not fit the robot.
    """
    limits = None if options.limits is None else load_limits(options.limits, embodiment)
    return SafetyGate(embodiment, limits, open_latch(run, options.actor_id, clock))


def open_latch(run: Run, actor_id: str, clock: Clock) -> SafetyLatch:
    """What keeps a robot that was stopped from moving until a person clears it."""
    return SafetyLatch(clock, actor_folder(run, actor_id) / "latch")


def open_subscriber(
    stack: ExitStack, run: Run, options: ActorOptions, embodiment: Embodiment, *, bus: EventBus, clock: Clock
) -> Subscriber | PinnedPolicy | None:
    """Where the actor's policies come from, closed by `stack`; None when people drive."""
    prepare = prepare_with(make_policy)
    if options.demonstrate:
        return None
    vetting = open_vetting(run, options)
    if options.rollout:
        pinned = PinnedPolicy(run.store, 0, embodiment, prepare=prepare, clock=clock, vetting=vetting)
        return stack.enter_context(closing(pinned))
    last_good = None
    if vetting is not None:
        last_good = LastGood(actor_folder(run, options.actor_id) / "policies", check=vetting.signed)
    subscriber = Subscriber(run.store, bus, embodiment, prepare=prepare, vetting=vetting, last_good=last_good)
    return stack.enter_context(closing(subscriber))


def open_vetting(run: Run, options: ActorOptions) -> PolicyVetting | None:
    """Whom this robot believes; None when its identity has no `trust.json`: then every policy of the run is taken.

    Raises:
        ValueError: channel `prod` without a `trust.json`.
    """
    identity = own_identity()
    if identity is None or not identity.trust.exists():
        if options.channel != TRAIN:
            raise ValueError(
                f"--channel {options.channel} is for robots that know whom to believe: give this one an identity with "
                "trust.json (`sop fleet enroll`) in SOP_IDENTITY"
            )
        return None
    return PolicyVetting(
        identity.trust.read_bytes(),
        TrustMemory(actor_folder(run, options.actor_id) / "trust", run.manifest.name),
        run=run.manifest.name,
        robot=options.actor_id,
        channel=options.channel,
    )


def actor_settings(run: Run, options: ActorOptions) -> ActorSettings:
    """What the actor does, by the run's configuration."""
    config, fleet = run.config, run.config.fleet
    in_lab = options.actor_id.startswith(layout.LAB_ACTOR)
    return ActorSettings(
        actor_id=options.actor_id,
        tasks=config.robot.all_tasks if in_lab else config.robot.fleet_tasks,
        instructions=run.manifest.instructions,
        seed=zlib.crc32(f"{config.seed}/{options.actor_id}".encode()),
        first_task=zlib.crc32(options.actor_id.encode()),
        reset_options={
            "scene": LAB if options.demonstrate else DEPLOYMENT,
            "time_factor": 1.0 if options.demonstrate else fleet.time_factor,
        },
        reset_s=fleet.reset_s,
        speed=fleet.speed if options.speed is None else options.speed,
        end_sequence=options.end_sequence,
    )


def close_uploader(uploader: Uploader, actor_id: str) -> None:
    """Send what can be sent now; says what waits."""
    waiting = uploader.close()
    if waiting:
        _log.warning("%d episodes wait in the spool; they go out when %s starts again", waiting, actor_id)
