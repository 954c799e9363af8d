"""The value network: the policy's own encoder, and a head that says how well things stand.

    image per camera -> CameraEncoder -> 2 tokens -+
    instruction ------------------------> 1 token -+-> Backbone -> P tokens -> joined -> MLP -> logits [bins]
    state ------------------------------> 1 token -+

Names of parameters are those of the policy (`vision.camera_<camera>.`, `backbone.`), so that a value function can
start from what the policy has learned to see.

Shapes: N observations, S state elements, D text width, W token width, P prefix tokens.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sop.core.embodiment import Embodiment
from sop.core.settings import build_settings
from sop.policies.settings import Settings
from sop.policies.transformer import Backbone
from sop.policies.vision import CameraEncoder

SHARED = ("vision.", "backbone.")
"""Beginnings of the names of the tensors that a value network can take over from a policy."""

_ENCODER_SETTINGS = (
    "width", "heads", "prefix_layers", "prefix_mlp", "channels", "keypoints", "grid", "text_encoder", "precision",
)  # fmt: skip
"""What `CameraEncoder`, `Backbone` and the arithmetic read of the policy's settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSettings:
    """Settings of the value function and of its fit. Sizes of the encoder are those of the policy.

    Raises:
        ValueError: on construction, naming the setting and the value it has.
    """

    num_bins: int = 201
    """Bins over the normalised return."""
    steps: int = 400
    """Optimizer steps of a fit."""
    batch_size: int = 64
    """Frames per step."""
    lr: float = 5e-4
    """Peak of the learning rate: linear warm-up, then half a cosine down to 0 at the end of the fit."""
    warmup_steps: int = 20
    """Optimizer steps of the warm-up."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    init: Literal["policy", "fresh"] = "policy"
    """Whether the encoder starts as a copy of the policy's."""
    random_shift: int = 3
    """Largest shift of a training image per axis, pixels; 0 for none."""
    dropout: float = 0.0
    """Share of the head's inputs that are dropped in training."""
    balance_outcomes: bool = True
    """Draw steps that lead to success and steps that do not equally often per task: rare failures count, at the
    price of values that are too low where failures are rare. False draws as in the data."""
    seed: int = 0
    """Of the initial weights and of the draws."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_bins", 2), ("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("random_shift", 0), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be 0 or more and finite, got {self.weight_decay}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.init not in ("policy", "fresh"):
            raise ValueError(f"init must be 'policy' or 'fresh', got {self.init!r}")


@dataclass(frozen=True, slots=True)
class ValueInputs:
    """What the network reads, as tensors on its device."""

    images: tuple[Tensor, ...]
    """Per camera, in the embodiment's order: uint8 [N, h, w, 3]."""
    state: Tensor
    """[N, S] normalised."""
    text: Tensor
    """[N, D] sentence embeddings."""


class ValueNetwork(nn.Module):
    """Observation and instruction to logits over the bins.

    The head reads all prefix tokens side by side: a mean would mix what the keypoints of a camera say with the rest.
    Its last layer starts at zero, so that an untrained network says -0.5 everywhere.

    Args:
        embodiment: gives cameras and number of state elements.
        encoder: sizes, see `encoder_settings`.
        num_bins: of the distribution.

    Raises:
        ValueError: sizes and images do not fit together.
    """

    def __init__(self, embodiment: Embodiment, encoder: Settings, num_bins: int) -> None:
        super().__init__()
        cameras = embodiment.cameras
        # The names under which the built-in policy keeps its cameras: torch allows no dots there.
        self.vision = nn.ModuleDict(
            {"camera_" + re.sub(r"\W", "_", camera): CameraEncoder(size, encoder) for camera, size in cameras.items()}
        )
        if len(self.vision) != len(cameras):
            raise ValueError(f"camera names differ only in punctuation: {sorted(cameras)}")
        self.backbone = Backbone(embodiment.num_states, len(cameras), encoder)
        tokens = (2 * len(cameras) + 2) * encoder.width
        self.head_in = nn.Linear(tokens, 2 * encoder.width)
        self.head_out = nn.Linear(2 * encoder.width, num_bins)
        nn.init.zeros_(self.head_out.weight)
        nn.init.zeros_(self.head_out.bias)

    def forward(self, inputs: ValueInputs, dropout: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Logits [N, bins].

        Args:
            inputs: N observations.
            dropout: share of the head's inputs that are zeroed (the others grow accordingly); for training.
            generator: of the dropout, so that the global generator stays untouched.
        """
        instruction = self.backbone.instruction_token(inputs.text)
        cameras = [
            encoder(images, instruction) for encoder, images in zip(self.vision.values(), inputs.images, strict=True)
        ]
        tokens = self.backbone(torch.cat(cameras, dim=1), instruction, inputs.state).flatten(1)
        if dropout > 0:
            where = "cpu" if generator is None else generator.device
            kept = torch.rand(tokens.shape, generator=generator, device=where).to(tokens.device) >= dropout
            tokens = tokens * kept / (1 - dropout)
        logits: Tensor = self.head_out(F.gelu(self.head_in(tokens)))
        return logits


def encoder_settings(config: Mapping[str, Any]) -> Settings:
    """Sizes of the encoder from the settings of a policy; those of another kind of policy give the defaults.

    Raises:
        ValueError: a size is out of range.
    """
    if not all(name in config for name in _ENCODER_SETTINGS):
        return Settings()
    return build_settings(Settings, {name: config[name] for name in _ENCODER_SETTINGS}, "value network")


def copy_encoder(network: ValueNetwork, module: nn.Module) -> int:
    """Take over every tensor of a policy that is named as one of the encoder (`SHARED`) and has its shape.

    Returns:
        How many tensors were copied; 0 for a policy with another encoder.
    """
    source, copied = module.state_dict(), 0
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.startswith(SHARED) and name in source and source[name].shape == tensor.shape:
                tensor.copy_(source[name])
                copied += 1
    return copied
