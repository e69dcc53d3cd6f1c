"""Published checkpoints of TokenPose, PPT, SDPose and DistilPose into the models here.

A file has to fit whole, with the attention scale of its layout: with another one a model loads, and predicts something
else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.losses.flow import RealNVP
from cyclekd.integrations.tokenpose.models.config import PRESETS, STRIDE, TokenPoseConfig
from cyclekd.integrations.tokenpose.models.tokenpose import TokenPose
from cyclekd.integrations.tokenpose.models.transformer import sine_positions
from cyclekd.integrations.tokenpose.weights.layouts import (
    Checkpoint,
    Source,
    check_numbers,
    parse_checkpoint,
    read_tensors,
    some,
)

_SCALES = {"head": "(dim / heads)^-0.5", "dim": "dim^-0.5"}
_INPUT_SIZES = ((256, 192), (384, 288), (128, 96), (64, 48), (256, 256), (384, 384), (512, 512))
_PATCH_SIZES = {12: (4, 3), 4: (2, 2)}


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a checkpoint, and of every tensor of the model; print it."""

    layout: str
    attention_scale: Literal["head", "dim"]
    loaded: tuple[str, ...]  # names in the model
    left_out: dict[str, str]  # names in the file, and why the model does without
    missing: tuple[str, ...]  # names in the model
    surplus: tuple[str, ...]  # names in the file
    mismatched: dict[str, str]  # names in the model, and what differs

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, surplus or of another shape."""
        return not (self.missing or self.surplus or self.mismatched)

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        lines = [
            f"layout           {self.layout}",
            f"attention scale  {self.attention_scale}: {_SCALES[self.attention_scale]}",
            f"loaded           {_tensors(self.loaded)}",
            *(f"left out         {some(names)}: {why}" for why, names in reasons.items()),
            f"missing          {some(self.missing)}",
            f"surplus          {some(self.surplus)}",
            *(f"does not fit     {name}: {what}" for name, what in self.mismatched.items()),
        ]
        return "\n".join(lines)


def load_reference_checkpoint(model: nn.Module, source: Source, *, strict: bool = True) -> LoadReport:
    """Put a published checkpoint into a TokenPose of this package, wrapped or not, and say what became of each tensor.

    Reads the layouts of `LAYOUTS`: the official TokenPose-S, -B and -L and PPT, and those built on mmpose (TokenPose,
    SDPose, PPT, DistilPose, SDPose-Reg); also inside of a training checkpoint ("state_dict", "model",
    "best_state_dict") and with the "module." of DataParallel; what is no tensor in a dict that you give is not looked
    at. `strict=False` loads the tensors that fit and reports the others. The weights of RLE's flow are for training
    only: `load_reference_flow`.

    Errors: PoseError, and the model stays as it is, where the file is of no known layout, cannot be read without
    running code of its own, holds NaN, infinity or whole numbers as weights, or is of another attention scale or number
    of heads; with `strict`, also where a tensor is missing, surplus or of another shape, or where the positions are not
    the sine table of this model's input size.
    """
    config = _config_of(model)
    checkpoint = parse_checkpoint(source)
    check_numbers(checkpoint.weights, checkpoint.where)
    _check_attention(checkpoint, config)
    report = _compare(checkpoint, model.state_dict(), config)
    if strict and not report.fits:
        raise PoseError(_why_not(checkpoint, report, config))
    model.load_state_dict({name: checkpoint.weights[name] for name in report.loaded}, strict=False)
    return report


def load_reference_flow(flow: RealNVP, source: Source) -> None:
    """The weights of RLE's flow from an mmpose-style checkpoint, where they are `...flow_model.s.0.0.weight` and so on.

    Errors: PoseError, and the flow stays as it is, where there are none, or where they are of another flow.
    """
    where, tensors = read_tensors(source)
    found = {key.split("flow_model.")[1]: value for key, value in tensors.items() if "flow_model." in key}
    if not found:
        raise PoseError(f"{where} has no flow: no key with flow_model. in it, only {some(list(tensors))}")
    fixed = {"loc": torch.zeros(2), "cov": torch.eye(2), "mask": flow.kept.cpu()}
    for name, expected in fixed.items():
        if name in found and not torch.equal(found.pop(name).cpu().to(expected.dtype), expected):
            raise PoseError(
                f"{where}: flow_model.{name} is not {expected.tolist()}, so it is of another flow than RealNVP()"
            )
    check_numbers(found, where)
    own = flow.state_dict()
    wrong = _shape_differences(found, own)
    if wrong or found.keys() != own.keys():
        names = sorted((found.keys() ^ own.keys()) | wrong.keys())
        raise PoseError(f"{where}: the flow does not fit RealNVP({len(flow.s)} couplings): {some(names)}")
    flow.load_state_dict(found)


def reference_model(source: Source) -> tuple[str, dict[str, Any]]:
    """Name and overrides for `create_model`, as far as the tensors of a published checkpoint tell.

    Errors: PoseError where no preset has such weights, or several have, as sdpose_s_v1 and ppt_s.
    """
    checkpoint = parse_checkpoint(source)
    seen = _settings_in(checkpoint)
    free = {"num_keypoints", "input_size", "attention_scale", "head_hidden"}
    found = []
    for preset in PRESETS.values():
        if isinstance(preset, TokenPoseConfig) and any(fnmatch(preset.name, name) for name in checkpoint.layout.models):
            overrides = _differing(preset, seen)
            if overrides.keys() <= free:
                found.append((preset.name, overrides))
    if len(found) == 1:
        return found[0]
    about = f"{checkpoint.where} ({checkpoint.layout.name})"
    if found:
        names = " or ".join(name for name, _ in found)
        raise PoseError(f"{about} could be {names}, whose weights are alike: say which model it is")
    raise PoseError(f"{about} is none of the presets: say which model it is, and how it differs; {_listed(seen)}")


def _config_of(model: nn.Module) -> TokenPoseConfig:
    if not isinstance(model, TokenPose):
        raise PoseError(
            f"load_reference_checkpoint({type(model).__name__}, ...) takes a model with keypoint tokens, such as "
            'create_model("tokenpose_s_v1"), and before it goes into DDP or torch.compile'
        )
    return model.config


def _check_attention(checkpoint: Checkpoint, config: TokenPoseConfig) -> None:
    """Scale and number of heads, which are in no shape."""
    layout, seen = checkpoint.layout, _settings_in(checkpoint)
    heads = seen.get("heads", config.heads)
    if layout.attention_scale != config.attention_scale and config.heads > 1:
        theirs, ours = f"scales attention by {_SCALES[layout.attention_scale]}", f"by {_SCALES[config.attention_scale]}"
    elif heads != config.heads and seen["dim"] == config.dim:
        theirs, ours = f"has {heads} heads wherever it was published", f"has {config.heads}"
    else:
        return
    raise PoseError(
        f"{checkpoint.where} is of {layout.name}, which {theirs}, and {config.name} {ours}: it would load and "
        f"predict something else. Write {_call(config, seen)}"
    )


def _compare(checkpoint: Checkpoint, own: Mapping[str, Tensor], config: TokenPoseConfig) -> LoadReport:
    weights = checkpoint.weights
    mismatched = _shape_differences(weights, own)
    left_out = dict(checkpoint.left_out)
    if problem := _position_problem(checkpoint, config):
        mismatched["positions"] = problem
    else:
        left_out[checkpoint.layout.tokens + "pos_embedding"] = "the fixed sine table, which is computed here"
    return LoadReport(
        layout=checkpoint.layout.name,
        attention_scale=checkpoint.layout.attention_scale,
        loaded=tuple(name for name in own if name in weights and name not in mismatched),
        left_out=left_out,
        # batch norms of old checkpoints have no num_batches_tracked, which nothing here reads
        missing=tuple(n for n in own if n not in weights and not n.endswith("num_batches_tracked")),
        surplus=(*checkpoint.surplus, *(checkpoint.keys[name] for name in weights if name not in own)),
        mismatched=mismatched,
    )


def _shape_differences(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: f"{tuple(tensors[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    }


def _position_problem(checkpoint: Checkpoint, config: TokenPoseConfig) -> str | None:
    """What is wrong with the file's table of positions; None where it is the model's own."""
    table, own = checkpoint.positions, sine_positions(config.grid_size, config.dim)[None]
    if table is None:
        return "there is no pos_embedding: such a model was trained without positions, and those here have them"
    if table.shape == own.shape:
        rounding = max(1e-5, torch.finfo(table.dtype).eps) if table.is_floating_point() else 0.0
        if torch.allclose(table.cpu().float(), own, rtol=0, atol=rounding):
            return None
        return f"pos_embedding is not the sine table of {config.grid_size} tokens: learned, or of another input size"
    keypoints = checkpoint.weights.get("keypoint_tokens", own[:, :0])
    if table.shape == (1, keypoints.shape[1] + own.shape[1], own.shape[2]):
        return "pos_embedding has rows for keypoint tokens: a learnable table, and the models here have the sine table"
    return f"pos_embedding is {tuple(table.shape)} and the sine table {tuple(own.shape)}: another input or patch size"


def _why_not(checkpoint: Checkpoint, report: LoadReport, config: TokenPoseConfig) -> str:
    seen = _settings_in(checkpoint)
    differing = _differing(config, seen)
    what = [f"{name} is {value!r} there and {getattr(config, name)!r} here" for name, value in differing.items()]
    if not any(name.startswith("backbone.") for name in checkpoint.weights):
        what.append("it has no backbone, as TokenPose-T, which is not among the models here")
    if report.missing:
        what.append(f"missing {some(report.missing, most=2)}")
    if report.surplus:
        what.append(f"surplus {some(report.surplus, most=2)}")
    shapes = [f"{name} is {sizes}" for name, sizes in report.mismatched.items() if name != "positions"]
    if shapes:
        what.append(f"of another shape {some(shapes, most=2)}")
    if "positions" in report.mismatched:
        what.append(report.mismatched["positions"])
    call = f"Write {_call(config, seen)}, or" if differing else "Write"
    return (
        f"{checkpoint.where} ({checkpoint.layout.name}) does not fit {config.name}: {'; '.join(what)}. "
        f"{call} strict=False to load what fits, {_tensors(report.loaded)}"
    )


def _settings_in(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of `TokenPoseConfig` that the tensors tell, and no others."""
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items() if tensor.ndim}
    seen: dict[str, Any] = {"attention_scale": checkpoint.layout.attention_scale, "groups": checkpoint.groups}
    if "backbone.layer1.0.conv1.weight" in shapes:
        seen["stage1_width"] = shapes["backbone.layer1.0.conv1.weight"][0]
        width = shapes.get("backbone.transition1.0.0.weight", (None,))[0]
        seen["backbone"] = "stem" if width is None else f"hrnet_w{width}"
        channels = width or 4 * seen["stage1_width"]
        patch_pixels = shapes.get("patch_embed.weight", (0, 0))[-1] // max(channels, 1)  # a damaged file can have 0
        if patch_pixels in _PATCH_SIZES:
            seen["patch_size"] = _PATCH_SIZES[patch_pixels]
    if len(shapes.get("keypoint_tokens", ())) == 3:
        _, seen["num_keypoints"], seen["dim"] = shapes["keypoint_tokens"]
        if seen["dim"] == 192:
            seen["heads"] = 12 if checkpoint.groups > 1 else 8  # in no shape, so as in all that were published
    if blocks := [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")]:
        seen["depth"] = max(blocks) + 1
    rows = [shapes[name][0] for name in ("head.mlp.1.weight", "head.mlp.3.weight") if name in shapes]
    return seen | (_head_settings(rows, checkpoint, seen) if rows else {})


def _head_settings(rows: list[int], checkpoint: Checkpoint, seen: Mapping[str, Any]) -> dict[str, Any]:
    """What the head's linear layers tell, which have that many outputs."""
    head = {4: "rle", 5: "distilpose"}.get(rows[-1], "heatmap")
    settings: dict[str, Any] = {"head": head}
    if head == "heatmap":
        pixels = rows[-1]
    else:
        settings |= {"head_hidden": rows[0]} if len(rows) == 2 else {}
        table = checkpoint.positions
        tokens = table.shape[1] if table is not None and table.ndim == 3 else 0
        pixels = tokens * math.prod(seen.get("patch_size", (0, 0)))
    sizes = [size for size in _INPUT_SIZES if size[0] * size[1] == pixels * STRIDE**2]
    return settings | ({"input_size": sizes[0]} if sizes else {})


def _differing(config: TokenPoseConfig, seen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in seen.items() if getattr(config, name) != value}


def _call(config: TokenPoseConfig, seen: Mapping[str, Any]) -> str:
    """The shortest call of create_model that makes such a model with what was seen in a file."""
    try:
        wanted = replace(config, **seen)
    except PoseError:
        return f"create_model with {_listed(_differing(config, seen))}"
    calls = []
    for preset in PRESETS.values():
        if isinstance(preset, TokenPoseConfig):
            names = [each.name for each in fields(preset) if each.name != "name"]
            overrides = _differing(preset, {name: getattr(wanted, name) for name in names})
            calls.append((len(overrides), preset.name != config.name, preset.name, overrides))
    _, _, name, overrides = min(calls, key=lambda call: call[:2])
    return f"create_model({', '.join([_quoted(name), *filter(None, [_listed(overrides)])])})"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_quoted(value)}" for name, value in settings.items())


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _tensors(names: Iterable[str]) -> str:
    count = len(list(names))
    return f"{count} tensor{'s' * (count != 1)}"
