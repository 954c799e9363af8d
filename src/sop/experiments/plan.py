"""The arms of X-IND and its numbers.

    base     plain: as it was made            tuned: made again from the same demonstrations, with an indicator
    kind     embed: tables in the expert      text: words in the instruction
    start    cold: straight into the stream   warm: after the offline warm-up

All arms of a seed learn from the same episodes in the same order, with the same value function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["embed", "text"]
Lessons = Literal["all", "positive", "weighted", "demonstrations"]
"""What gives a gradient: every window; those that RECAP calls positive; every window, by its advantage as in
`weighted_bc`; or those of demonstrations alone, as if neither the base policy nor the fleet had done anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """How RECAP is used in one arm."""

    tuned: bool = False
    """Whether the base policy was trained with an indicator already."""
    kind: Kind | None = None
    """How the policy is told; None: it is not."""
    warm: bool = False
    """Whether the indicator is trained on the offline buffer before the stream begins."""
    negatives: bool = True
    """Whether the policy is told of bad actions; else these train the null branch."""
    lessons: Lessons = "all"
    """What it learns from, in as many steps; all, where it has an indicator."""

    def __post_init__(self) -> None:
        if self.kind is None and (self.tuned or self.warm):
            raise ValueError("an arm without an indicator has no tuned base and no warm-up")
        if self.kind is not None and self.lessons != "all":
            raise ValueError("an arm that is told of good and bad leaves nothing out")

    @property
    def base(self) -> str | None:
        """Name of the job that makes its base policy; None for the stream's own."""
        return f"base-{self.kind}" if self.tuned else None


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        f"{base}-{kind}-{start}": Arm(tuned=base == "tuned", kind=kind, warm=start == "warm")
        for base in ("plain", "tuned")
        for kind in ("embed", "text")
        for start in ("cold", "warm")
    }
    | {
        "positive-only": Arm(kind="embed", warm=True, negatives=False),
        "no-indicator": Arm(),
        "filtered": Arm(lessons="positive"),
        "weighted": Arm(lessons="weighted"),
        "demonstrations": Arm(lessons="demonstrations"),
    }
)
"""The eight combinations, and five controls."""
BASES: Mapping[str, Kind] = MappingProxyType({"base-embed": "embed", "base-text": "text"})
"""Jobs that make the tuned base policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Numbers of the experiment. The defaults are the full one.

    What it costs per arm and seed on one core, a learner step being 0.1 to 0.15 s and an evaluation episode 0.2 s: at
    most 150 + 475 + 160 steps (80 to 120 s), 6 x 4 x 8 episodes for the curve (40 s), 6 x 4 x 12 and 2 x 10 at the
    end (60 s; those with beta > 1 plan twice as long), 48 pairs of look-aheads (15 s), values of 200 episodes once per
    seed (30 s): about four minutes. Thirteen arms and two tuned bases (a minute each) at three seeds with two workers:
    little more than an hour, beside the streams, ten minutes each when they have to be recorded.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    """Those that are run; `no-indicator` is the one that tells how good the base policy is."""
    preset: str = "metaworld"
    """Of streams that are recorded for the experiment."""
    stream_changes: tuple[str, ...] = ()
    """Further settings of such streams, as for `sop run --set`."""
    episodes: int = 72
    """Of the fleet, the first of the stream; aborted ones are left out."""
    steps_per_episode: int = 5
    """Learner steps between two of them."""
    cooldown_steps: int = 120
    """Learner steps after the last one."""
    warmup_max_steps: int = 100
    """Learner steps of a warm-up that does not reach its goal."""
    publish_every: int = 25
    """Learner steps."""
    rollouts: Literal["value_only", "value_and_policy"] = "value_and_policy"
    """Whether policies learn from base rollouts: without them a warm-up sees no bad action. The same in all arms."""
    demonstrations: Literal["positive", "advantage"] = "positive"
    """How the arms label demonstrations (a tuned base is made with `advantage` in any case)."""
    offline_positive: float = 0.30
    """Part of the demonstrations' steps that is positive for a tuned base, of the rollouts' for the arms."""
    curve_episodes: int = 6
    """Evaluation episodes per fleet task at the evaluated publishes."""
    final_episodes: int = 12
    """Per fleet task and condition at the end."""
    held_out_episodes: int = 10
    """Per held-out task at the end."""
    betas: tuple[float, ...] = (0.0, 1.0, 1.5, 2.0, 2.5)
    """Guidance at the end, asking for good actions; 0 is the null branch."""
    window_batches: int = 4
    """Batches of fixed windows on which branches and chunks are compared."""
    windows_per_batch: int = 32
    pair_seeds: int = 6
    """Scenes per fleet task from which the two look-aheads begin ..."""
    pair_chunks: tuple[int, ...] = (1, 4)
    """... after so many chunks of the null branch."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms must be some of {', '.join(ARMS)}, each once; got {', '.join(self.arms) or 'none'}")
        if self.episodes < 1:
            raise ValueError(f"episodes of the fleet must be at least 1, got {self.episodes}")

    def learner_steps(self, episodes: int) -> int:
        """Learner steps of an arm without a warm-up, whose stream has so many episodes."""
        return (episodes - 1) * self.steps_per_episode + 1 + self.cooldown_steps


FULL = Plan()
QUICK = Plan(
    preset="debug",
    stream_changes=(
        "fleet.speed=0",
        "fleet.episodes=8",
        "fleet.num_actors=1",
        "pretrain.steps=25",
        "rollouts.episodes_per_task=6",
        "rollouts.workers=1",
        "algorithm_settings.install=cold",
        "learner.cooldown_steps=2",
        "learner.decode_workers=0",
        "evaluation.episodes_per_task=1",
        "evaluation.progress_episodes_per_task=0",
    ),
    episodes=6,
    steps_per_episode=2,
    cooldown_steps=2,
    warmup_max_steps=4,
    publish_every=4,
    curve_episodes=1,
    final_episodes=2,
    held_out_episodes=1,
    betas=(0.0, 1.0, 2.0),
    window_batches=1,
    windows_per_batch=8,
    pair_seeds=1,
    pair_chunks=(0, 1),
)
"""The whole thing on the toy robot, to see that it works."""


def evaluated(publishes: int) -> list[int]:
    """Numbers of the publishes that are measured, of `publishes` in all: 0, 1, 2, 4, 8, ... and the last."""
    if publishes < 1:
        return []
    chosen, power = {0, publishes - 1}, 1
    while power < publishes:
        chosen.add(power)
        power *= 2
    return sorted(chosen)
