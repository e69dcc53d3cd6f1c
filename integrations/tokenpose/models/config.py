"""What defines a pose model: frozen dataclasses that can be printed, and the presets by name.

Sizes are (height, width) everywhere. The paper's "TokenPose-B" and its kin have a first stage of half the width, a slip
of the released configuration; here they carry `narrow` in their names, and `tokenpose_b` is the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError

STRIDE = 4
"""Of every TokenPose backbone and of every heat map, in pixels."""

Backbone = Literal["stem", "hrnet_w18_small", "hrnet_w32", "hrnet_w48"]
AttentionScale = Literal["head", "dim"]
TokenHead = Literal["heatmap", "rle", "distilpose"]
ResNet = Literal["resnet50", "resnet101", "resnet152"]
ConvHead = Literal["heatmap", "rle"]


@dataclass(frozen=True)
class TokenPoseConfig:
    """A transformer over keypoint tokens and visual tokens (TokenPose, ICCV 2021), and its cycles in training."""

    name: str
    num_keypoints: int = 17
    input_size: tuple[int, int] = (256, 192)
    backbone: Backbone = "stem"
    stage1_width: int = 64  # of HRNet's first stage; 32 in the paper's B models
    patch_size: tuple[int, int] = (4, 3)  # in pixels of the stride-4 feature map
    dim: int = 192
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 3.0
    attention_scale: AttentionScale = "head"  # (dim / heads)^-0.5, or dim^-0.5 as in the official S models
    groups: int = 1  # of blocks; the head reads the keypoint tokens after each, side by side (3 in the official L)
    head: TokenHead = "heatmap"
    head_hidden: int = 64  # of the regression heads; 2-layer where it is at least twice dim
    keep_rate: float = 1.0  # of visual tokens at each pruning block
    prune_at: tuple[int, ...] = ()  # 0-based indices of blocks that drop tokens (PPT, ECCV 2022)
    cycles: int = 1  # in training; more than 1 wraps the model

    def __post_init__(self) -> None:
        _keep_as_tuples(self, input_size=2, patch_size=2, prune_at=None)
        _check_choices(self.name, Backbone, backbone=self.backbone)
        _check_choices(self.name, AttentionScale, attention_scale=self.attention_scale)
        _check_choices(self.name, TokenHead, head=self.head)
        self._check_numbers()

    @property
    def feature_size(self) -> tuple[int, int]:
        """Of the backbone's feature map, which is also that of the heat maps."""
        return self.input_size[0] // STRIDE, self.input_size[1] // STRIDE

    @property
    def grid_size(self) -> tuple[int, int]:
        """Visual tokens down and across."""
        return self.feature_size[0] // self.patch_size[0], self.feature_size[1] // self.patch_size[1]

    @property
    def num_visual_tokens(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return (self.dim if self.attention_scale == "dim" else self.dim // self.heads) ** -0.5

    def _check_numbers(self) -> None:
        if not all(self.patch_size):
            raise PoseError(f"{self.name}: patch_size={self.patch_size} has to be at least 1 each way")
        coarsest = STRIDE if self.backbone == "stem" else 4 * STRIDE  # stride of a branch
        down, across = (math.lcm(STRIDE * side, coarsest) for side in self.patch_size)
        _check_input(self.name, self.input_size, (down, across))
        counts = ("num_keypoints", "stage1_width", "dim", "depth", "heads", "groups", "head_hidden", "cycles")
        _check_counts(self.name, **{field: getattr(self, field) for field in counts})
        for field in ("mlp_ratio", "keep_rate"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise PoseError(f"{self.name}: {field}={value!r} has to be a finite number above 0")
        if self.dim * self.mlp_ratio < 1:
            raise PoseError(f"{self.name}: mlp_ratio={self.mlp_ratio} leaves no unit in an MLP: 3.0 is usual")
        if self.dim % self.heads or self.dim % 4:
            raise PoseError(
                f"{self.name}: dim={self.dim} has to be a multiple of heads={self.heads}, and of 4 for the sine table"
            )
        if self.cycles > 1 and self.depth < 2:
            raise PoseError(f"{self.name}: cycles={self.cycles} need at least 2 blocks, and depth={self.depth}")
        if self.depth % self.groups:
            raise PoseError(f"{self.name}: depth={self.depth} does not divide into groups={self.groups}")
        self._check_pruning()

    def _check_pruning(self) -> None:
        if self.keep_rate > 1:
            raise PoseError(f"{self.name}: keep_rate={self.keep_rate} is a share of the tokens, above 0 and at most 1")
        if self.keep_rate < 1 and not self.prune_at:
            raise PoseError(
                f"{self.name}: keep_rate={self.keep_rate} needs blocks that prune, as in prune_at=(3, 6, 9)"
            )
        if any(index >= self.depth for index in self.prune_at) or len(set(self.prune_at)) < len(self.prune_at):
            raise PoseError(f"{self.name}: prune_at={self.prune_at} names blocks of 0 to {self.depth - 1}, each once")
        if self.cycles > 1 and len(self.prune_at) == self.depth:
            raise PoseError(
                f"{self.name}: prune_at={self.prune_at} is every block, and cycles={self.cycles} need one that does "
                "not prune, which tells tokens from positions: leave one out"
            )


@dataclass(frozen=True)
class ConvPoseConfig:
    """A ResNet with deconvolutions (SimpleBaseline, ECCV 2018) or with regressed coordinates (RLE, ICCV 2021)."""

    name: str
    num_keypoints: int = 17
    input_size: tuple[int, int] = (256, 192)
    backbone: ResNet = "resnet50"
    head: ConvHead = "heatmap"
    cycles: ClassVar[int] = 1  # there are no blocks to repeat

    def __post_init__(self) -> None:
        _keep_as_tuples(self, input_size=2)
        _check_choices(self.name, ResNet, backbone=self.backbone)
        _check_choices(self.name, ConvHead, head=self.head)
        _check_input(self.name, self.input_size, (32, 32))
        _check_counts(self.name, num_keypoints=self.num_keypoints)

    @property
    def feature_size(self) -> tuple[int, int]:
        """Of the heat maps."""
        return self.input_size[0] // STRIDE, self.input_size[1] // STRIDE


PoseConfig = TokenPoseConfig | ConvPoseConfig


def config_for(name: str, **overrides: Any) -> PoseConfig:
    """The preset of that name, with fields replaced. Errors: PoseError for an unknown name or field."""
    if name not in PRESETS:
        raise PoseError(f"no pose model is called {name!r}; there are {', '.join(PRESETS)}")
    return changed(PRESETS[name], overrides)


def changed(config: PoseConfig, overrides: Mapping[str, Any]) -> PoseConfig:
    """The config with fields replaced. Errors: PoseError for a field that it does not have, or its name."""
    names = [field for field in vars(config) if field != "name"]
    if unknown := sorted(overrides.keys() - set(names)):
        raise PoseError(f"{config.name} has no {', '.join(unknown)}; what can be set is {', '.join(names)}")
    return replace(config, **overrides)


def check_images(config: PoseConfig, images: Tensor) -> None:
    """Raises PoseError unless a model of this config can take these images."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *config.input_size):
        raise PoseError(
            f"{config.name} takes images of {('B', 3, *config.input_size)}, and got {tuple(images.shape)}: resize "
            f"them, or create_model({config.name!r}, input_size=(H, W))"
        )
    if not images.is_floating_point():
        raise PoseError(
            f"{config.name} takes normalised images, and got {images.dtype}: divide by 255 and normalise, as "
            "warp.normalize does"
        )


def _keep_as_tuples(config: TokenPoseConfig | ConvPoseConfig, **lengths: int | None) -> None:
    """Fields of several whole numbers, which come as lists from JSON."""
    for field, length in lengths.items():
        value = getattr(config, field)
        whole = isinstance(value, list | tuple) and all(_is_whole(each) and each >= 0 for each in value)
        if not whole or length not in (None, len(value)):
            wanted = "(height, width)" if length == 2 else "indices such as (3, 6, 9)"
            raise PoseError(f"{config.name}: {field}={value!r} has to be {wanted} in whole numbers")
        object.__setattr__(config, field, tuple(value))


def _check_choices(name: str, known: Any, **choice: str) -> None:
    for field, value in choice.items():
        if value not in get_args(known):
            raise PoseError(f"{name}: {field}={value!r} is none of {', '.join(get_args(known))}")


def _check_input(name: str, size: tuple[int, int], multiple: tuple[int, int]) -> None:
    if not all(side > 0 and side % m == 0 for side, m in zip(size, multiple, strict=True)):
        raise PoseError(
            f"{name}: input_size={size} has to be (height, width) in pixels, in multiples of {multiple[0]} and "
            f"{multiple[1]}"
        )


def _check_counts(name: str, **counts: int) -> None:
    for field, value in counts.items():
        if not _is_whole(value) or value < 1:
            raise PoseError(f"{name}: {field}={value!r} has to be a whole number of at least 1")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _presets() -> dict[str, PoseConfig]:
    s_v1 = TokenPoseConfig("tokenpose_s_v1")
    s_v2 = TokenPoseConfig("tokenpose_s_v2", patch_size=(2, 2))
    t_6 = TokenPoseConfig("tokenpose_t_6", depth=6)
    b = TokenPoseConfig("tokenpose_b", backbone="hrnet_w32")
    b_narrow = TokenPoseConfig("tokenpose_b_narrow", backbone="hrnet_w32", stage1_width=32)
    l_d24 = TokenPoseConfig("tokenpose_l_d24", backbone="hrnet_w48", depth=24, heads=12, groups=3)
    pruned: dict[str, Any] = {"keep_rate": 0.7, "prune_at": (3, 6, 9)}
    configs: list[PoseConfig] = [
        s_v1,
        s_v2,
        t_6,
        b,
        b_narrow,
        l_d24,
        replace(t_6, name="sdpose_t", cycles=3),
        replace(s_v1, name="sdpose_s_v1", cycles=2),
        replace(s_v2, name="sdpose_s_v2", cycles=2),
        replace(b, name="sdpose_b", cycles=2),
        replace(b_narrow, name="sdpose_b_narrow", cycles=2),
        replace(s_v1, name="ppt_s", **pruned),
        replace(b, name="ppt_b", **pruned),
        replace(b_narrow, name="ppt_b_narrow", **pruned),
        replace(s_v1, name="sdpose_s_v1_ppt", cycles=2, **pruned),
        replace(s_v1, name="tokenreg_s", head="distilpose"),
        replace(s_v1, name="sdpose_reg", head="rle", cycles=2),
        ConvPoseConfig("simplebaseline_r50"),
        ConvPoseConfig("simplebaseline_r101", backbone="resnet101"),
        ConvPoseConfig("simplebaseline_r152", backbone="resnet152"),
        ConvPoseConfig("rle_r50", head="rle"),
    ]
    return {config.name: config for config in configs}


PRESETS = _presets()


def tokens_kept(config: TokenPoseConfig, keep_rate: float) -> dict[int, int]:
    """Visual tokens that each pruning block leaves, by its index: 256 become 180, 126 and 89 at 0.7."""
    kept, left = {}, config.num_visual_tokens
    for index in sorted(config.prune_at):
        left = math.ceil(left * keep_rate)
        kept[index] = left
    return kept
