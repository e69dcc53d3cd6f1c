"""How published checkpoints name their tensors, by a few rules per layout, and reading one without running its code.

The attention scale is in no tensor and in no shape, so a layout has to say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError

MOST_LEVELS = 4
"""Of state dicts in one another."""

Source = str | Path | Mapping[str, Any]
"""A file (.pth and the like, or .safetensors), or what is in it."""

_TOKEN_PART = r"(keypoint_token$|patch_to_embedding\.|mlp_head\.|transformer\w*\.layers\.)"


@dataclass(frozen=True)
class Layout:
    """How one family of published checkpoints names its tensors."""

    name: str
    backbone: str  # prefix
    tokens: str  # prefix of all but the backbone
    mark: str  # what follows `tokens` in some key of this layout, and of none above it in the table
    attention_scale: Literal["head", "dim"]
    models: tuple[str, ...]  # names of the models it is known for


LAYOUTS = (
    Layout("official PPT-S", "features.", "features.", r"transformer\.layers\.\d+\.0\.norm\.", "dim", ("ppt_*",)),
    Layout("official TokenPose-S", "features.", "features.", _TOKEN_PART, "dim", ("tokenpose_*",)),
    Layout(
        "official PPT-B", "pre_feature.", "transformer.", r"transformer\.layers\.\d+\.0\.norm\.", "head", ("ppt_*",)
    ),
    Layout(
        "official TokenPose-L", "pre_feature.", "transformer.", r"transformer\d\.layers\.", "head", ("tokenpose_*",)
    ),
    Layout("official TokenPose-B", "pre_feature.", "transformer.", _TOKEN_PART, "head", ("tokenpose_*",)),
    Layout(
        "mmpose-style SDPose or PPT",
        "backbone.",
        "keypoint_head.tokenpose.",
        r"transformer_layer1\.",
        "head",
        ("sdpose_*", "ppt_*"),
    ),
    Layout("mmpose-style TokenPose", "backbone.", "keypoint_head.tokenpose.", _TOKEN_PART, "head", ("tokenpose_*",)),
    Layout(
        "mmpose-style DistilPose or SDPose-Reg",
        "backbone.",
        "keypoint_head.tokenhead.",
        _TOKEN_PART,
        "head",
        ("tokenreg_*", "sdpose_reg"),
    ),
)

_BACKBONE = re.compile(r"(?:conv|bn|layer|transition|stage)\d.*")  # named as in timm, and so here
_LAYER = re.compile(r"transformer(?:_layer1|(\d))?\.layers\.(\d+)\.(.+)")  # 1 to 3 are TokenPose-L's groups

_RULES = (
    (r"keypoint_token", r"keypoint_tokens"),
    (r"patch_to_embedding\.(.+)", r"patch_embed.\1"),
    (r"mlp_head\.(.+)", r"head.mlp.\1"),
)
_RULES_IN_A_LAYER = (
    (r"0\.(?:fn\.)?norm\.(.+)", r"norm1.\1"),  # PPT's attention has one wrapper less
    (r"0\.fn\.(?:fn\.)?to_qkv\.(.+)", r"attn.qkv.\1"),
    (r"0\.fn\.(?:fn\.)?to_out\.0\.(.+)", r"attn.proj.\1"),
    (r"1\.fn\.norm\.(.+)", r"norm2.\1"),
    (r"1\.fn\.fn\.net\.0\.(.+)", r"mlp.fc1.\1"),
    (r"1\.fn\.fn\.net\.3\.(.+)", r"mlp.fc2.\1"),
)

_FLOW = "keypoint_head.kpt_loss.flow_model."


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose layout is known, sorted into what a model here takes and what it does not."""

    where: str  # for messages
    layout: Layout
    weights: dict[str, Tensor]  # by the names of the model here
    keys: dict[str, str]  # of these names, those in the file
    positions: Tensor | None  # the table of positions, [1, tokens, dim]
    groups: int  # of layers, 3 in TokenPose-L
    left_out: dict[str, str] = field(default_factory=dict)  # names in the file, and why
    surplus: list[str] = field(default_factory=list)  # names in the file


def parse_checkpoint(source: Source) -> Checkpoint:
    """Read a checkpoint and name its tensors as here. Errors: PoseError for an unreadable file or an unknown layout."""
    where, tensors = read_tensors(source)
    layout = _layout_of(tensors, where)
    layers = [match for key in tensors if (match := _LAYER.match(key.removeprefix(layout.tokens)))]
    per_group = max((int(match[2]) + 1 for match in layers), default=0)
    checkpoint = Checkpoint(
        where=where,
        layout=layout,
        weights={},
        keys={},
        positions=tensors.pop(layout.tokens + "pos_embedding", None),
        groups=max((int(match[1] or 1) for match in layers), default=1),
    )
    for key, tensor in tensors.items():
        name = _translate(key, layout, per_group)
        if key.startswith(_FLOW):
            checkpoint.left_out[key] = "RLE's flow is for training only; load_reference_flow reads it"
        elif name is None or name in checkpoint.weights:
            checkpoint.surplus.append(key)
        else:
            checkpoint.weights[name] = tensor
            checkpoint.keys[name] = key
    return checkpoint


def _translate(key: str, layout: Layout, per_group: int) -> str | None:
    """The name here of a tensor of that layout, or None where it has none."""
    if key.startswith(layout.tokens):
        rest = key.removeprefix(layout.tokens)
        if layer := _LAYER.fullmatch(rest):
            group, index = int(layer[1] or 1), int(layer[2])
            name = _first_match(_RULES_IN_A_LAYER, layer[3])
            return name and f"blocks.{(group - 1) * per_group + index}.{name}"
        if name := _first_match(_RULES, rest):
            return name
    if key.startswith(layout.backbone) and _BACKBONE.fullmatch(rest := key.removeprefix(layout.backbone)):
        return f"backbone.{rest}"
    return None


def _first_match(rules: Iterable[tuple[str, str]], key: str) -> str | None:
    for pattern, name in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return None


def _layout_of(keys: Iterable[str], where: str) -> Layout:
    for layout in LAYOUTS:
        mark = re.compile(re.escape(layout.tokens) + layout.mark)
        if any(mark.match(key) for key in keys):
            return layout
    raise PoseError(f"{where} is of no layout known here: {_guess_origin(list(keys))}")


def _guess_origin(keys: list[str]) -> str:
    if "keypoint_tokens" in keys:
        return "these are this package's own names, which model.load_state_dict and from_pretrained take"
    if "conv1.weight" in keys:
        return "it looks like a bare backbone; create_model(..., pretrained_backbone=True) gets timm's ImageNet weights"
    known = "; ".join(f"{layout.name} ({layout.tokens}keypoint_token)" for layout in LAYOUTS)
    return f"it has {some(keys)}, and what can be read is {known}"


def read_tensors(source: Source) -> tuple[str, dict[str, Tensor]]:
    """A name for messages, and the tensors of the innermost state dict; what lies beside it is not looked at."""
    if not isinstance(source, str | Path | Mapping):
        raise PoseError(f"a checkpoint is a file or a dict of tensors by name, and not a {type(source).__name__}")
    where = "the mapping" if isinstance(source, Mapping) else str(source)
    found = source if isinstance(source, Mapping) else _read_file(Path(source))
    for _ in range(MOST_LEVELS):
        inner = [found[n] for n in ("state_dict", "model", "best_state_dict") if isinstance(found.get(n), Mapping)]
        found = inner[0] if inner else found
    tensors = {str(key).removeprefix("module."): value for key, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise PoseError(f"{where} holds no tensors, nor a state_dict or model with tensors, only {some(list(found))}")
    return where, tensors


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise PoseError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise PoseError(_why_unreadable(path, error)) from error
    if not isinstance(loaded, Mapping):
        raise PoseError(f"{path} holds a {type(loaded).__name__}, where a dict of tensors by name was expected")
    return loaded


def _why_unreadable(path: Path, error: Exception) -> str:
    other = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
    if other is None:
        return (
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
        )
    return (
        f"{path} holds an object of {other[1]} beside tensors, and to load it could run code that came with the file. "
        "Open it with the program that wrote it, if you trust its source, and save its state_dict alone"
    )


def check_numbers(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises PoseError for whole numbers where weights belong, for NaN and for infinity."""
    weights = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    if whole := [name for name, value in weights.items() if not value.is_floating_point()]:
        raise PoseError(f"{where} has no floating-point numbers in {some(whole)}: it was quantised, or is damaged")
    if bad := [name for name, value in weights.items() if not torch.isfinite(value.float()).all()]:  # float: of fp8
        raise PoseError(
            f"{where} has NaN or infinity in {some(bad)}: the training that wrote it had diverged, or it is damaged"
        )


def some(names: Iterable[Any], most: int = 4) -> str:
    """How many there are, and the first of them."""
    listed = [str(name) for name in names]
    shown = ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
    return f"{len(listed)}: {shown}" if listed else "none"
