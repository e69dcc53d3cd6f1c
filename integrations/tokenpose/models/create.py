"""Pose models by name, in timm's manner: `create_model("sdpose_s_v1")`, `list_models("ppt*")`."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from torch import nn

from cyclekd import wrap_multicycle
from cyclekd.integrations.tokenpose.models.baselines import ConvPose
from cyclekd.integrations.tokenpose.models.config import PRESETS, PoseConfig, TokenPoseConfig, config_for
from cyclekd.integrations.tokenpose.models.tokenpose import TokenPose


def create_model(name: str, *, pretrained_backbone: bool = False, **overrides: Any) -> nn.Module:
    """The pose model of that name, with random weights; in training mode, as any new module.

    `overrides` replace fields of its preset (`config.py`), such as `num_keypoints=14`, `input_size=(128, 96)`,
    `depth=4`, `attention_scale="dim"` or `cycles=1`. With more than one cycle the model comes wrapped by
    `wrap_multicycle`: in training a call returns a `CycleOutput`, in evaluation one pass. `pretrained_backbone` takes
    ImageNet weights from timm for HRNet and ResNet. Errors: PoseError for an unknown name, an unknown field, sizes that
    do not fit, or ImageNet weights that cannot be had.
    """
    return build(config_for(name, **overrides), pretrained_backbone)


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows and that match, such as "sdpose*"; in alphabetical order."""
    return sorted(name for name in PRESETS if fnmatch(name, pattern))


def build(config: PoseConfig, pretrained_backbone: bool = False) -> nn.Module:
    """The model that a config describes, wrapped where it has several cycles."""
    if not isinstance(config, TokenPoseConfig):
        return ConvPose(config, pretrained_backbone)
    model = TokenPose(config, pretrained_backbone)
    return wrap_multicycle(model, config.cycles, stack="blocks") if config.cycles > 1 else model
