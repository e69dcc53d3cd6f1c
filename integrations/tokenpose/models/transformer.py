"""The transformer of TokenPose and PPT: blocks that hand on tokens together with the positions that belong to them.

Positions are part of what a block takes and gives, not something between blocks: so a later cycle finds those of the
tokens that pruning left, and nothing has to be known about cycles here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with fused kernels; queries, keys and values without bias.

    Tokens [B, T, dim] to [B, T, dim], and the queries and keys [B, heads, T, dim / heads] that they mixed by.
    """

    def __init__(self, dim: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(tokens), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(rearrange(mixed, "b h t d -> b t (h d)")), q, k


class Block(nn.Module):
    """Pre-norm attention and MLP; tokens [B, K + N, D] and positions [1 or B, K + N, D] in and out.

    `adds_positions` is False for the first block of a transformer, which gets tokens that hold them, or, in a later
    cycle, tokens that nothing is added to: in the authors' code positions come before every layer but the first.

    With `keep` it drops, between attention and MLP, the visual tokens to which the keypoint tokens attend least (PPT,
    ECCV 2022). At most `keep` visual tokens leave, in the order of their scores; where no more enter, as in a later
    cycle, all stay.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        scale: float,
        adds_positions: bool,
        num_keypoints: int,
        keep: int | None = None,
    ) -> None:
        super().__init__()
        self.adds_positions, self.num_keypoints, self.keep = adds_positions, num_keypoints, keep
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.adds_positions:
            tokens = tokens + positions
        mixed, q, k = self.attn(self.norm1(tokens))
        tokens = tokens + mixed
        if self.keep is not None and tokens.shape[1] - self.num_keypoints > self.keep:
            kept = self.choose(q, k)
            tokens, positions = _take(tokens, kept), _take(positions.expand_as(tokens), kept)
        return tokens + self.mlp(self.norm2(tokens)), positions

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor) -> Tensor:
        """Indices of the tokens that stay, [B, K + keep]: all keypoint tokens, then visual ones, best first.

        The score is the attention that a visual token gets, averaged over heads and summed over keypoint tokens.
        """
        K = self.num_keypoints
        with torch.autocast(q.device.type, enabled=False):  # near ties would be decided by rounding
            attention = (self.attn.scale * q[:, :, :K].float() @ k.float().mT).softmax(-1)  # [B, heads, K, K + N]
            scores = attention[..., K:].mean(1).sum(1)  # [B, N]
        visual = scores.topk(self.keep).indices + K
        return torch.cat([torch.arange(K, device=q.device).expand(q.shape[0], K), visual], dim=1)


def _take(tokens: Tensor, kept: Tensor) -> Tensor:
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """The fixed table [grid height x grid width, dim]: first half of the channels for y, second half for x.

    Rows and columns count from 1 and are scaled so that the last is 2 pi; sine and cosine alternate, with the
    frequencies of DETR's table (arXiv:2005.12872). In the order of operations of the published tables, bit for bit.
    """
    y, x = (_angles(size, dim // 2) for size in grid)  # [grid height, dim / 2], [grid width, dim / 2]
    table = torch.cat([y[:, None].expand(-1, grid[1], -1), x[None].expand(grid[0], -1, -1)], dim=-1)
    return table.flatten(0, 1)


def _angles(size: int, channels: int) -> Tensor:
    place = torch.arange(1, size + 1, dtype=torch.float32)
    place = place / (place[-1] + 1e-6) * (2 * math.pi)
    pair = torch.div(torch.arange(channels, dtype=torch.float32), 2, rounding_mode="floor")
    angle = place[:, None] / 10000 ** (2 * pair / channels)
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)
