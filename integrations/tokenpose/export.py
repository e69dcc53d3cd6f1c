"""A pose model with its decoding as one module, images in and key points out, and that module as an ONNX file."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.config import PoseConfig
from cyclekd.integrations.tokenpose.decoding import (
    Keypoints,
    decode_heatmaps,
    decode_regression,
    decode_token_regression,
)
from cyclekd.integrations.tokenpose.errors import PoseError


class KeypointModel(nn.Module):
    """`model` with its decoding: images [B, 3, H, W] to key points [B, K, 2] in input pixels and scores [B, K].

    One pass, also of a model that was trained in cycles, whose weights it shares. `method` is that of
    `decode_heatmaps`; regression heads have one way alone.
    """

    def __init__(self, model: nn.Module, method: str = "dark") -> None:
        super().__init__()
        self.model, self.method = model, method
        self.eval()

    def forward(self, images: Tensor) -> Keypoints:
        return decode_output(self.model.config, self.model(images), self.method)


def decode_output(config: PoseConfig, output: Tensor, method: str = "dark") -> Keypoints:
    """What a model of this config returns in evaluation, as key points [B, K, 2] in input pixels, scores [B, K].

    A heat map without a positive value has its key point outside of the image, at negative coordinates.
    """
    height, width = config.input_size
    if config.head == "heatmap":
        found, grid = decode_heatmaps(output, method), config.feature_size
    else:
        decode = decode_regression if config.head == "rle" else decode_token_regression
        found, grid = decode(output), (1, 1)
    x, y = found.coordinates.unbind(-1)
    return Keypoints(torch.stack((x * (width / grid[1]), y * (height / grid[0])), -1), found.scores)


def export_onnx(model: nn.Module, path: str | Path, method: str = "dark") -> Path:
    """Write `model` with its decoding as ONNX: input `images` [B, 3, H, W], outputs `keypoints` and `scores`.

    B is free, H and W are the model's. The model is left as it was. Needs onnx and onnxscript. Errors: PoseError where
    the file exists, or its folder does not.
    """
    path = Path(path)
    if path.exists():
        raise PoseError(f"export_onnx({str(path)!r}): this file exists; choose another name, or remove it first")
    if not path.parent.is_dir():
        raise PoseError(f"export_onnx({str(path)!r}): there is no folder {path.parent}; make it first")
    whole = KeypointModel(copy.deepcopy(model).cpu().float(), method)
    images = torch.randn(2, 3, *model.config.input_size)
    program = torch.onnx.export(
        whole,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["keypoints", "scores"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
    )
    program.save(path)
    return path
