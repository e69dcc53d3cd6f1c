"""TokenPose: a feature map cut into visual tokens, a learned token per keypoint, one transformer over both.

A model of several cycles is this one after `wrap_multicycle`; nothing here knows of cycles.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.backbones import make_backbone
from cyclekd.integrations.tokenpose.config import TokenPoseConfig, tokens_kept
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.heads import DistilPoseHead, HeatmapHead, RLEHead
from cyclekd.integrations.tokenpose.transformer import Block, PruningBlock, sine_positions


class TokenPose(nn.Module):
    """Images [B, 3, H, W] to heat maps [B, K, H/4, W/4], or to [B, K, 4 or 5] with a regression head.

    TokenPose (ICCV 2021, arXiv:2104.03516) in the form that SDPose, PPT and DistilPose share: keypoint tokens first,
    then visual tokens row by row; sine positions for the visual ones, again before every block but the first.
    Images are normalised RGB of `config.input_size`. Errors: PoseError for images of another size.
    """

    def __init__(self, config: TokenPoseConfig, pretrained_backbone: bool = False) -> None:
        super().__init__()
        self.config = config
        self.img_size = config.input_size  # where find_stacks, as for timm's models, looks for it
        self.backbone = make_backbone(config.backbone, config.stage1_width, pretrained_backbone)
        patch = config.patch_size[0] * config.patch_size[1] * self.backbone.num_features
        self.patch_embed = nn.Linear(patch, config.dim)
        self.keypoint_tokens = nn.Parameter(torch.zeros(1, config.num_keypoints, config.dim))
        # Keypoint tokens have no place: zeros, so that one addition serves all tokens.
        table = torch.zeros(1, config.num_keypoints + config.num_visual_tokens, config.dim)
        table[0, config.num_keypoints :] = sine_positions(config.grid_size, config.dim)
        self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.ModuleList(_make_block(config, index) for index in range(config.depth))
        self.head = _make_head(config)
        self.reset_parameters(backbone=not pretrained_backbone)

    def reset_parameters(self, backbone: bool = True) -> None:
        """As published: linear layers and tokens from a truncated normal of 0.02, convolutions from one of 0.001."""
        nn.init.trunc_normal_(self.keypoint_tokens, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d) and (backbone or not name.startswith("backbone.")):
                nn.init.normal_(module.weight, std=0.001)  # batch norm brings them back to scale

    def forward(self, images: Tensor) -> Tensor:
        tokens, positions = self.embed(images)
        read = []
        for index, block in enumerate(self.blocks):
            tokens, positions = block(tokens, positions)
            if self._ends_group(index):
                read.append(tokens[:, : self.config.num_keypoints])
        return self.head(read[0] if len(read) == 1 else torch.cat(read, dim=-1))

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the last block, [B, K + N, D], keypoints first; one pass, also where the model is wrapped."""
        tokens, positions = self.embed(images)
        for block in self.blocks:
            tokens, positions = block(tokens, positions)
        return tokens

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, K + N, D] as they enter the first block, and the positions [1, K + N, D] that go with them."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.config.input_size):
            raise PoseError(
                f"{self.config.name} takes images of {('B', 3, *self.config.input_size)}, and got "
                f"{tuple(images.shape)}: resize them, or create_model({self.config.name!r}, input_size=(H, W))"
            )
        if images.is_cuda or not torch.is_grad_enabled():
            # What tensor cores work in, and faster on a CPU too. There, though, batch norm sums one by one in this
            # format: gradients were off by 1e-3 at 4 images.
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.backbone(images)
        p1, p2 = self.config.patch_size
        patches = rearrange(features, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p1, p2=p2)
        visual = self.patch_embed(patches)
        keypoints = self.keypoint_tokens.expand(images.shape[0], -1, -1).to(visual.dtype)
        return torch.cat([keypoints, visual], dim=1) + self.positions, self.positions

    def _ends_group(self, index: int) -> bool:
        return (index + 1) % (self.config.depth // self.config.groups) == 0


def token_groups(model: nn.Module) -> dict[str, tuple[slice, float]]:
    """Keypoint and visual tokens of a TokenPose, as `CycleLoss(groups=...)` takes them; equations (1) and (2)."""
    keypoints = model.config.num_keypoints
    return {"keypoint": (slice(0, keypoints), 1.0), "visual": (slice(keypoints, None), 1.0)}


def set_keep_rate(model: nn.Module, keep_rate: float) -> None:
    """Change the share of visual tokens that each pruning block keeps, between two steps; 1 keeps all.

    Not part of the state dict: a resumed training sets it again. Each new share compiles a compiled model anew, which
    PyTorch does 8 times by default, so anneal in a few steps there.
    Errors: PoseError for a model without pruning blocks, or a share outside of 0 to 1.
    """
    blocks = {index: block for index, block in enumerate(model.blocks) if isinstance(block, PruningBlock)}
    if not blocks:
        raise PoseError(f"{model.config.name} has no pruning blocks: create it with prune_at=(3, 6, 9), as ppt_s is")
    if not 0 < keep_rate <= 1:
        raise PoseError(f"keep_rate={keep_rate} is a share of the tokens, above 0 and at most 1")
    for index, keep in tokens_kept(model.config, keep_rate).items():
        blocks[index].keep = keep


def annealed_keep_rate(epoch: float, keep_rate: float = 0.7, wait: float = 10, anneal: float = 100) -> float:
    """PPT's own schedule for `set_keep_rate`: 1 for `wait` epochs, then down a half cosine to `keep_rate` in `anneal`.

    SDPose's PPT models were trained with the final rate from the first step instead.
    """
    progress = min(max((epoch - wait) / anneal, 0.0), 1.0)
    return keep_rate + (1 - keep_rate) * (1 + math.cos(math.pi * progress)) / 2


def _make_block(config: TokenPoseConfig, index: int) -> Block:
    adds_positions = index % (config.depth // config.groups) > 0
    arguments = (config.dim, config.heads, config.mlp_ratio, config.scale, adds_positions)
    if index in config.prune_at:
        return PruningBlock(*arguments, config.num_keypoints, tokens_kept(config, config.keep_rate)[index])
    return Block(*arguments)


def _make_head(config: TokenPoseConfig) -> nn.Module:
    dim = config.groups * config.dim
    if config.head == "heatmap":
        return HeatmapHead(dim, config.feature_size)
    return (RLEHead if config.head == "rle" else DistilPoseHead)(dim, config.head_hidden)
