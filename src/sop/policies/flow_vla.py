"""The built-in VLA: two cameras, an instruction and the robot's state in, a chunk of actions out, by flow matching.

    image per camera -> conv net, FiLM by the instruction -> 2 tokens -+
    instruction -> sentence embedding --------------------> 1 token  --+-> prefix transformer -> keys, values
    state ------------------------------------------------> 1 token  -+                            |
    noise [H, A] -> action expert, AdaLN on flow time, attends to the prefix <---------------------+
          '-> 4 Euler steps -> actions [H, A]

Flow time t: 0 is noise, 1 is the action. x_t = (1 - t) * noise + t * action, and the network learns the velocity
action - noise (Lipman et al. 2023; pi0, arXiv 2410.24164, with its emphasis on the noisy end: t = 1 - Beta(1.5, 1)).

Shapes: B windows or N observations, H steps, A action elements, S state elements, W width, D text width.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sop.core.embodiment import Embodiment, Observation
from sop.core.experience import Batch
from sop.core.policy import ActionChunk, Conditioning, PolicySpec, Weights
from sop.core.settings import build_settings
from sop.policies.base import export_weights, load_weights
from sop.policies.normalization import LARGEST_STATE, check_normalization
from sop.policies.precision import autocast, training_dtype
from sop.policies.sentences import TextEncoder, make_text_encoder
from sop.policies.settings import Settings
from sop.policies.transformer import ActionExpert, Backbone, PrefixCache
from sop.policies.vision import CameraEncoder, random_shift


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
    """All weights. Parameter names begin with `vision.camera_<camera>.`, `backbone.` and `expert.` (see `freeze`)."""

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
        """Everything that does not depend on flow time or noise."""
        instruction = self.backbone.instruction_token(inputs.text)
        cameras = [
            encoder(images, instruction) for encoder, images in zip(self.vision.values(), inputs.images, strict=True)
        ]
        prefix = self.backbone(torch.cat(cameras, dim=1), instruction, inputs.state)
        return self.expert.read_prefix(prefix)

    def forward(self, inputs: Inputs, action: Tensor, noise: Tensor, time: Tensor, valid: Tensor | None) -> Tensor:
        """Squared error of the velocity, float32 [B, draws, H], mean over action elements.

        Args:
            inputs: B observations.
            action: [B, H, A] normalised.
            noise: [B, draws, H, A].
            time: [B, draws] flow time.
            valid: bool [B, H], which steps may be seen by the others; None for all.
        """
        draws = noise.shape[1]
        share = time[:, :, None, None]
        noisy = (1 - share) * noise + share * action[:, None]
        if valid is not None:
            valid = valid.repeat_interleave(draws, 0)
        prefix = self.read(inputs).repeat(draws)
        velocity = self.expert(noisy.flatten(0, 1), self.expert.modulations(time.flatten()), prefix, valid)
        error: Tensor = (velocity.float().view_as(noise) - (action[:, None] - noise)).square().mean(dim=-1)
        return error

    def sample(self, inputs: Inputs, noise: Tensor, steps: int) -> Tensor:
        """Integrate from noise [N, H, A] to normalised actions [N, H, A] with `steps` Euler steps."""
        prefix = self.read(inputs)
        times = torch.arange(steps, device=noise.device) / steps
        modulations = self.expert.modulations(times)
        actions = noise
        for step in range(steps):
            at_step = tuple(modulation[step : step + 1] for modulation in modulations)
            actions = actions + self.expert(actions, at_step, prefix) / steps
        return actions


class FlowVLA:
    """`TrainablePolicy` around `FlowNetwork`: normalisation, text, noise, precision, weights in and out.

    Actions are clipped to the embodiment's limits: a normal tail beyond them is no plan. Inference is float32
    (at this size faster than bfloat16, and the same on a robot without it); the training step computes in
    bfloat16 where the processor does. Not thread-safe.

    Args:
        spec: `config` holds `Settings`.
        seed: of the initial weights and of the sampling noise until `reset`.
        encoder: of the instructions; None makes the one that the settings name.

    Raises:
        ValueError: settings, statistics and embodiment do not fit together.
    """

    def __init__(self, spec: PolicySpec, seed: int = 0, encoder: TextEncoder | None = None) -> None:
        self.settings = build_settings(Settings, spec.config, f"policy {spec.kind}")
        if spec.action_horizon != self.settings.action_horizon:
            raise ValueError(
                f"policy {spec.kind}: action_horizon is {self.settings.action_horizon} in the settings "
                f"and {spec.action_horizon} in the spec"
            )
        check_normalization(spec.normalization, spec.embodiment)
        self._spec = spec
        self.version = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: nn.Module = FlowNetwork(spec.embodiment, self.settings)
        self._encoder = make_text_encoder(self.settings.text_encoder) if encoder is None else encoder
        if self._encoder.width != self.settings.text_width:
            raise ValueError(f"the encoder gives {self._encoder.width} numbers, {self.settings.text_width} are read")
        statistics = {key: np.asarray(values, np.float32) for key, values in spec.normalization.items()}
        self._state_mean, self._state_std = statistics["state_mean"], statistics["state_std"]
        self._action_mean, self._action_std = statistics["action_mean"], statistics["action_std"]
        self._low = np.asarray(spec.embodiment.action_low, np.float32)
        self._high = np.asarray(spec.embodiment.action_high, np.float32)
        self._noise = np.random.default_rng(seed)

    @property
    def spec(self) -> PolicySpec:
        """What this policy needs to run."""
        return self._spec

    def reset(self, seed: int) -> None:
        """Seed the noise of `infer`; there is no history to forget."""
        self._noise = np.random.default_rng(seed)

    def infer(self, observation: Observation, instruction: str, conditioning: Conditioning) -> ActionChunk:
        """Plan the next steps, [H, A] in action units; blocks for one inference.

        Raises:
            ValueError: an image or the state is not of the embodiment, or an indicator is asked for.
        """
        return np.asarray(self.infer_many([observation], [instruction], conditioning, [self._noise])[0])

    def infer_many(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        conditioning: Conditioning,
        generators: Sequence[np.random.Generator],
    ) -> npt.NDArray[np.float32]:
        """Plan for N robots at once, [N, H, A]; see `TrainablePolicy.infer_many`.

        Raises:
            ValueError: an image or a state is not of the embodiment, an indicator is asked for, or the sequences
                differ in length.
        """
        if not len(observations) == len(instructions) == len(generators):
            raise ValueError(
                f"one instruction and one generator per observation: got {len(observations)} observations, "
                f"{len(instructions)} instructions, {len(generators)} generators"
            )
        if conditioning.advantage_indicator is not None:
            raise ValueError(_NO_INDICATOR)
        images = {
            camera: np.stack([_image(observation, camera, size) for observation in observations])
            for camera, size in self._spec.embodiment.cameras.items()
        }
        state = np.stack([_state(observation, self._spec.embodiment.num_states) for observation in observations])
        shape = (self._spec.action_horizon, self._spec.embodiment.num_actions)
        noise = np.stack([generator.standard_normal(shape, np.float32) for generator in generators])
        with torch.inference_mode():
            inputs = self._inputs(images, state, instructions)
            start = torch.from_numpy(noise).to(inputs.state.device)
            actions = self._network.sample(inputs, start, self.settings.euler_steps).cpu().numpy()
        planned: npt.NDArray[np.float32] = actions * self._action_std + self._action_mean
        return planned.clip(self._low, self._high)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Flow-matching loss per window, [B]; see `TrainablePolicy.loss`.

        A step without weight neither counts nor is seen by the other steps, so nothing is learned from it.
        Images are shifted independently per window and camera; the draws of noise and flow time share them.
        """
        if batch.advantage_indicator is not None:
            raise ValueError(_NO_INDICATOR)
        settings = self.settings
        images = {
            camera: random_shift(batch.images[camera], settings.random_shift, generator)
            for camera in self._spec.embodiment.cameras
        }
        inputs = self._inputs(images, batch.state, batch.instruction)
        device = inputs.state.device
        action = torch.from_numpy((batch.action - self._action_mean) / self._action_std).to(device)
        weight = torch.from_numpy(np.array(batch.loss_weight)).to(device)
        draws = (len(batch), settings.noise_draws)
        where = generator.device
        uniform = torch.rand(draws, generator=generator, device=where).to(device)
        noise = torch.randn((*draws, *batch.action.shape[1:]), generator=generator, device=where).to(device)
        time = 1 - uniform ** (1 / settings.time_power)  # u ** (1 / a) of a uniform u is Beta(a, 1)
        valid = weight > 0
        hidden = None if (batch.loss_weight > 0).all() else valid
        with autocast(device, training_dtype(settings.precision, device)):
            error: Tensor = self.module(inputs, action, noise, time, hidden)
        return (weight * error.mean(dim=1)).sum(dim=1) / valid.sum(dim=1).clamp(min=1)

    def load(self, weights: Weights, version: int) -> None:
        """Replace the weights by copies; all or nothing.

        Raises:
            PolicyRefused: a name, shape, dtype or value is wrong; the old weights stay.
        """
        load_weights(self.module, weights)
        self.version = version

    def export(
        self,
        weights: Mapping[str, Tensor] | None = None,
        *,
        dtype: str = "float32",
        names: Collection[str] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Copies of the weights; see `TrainablePolicy.export`."""
        return export_weights(self.module, weights, dtype=dtype, names=names)

    @property
    def _network(self) -> FlowNetwork:
        return cast("FlowNetwork", self.module)

    def _inputs(
        self, images: Mapping[str, npt.NDArray[np.uint8]], state: npt.NDArray[np.float32], instructions: Sequence[str]
    ) -> Inputs:
        device = next(self.module.parameters()).device
        normalised = np.clip((state - self._state_mean) / self._state_std, -LARGEST_STATE, LARGEST_STATE)
        distinct = list(dict.fromkeys(instructions))
        row = {instruction: index for index, instruction in enumerate(distinct)}
        text = self._encoder.encode(distinct)[[row[instruction] for instruction in instructions]]
        return Inputs(
            images=tuple(_tensor(images[camera]).to(device) for camera in self._spec.embodiment.cameras),
            state=torch.from_numpy(normalised).to(device),
            text=torch.from_numpy(text).to(device),
        )


_NO_INDICATOR = (
    "this policy was trained without an advantage indicator: use Conditioning(advantage_indicator=None) "
    "and batches without one"
)


def _tensor(array: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _image(observation: Observation, camera: str, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    image = observation.images.get(camera)
    if image is None:
        raise ValueError(f"observation: camera {camera!r} is missing, got {sorted(observation.images)}")
    if image.shape != (*size, 3) or image.dtype != np.uint8:
        raise ValueError(f"observation: {camera} must be uint8 {(*size, 3)}, got {image.dtype.name} {image.shape}")
    return image


def _state(observation: Observation, count: int) -> npt.NDArray[np.float32]:
    state = observation.state
    if state.shape != (count,) or state.dtype != np.float32:
        raise ValueError(f"observation: state must be float32 {(count,)}, got {state.dtype.name} {state.shape}")
    return state


def _module_name(camera: str) -> str:
    """Camera name as a part of parameter names: torch allows no dots there."""
    return "camera_" + re.sub(r"\W", "_", camera)
