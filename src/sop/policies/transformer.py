"""The two transformers: the prefix (what is seen, asked and sensed) and the action expert (what to do).

Shapes: N rows, P prefix tokens, H action tokens, W width, A action elements, L expert layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sop.policies.indicator import NULL, zero_table
from sop.policies.settings import Settings


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """The prefix as the expert's layers see it: computed once per observation, used at every flow time."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    """Per expert layer: keys and values, [N, heads, P, W / heads] each."""

    def repeat(self, times: int) -> "PrefixCache":
        """Every row `times` times in a row: [N, ...] -> [N * times, ...]."""
        if times == 1:
            return self
        repeated = ((k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.keys_values)
        return PrefixCache(tuple(repeated))

    def joined(self, other: "PrefixCache") -> "PrefixCache":
        """All rows of this one, then all rows of the other."""
        pairs = zip(self.keys_values, other.keys_values, strict=True)
        return PrefixCache(tuple((torch.cat((k, k2)), torch.cat((v, v2))) for (k, v), (k2, v2) in pairs))


def _split_heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention, heads joined again: [N, heads, ., W / heads] -> [N, ., W].

    Written out because the fused kernel takes twice the time for a dozen tokens on a processor.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    joined: Tensor = (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    return joined


def _mlp(width: int, multiple: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, multiple * width), nn.GELU(), nn.Linear(multiple * width, width))


class PrefixLayer(nn.Module):
    """A pre-norm transformer layer; every prefix token sees every other."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self._heads = settings.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = _mlp(width, settings.prefix_mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, P, W] -> [N, P, W]."""
        q, k, v = self.query_key_value(self.attention_norm(tokens)).chunk(3, dim=-1)
        q, k, v = (_split_heads(part, self._heads) for part in (q, k, v))
        tokens = tokens + self.attention_out(_attend(q, k, v))
        out: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return out


class Backbone(nn.Module):
    """Instruction and proprioception as tokens, and the transformer over the whole prefix."""

    def __init__(self, num_states: int, num_cameras: int, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self._text_scale = math.sqrt(settings.text_width)
        self.instruction = nn.Linear(settings.text_width, width)
        self.proprioception = nn.Linear(num_states, width)
        self.positions = nn.Parameter(0.02 * torch.randn(2 * num_cameras + 2, width))
        self.layers = nn.ModuleList(PrefixLayer(settings) for _ in range(settings.prefix_layers))
        self.norm = nn.LayerNorm(width)

    def instruction_token(self, text: Tensor) -> Tensor:
        """Sentence embeddings of length 1 [N, D] -> [N, W]. Scaled so that an element is of order 1."""
        token: Tensor = self.instruction(text * self._text_scale)
        return token

    def forward(self, cameras: Tensor, instruction: Tensor, state: Tensor) -> Tensor:
        """Camera tokens [N, 2 * cameras, W], instruction token [N, W], normalised state [N, S] -> [N, P, W]."""
        tokens = torch.cat((cameras, instruction[:, None], self.proprioception(state)[:, None]), dim=1)
        tokens = tokens + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        out: Tensor = self.norm(tokens)
        return out


class ExpertLayer(nn.Module):
    """A transformer layer with adaptive LayerNorm (AdaLN, Peebles and Xie 2023).

    Action tokens see each other and the prefix; flow time and the indicator scale, shift and gate both halves.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self._heads = settings.heads
        self.prefix_key_value = nn.Linear(width, 2 * width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp = _mlp(width, settings.expert_mlp)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.indicator = zero_table(6 * width) if settings.indicator == "embed" else None

    def read_prefix(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix for this layer."""
        keys, values = self.prefix_key_value(prefix).chunk(2, dim=-1)
        return _split_heads(keys, self._heads), _split_heads(values, self._heads)

    def forward(
        self, tokens: Tensor, modulation: Tensor, prefix: tuple[Tensor, Tensor], visible: Tensor | None
    ) -> Tensor:
        """[N, H, W] -> [N, H, W].

        Args:
            tokens: [N, H, W].
            modulation: [N or 1, 1, 6 W] from `ActionExpert.modulations`.
            prefix: keys and values of the prefix.
            visible: bool [N, 1, 1, P + H], which keys may be attended to; None for all.
        """
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)
        q, k, v = self.query_key_value(_modulated_norm(tokens, scale1, shift1)).chunk(3, dim=-1)
        q, k, v = (_split_heads(part, self._heads) for part in (q, k, v))
        k, v = torch.cat((prefix[0], k), dim=2), torch.cat((prefix[1], v), dim=2)
        tokens = torch.addcmul(tokens, self.attention_out(_attend(q, k, v, visible)), 1 + gate1)
        return torch.addcmul(tokens, self.mlp(_modulated_norm(tokens, scale2, shift2)), 1 + gate2)


def _modulated_norm(tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[-1:]), 1 + scale)


class ActionExpert(nn.Module):
    """Predicts the flow's velocity for a chunk of noisy actions, with weights of its own."""

    def __init__(self, num_actions: int, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.action_in = nn.Linear(num_actions, width)
        self.positions = nn.Parameter(0.02 * torch.randn(settings.action_horizon, width))
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(ExpertLayer(settings) for _ in range(settings.expert_layers))
        self.final_modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.final_modulation.bias)
        self.indicator = zero_table(2 * width) if settings.indicator == "embed" else None
        self.action_out = nn.Linear(width, num_actions)
        self._width = width

    def read_prefix(self, prefix: Tensor) -> PrefixCache:
        """[N, P, W] -> the keys and values that `forward` needs."""
        return PrefixCache(tuple(layer.read_prefix(prefix) for layer in self._layers()))

    def modulations(self, time: Tensor, indicator: Tensor | None = None) -> tuple[Tensor, ...]:
        """What flow time and the indicator do to each layer and to the output; depends on nothing else.

        Args:
            time: [N] flow time, 0 = noise, 1 = action.
            indicator: int64 [N] rows of the indicator's tables; None for NULL. Not read when there are no tables.

        Returns:
            One [N, 1, 6 W] per layer, then [N, 1, 2 W].
        """
        embedding = F.silu(self.time_mlp(_time_features(time, self._width)))
        if indicator is None:
            indicator = torch.full(time.shape, NULL, device=time.device)
        layers = [_modulation(embedding, layer.modulation, layer.indicator, indicator) for layer in self._layers()]
        return (*layers, _modulation(embedding, self.final_modulation, self.indicator, indicator))

    def forward(
        self, noisy: Tensor, modulations: tuple[Tensor, ...], prefix: PrefixCache, valid: Tensor | None = None
    ) -> Tensor:
        """Velocity [N, H, A] at the noisy actions [N, H, A].

        Args:
            noisy: (1 - time) * noise + time * action, normalised.
            modulations: from `modulations`, for N rows or for 1.
            prefix: from `read_prefix`, N rows.
            valid: bool [N, H]; steps that are False are hidden from all others. None when all are valid.
        """
        visible = None
        if valid is not None:
            visible = F.pad(valid, (prefix.keys_values[0][0].shape[2], 0), value=True)[:, None, None, :]
        tokens = self.action_in(noisy) + self.positions
        for layer, modulation, keys_values in zip(self.layers, modulations[:-1], prefix.keys_values, strict=True):
            tokens = layer(tokens, modulation, keys_values, visible)
        scale, shift = modulations[-1].chunk(2, dim=-1)
        velocity: Tensor = self.action_out(_modulated_norm(tokens, scale, shift))
        return velocity

    def _layers(self) -> list[ExpertLayer]:
        return [layer for layer in self.layers if isinstance(layer, ExpertLayer)]


def _modulation(embedding: Tensor, of_time: nn.Linear, table: nn.Embedding | None, rows: Tensor) -> Tensor:
    """[N, W] -> [N, 1, .]: what flow time asks for, plus the indicator's row where there is a table."""
    modulation: Tensor = of_time(embedding[:, None])
    if table is not None:  # in the type of the step's arithmetic: zeros then change no bit, also in bfloat16
        modulation = modulation + table(rows)[:, None].to(modulation.dtype)
    return modulation


def _time_features(time: Tensor, width: int) -> Tensor:
    """Sine and cosine of flow time at `width / 2` periods from 4 down to 0.004, as in pi0: [N] -> [N, width]."""
    periods = torch.logspace(math.log10(4.0), math.log10(4e-3), width // 2, device=time.device)
    angles = time[:, None] * (2 * math.pi / periods)
    return torch.cat((angles.sin(), angles.cos()), dim=1)
