"""A real fine-tune whose successive weights the delta codec is measured on: not random numbers with a chosen spread.

A decoder-only transformer of 54 million parameters (12 layers, width 608, bytes) is trained with AdamW (the learner's
settings) on the sources of Python's standard library: first the top-level modules at a high learning rate, then, from
those weights and moments, the modules of the packages at the learning rate under test. fp32 master weights, bf16
autocast, small noisy batches. The pretrained state is kept in runs/bench/cache: all learning rates start from it.
"""

import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from harness import RESULTS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, npt.NDArray[Any]]
LEARNING_RATES = (1e-5, 5e-5)
LAYERS, WIDTH, HEADS, CONTEXT = 12, 608, 8, 128
PRETRAIN_LR = 3e-4
FULL_PRETRAIN_STEPS, QUICK_PRETRAIN_STEPS = 120, 20
FULL_WARM_STEPS, QUICK_WARM_STEPS = 30, 5
"""Steps at the learning rate under test before the first snapshot: AdamW's moments forget the pretraining."""
FULL_BATCH, QUICK_BATCH = 2, 1
"""Sequences of CONTEXT bytes per step."""
THREADS = 2


class ByteModel(nn.Module):
    """Predicts the next byte of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(
                    parameter,
                    std=0.02 / (2 * LAYERS) ** 0.5 if name.endswith(("out_proj.weight", "linear2.weight")) else 0.02,
                )

    def forward(self, text: Tensor) -> Tensor:
        """Mean cross entropy in nats; text: uint8 [B, CONTEXT + 1]."""
        text = text.long()
        hidden = self.embedding(text[:, :-1]) + self.position
        hidden = self.norm(self.layers(hidden, mask=self.mask, is_causal=True))
        logits = self.head(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


class Training:
    """The model, its optimizer and the text it reads."""

    def __init__(self, lr: float, pattern: str, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = ByteModel()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=1e-4, fused=True)
        self.losses: list[float] = []
        self._text = _sources(pattern)
        self._batch = batch
        self._rng = np.random.default_rng(seed)

    def run(self, steps: int) -> None:
        """Take optimizer steps."""
        for _ in range(steps):
            starts = self._rng.integers(0, len(self._text) - CONTEXT, self._batch)
            text = torch.from_numpy(np.stack([self._text[start : start + CONTEXT + 1] for start in starts]))
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(text)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.losses.append(loss.item())

    def save(self, path: Path) -> None:
        """Weights, moments and the number of steps as one safetensors file, whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {
                f"w.{name}": parameter.detach(),
                f"m.{name}": state["exp_avg"],
                f"v.{name}": state["exp_avg_sq"],
            }
        tensors["steps"] = torch.tensor([len(self.losses)])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{time.monotonic_ns()}.part")
        save_file(tensors, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Inverse of `save`."""
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"w.{name}"])
                self.optimizer.state[parameter] = {
                    "step": tensors["steps"][0].float(),
                    "exp_avg": tensors[f"m.{name}"].clone(),
                    "exp_avg_sq": tensors[f"v.{name}"].clone(),
                }

    def weights(self, dtype: str) -> Weights:
        """A copy of the weights as they are now."""
        return {name: _array(parameter, dtype) for name, parameter in self.model.named_parameters()}


def snapshots(lr: float, every: int, count: int, *, quick: bool, seed: int, dtype: str = "BF16") -> Iterator[Weights]:
    """`count + 1` snapshots of a fine-tune at learning rate `lr`, `every` optimizer steps apart.

    Args:
        lr: of the fine-tune; constant.
        every: steps between snapshots.
        count: intervals.
        quick: short pretraining and batches of one; same size of model.
        seed: of the weights, the pretraining and the text.
        dtype: "BF16" (ml_dtypes.bfloat16, rounded from the fp32 master) or "F32".
    """
    torch.set_num_threads(THREADS)
    training = Training(lr, "*/*.py", QUICK_BATCH if quick else FULL_BATCH, seed + 1)
    training.load(_pretrained(quick, seed))
    training.run(QUICK_WARM_STEPS if quick else FULL_WARM_STEPS)
    yield training.weights(dtype)
    for _ in range(count):
        training.run(every)
        yield training.weights(dtype)


def entropy_bound_percent(old: Weights, new: Weights) -> float:
    """H(new - old | exponent of old) in percent of the dense size of bf16 weights, over all tensors together. The
    difference is that of the bits in the order of the values: what is there to gain without a better context."""
    counts = np.zeros(256 << 16, np.int64)
    total = 0
    for name, array in old.items():
        before, after = (_ordered(weights[name]) for weights in (old, new))
        exponent = (array.reshape(-1).view(np.uint16) >> 7) & 255
        difference = (after - before) & 0xFFFF
        counts += np.bincount((exponent.astype(np.int64) << 16) | difference, minlength=256 << 16)
        total += array.size
    table = counts.reshape(256, 1 << 16)
    of_exponent = table.sum(1)
    bits = _n_log_n(of_exponent) - _n_log_n(table)
    return float(100 * bits / (16 * total))


def changed_percent(old: Weights, new: Weights) -> float:
    """Elements whose bits differ, in percent."""
    differ = sum(int((_bits(array) != _bits(new[name])).sum()) for name, array in old.items())
    return 100 * differ / sum(array.size for array in old.values())


def _n_log_n(counts: npt.NDArray[np.int64]) -> float:
    found = counts[counts > 0].astype(np.float64)
    return float((found * np.log2(found)).sum())


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.reshape(-1).view(f"u{array.itemsize}")


def _ordered(array: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    bits = array.reshape(-1).view(np.int16).astype(np.int64)
    return np.where(bits < 0, bits ^ 0x7FFF, bits)


def _array(parameter: Tensor, dtype: str) -> npt.NDArray[Any]:
    with torch.no_grad():
        if dtype == "F32":
            return np.array(parameter.numpy())
        return parameter.to(torch.bfloat16).view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _sources(pattern: str) -> npt.NDArray[np.uint8]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in sorted(folder.glob(pattern)) if path.parent.name not in ("test", "site-packages"))
    return np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)


def _pretrained(quick: bool, seed: int) -> Path:
    """The pretrained state; trains it if it is not in the cache."""
    steps, batch = (QUICK_PRETRAIN_STEPS, QUICK_BATCH) if quick else (FULL_PRETRAIN_STEPS, FULL_BATCH)
    path = RESULTS / "cache" / f"bytes-{LAYERS}x{WIDTH}-{steps}x{batch}-seed{seed}.safetensors"
    if not path.exists():
        training = Training(PRETRAIN_LR, "*.py", batch, seed)
        training.run(steps)
        training.save(path)
        print(
            f"pretrained {steps} steps: loss {training.losses[0]:.2f} -> {np.mean(training.losses[-10:]):.2f}",
            flush=True,
        )
    return path
