"""Convolutional models to compare with: a ResNet with deconvolutions, and one that regresses coordinates."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.models.backbones import timm_model
from cyclekd.integrations.tokenpose.models.config import ConvPoseConfig, check_images

DECONVOLUTION_WIDTH = 256


class ConvPose(nn.Module):
    """Images [B, 3, H, W] to heat maps [B, K, H/4, W/4], or to [B, K, 4]: x, y and two raw sigmas.

    The first is SimpleBaseline (ECCV 2018, arXiv:1804.06208), the second a pooled ResNet with one linear layer, which
    RLE trains (ICCV 2021, arXiv:2107.11291). Errors: PoseError for images of another size than `config.input_size`, or
    of whole numbers.
    """

    def __init__(self, config: ConvPoseConfig, pretrained_backbone: bool = False) -> None:
        super().__init__()
        self.config = config
        pool = "" if config.head == "heatmap" else "avg"
        self.backbone = timm_model(config.backbone, pretrained=pretrained_backbone, num_classes=0, global_pool=pool)
        make_head = DeconvolutionHead if config.head == "heatmap" else PooledRLEHead
        self.head = make_head(self.backbone.num_features, config.num_keypoints)

    def forward(self, images: Tensor) -> Tensor:
        check_images(self.config, images)
        return self.head(self.backbone(images))


class DeconvolutionHead(nn.Sequential):
    """Three transposed convolutions, each of which doubles the size, and a heat map per keypoint."""

    def __init__(self, features: int, num_keypoints: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [
                nn.ConvTranspose2d(features, DECONVOLUTION_WIDTH, kernel_size=4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(DECONVOLUTION_WIDTH),
                nn.ReLU(inplace=True),
            ]
            features = DECONVOLUTION_WIDTH
        super().__init__(*layers, nn.Conv2d(features, num_keypoints, kernel_size=1))
        for layer in self:
            if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d)):
                nn.init.normal_(layer.weight, std=0.001)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


class PooledRLEHead(nn.Module):
    """Pooled features [B, C] to [B, K, 4]."""

    def __init__(self, features: int, num_keypoints: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, 4 * num_keypoints)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor) -> Tensor:
        return rearrange(self.fc(features), "b (k four) -> b k four", four=4)
