"""Feature maps of stride 4, made of timm's HRNets: the first stage alone (the "stem" of the S models), or three stages.

timm's module names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.models.hrnet import HighResolutionNet, cfg_cls
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.errors import PoseError


class Stem(nn.Module):
    """HRNet's stem and first stage: [B, 3, H, W] to [B, 4 x stage1_width, H/4, W/4]."""

    def __init__(self, hrnet: HighResolutionNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = hrnet.conv1, hrnet.bn1, hrnet.act1
        self.conv2, self.bn2, self.act2 = hrnet.conv2, hrnet.bn2, hrnet.act2
        self.layer1 = hrnet.layer1
        self.num_features = self.layer1[-1].conv3.out_channels

    def forward(self, images: Tensor) -> Tensor:
        if images.is_cuda or not torch.is_grad_enabled():
            # What tensor cores work in, and faster on a CPU too. There, though, batch norm sums one by one in this
            # format: gradients were off by 1e-3 at 4 images.
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.act1(self.bn1(self.conv1(images)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.layer1(x)


class HRNet(Stem):
    """Three stages of HRNet (CVPR 2019), and of these the branch of highest resolution: [B, 16, 32 or 48, H/4, W/4]."""

    def __init__(self, hrnet: HighResolutionNet) -> None:
        super().__init__(hrnet)
        self.transition1, self.stage2 = hrnet.transition1, hrnet.stage2
        self.transition2, self.stage3 = hrnet.transition2, hrnet.stage3
        last = self.stage3[-1]
        last.fuse_layers = last.fuse_layers[:1]  # the other branches go nowhere from here
        self.num_features = hrnet.stage3_cfg["num_channels"][0]

    def forward(self, images: Tensor) -> Tensor:
        x = super().forward(images)
        branches = self.stage2([transition(x) for transition in self.transition1])
        new = self.transition2[-1](branches[-1])
        return self.stage3([*branches, new])[0]


def make_backbone(name: str, stage1_width: int = 64, pretrained: bool = False) -> Stem:
    """The backbone "stem" or an HRNet by timm's name, `pretrained` with timm's ImageNet weights.

    Errors: PoseError where there are no such weights (a stem alone, or a first stage of another width), or where they
    cannot be had.
    """
    variant = "hrnet_w32" if name == "stem" else name
    if not pretrained:
        hrnet = _random_hrnet(variant, stage1_width, stages=1 if name == "stem" else 3)
    elif name == "stem" or stage1_width != _published_width(name):
        raise PoseError(
            "pretrained_backbone=True: ImageNet weights are there for hrnet_w32 and hrnet_w48 with stage1_width=64, "
            f"hrnet_w18_small with 32; this model has backbone={name!r}, stage1_width={stage1_width}: leave it out, or "
            "take tokenpose_b"
        )
    else:
        hrnet = timm_model(variant, pretrained=True)
    return Stem(hrnet) if name == "stem" else HRNet(hrnet)


def timm_model(name: str, *, pretrained: bool, **settings: Any) -> nn.Module:
    """The model of timm of that name. Errors: PoseError where its pretrained weights cannot be had."""
    try:
        return timm.create_model(name, pretrained=pretrained, **settings)
    except (OSError, HfHubHTTPError) as error:
        raise PoseError(
            f"pretrained_backbone=True: the ImageNet weights of {name} cannot be had "
            f"({type(error).__name__}): connect to the hub once so that they are in its cache, or leave it out"
        ) from error


def _published_width(variant: str) -> int:
    return cfg_cls[variant]["stage1"]["num_channels"][0]


def _random_hrnet(variant: str, stage1_width: int, stages: int) -> HighResolutionNet:
    cfg = dict(cfg_cls[variant])
    cfg["stage1"] = {**cfg["stage1"], "num_channels": (stage1_width,)}
    for unused in range(stages + 1, 5):
        cfg[f"stage{unused}"] = {**cfg[f"stage{unused}"], "num_modules": 0}
    return HighResolutionNet(cfg, head="none")
