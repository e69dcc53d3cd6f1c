"""The convolutional baselines against their layers written out, and ImageNet backbones: asked of timm, and kept."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.models.create import create_model


def lively(name: str, **overrides: Any) -> nn.Module:
    """A model in evaluation whose every layer makes a difference."""
    model = create_model(name, input_size=(64, 32), num_keypoints=5, **overrides).eval()
    with torch.no_grad():
        for module in model.head.modules():
            if isinstance(module, (nn.ConvTranspose2d, nn.Conv2d, nn.Linear)):
                module.weight.normal_(std=(4 / module.weight[:, 0].numel()) ** 0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.1)
    return model


def test_simplebaseline_is_three_normalised_doublings_and_a_heat_map_per_keypoint() -> None:
    model, images = lively("simplebaseline_r50"), torch.randn(2, 3, 64, 32)
    first, norm1, _, second, norm2, _, third, norm3, _, last = model.head
    with torch.no_grad():
        maps = model.backbone.forward_features(images)
        for layer, norm in ((first, norm1), (second, norm2), (third, norm3)):
            maps = F.conv_transpose2d(maps, layer.weight, stride=2, padding=1)
            mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
            maps = (maps - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
            maps = maps.clamp(min=0)
        expected = F.conv2d(maps, last.weight, last.bias)
        found = model(images)
    assert first.weight.shape == (2048, 256, 4, 4) and found.shape == (2, 5, 16, 8) and found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_regressing_baseline_is_one_linear_layer_on_the_mean_feature() -> None:
    model, images = lively("rle_r50"), torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        pooled = model.backbone.forward_features(images).mean((2, 3))
        found = model(images)
    for keypoint in range(5):
        rows = slice(4 * keypoint, 4 * keypoint + 4)  # x, y and the raw sigmas of one key point stand together
        expected = pooled @ model.head.fc.weight[rows].T + model.head.fc.bias[rows]
        torch.testing.assert_close(found[:, keypoint], expected, rtol=1e-4, atol=1e-4)


def test_the_heads_begin_with_the_published_spread() -> None:
    head = create_model("simplebaseline_r50").head
    for index in (0, 3, 6, 9):
        assert head[index].weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not head[9].bias.any()
    regression = create_model("rle_r50").head.fc
    assert regression.weight.std().item() == pytest.approx(0.01, rel=0.05) and not regression.bias.any()


PARAMETERS = {
    "simplebaseline_r50": 33_999_697,
    "simplebaseline_r101": 52_991_825,
    "simplebaseline_r152": 68_635_473,
    "rle_r50": 23_647_364,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_baselines_have_exactly_so_many_parameters(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


W18 = {"backbone": "hrnet_w18_small", "stage1_width": 32}


@pytest.mark.parametrize(
    ("name", "overrides", "of_timm"),
    [
        ("tokenpose_b", {}, "hrnet_w32"),
        ("sdpose_b", {}, "hrnet_w32"),
        ("sdpose_t", W18, "hrnet_w18_small"),
        ("rle_r50", {}, "resnet50"),
        ("simplebaseline_r50", {}, "resnet50"),
    ],
)
def test_imagenet_weights_are_asked_of_timm_and_kept(
    name: str, overrides: dict[str, Any], of_timm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, asked = timm.create_model, []

    def pretend(variant: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append((variant, pretrained))
        backbone = create(variant, pretrained=False, **options)
        for parameter in backbone.parameters():
            nn.init.constant_(parameter, 0.25)
        return backbone

    monkeypatch.setattr(timm, "create_model", pretend)
    model = create_model(name, input_size=(64, 96), pretrained_backbone=True, **overrides)
    assert asked == [(of_timm, True)]
    assert all((parameter == 0.25).all() for parameter in model.backbone.parameters())
    assert all((parameter != 0.25).any() for parameter in model.head.parameters())


def test_a_model_without_pretrained_backbone_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []
    monkeypatch.setattr(
        timm, "create_model", lambda *names, pretrained=False, **o: asked.append(pretrained) or create(*names, **o)
    )
    create_model("rle_r50")
    create_model("tokenpose_b")
    assert not any(asked)


def test_images_are_laid_out_channels_last_unless_a_cpu_needs_gradients() -> None:
    model = create_model("sdpose_t", input_size=(64, 48))
    seen: list[bool] = []
    model.backbone.conv1.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    images: Tensor = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        model.eval()(images)
    model.train()(images)
    assert seen == [True, False]
