"""One optimizer step: AdamW, clipped gradient, warm-up, moving average of the weights; on one rank or many."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sop.config import LearnerConfig
from sop.core.errors import RunError
from sop.learner.ranks import OneRank, Ranks

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps per parameter."""


class StepResult(NamedTuple):
    """What an optimizer step did."""

    loss: float
    """Mean loss of the batch."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    skipped: bool
    """Loss or gradient was not finite: nothing was changed."""


def constant_after_warmup(warmup_steps: int) -> Callable[[int], float]:
    """Learning-rate factor: linear from 0 to 1 over the warm-up, then 1."""
    return lambda step: min(1.0, (step + 1) / max(1, warmup_steps))


class Optimization:
    """Everything that changes the weights, with a state that can be saved and restored exactly.

    With several ranks each has one and all call its methods alike: they take the same steps. What they give back is
    whole, whatever is sharded; a state fits any number of ranks.

    Args:
        module: its parameters are trained in place, except frozen ones.
        config: optimizer settings. Parameters whose name a key of `lr_multipliers` matches have its factor on the
            learning rate, beside those of the schedule and of `step`, and no weight decay.
        schedule: factor of the learning rate for optimizer step 0, 1, 2, ...
        ranks: who takes the steps together; the module is sharded already, if at all. None is this process alone.

    Raises:
        ValueError: a key of `lr_multipliers` is not a regular expression, or its factor is negative or not finite.
    """

    def __init__(
        self,
        module: nn.Module,
        config: LearnerConfig,
        schedule: Callable[[int], float],
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks: Ranks = ranks or OneRank()
        self._module = module
        self._config = config
        self._schedule = schedule
        self._names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._parameters = dict(module.named_parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [self._parameters[name] for name in names], "lr_multiplier": factor} | own
                for names, factor, own in _groups(self._names, config.lr_multipliers)
            ],
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._average = {name: self._parameters[name].detach().clone() for name in self._names}
        self._steps = 0
        self._skipped_in_a_row = 0

    def step(self, losses: Tensor, lr_factor: float = 1.0) -> StepResult:
        """Take the losses [B] of a batch, step along the gradient of their mean over all ranks.

        Args:
            losses: one per window of this rank, with a graph.
            lr_factor: further factor of the learning rate, e.g. for a cool-down.

        Raises:
            RunError: `max_skipped_steps` steps in a row were not finite.
        """
        loss = losses.mean()
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        trained = [self._parameters[name] for name in self._names]
        self._ranks.average_gradients(trained)
        norm = self._ranks.whole(torch.nn.utils.clip_grad_norm_(trained, self._config.grad_clip))
        loss = self._ranks.mean(loss)  # all ranks have the same loss and norm, so they skip together
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self._skip()
            return StepResult(loss.item(), norm.item(), skipped=True)
        self._skipped_in_a_row = 0
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * self._schedule(self._steps) * lr_factor * group["lr_multiplier"]
        self._optimizer.step()
        self._steps += 1
        with torch.no_grad():
            averages = [self._average[name] for name in self._names]
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in trained], 1 - self._config.ema)
        return StepResult(loss.item(), norm.item(), skipped=False)

    @property
    def unfrozen(self) -> tuple[str, ...]:
        """Names of the tensors that training can change: trained parameters and all buffers."""
        frozen = {name for name, parameter in self._parameters.items() if not parameter.requires_grad}
        return tuple(name for name in self._module.state_dict() if name not in frozen)

    def averaged(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The module's state with its trained parameters averaged over time (may be live tensors: copy to keep).

        Args:
            names: only these; None for all.
        """
        state = dict(self._module.state_dict()) | self._average
        return self._ranks.collect((name, state[name]) for name in state if names is None or name in names)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state by name: weights, averages, moments (may be live tensors: copy to keep)."""
        return self._ranks.collect(self._own_tensors())

    def state_dict(self) -> dict[str, Any]:
        """The rest of the state, as JSON values."""
        return {"steps": self._steps}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on where `tensors` and `state_dict` were taken; of several ranks the first gives its tensors to all."""
        own = {name: value for name, value in tensors.items() if name.startswith(("module/", "average/", "optimizer/"))}
        tensors = self._ranks.distribute(own, self._shapes())
        self._module.load_state_dict(_under("module/", tensors))
        for name, value in _under("average/", tensors).items():
            self._average[name].copy_(value)
        optimizer = {key: _under(f"optimizer/{key}/", tensors) for key in _MOMENTS}
        for name in self._names:
            if name in optimizer["step"]:
                parameter = self._parameters[name]
                self._optimizer.state[parameter] = {
                    key: values[name].to(parameter.device, copy=True) for key, values in optimizer.items()
                }
        self._steps = state["steps"]

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As this rank has them, the same names in the same order on every rank."""
        for name, value in self._module.state_dict().items():
            yield f"module/{name}", value.detach()
        for name, value in self._average.items():
            yield f"average/{name}", value
        for name in self._names:
            for key, value in self._optimizer.state[self._parameters[name]].items():
                yield f"optimizer/{key}/{name}", value

    def _shapes(self) -> dict[str, Tensor]:
        """For every name that `tensors` may give a tensor that is sharded in the same way."""
        like = {f"module/{name}": value for name, value in self._module.state_dict().items()}
        like |= {f"average/{name}": value for name, value in self._average.items()}
        return like | {f"optimizer/{key}/{name}": self._parameters[name] for key in _MOMENTS for name in self._names}

    def _skip(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._config.max_skipped_steps:
            raise RunError(
                f"loss or gradient was not finite {self._skipped_in_a_row} times in a row: "
                "the learner stops before it publishes; restart it to go on from the last checkpoint"
            )


def _groups(names: Sequence[str], multipliers: Mapping[str, float]) -> list[tuple[list[str], float, dict[str, float]]]:
    """Names, factor of the learning rate and own settings of each group of parameters, first those that match nothing.

    A name belongs to the first expression that matches. Groups without names are left out.
    """
    rest, groups = list(names), []
    for pattern, factor in multipliers.items():
        try:
            matched = [name for name in rest if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"lr_multipliers: {pattern!r} is not a regular expression ({error})") from error
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"lr_multipliers: the factor of {pattern!r} must be 0 or more, got {factor}")
        rest = [name for name in rest if name not in matched]
        groups.append((matched, factor, {"weight_decay": 0.0}))
    return [group for group in [(rest, 1.0, {}), *groups] if group[0]]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
