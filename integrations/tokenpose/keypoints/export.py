"""A pose model with its decoding as one module, images in and key points out, and that module as an ONNX file."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from cyclekd import CycleOutput
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import (
    Keypoints,
    decode_heatmaps,
    decode_regression,
    decode_token_regression,
)
from cyclekd.integrations.tokenpose.models.config import PoseConfig


class KeypointModel(nn.Module):
    """`model` with its decoding: images [B, 3, H, W] to key points [B, K, 2] in input pixels and scores [B, K].

    For evaluation, so call .eval(), which also reaches `model`: it is shared, not copied. As the model evaluates: one
    pass unless `inference_cycles` says otherwise. `method` is that of `decode_heatmaps`; regression heads have one way
    alone. `aligned` is for models trained by TokenPose's own code, see `decode_output`. Errors: PoseError for another
    kind of model, or an unknown method.
    """

    def __init__(self, model: nn.Module, method: str = "dark", aligned: bool = False) -> None:
        super().__init__()
        if not isinstance(getattr(model, "config", None), PoseConfig):
            raise PoseError(
                "KeypointModel and export_onnx take a model of create_model or from_pretrained, and got a "
                f"{type(model).__name__}: pass model.module where it is in DDP"
            )
        decode_heatmaps(torch.zeros(1, 1, 8, 8), method)  # refuses an unknown method before an export begins
        self.model, self.method, self.aligned = model, method, aligned

    def forward(self, images: Tensor) -> Keypoints:
        return decode_output(self.model.config, self.model(images), self.method, self.aligned)


def decode_output(config: PoseConfig, output: Tensor, method: str = "dark", aligned: bool = False) -> Keypoints:
    """What a model of this config returns in evaluation, as key points [B, K, 2] in input pixels, scores [B, K].

    A heat map's pixel 1 is the input's pixel 4; with `aligned`, as TokenPose's own code has it, the outermost pixels of
    both coincide, up to 3 px apart from that. A heat map without a positive value has its key point outside of the
    image, at negative coordinates.
    Errors: PoseError for what it returns in training in cycles.
    """
    if isinstance(output, CycleOutput):
        raise PoseError(
            f"decode_output takes one output of {config.name}, and got those of every cycle in training: call "
            "model.eval() first, or decode each of output.outputs"
        )
    height, width = config.input_size
    if config.head == "heatmap":
        found, grid = decode_heatmaps(output, method), config.feature_size
        if aligned:
            height, width, grid = height - 1, width - 1, (grid[0] - 1, grid[1] - 1)
    else:
        decode = decode_regression if config.head == "rle" else decode_token_regression
        found, grid = decode(output), (1, 1)
    x, y = found.coordinates.unbind(-1)
    return Keypoints(torch.stack((x * (width / grid[1]), y * (height / grid[0])), -1), found.scores)


def export_onnx(model: nn.Module, path: str | Path, method: str = "dark", aligned: bool = False) -> Path:
    """Write `model` with its decoding as ONNX: input `images` [B, 3, H, W], outputs `keypoints` and `scores`.

    B is free, H and W are the model's. The model is left as it was. Needs onnx and onnxscript. What the file gives is
    what `KeypointModel` does for maps that have a peak; with "dark", a noisy or flat map turns rounding into pixels.
    Errors: PoseError where the file exists, its folder does not, or `KeypointModel` refuses the model or the method.
    """
    path = Path(path)
    if path.exists():
        raise PoseError(f"export_onnx({str(path)!r}): this file exists; choose another name, or remove it first")
    if not path.parent.is_dir():
        raise PoseError(f"export_onnx({str(path)!r}): there is no folder {path.parent}; make it first")
    whole = copy.deepcopy(KeypointModel(model, method, aligned)).cpu().float().eval()
    images = torch.randn(2, 3, *model.config.input_size)
    with torch.autocast("cpu", enabled=False):  # whose casts a runtime would refuse
        program = torch.onnx.export(
            whole,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["keypoints", "scores"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=65535)}},
        )
    program.save(path)
    return path
