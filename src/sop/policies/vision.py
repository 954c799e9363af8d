"""Cameras as tokens: a small convolutional net per camera whose features the instruction modulates.

Everything stays in the cameras' own layout [N, h, w, channels], in which the convolutions are fastest on a
processor. Shapes: N images, [N, h, w, 3] as cameras give them, C channels, K keypoints, W token width.
"""

import math
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sop.core.experience import Share
from sop.policies.draws import draw_rows
from sop.policies.settings import Settings

_KERNELS = (5, 3, 3)
_STRIDES = (2, 2, 1)


class CameraEncoder(nn.Module):
    """One camera's image as two tokens: where things are (keypoints) and what is where (pooled grid).

    Three convolutions, each followed by GroupNorm (with one group, so that no layout has to be changed for it)
    and ReLU. In between FiLM (Perez et al. 2018): the instruction scales and shifts every channel, so that the
    same picture is read differently for different tasks; not after the first convolution, whose edges and
    colours mean the same for every task and which is half of the cost.

    Args:
        size: height and width of the images.
        settings: sizes.

    Raises:
        ValueError: the images are too small for the grid.
    """

    def __init__(self, size: tuple[int, int], settings: Settings) -> None:
        super().__init__()
        if min(size) < 4 * settings.grid:
            raise ValueError(f"grid {settings.grid} needs images of {4 * settings.grid} pixels per side, got {size}")
        channels = settings.channels
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel, stride, kernel // 2)
            for before, after, kernel, stride in zip((3, *channels[:-1]), channels, _KERNELS, _STRIDES, strict=True)
        )
        self.film = nn.ModuleList(nn.Linear(settings.width, 2 * count) for count in channels[1:])
        for layer in self.film:
            linear = cast("nn.Linear", layer)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.heatmaps = nn.Linear(channels[-1], settings.keypoints)
        self.keypoint_token = nn.Linear(2 * settings.keypoints, settings.width)
        self.grid_token = nn.Linear(channels[-1] * settings.grid**2, settings.width)
        height, width = (math.ceil(side / math.prod(_STRIDES)) for side in size)
        self._pooling: Tensor
        self._positions: Tensor
        self.register_buffer("_pooling", pooling_matrix(height, width, settings.grid), persistent=False)
        self.register_buffer("_positions", position_matrix(height, width), persistent=False)

    def forward(self, images: Tensor, instruction: Tensor) -> Tensor:
        """uint8 [N, h, w, 3] and the instruction token [N, W] -> tokens [N, 2, W]."""
        pixels = images.float().mul_(2 / 255).sub_(1)
        pixels = self._convolve(0, pixels).relu_()
        for index, film in enumerate(self.film):
            scale, shift = film(instruction)[:, None, None].chunk(2, dim=-1)
            pixels = torch.addcmul(shift, self._convolve(index + 1, pixels), 1 + scale).relu_()
        pixels = pixels.flatten(1, 2)
        keypoints = spatial_softmax(self.heatmaps(pixels), self._positions)
        pooled = torch.bmm(self._pooling.expand(len(pixels), -1, -1), pixels)
        return torch.stack((self.keypoint_token(keypoints), self.grid_token(pooled.flatten(1))), dim=1)

    def _convolve(self, index: int, pixels: Tensor) -> Tensor:
        features: Tensor = self.convolutions[index](pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.layer_norm(features, features.shape[1:])  # GroupNorm with one group


def spatial_softmax(heatmaps: Tensor, positions: Tensor) -> Tensor:
    """Mean position of each heat map under its softmax (Levine et al. 2016).

    Args:
        heatmaps: [N, h w, K].
        positions: from `position_matrix`.

    Returns:
        float32 [N, 2 K] in [-1, 1], first all columns, then all rows: bfloat16 has too few digits for a position
        within a pixel.
    """
    with torch.autocast(heatmaps.device.type, enabled=False):
        attention = heatmaps.float().softmax(dim=1)
        return torch.bmm(positions.expand(len(heatmaps), -1, -1), attention).flatten(1)


def position_matrix(height: int, width: int) -> Tensor:
    """[2, h w]: column and row of each pixel, from -1 at one border to 1 at the other."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack((columns.flatten(), rows.flatten()))


def pooling_matrix(height: int, width: int, grid: int) -> Tensor:
    """[grid * grid, h w] whose product with [h w, C] pixels is their `adaptive_avg_pool2d`."""
    cells = F.adaptive_avg_pool2d(torch.eye(height * width).view(-1, 1, height, width), grid)
    return cells.flatten(1).T.contiguous()


def random_shift(
    images: npt.NDArray[np.uint8], largest: int, generator: torch.Generator, share: Share | None = None
) -> npt.NDArray[np.uint8]:
    """Shift every image by its own random whole number of pixels per axis; border pixels are repeated.

    The augmentation of DrQ (Yarats et al. 2021): pad by `largest`, crop at random. [N, h, w, 3] -> a new array
    of the same shape. `share` is the batch's.
    """
    count, height, width, _ = images.shape
    where = generator.device
    corner = draw_rows(
        count, share, lambda rows: torch.randint(2 * largest + 1, (rows, 2), generator=generator, device=where)
    ).tolist()
    padding = ((0, 0), (largest, largest), (largest, largest), (0, 0))
    padded = np.pad(images, padding, mode="edge")
    shifted = np.empty_like(images)
    for index, (top, left) in enumerate(corner):
        shifted[index] = padded[index, top : top + height, left : left + width]
    return shifted
