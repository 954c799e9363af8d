"""The built-in VLA: two cameras, an instruction and the robot's state in, a chunk of actions out, by flow matching.

    image per camera -> conv net, FiLM by the instruction -> 2 tokens -+
    instruction -> sentence embedding --------------------> 1 token  --+-> prefix transformer -> keys, values
    state ------------------------------------------------> 1 token  -+                            |
    noise [H, A] -> action expert, AdaLN on flow time (and on the advantage indicator: `embed`), --+
                    attends to the prefix <--------------------------------------------------------+
          '-> 4 Euler steps -> actions [H, A]

Flow time t: 0 is noise, 1 is the action. x_t = (1 - t) * noise + t * action, and the network learns the velocity
action - noise (Lipman et al. 2023; pi0, arXiv 2410.24164, with its emphasis on the noisy end: t = 1 - Beta(1.5, 1)).

With an indicator there are three branches: null, negative, positive. Guidance with beta (pi*0.6, appendix E) follows
v(null) + beta * (v(indicator) - v(null)); beta 1 is the indicator's branch alone and beta 0 the null branch.

Shapes: B windows or N observations, H steps, A action elements, S state elements, D text width.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sop.core.embodiment import Observation
from sop.core.experience import Batch
from sop.core.policy import ActionChunk, Conditioning, PolicySpec, Weights
from sop.core.settings import build_settings
from sop.policies.base import BranchVelocities, export_weights, load_weights
from sop.policies.draws import draw_rows
from sop.policies.indicator import NEGATIVE, NULL, POSITIVE, conditioning_row, drop_out, indicator_rows, sentences
from sop.policies.network import FlowNetwork, Inputs
from sop.policies.noise import EpisodeNoise, NoiseSource
from sop.policies.normalization import LARGEST_STATE, check_normalization
from sop.policies.precision import autocast, training_dtype
from sop.policies.sentences import TextEncoder, make_text_encoder
from sop.policies.settings import Settings
from sop.policies.vision import random_shift

__all__ = ["FlowNetwork", "FlowVLA", "Inputs"]


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
        self._noise = EpisodeNoise(seed)

    @property
    def spec(self) -> PolicySpec:
        """What this policy needs to run."""
        return self._spec

    def reset(self, seed: int, coherence: float = 0.0) -> None:
        """Seed the noise of `infer`; there is no history to forget. See `Policy.reset`."""
        self._noise = EpisodeNoise(seed, coherence)

    def infer(self, observation: Observation, instruction: str, conditioning: Conditioning) -> ActionChunk:
        """Plan the next steps, [H, A] in action units; blocks for one inference.

        Raises:
            ValueError: an image or the state is not of the embodiment, or an indicator is asked for that this policy
                was made without.
        """
        return np.asarray(self.infer_many([observation], [instruction], conditioning, [self._noise])[0])

    def infer_many(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        conditioning: Conditioning,
        generators: Sequence[NoiseSource],
    ) -> npt.NDArray[np.float32]:
        """Plan for N robots at once, [N, H, A]; see `TrainablePolicy.infer_many`.

        Raises:
            ValueError: an image or a state is not of the embodiment, an indicator is asked for that this policy was
                made without, or the sequences differ in length.
        """
        if not len(observations) == len(instructions) == len(generators):
            raise ValueError(
                f"one instruction and one generator per observation: got {len(observations)} observations, "
                f"{len(instructions)} instructions, {len(generators)} generators"
            )
        if conditioning.advantage_indicator is not None:
            self._require_indicator()
        images = {
            camera: np.stack([_image(observation, camera, size) for observation in observations])
            for camera, size in self._spec.embodiment.cameras.items()
        }
        state = np.stack([_state(observation, self._spec.embodiment.num_states) for observation in observations])
        shape = (self._spec.action_horizon, self._spec.embodiment.num_actions)
        noise = np.stack([generator.standard_normal(shape, np.float32) for generator in generators])
        with torch.inference_mode():
            row = conditioning_row(conditioning)
            inputs = self._inputs(images, state, instructions, [row] * len(instructions))
            start = torch.from_numpy(noise).to(inputs.state.device)
            steps = self.settings.euler_steps
            if row == NULL or conditioning.guidance == 1:
                sampled = self._network.sample(inputs, start, steps, row)
            else:
                null = self._with_row(inputs, instructions, NULL)
                sampled = self._network.sample_guided(
                    null, inputs, start, steps, row=row, guidance=conditioning.guidance
                )
            actions = sampled.cpu().numpy()
        planned: npt.NDArray[np.float32] = actions * self._action_std + self._action_mean
        return planned.clip(self._low, self._high)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Flow-matching loss per window, [B]; see `TrainablePolicy.loss`.

        A step without weight neither counts nor is seen by the other steps, so nothing is learned from it.
        Images are shifted independently per window and camera; the draws of noise and flow time share them, and the
        branch: a window whose indicator is -1 or 1 teaches that branch, or with `indicator_dropout` the null branch.
        The generator is asked, in this order, for shifts, flow times, noise and, where the batch has an indicator,
        one dropout number per window.
        """
        settings = self.settings
        if batch.advantage_indicator is not None:
            self._require_indicator()
        images = {
            camera: random_shift(batch.images[camera], settings.random_shift, generator, batch.share)
            for camera in self._spec.embodiment.cameras
        }
        action, weight = self._normalised_action(batch), torch.from_numpy(np.array(batch.loss_weight)).to(self._device)
        time, noise = self._draw(batch, settings.noise_draws, generator)
        rows = torch.full((len(batch),), NULL)
        if batch.advantage_indicator is not None:
            rows = indicator_rows(batch.advantage_indicator, len(batch))
            rows = drop_out(rows, settings.indicator_dropout, generator, batch.share)
        inputs = self._inputs(images, batch.state, batch.instruction, rows.tolist())
        valid = weight > 0
        hidden = None if (batch.loss_weight > 0).all() else valid
        with autocast(self._device, training_dtype(settings.precision, self._device)):
            error: Tensor = self.module(inputs, action, noise, time, hidden, indicator=rows.to(self._device))
        return (weight * error.mean(dim=1)).sum(dim=1) / valid.sum(dim=1).clamp(min=1)

    def branch_velocities(self, batch: Batch, generator: torch.Generator) -> BranchVelocities:
        """What the three branches predict for the same windows; see `ConditionedPolicy.branch_velocities`.

        Raises:
            ValueError: the policy has no indicator.
        """
        self._require_indicator()
        with torch.inference_mode():
            time, noise = self._draw(batch, 1, generator)
            time, noise = time[:, 0], noise[:, 0]
            share = time[:, None, None]
            noisy = (1 - share) * noise + share * self._normalised_action(batch)
            images = {camera: np.asarray(batch.images[camera]) for camera in self._spec.embodiment.cameras}
            null = self._inputs(images, batch.state, batch.instruction, [NULL] * len(batch))
            valid = torch.from_numpy(batch.loss_weight > 0).to(self._device)
            shared, found = self._network.read(null), []
            for row in (NULL, NEGATIVE, POSITIVE):
                inputs = null if row == NULL else self._with_row(null, batch.instruction, row)
                prefix = shared if inputs is null else self._network.read(inputs)
                modulations = self._network.expert.modulations(time, torch.full(time.shape, row, device=time.device))
                velocity = self._network.expert(noisy, modulations, prefix, valid)
                found.append((velocity * valid[:, :, None]).cpu().numpy())
        return BranchVelocities(*found)

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

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _require_indicator(self) -> None:
        if self.settings.indicator == "none":
            raise ValueError(_NO_INDICATOR)

    def _normalised_action(self, batch: Batch) -> Tensor:
        return torch.from_numpy((batch.action - self._action_mean) / self._action_std).to(self._device)

    def _draw(self, batch: Batch, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Flow times [B, draws] and noise [B, draws, H, A]; u ** (1 / a) of a uniform u is Beta(a, 1)."""
        where, count, action = generator.device, len(batch), batch.action.shape[1:]
        uniform = draw_rows(
            count, batch.share, lambda rows: torch.rand((rows, draws), generator=generator, device=where)
        ).to(self._device)
        noise = draw_rows(
            count, batch.share, lambda rows: torch.randn((rows, draws, *action), generator=generator, device=where)
        ).to(self._device)
        return 1 - uniform ** (1 / self.settings.time_power), noise

    def _inputs(
        self,
        images: Mapping[str, npt.NDArray[np.uint8]],
        state: npt.NDArray[np.float32],
        instructions: Sequence[str],
        rows: Sequence[int],
    ) -> Inputs:
        normalised = np.clip((state - self._state_mean) / self._state_std, -LARGEST_STATE, LARGEST_STATE)
        return Inputs(
            images=tuple(_tensor(images[camera]).to(self._device) for camera in self._spec.embodiment.cameras),
            state=torch.from_numpy(normalised).to(self._device),
            text=self._text(instructions, rows),
        )

    def _with_row(self, inputs: Inputs, instructions: Sequence[str], row: int) -> Inputs:
        """The same observations for another branch; `inputs` itself where the branch is not in the text."""
        if self.settings.indicator != "text":
            return inputs
        return replace(inputs, text=self._text(instructions, [row] * len(instructions)))

    def _text(self, instructions: Sequence[str], rows: Sequence[int]) -> Tensor:
        """[N, D]; every distinct sentence is encoded once."""
        said = list(instructions)
        if self.settings.indicator == "text":
            said = sentences(self.settings.indicator_text, instructions, rows)
        distinct = list(dict.fromkeys(said))
        place = {sentence: index for index, sentence in enumerate(distinct)}
        text = self._encoder.encode(distinct)[[place[sentence] for sentence in said]]
        return torch.from_numpy(text).to(self._device)


_NO_INDICATOR = (
    "this policy was made without an advantage indicator: use Conditioning(advantage_indicator=None) "
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
