"""The value function as a learning rule uses it: fit on stored episodes, ask for values, save, restore.

    function = ValueFunction(policy.spec, settings, module=policy.module)
    report = function.fit(episodes)                       # version 0 -> 1; minutes
    values = function.predict(episode)                    # [T]
    A = function.advantages(episode, values, lookahead)   # [T]
    again = ValueFunction.from_state(function.state_dict())

A fit trains a copy of the network and puts it in place when it is done: whoever predicts meanwhile gets the values of
one version or of the other, and a fit that fails changes nothing.

Shapes: T steps, N frames, S state elements.
"""

import copy
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sop.core.errors import RunError
from sop.core.experience import StoredEpisode
from sop.core.policy import PolicySpec
from sop.core.settings import build_settings
from sop.policies.precision import autocast, training_dtype
from sop.policies.sentences import TextEncoder, make_text_encoder
from sop.values.distribution import expectation, two_hot
from sop.values.frames import FrameTable
from sop.values.inputs import FrameReader, Statistics, fitted_statistics, known_statistics
from sop.values.network import ValueNetwork, ValueSettings, copy_encoder, encoder_settings
from sop.values.returns import ReturnSettings, advantages, longest_episodes, returns

_log = logging.getLogger(__name__)

_PREDICT_BATCH = 64
"""Frames per forward pass: fixed, because values of another batch size differ in the last digits."""
_STATE = "value"
"""Key of the JSON part of a saved value function; its arrays are called `value/<tensor>`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What a fit did."""

    losses: tuple[float, ...]
    """Cross entropy of every step's batch, nats."""
    seconds: float
    """Wall time."""
    num_frames: int
    """Steps with a target that could be drawn."""


class ValueFunction:
    """V(o_t, l): the normalised return that is to be expected from an observation on, in [-1, 0].

    `predict`, `state_dict` and one `fit` may run in different threads; two fits at once may not.

    Args:
        spec: of the policy: embodiment, statistics of the state, sizes of the encoder.
        settings: of network and fit.
        return_settings: what outcomes are worth.
        task_steps: task -> steps of its longest episode, which scales its returns. A task that is missing is added
            by the first fit that sees it; after that it never changes, and longer episodes are clipped.
        module: the policy's weights to start from; needed for `init="policy"`, only read.
        encoder: of the instructions; None makes the one that the policy's settings name.
        device: where the network lives.

    Raises:
        ValueError: settings and spec do not fit together, or `module` is missing.
    """

    def __init__(
        self,
        spec: PolicySpec,
        settings: ValueSettings | None = None,
        return_settings: ReturnSettings | None = None,
        task_steps: Mapping[str, int] | None = None,
        *,
        module: nn.Module | None = None,
        encoder: TextEncoder | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings = settings or ValueSettings()
        self.return_settings = return_settings or ReturnSettings()
        self.version = 0
        """0 before the first fit; every fit adds 1."""
        self.copied = 0
        """Tensors that were taken over from the policy."""
        self.device = torch.device(device)
        self._spec = spec
        self._task_steps = dict(task_steps or {})
        for task, steps in self._task_steps.items():
            if steps < 1:
                raise ValueError(f"task_steps of {task!r} must be at least 1, got {steps}")
        self._sizes = encoder_settings(spec.config)
        encoder = make_text_encoder(self._sizes.text_encoder) if encoder is None else encoder
        if encoder.width != self._sizes.text_width:
            raise ValueError(f"the encoder gives {encoder.width} numbers, {self._sizes.text_width} are read")
        self._reader = FrameReader(spec.embodiment, encoder, self.device)
        self._statistics = known_statistics(spec.normalization, spec.embodiment.num_states)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            network = ValueNetwork(spec.embodiment, self._sizes, self.settings.num_bins)
        if self.settings.init == "policy":
            if module is None:
                raise ValueError("init='policy' needs the policy's module; pass module=policy.module or init='fresh'")
            self.copied = copy_encoder(network, module)
            _log.info("value function: %d tensors of the encoder start as those of the policy", self.copied)
        self._network = network.to(self.device)
        self._lock = threading.Lock()

    @property
    def task_steps(self) -> Mapping[str, int]:
        """Task -> steps of its longest episode, as frozen by the fits so far (a copy)."""
        return dict(self._task_steps)

    def returns(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """[T] what `fit` takes as targets; see `sop.values.returns.returns`.

        Raises:
            ValueError: no fit has seen the episode's task.
        """
        return returns(episode, self._steps_of(episode.task), self.return_settings)

    def advantages(
        self, episode: StoredEpisode, values: npt.NDArray[np.float32], lookahead: int
    ) -> npt.NDArray[np.float32]:
        """[T]; see `sop.values.returns.advantages`.

        Raises:
            ValueError: no fit has seen the episode's task, or an argument does not fit.
        """
        return advantages(episode, values, self._steps_of(episode.task), self.return_settings, lookahead)

    def fit(self, episodes: Sequence[StoredEpisode], steps: int | None = None, seed: int | None = None) -> FitReport:
        """Learn the returns of these episodes, starting from the present weights; blocks, one batch at a time.

        Equal weights, episodes, steps and seeds give equal results on the same machine with as many threads; torch's
        global generator is not touched. `episodes` may load an episode when it is indexed: each is read once for
        its targets, then for every frame that is drawn.

        Args:
            episodes: those of all sources.
            steps: optimizer steps; None takes the settings'.
            seed: of draws and augmentation; None takes the settings' plus the version.

        Raises:
            RunError: no step has a return, or the loss is not finite; the value function is unchanged.
            InvalidRecord: an episode does not fit the embodiment, or a frame is damaged; unchanged as well.
        """
        began = time.perf_counter()
        steps = self.settings.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        task_steps = longest_episodes(episodes) | self._task_steps
        statistics = self._statistics or fitted_statistics(episodes)
        targets = [returns(one, task_steps.get(one.task, 1), self.return_settings) for one in episodes]
        table = FrameTable(episodes, targets, balance_outcomes=self.settings.balance_outcomes)
        seed = self.settings.seed + self.version if seed is None else seed
        network = copy.deepcopy(self._network)
        losses = self._train(network, episodes, table, statistics, steps=steps, seed=seed)
        with self._lock:
            self._network, self._statistics, self._task_steps = network, statistics, task_steps
            self.version += 1
        seconds = time.perf_counter() - began
        _log.info(
            "value function %d: %d steps on %d frames of %d episodes, loss %.3f -> %.3f, %.1f s",
            self.version, steps, len(table), len(episodes), losses[0], losses[-1], seconds,
        )  # fmt: skip
        return FitReport(losses=losses, seconds=seconds, num_frames=len(table))

    def predict(self, episode: StoredEpisode) -> npt.NDArray[np.float32]:
        """Float32 [T] in [-1, 0]: the value at every step, whoever drove. Decodes all frames and blocks for it.

        Raises:
            RunError: the statistics of the state are not known before the first fit.
            InvalidRecord: the episode does not fit the embodiment, or a frame is damaged.
        """
        with self._lock:
            network, statistics = self._network, self._statistics
        if statistics is None:
            raise RunError("value function: the policy has no statistics of the state; fit the value function first")
        values = np.empty(episode.num_steps, np.float32)
        for start in range(0, episode.num_steps, _PREDICT_BATCH):
            rows = [(episode, step) for step in range(start, min(start + _PREDICT_BATCH, episode.num_steps))]
            inputs = self._reader.read(rows, statistics)
            with torch.inference_mode():
                values[start : start + len(rows)] = expectation(network(inputs)).clamp(-1, 0).cpu().numpy()
        return values

    def state_dict(self) -> dict[str, Any]:
        """All that `from_state` needs: JSON values under `value`, a copy of each tensor under `value/<name>`."""
        with self._lock:
            network, statistics, version = self._network, self._statistics, self.version
            task_steps = dict(self._task_steps)
        tensors = {f"{_STATE}/{name}": tensor.cpu().numpy().copy() for name, tensor in network.state_dict().items()}
        about = {
            "version": version,
            "copied": self.copied,
            "spec": msgspec.to_builtins(self._spec),
            "settings": msgspec.to_builtins(self.settings),
            "return_settings": msgspec.to_builtins(self.return_settings),
            "task_steps": task_steps,
            "statistics": None if statistics is None else [part.tolist() for part in statistics],
        }
        return {_STATE: about} | tensors

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], *, encoder: TextEncoder | None = None, device: torch.device | str = "cpu"
    ) -> "ValueFunction":
        """Rebuild a value function without the policy; predictions are equal to the bit on the same machine
        with as many threads of torch.

        Args:
            state: holds what `state_dict` gave; other keys are ignored.
            encoder: see the constructor.
            device: see the constructor.

        Raises:
            ValueError: the state is incomplete, or its tensors have other names or shapes than this network.
        """
        try:
            about = state[_STATE]
            spec = msgspec.convert(about["spec"], PolicySpec)
            settings = build_settings(ValueSettings, about["settings"], "value function")
            return_settings = build_settings(ReturnSettings, about["return_settings"], "value function")
            fresh = dataclasses.replace(settings, init="fresh")
            function = cls(spec, fresh, return_settings, about["task_steps"], encoder=encoder, device=device)
            function.settings, function.version, function.copied = settings, about["version"], about["copied"]
            if about["statistics"] is not None:
                mean, std = (np.asarray(part, np.float32) for part in about["statistics"])
                function._statistics = (mean, std)
            names = function._network.state_dict()
            tensors = {name: torch.from_numpy(np.array(state[f"{_STATE}/{name}"])) for name in names}
            function._network.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError, msgspec.ValidationError) as error:
            raise ValueError(f"saved value function: {error}; fit a new one or take another checkpoint") from error
        return function

    def _train(
        self,
        network: ValueNetwork,
        episodes: Sequence[StoredEpisode],
        table: FrameTable,
        statistics: Statistics,
        *,
        steps: int,
        seed: int,
    ) -> tuple[float, ...]:
        settings, dtype = self.settings, training_dtype(self._sizes.precision, self.device)
        draws, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        parameters = list(network.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        losses = []
        for step in range(steps):
            frames = table.draw(settings.batch_size, draws)
            rows = [(episodes[one], int(at)) for one, at in zip(frames.episode, frames.step, strict=True)]
            inputs = self._reader.read(rows, statistics, settings.random_shift, noise)
            target = two_hot(torch.from_numpy(frames.target), settings.num_bins).to(self.device)
            with autocast(self.device, dtype):
                logits = network(inputs, settings.dropout, noise)
            loss = -(target * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            losses.append(loss.item())
            if not (math.isfinite(losses[-1]) and torch.isfinite(norm)):
                raise RunError(
                    f"value function: loss or gradient is not finite at step {step} of the fit; nothing was changed; "
                    f"lower lr ({settings.lr})"
                )
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _schedule(step, steps, settings.warmup_steps)
            optimizer.step()
        return tuple(losses)

    def _steps_of(self, task: str) -> int:
        if task not in self._task_steps:
            raise ValueError(f"the value function does not know task {task!r}, only {sorted(self._task_steps)}")
        return self._task_steps[task]


def _schedule(step: int, steps: int, warmup_steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
