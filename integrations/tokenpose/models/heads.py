"""From the keypoint tokens to heat maps or coordinates; one head serves every cycle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class HeatmapHead(nn.Module):
    """Keypoint tokens [B, K, D] to heat maps [B, K, h, w], one pixel per output of the last layer."""

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        pixels = size[0] * size[1]
        self.mlp = token_mlp(dim, pixels // 8, pixels)

    def forward(self, tokens: Tensor) -> Tensor:
        return rearrange(self.mlp(tokens), "b k (h w) -> b k h w", h=self.size[0])


class RLEHead(nn.Module):
    """Keypoint tokens [B, K, D] to [B, K, 4]: x and y as shares of the input's width and height, two raw sigmas.

    Nothing bounds them; loss and decoding put the sigmas through a sigmoid (RLE, ICCV 2021).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mlp = token_mlp(dim, hidden, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(tokens)


class DistilPoseHead(nn.Module):
    """Keypoint tokens [B, K, D] to [B, K, 5]: x and y in 0 to 1, a confidence, two positive sigmas (CVPR 2023)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mlp = token_mlp(dim, hidden, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        place, confidence, sigma = self.mlp(tokens).split((2, 1, 2), dim=-1)
        return torch.cat([place.sigmoid(), confidence, F.softplus(sigma)], dim=-1)


def token_mlp(dim: int, hidden: int, outputs: int) -> nn.Sequential:
    """LayerNorm and Linear, twice where the hidden layer is at least twice as wide as a token, as in TokenPose."""
    if 2 * dim <= hidden:
        return nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, outputs)
        )
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, outputs))
