"""The built-in VLA's network: all of its weights, the error it is trained on, and the integration of its velocity.

Shapes: B windows or N observations, H steps, A action elements, S state elements, W width, D text width.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sop.core.embodiment import Embodiment
from sop.policies.indicator import NULL
from sop.policies.settings import Settings
from sop.policies.transformer import ActionExpert, Backbone, ExpertLayer, PrefixCache, PrefixLayer
from sop.policies.vision import CameraEncoder


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the network reads, as tensors on its device."""

    images: tuple[Tensor, ...]
    """Per camera, in the embodiment's order: uint8 [N, h, w, 3]."""
    state: Tensor
    """[N, S] normalised."""
    text: Tensor
    """[N, D] sentence embeddings."""


class FlowNetwork(nn.Module):
    """All weights. Parameter names begin with `vision.camera_<camera>.`, `backbone.` and `expert.` (see `freeze`).

    With `Settings.indicator` "embed" the expert has tables for the indicator besides, named `....indicator.weight`,
    all zero at first: until they are trained, the network is the one without them, to the bit.
    """

    def __init__(self, embodiment: Embodiment, settings: Settings) -> None:
        super().__init__()
        self.vision = nn.ModuleDict(
            {_module_name(camera): CameraEncoder(size, settings) for camera, size in embodiment.cameras.items()}
        )
        if len(self.vision) != len(embodiment.cameras):
            raise ValueError(f"camera names differ only in punctuation: {sorted(embodiment.cameras)}")
        self.backbone = Backbone(embodiment.num_states, len(embodiment.cameras), settings)
        self.expert = ActionExpert(embodiment.num_actions, settings)

    def read(self, inputs: Inputs) -> PrefixCache:
        """Everything that does not depend on flow time, noise or the indicator's row."""
        instruction = self.backbone.instruction_token(inputs.text)
        cameras = [
            encoder(images, instruction) for encoder, images in zip(self.vision.values(), inputs.images, strict=True)
        ]
        prefix = self.backbone(torch.cat(cameras, dim=1), instruction, inputs.state)
        return self.expert.read_prefix(prefix)

    def forward(
        self,
        inputs: Inputs,
        action: Tensor,
        noise: Tensor,
        time: Tensor,
        valid: Tensor | None,
        *,
        indicator: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the velocity, float32 [B, draws, H], mean over action elements.

        Args:
            inputs: B observations.
            action: [B, H, A] normalised.
            noise: [B, draws, H, A].
            time: [B, draws] flow time.
            valid: bool [B, H], which steps may be seen by the others; None for all.
            indicator: int64 [B] rows of the indicator's tables, the same for all draws of a window; None for NULL.
        """
        draws = noise.shape[1]
        share = time[:, :, None, None]
        noisy = (1 - share) * noise + share * action[:, None]
        if valid is not None:
            valid = valid.repeat_interleave(draws, 0)
        if indicator is not None:
            indicator = indicator.repeat_interleave(draws, 0)
        prefix = self.read(inputs).repeat(draws)
        modulations = self.expert.modulations(time.flatten(), indicator)
        velocity = self.expert(noisy.flatten(0, 1), modulations, prefix, valid)
        error: Tensor = (velocity.float().view_as(noise) - (action[:, None] - noise)).square().mean(dim=-1)
        return error

    def sample(self, inputs: Inputs, noise: Tensor, steps: int, row: int = NULL) -> Tensor:
        """Integrate one branch from noise [N, H, A] to normalised actions [N, H, A] with `steps` Euler steps.

        Args:
            inputs: N observations, with the text of that branch.
            noise: [N, H, A].
            steps: of the integration.
            row: of the indicator's tables, the same for all observations.
        """
        prefix = self.read(inputs)
        modulations = self._modulations(steps, row, noise)
        actions = noise
        for step in range(steps):
            at_step = tuple(modulation[step : step + 1] for modulation in modulations)
            actions = actions + self.expert(actions, at_step, prefix) / steps
        return actions

    def sample_guided(
        self, null: Inputs, conditional: Inputs, noise: Tensor, steps: int, *, row: int, guidance: float
    ) -> Tensor:
        """Integrate v(null) + guidance * (v(row) - v(null)); both branches in one pass of 2 N rows per Euler step.

        Args:
            null: N observations, with the text of the null branch.
            conditional: the same with the text of the other; when it is `null` itself, the prefix is read once.
            noise: [N, H, A], where both branches begin.
            steps: of the integration.
            row: of the indicator's tables for the second branch.
            guidance: beta.
        """
        prefix = self.read(null)
        prefix = prefix.joined(prefix if conditional is null else self.read(conditional))
        branches = zip(self._modulations(steps, NULL, noise), self._modulations(steps, row, noise), strict=True)
        # [steps, 2, 6 W]: what differs between the branches is repeated for N rows at every step, nothing else is.
        modulations = [torch.cat(pair, dim=1) for pair in branches]
        actions = noise
        for step in range(steps):
            at_step = tuple(modulation[step].repeat_interleave(len(noise), 0)[:, None] for modulation in modulations)
            without, with_row = self.expert(torch.cat((actions, actions)), at_step, prefix).chunk(2)
            actions = actions + (without + guidance * (with_row - without)) / steps
        return actions

    def _modulations(self, steps: int, row: int, like: Tensor) -> tuple[Tensor, ...]:
        times = torch.arange(steps, device=like.device) / steps
        return self.expert.modulations(times, torch.full((steps,), row, device=like.device))


def flow_blocks(module: nn.Module) -> list[nn.Module]:
    """Blocks for sharding, inner ones first: every layer, and of an expert's layer what is used outside of its turn
    (keys and values of the prefix, and the modulations, which are computed for all layers before the first)."""
    blocks: list[nn.Module] = []
    for part in module.modules():
        if isinstance(part, ExpertLayer):
            blocks += [part.prefix_key_value, part.modulation]
            blocks += [] if part.indicator is None else [part.indicator]
        if isinstance(part, ExpertLayer | PrefixLayer):
            blocks.append(part)
    return blocks


def _module_name(camera: str) -> str:
    """Camera name as a part of parameter names: torch allows no dots there."""
    return "camera_" + re.sub(r"\W", "_", camera)
