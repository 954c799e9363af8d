"""Sizes and options of the built-in policy."""

from dataclasses import dataclass
from typing import Literal

from sop.policies.indicator import PLACEHOLDERS

TEXT_WIDTH: dict[str, int] = {"minilm": 384, "hash": 64}
"""Length of the sentence embedding per text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of `FlowVLA`. The sizes of actions, state and images come from the embodiment.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    action_horizon: int = 8
    """H: actions predicted per inference, control steps."""
    width: int = 128
    """Width of every token."""
    heads: int = 4
    """Attention heads; must divide `width`."""
    prefix_layers: int = 2
    """Transformer layers over the prefix (images, instruction, proprioception)."""
    expert_layers: int = 2
    """Transformer layers of the action expert."""
    prefix_mlp: int = 4
    """Hidden width of the prefix layers' MLPs, as a multiple of `width`."""
    expert_mlp: int = 2
    """Hidden width of the expert layers' MLPs, as a multiple of `width`."""
    channels: tuple[int, int, int] = (32, 48, 64)
    """Output channels of the three convolutions; the first two halve height and width."""
    keypoints: int = 32
    """Spatial-softmax keypoints per camera."""
    grid: int = 4
    """Side of the pooled grid per camera; images need at least 4 * grid pixels per side."""
    text_encoder: Literal["minilm", "hash"] = "minilm"
    """`minilm` reads the meaning of an instruction; `hash` only tells sentences apart (debugging)."""
    random_shift: int = 3
    """Largest shift of a training image per axis, pixels; 0 for none."""
    noise_draws: int = 2
    """Draws of (noise, flow time) per window and training step; the prefix is computed once for all."""
    time_power: float = 1.5
    """Flow time in training is 1 - u with u ~ Beta(time_power, 1): above 1 favours the noisy end; 1 is uniform."""
    euler_steps: int = 4
    """Integration steps from noise to actions at inference."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the training step; `auto` takes bfloat16 where the processor computes in it."""
    indicator: Literal["none", "embed", "text"] = "none"
    """How an advantage indicator reaches the network: not at all; as zero-initialised tables in the action expert,
    so that the policy is at first the one without them; or as words in the instruction."""
    indicator_dropout: float = 0.3
    """Share of the training windows with an indicator that are learned without it (pi*0.6); below 1."""
    indicator_text: str = "{instruction}\nAdvantage: {advantage}"
    """What the sentence encoder gets in place of the instruction, `{advantage}` being "positive" or "negative". Only
    for `text`. Another string at inference than in training is an untrained condition: it belongs to the weights."""

    def __post_init__(self) -> None:
        for name in (
            "action_horizon", "width", "heads", "prefix_layers", "expert_layers", "prefix_mlp", "expert_mlp",
            "keypoints", "grid", "noise_draws", "euler_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and a multiple of heads ({self.heads}), got {self.width}")
        if min(self.channels) < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")
        if self.random_shift < 0:
            raise ValueError(f"random_shift must be 0 or more, got {self.random_shift}")
        if self.time_power <= 0:
            raise ValueError(f"time_power must be positive, got {self.time_power}")
        if not 0 <= self.indicator_dropout < 1:
            raise ValueError(f"indicator_dropout must be in [0, 1), got {self.indicator_dropout}")
        for placeholder in PLACEHOLDERS:
            if placeholder not in self.indicator_text:
                raise ValueError(f"indicator_text must contain {placeholder}, got {self.indicator_text!r}")

    @property
    def text_width(self) -> int:
        """Length of the sentence embedding."""
        return TEXT_WIDTH[self.text_encoder]
