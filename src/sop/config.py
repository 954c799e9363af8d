"""The configuration of a run: frozen dataclasses, checked when they are made. Standard library only.

Every field has its unit and the meaning of its extremes. Whole configurations are in `sop.presets`;
`sop run --set learner.lr=1e-4` changes one value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class RobotConfig:
    """Which robots, and what they are asked to do."""

    kind: str
    """Name in `sop.robots.ROBOTS`."""
    fleet_tasks: tuple[str, ...]
    """Tasks that the fleet works on."""
    held_out_tasks: tuple[str, ...] = ()
    """Tasks that live in the offline buffer only; evaluated to see whether generality is kept."""
    image_size: int = 64
    """Height and width of every camera image, pixels."""

    def __post_init__(self) -> None:
        _require(bool(self.fleet_tasks), "robot.fleet_tasks must name at least one task")
        both = set(self.fleet_tasks) & set(self.held_out_tasks)
        _require(not both, f"robot.held_out_tasks must not be fleet tasks, got {sorted(both)} in both")

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """Fleet tasks, then held-out tasks."""
        return self.fleet_tasks + self.held_out_tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorConfig:
    """When the stand-in for a person takes over and when it hands back (see `sop.operators.stand_in`)."""

    kind: str = "stand_in"
    """Name in `sop.operators.OPERATORS`; `none` leaves the robots alone."""
    deviation: float = 0.8
    """Distance between the policy's and the expert's action that alarms the operator: norm of the
    displacement's difference plus half of the gripper's, in action units."""
    reaction_steps: int = 8
    """Steps that the deviation has to last before the operator has reacted (0.4 s at 20 Hz)."""
    stall_steps: int = 40
    """Steps without progress after which the operator takes over."""
    min_steps: int = 24
    """Shortest correction, steps."""
    max_steps: int = 60
    """Longest correction, steps, before the operator hands back whatever happened."""
    recovery: float = 0.3
    """Progress that has to be made during a correction before the operator hands back."""
    max_hand_backs: int = 2
    """After this many hand-backs in an episode the operator keeps control to the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """How many robots act, and how fast their time runs."""

    num_actors: int = 4
    speed: float = 1.0
    """Robot seconds per wall-clock second; 1 is real time, 0 runs as fast as the machine can."""
    episodes: int | None = 144
    """Collect this many episodes (aborted ones not counted), then finish; None runs until stopped."""
    minutes: float | None = None
    """Stop collecting after this wall-clock time; None for no limit."""
    time_factor: float = 1.6
    """Training episodes may last this many times the task's evaluation horizon: a corrected attempt takes longer."""
    reset_s: float = 1.0
    """Robot time between two episodes in which the scene is put back, seconds."""

    def __post_init__(self) -> None:
        _require(self.num_actors >= 0, f"fleet.num_actors must be 0 or more, got {self.num_actors}")
        _require(self.speed >= 0, f"fleet.speed must be 0 or more, got {self.speed}")
        _require(self.episodes is None or self.episodes > 0, f"fleet.episodes must be positive, got {self.episodes}")
        _require(self.time_factor >= 1, f"fleet.time_factor must be at least 1, got {self.time_factor}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplorationConfig:
    """What the fleet tries beyond what its policy proposes (see `sop.actor.exploration`); never in evaluations.

    For algorithms that learn from the policy's own actions: without it, where an episode begins decides how it ends.
    """

    kind: Literal["none", "offset", "noise"] = "none"
    """`noise`: all chunks of an episode are sampled from noise that they have in common: one of the policy's ways.
    `offset` adds a constant to all actions of a chunk. Both go with a tempo; all before the safety gate."""
    coherence: float = 1.0
    """With `noise`: correlation of the noise of any two chunks of an episode; 0 is how a policy samples otherwise."""
    std: float = 0.3
    """Standard deviation of the offset per action element, as a share of half the element's range."""
    probability: float = 0.25
    """Share of the chunks that get an offset."""
    tempo: float = 0.0
    """Standard deviation of the logarithm of a factor by which the explored elements of a chunk are multiplied, drawn
    for every chunk: 0.3 is a third faster or slower along the same way. For displacements."""
    tempo_mean: float = 0.0
    """Mean of that logarithm: 0.1 is a tenth faster than proposed. Proposals at their bounds can only be slowed down,
    so a mean of 0 is slower on the whole. Without either there is no factor."""
    hold_chunks: int = 1
    """Chunks in a row that share one draw; 1 draws for every chunk."""
    elements: tuple[int, ...] | None = None
    """Numbers of the explored action elements; None: those with a hold value (displacements, but not a gripper)."""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear` lets the standard deviation fall to `final_share` of `std` over `over_episodes`."""
    final_share: float = 0.0
    over_episodes: int | None = None
    """Episodes of each single actor, counted by its own sequence numbers, so that a restart changes nothing."""

    def __post_init__(self) -> None:
        kinds = ("none", "offset", "noise")
        _require(self.kind in kinds, f"exploration.kind must be none, offset or noise, got {self.kind!r}")
        for name in ("std", "tempo"):
            value = getattr(self, name)
            _require(0 <= value < float("inf"), f"exploration.{name} must be 0 or more and finite, got {value}")
        _require(abs(self.tempo_mean) <= 1, f"exploration.tempo_mean must be in [-1, 1], got {self.tempo_mean}")
        for name in ("probability", "final_share", "coherence"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"exploration.{name} must be in [0, 1], got {value}")
        _require(self.hold_chunks >= 1, f"exploration.hold_chunks must be at least 1, got {self.hold_chunks}")
        named = self.elements is None or (bool(self.elements) and min(self.elements) >= 0)
        _require(named, f"exploration.elements must name elements from 0 on, got {self.elements}")
        _require(
            self.schedule in ("constant", "linear"),
            f"exploration.schedule must be constant or linear, got {self.schedule!r}",
        )
        _require(
            self.schedule == "constant" or (self.over_episodes is not None and self.over_episodes >= 1),
            f"exploration.over_episodes must be at least 1 for a linear schedule, got {self.over_episodes}",
        )

    def share(self, sequence: int) -> float:
        """Share of `std` in an actor's episode of this number: 1, or 1 - (1 - final_share) * sequence / over_episodes
        until it has reached `final_share`."""
        if self.schedule == "constant" or self.over_episodes is None:
            return 1.0
        return 1.0 - (1.0 - self.final_share) * min(1.0, sequence / self.over_episodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Rollouts of the base policy before the fleet starts, for algorithms that ask for them: nobody corrects them."""

    episodes_per_task: int = 24
    """Of every fleet task."""
    explore: bool = True
    """With the run's exploration at full strength, also when the fleet itself does not explore: rollouts are for
    telling good from bad, so they need both outcomes from similar beginnings."""
    workers: int = 2
    """Actor processes that record them."""

    def __post_init__(self) -> None:
        for name in ("episodes_per_task", "workers"):
            _require(getattr(self, name) >= 1, f"rollouts.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Which policy is trained."""

    kind: str = "flow_vla"
    """Name in `sop.policies.POLICIES`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of that class, see its `Settings`; what is not named keeps its default."""
    execution_horizon: int = 8
    """Steps executed before the next inference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """The adaptive sampler (SOP section on task-balanced, loss-adaptive sampling; defaults in spec A.6)."""

    alpha: float = 1.5
    """Preference for online data at equal loss; above 1."""
    scale: Literal["ratio", "raw"] = "ratio"
    """`ratio` divides both mean losses by their average before the sigmoid; `raw` is the paper's formula."""
    window: int = 200
    """W: learner steps over which losses are averaged."""
    min_entries: int = 20
    """Until both sides have this many entries the online share is 0.5."""
    min_share: float = 0.2
    max_share: float = 0.8
    """The online share is kept in [min_share, max_share]."""
    min_online_starts: int = 100
    """With fewer window starts online, a task that has demonstrations is drawn offline only."""
    max_actor_share: float | None = None
    """Largest share of one robot in the online windows of a task. None: 2 / N with N robots that have data for the
    task, so nothing is cut while there are one or two; 1 never cuts. Below 1 / N every robot has 1 / N."""

    def __post_init__(self) -> None:
        _require(
            self.max_actor_share is None or 0 < self.max_actor_share <= 1,
            f"sampler.max_actor_share must be in (0, 1], got {self.max_actor_share}",
        )
        _require(self.scale in ("ratio", "raw"), f"sampler.scale must be ratio or raw, got {self.scale!r}")
        _require(self.alpha > 0, f"sampler.alpha must be positive, got {self.alpha}")
        _require(
            0 <= self.min_share <= self.max_share <= 1,
            f"sampler shares must satisfy 0 <= min_share <= max_share <= 1, got {self.min_share}, {self.max_share}",
        )
        _require(self.window >= 1, f"sampler.window must be at least 1, got {self.window}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How the base policy (version 0) is made from lab demonstrations."""

    demonstrations_per_task: int = 20
    steps: int = 400
    batch_size: int = 64
    lr: float = 1e-3
    """Peak learning rate; warm-up, then cosine to zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    """The learner's loop."""

    batch_size: int = 64
    lr: float = 5e-4
    weight_decay: float = 1e-4
    lr_multipliers: Mapping[str, float] = field(default_factory=lambda: {r"\.indicator": 10.0})
    """Regular expression -> factor of the learning rate of the parameters whose name it matches (the first that
    matches counts); they get no weight decay. What matches nothing changes nothing."""
    warmup_steps: int = 20
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.99
    """Decay of the moving average of the weights, which is what is published; 0 publishes the weights."""
    freeze: str = ""
    """Regular expression: parameters whose name it matches are not trained."""
    publish_every: int = 25
    """Learner steps between two published policies."""
    golden_observations: int = 64
    """Moments of the demonstrations on which every version has to act sensibly before it is published, about 0.1 s of
    a core per version; 0 publishes whatever is finite."""
    publish_dtype: str = "float32"
    """`float32`, or `bfloat16`: half the bytes, rounded to the nearest."""
    publish_encoding: str = "auto"
    """`full` writes one file per policy, to be read where it lies; `packed` writes differences, for robots behind a
    link; `auto` is full when the store is a directory and packed when it is not."""
    checkpoint_every: int = 200
    """Learner steps between two checkpoints."""
    max_draws_per_start: float = 12.0
    """Pause when every window start that the fleet added has been drawn this often on average; 0 never pauses."""
    offline_steps: int = 800
    """Steps of an algorithm that collects nothing (`bc`)."""
    cooldown_steps: int = 400
    """Steps after the last episode, while the learning rate falls linearly."""
    cooldown_lr_factor: float = 0.1
    """Share of the learning rate that is left at the end of the cool-down."""
    prefetch: int = 2
    """Batches that are prepared ahead."""
    decode_workers: int = 1
    """Processes that decode images beside the learner; 0 decodes in a thread of it. The batches are the same."""
    disk_cache_gb: float = 50.0
    """Bound of the episodes kept in `<folder>/cache`, gigabytes, when the store is not a directory of this machine;
    0 keeps them in memory, which needs `decode_workers` = 0."""
    cache_gb: float = 4.0
    """Bound of the encoded episodes kept in memory, gigabytes, when `disk_cache_gb` is 0."""
    label_cache_mb: float = 256.0
    """Bound of the labels kept in memory, megabytes; what is beyond is asked of the algorithm again."""
    device: str = "auto"
    """Where the learner computes, e.g. `cpu` or `cuda:0`; `auto` takes a GPU when there is one."""
    parallel: Literal["replicate", "shard"] = "replicate"
    """What the ranks of a learner on many GPUs keep (`torchrun ... -m sop learner`): `replicate`, each all weights;
    `shard`, each a part of them and of the optimizer, for policies that do not fit on one. One process keeps all."""
    threads: int = 1
    """Processor threads of the learner while the fleet runs beside it."""
    keep_policies: int = 50
    """Newest published policies whose tensors are kept; manifests are kept for ever."""
    max_skipped_steps: int = 3
    """Steps in a row with a loss or gradient that is not finite, before the learner stops."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "publish_every", "checkpoint_every", "threads", "prefetch", "keep_policies"):
            _require(getattr(self, name) >= 1, f"learner.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("golden_observations", "decode_workers", "disk_cache_gb"):
            _require(getattr(self, name) >= 0, f"learner.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("cache_gb", "label_cache_mb"):
            _require(getattr(self, name) > 0, f"learner.{name} must be positive, got {getattr(self, name)}")
        _require(
            self.publish_dtype in ("float32", "bfloat16"),
            f"learner.publish_dtype must be float32 or bfloat16, got {self.publish_dtype!r}",
        )
        _require(
            self.publish_encoding in ("auto", "full", "packed"),
            f"learner.publish_encoding must be auto, full or packed, got {self.publish_encoding!r}",
        )
        parallel = ("replicate", "shard")
        _require(self.parallel in parallel, f"learner.parallel must be replicate or shard, got {self.parallel!r}")
        _require(self.lr > 0, f"learner.lr must be positive, got {self.lr}")
        _require(0 <= self.ema < 1, f"learner.ema must be in [0, 1), got {self.ema}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How policies are judged: deployment scenes, no operators, fixed seeds that training never uses."""

    episodes_per_task: int = 50
    """For the base and the final policy, and for the expert."""
    progress_episodes_per_task: int = 10
    """For versions that are evaluated while the fleet runs; 0 for none."""
    first_seed: int = 7_000_000
    """Episode i of a task is reset with seed first_seed + i (progress evaluations use other seeds)."""
    workers: int = 2
    """Processes for the base and final evaluation."""

    def __post_init__(self) -> None:
        _require(0 <= self.first_seed < 2**30, f"evaluation.first_seed must be in [0, 2^30), got {self.first_seed}")
        _require(self.episodes_per_task >= 1, "evaluation.episodes_per_task must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    preset: str
    robot: RobotConfig
    seed: int = 0
    algorithm: str = "hg_dagger"
    """Name in `sop.algorithms.ALGORITHMS`."""
    algorithm_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the algorithm; what is not named keeps its default."""
    operator: OperatorConfig = OperatorConfig()
    fleet: FleetConfig = FleetConfig()
    exploration: ExplorationConfig = ExplorationConfig()
    rollouts: RolloutConfig = RolloutConfig()
    policy: PolicyConfig = PolicyConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sampler: SamplerConfig = SamplerConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def rollout_exploration(self) -> ExplorationConfig:
        """The exploration of the base rollouts."""
        if not self.rollouts.explore:
            return ExplorationConfig()
        kind = "offset" if self.exploration.kind == "none" else self.exploration.kind
        return replace(self.exploration, kind=kind, schedule="constant", final_share=0.0, over_episodes=None)
