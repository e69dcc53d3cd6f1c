"""TokenPose: a feature map cut into visual tokens, a learned token per keypoint, one transformer over both.

A model of several cycles is this one after `wrap_multicycle`; nothing here knows of cycles.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.models.backbones import make_backbone
from cyclekd.integrations.tokenpose.models.config import TokenPoseConfig, check_images, tokens_kept
from cyclekd.integrations.tokenpose.models.heads import DistilPoseHead, HeatmapHead, RLEHead
from cyclekd.integrations.tokenpose.models.transformer import Block, sine_positions


class TokenPose(nn.Module):
    """Images [B, 3, H, W] to heat maps [B, K, H/4, W/4], or to [B, K, 4 or 5] with a regression head.

    TokenPose (ICCV 2021, arXiv:2104.03516) in the form that SDPose, PPT and DistilPose share: keypoint tokens first,
    then visual tokens row by row; sine positions for the visual ones, again before every block but the first.
    Images are normalised RGB of `config.input_size`. Errors: PoseError for images of another size, or of whole numbers.
    """

    def __init__(self, config: TokenPoseConfig, pretrained_backbone: bool = False) -> None:
        super().__init__()
        self.config = config
        # Where find_stacks, as for timm's models, looks for the size to run. Tokens that drop out on the way would end
        # its stack, so it reads the blocks of a pruning model off their list.
        self.img_size = None if config.prune_at else config.input_size
        self.backbone = make_backbone(config.backbone, config.stage1_width, pretrained_backbone)
        self.patch_embed = PatchEmbed(config.patch_size, self.backbone.num_features, config.dim)
        self.keypoint_tokens = nn.Parameter(torch.zeros(1, config.num_keypoints, config.dim))
        # Keypoint tokens have no place: zeros, so that one addition serves all tokens.
        table = torch.zeros(1, config.num_keypoints + config.num_visual_tokens, config.dim)
        table[0, config.num_keypoints :] = sine_positions(config.grid_size, config.dim)
        self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.ModuleList(_make_block(config, index) for index in range(config.depth))
        self.keep_rate = config.keep_rate  # of the moment, see set_keep_rate
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
        check_images(self.config, images)
        visual = self.patch_embed(self.backbone(images))
        keypoints = self.keypoint_tokens.expand(images.shape[0], -1, -1)
        return torch.cat([keypoints, visual], dim=1) + self.positions, self.positions

    def _ends_group(self, index: int) -> bool:
        return (index + 1) % (self.config.depth // self.config.groups) == 0


class PatchEmbed(nn.Linear):
    """A feature map [B, C, H, W] to a token per patch, row by row, [B, N, D]; cut in here, so once for all cycles."""

    def __init__(self, patch: tuple[int, int], features: int, dim: int) -> None:
        super().__init__(patch[0] * patch[1] * features, dim)
        self.patch = patch

    def forward(self, features: Tensor) -> Tensor:
        p1, p2 = self.patch
        return super().forward(rearrange(features, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p1, p2=p2))


def token_groups(model: nn.Module) -> dict[str, tuple[slice, float]]:
    """Keypoint and visual tokens of a TokenPose, as `CycleLoss(groups=...)` takes them; equations (1) and (2).

    Errors: PoseError for another model, or one inside of DDP.
    """
    keypoints = _token_pose(model, "token_groups").config.num_keypoints
    return {"keypoint": (slice(0, keypoints), 1.0), "visual": (slice(keypoints, None), 1.0)}


def set_keep_rate(model: nn.Module, keep_rate: float) -> None:
    """Change the share of visual tokens that each pruning block keeps, between two steps; 1 keeps all.

    Not part of the state dict: a resumed training sets it again. Each new share compiles a compiled model anew, which
    PyTorch does 8 times by default, so anneal in a few steps there.
    Errors: PoseError for a model without pruning blocks, or inside of DDP, or a share outside of 0 to 1.
    """
    model = _token_pose(model, "set_keep_rate")
    if not model.config.prune_at:
        raise PoseError(f"{model.config.name} has no pruning blocks: create it with prune_at=(3, 6, 9), as ppt_s is")
    if not 0 < keep_rate <= 1:
        raise PoseError(f"keep_rate={keep_rate} is a share of the tokens, above 0 and at most 1")
    model.keep_rate = keep_rate
    for index, keep in tokens_kept(model.config, keep_rate).items():
        model.blocks[index].keep = keep


def annealed_keep_rate(epoch: float, keep_rate: float = 0.7, wait: float = 10, anneal: float = 100) -> float:
    """PPT's own schedule for `set_keep_rate`: 1 for `wait` epochs, then down a half cosine to `keep_rate` in `anneal`.

    With `anneal=0` it falls at once. SDPose's PPT models were trained with the final rate from the first step instead.
    """
    progress = min(max((epoch - wait) / anneal, 0.0), 1.0) if anneal > 0 else float(epoch >= wait)
    return keep_rate + (1 - keep_rate) * (1 + math.cos(math.pi * progress)) / 2


def _token_pose(model: nn.Module, asked: str) -> TokenPose:
    """The model itself, of which torch.compile makes another object."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, TokenPose):
        raise PoseError(
            f"{asked} takes a model with keypoint tokens, such as create_model('sdpose_s_v1'), and got a "
            f"{type(model).__name__}: pass model.module where it is in DDP"
        )
    return model


def _make_block(config: TokenPoseConfig, index: int) -> Block:
    adds_positions = index % (config.depth // config.groups) > 0
    keep = tokens_kept(config, config.keep_rate).get(index)
    return Block(config.dim, config.heads, config.mlp_ratio, config.scale, adds_positions, config.num_keypoints, keep)


def _make_head(config: TokenPoseConfig) -> nn.Module:
    dim = config.groups * config.dim
    if config.head == "heatmap":
        return HeatmapHead(dim, config.feature_size)
    return (RLEHead if config.head == "rle" else DistilPoseHead)(dim, config.head_hidden)
