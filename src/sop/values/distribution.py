"""A value as a distribution over bins, and back: what a distributional value function learns and what it says.

Values are normalised returns in [-1, 0]. A target between two bin centres is split linearly between them, so that its
expectation is the target itself (two-hot, Imani and White 2018; 201 bins as in pi*0.6, arXiv 2511.14759).

    centres   -1      -0.995    -0.99         0
    target -0.992:     0.4       0.6
"""

import torch
from torch import Tensor


def bin_centres(num_bins: int) -> Tensor:
    """Float32 [num_bins], evenly from -1 to 0, both included.

    Raises:
        ValueError: fewer than 2 bins.
    """
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}")
    return torch.linspace(-1, 0, num_bins, dtype=torch.float64).float()


def two_hot(value: Tensor, num_bins: int) -> Tensor:
    """Probabilities of the bins for values of any shape: [...] -> float32 [..., num_bins], rows sum to 1.

    Values are clipped to [-1, 0]. On a centre all mass lies in one bin, else in the two neighbours.

    Raises:
        ValueError: a value is not finite, or there are fewer than 2 bins.
    """
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}")
    if not torch.isfinite(value).all():
        raise ValueError("two_hot: a value is not finite; leave out steps without a target")
    position = (value.double().clamp(-1, 0) + 1) * (num_bins - 1)
    lower = position.floor().clamp(max=num_bins - 2)
    share = (position - lower).float()[..., None]
    index = lower.long()[..., None]
    mass = torch.zeros((*value.shape, num_bins), device=value.device)
    return mass.scatter_(-1, index, 1 - share).scatter_(-1, index + 1, share)


def expectation(logits: Tensor) -> Tensor:
    """Mean of the distribution that logits describe: [..., num_bins] -> float32 [...] in [-1, 0]."""
    return logits.float().softmax(dim=-1) @ bin_centres(logits.shape[-1]).to(logits.device)
