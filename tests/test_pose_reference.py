"""Published checkpoints load by the key names of their layouts, whole and with their attention scale, or not at all.

The names are written out here, as they are in the published files; the tensors are those of a small model.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cyclekd import run_cycles
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.losses.flow import RealNVP
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.weights.reference import (
    LoadReport,
    load_reference_checkpoint,
    load_reference_flow,
    reference_model,
)
from golden import golden, golden_json

TINY: dict[str, Any] = {"input_size": (64, 48), "depth": 2, "dim": 8, "heads": 2}
FULL: dict[str, Any] = {"input_size": (256, 192), "dim": 192, "heads": 8}

Weights = dict[str, Tensor]


def tiny(name: str, role: str = "target", **overrides: Any) -> nn.Module:
    """With no value that a new model has, batch statistics included; one object for each config and role."""
    model = _made(role, name, tuple({**TINY, **overrides}.items()))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.05, 0.15)
    return model


@functools.cache
def _made(role: str, name: str, overrides: tuple[tuple[str, Any], ...]) -> nn.Module:
    return create_model(name, **dict(overrides)).eval()


# -- the layouts, key by key -------------------------------------------------------------------------------------------

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

STEM = [
    *("conv1.weight", *(f"bn1.{name}" for name in BATCH_NORM)),
    *("conv2.weight", *(f"bn2.{name}" for name in BATCH_NORM)),
    *(f"layer1.{i}.conv{j}.weight" for i in range(4) for j in (1, 2, 3)),
    *(f"layer1.{i}.bn{j}.{name}" for i in range(4) for j in (1, 2, 3) for name in BATCH_NORM),
    *("layer1.0.downsample.0.weight", *(f"layer1.0.downsample.1.{name}" for name in BATCH_NORM)),
]

TOKENS = {
    "keypoint_token": "keypoint_tokens",
    "patch_to_embedding.weight": "patch_embed.weight",
    "patch_to_embedding.bias": "patch_embed.bias",
    "mlp_head.0.weight": "head.mlp.0.weight",
    "mlp_head.0.bias": "head.mlp.0.bias",
    "mlp_head.1.weight": "head.mlp.1.weight",
    "mlp_head.1.bias": "head.mlp.1.bias",
    "mlp_head.2.weight": "head.mlp.2.weight",
    "mlp_head.2.bias": "head.mlp.2.bias",
    "mlp_head.3.weight": "head.mlp.3.weight",
    "mlp_head.3.bias": "head.mlp.3.bias",
}
MLP = {
    "1.fn.norm.weight": "norm2.weight",
    "1.fn.norm.bias": "norm2.bias",
    "1.fn.fn.net.0.weight": "mlp.fc1.weight",
    "1.fn.fn.net.0.bias": "mlp.fc1.bias",
    "1.fn.fn.net.3.weight": "mlp.fc2.weight",
    "1.fn.fn.net.3.bias": "mlp.fc2.bias",
}
TOKENPOSE_LAYER = {
    "0.fn.norm.weight": "norm1.weight",
    "0.fn.norm.bias": "norm1.bias",
    "0.fn.fn.to_qkv.weight": "attn.qkv.weight",
    "0.fn.fn.to_out.0.weight": "attn.proj.weight",
    "0.fn.fn.to_out.0.bias": "attn.proj.bias",
    **MLP,
}
PPT_LAYER = {
    "0.norm.weight": "norm1.weight",
    "0.norm.bias": "norm1.bias",
    "0.fn.to_qkv.weight": "attn.qkv.weight",
    "0.fn.to_out.0.weight": "attn.proj.weight",
    "0.fn.to_out.0.bias": "attn.proj.bias",
    **MLP,
}

LAYOUTS: dict[str, tuple[str, dict[str, Any], str, str, list[str], dict[str, str]]] = {
    # name: the model, prefix of the backbone, of the rest, of each layer, and names in a layer
    "official TokenPose-S": (
        "tokenpose_s_v1",
        {"attention_scale": "dim"},
        "features.",
        "features.",
        [f"features.transformer.layers.{i}." for i in range(12)],
        TOKENPOSE_LAYER,
    ),
    "official PPT-S": (
        "ppt_s",
        {"attention_scale": "dim", "prune_at": (1,)},
        "features.",
        "features.",
        ["features.transformer.layers.0.", "features.transformer.layers.1."],
        PPT_LAYER,
    ),
    "official TokenPose-B": (
        "tokenpose_b",
        {},
        "pre_feature.",
        "transformer.",
        ["transformer.transformer.layers.0.", "transformer.transformer.layers.1."],
        TOKENPOSE_LAYER,
    ),
    "official PPT-B": (
        "ppt_b",
        {"prune_at": (1,), "backbone": "stem"},  # quicker than HRNet, whose names are those of TokenPose-B
        "pre_feature.",
        "transformer.",
        ["transformer.transformer.layers.0.", "transformer.transformer.layers.1."],
        PPT_LAYER,
    ),
    "official TokenPose-L": (
        "tokenpose_l_d24",
        {"depth": 6},
        "pre_feature.",
        "transformer.",
        [f"transformer.transformer{group}.layers.{layer}." for group in (1, 2, 3) for layer in (0, 1)],
        TOKENPOSE_LAYER,
    ),
    "mmpose-style TokenPose": (
        "tokenpose_s_v1",
        {},
        "backbone.",
        "keypoint_head.tokenpose.",
        [f"keypoint_head.tokenpose.transformer.layers.{i}." for i in range(12)],
        TOKENPOSE_LAYER,
    ),
    "mmpose-style SDPose or PPT": (
        "sdpose_s_v1",
        {},
        "backbone.",
        "keypoint_head.tokenpose.",
        [
            "keypoint_head.tokenpose.transformer_layer1.layers.0.",
            "keypoint_head.tokenpose.transformer_layer1.layers.1.",
        ],
        TOKENPOSE_LAYER,
    ),
    "mmpose-style DistilPose or SDPose-Reg": (
        "tokenreg_s",
        {},
        "backbone.",
        "keypoint_head.tokenhead.",
        ["keypoint_head.tokenhead.transformer.layers.0.", "keypoint_head.tokenhead.transformer.layers.1."],
        TOKENPOSE_LAYER,
    ),
}


def published(layout: str, **overrides: Any) -> tuple[nn.Module, Weights]:
    """A model and a checkpoint of it in that layout."""
    name, settings, backbone, tokens, layers, layer_names = LAYOUTS[layout]
    model = tiny(name, "source", **{**settings, **overrides})
    own = model.state_dict()
    stages = [key.removeprefix("backbone.") for key in own if key.startswith(("backbone.stage", "backbone.transition"))]
    weights = {backbone + key: own[f"backbone.{key}"] for key in STEM + stages}
    weights |= {tokens + key: own[name] for key, name in TOKENS.items() if name in own}
    for index, prefix in enumerate(layers[: len(model.blocks)]):
        weights |= {prefix + key: own[f"blocks.{index}.{name}"] for key, name in layer_names.items()}
    assert len(weights) == len(own)
    weights[tokens + "pos_embedding"] = model.positions[:, model.config.num_keypoints :].clone()
    return model, {key: tensor.clone() for key, tensor in weights.items()}


def new(layout: str, **overrides: Any) -> nn.Module:
    name, settings, *_ = LAYOUTS[layout]
    return tiny(name, **{**settings, **overrides})


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_a_layout_is_loaded_and_the_sine_table_left_out(layout: str) -> None:
    source, weights = published(layout)
    model = new(layout)
    assert not same_weights(model, source)
    report = load_reference_checkpoint(model, weights)
    assert same_weights(model, source)
    assert report.fits and report.layout == layout and set(report.loaded) == set(model.state_dict())
    assert report.attention_scale == model.config.attention_scale
    table = LAYOUTS[layout][3] + "pos_embedding"
    assert report.left_out == {table: "the fixed sine table, which is computed here"}


def test_the_prefixed_names_are_those_of_the_published_b_and_l_files() -> None:
    b = published("official TokenPose-B")[1]
    for key in (
        "pre_feature.layer1.0.downsample.1.running_var",
        "pre_feature.transition1.0.0.weight",
        "pre_feature.transition1.1.0.1.bias",
        "pre_feature.stage2.0.branches.1.3.conv2.weight",
        "pre_feature.stage2.0.fuse_layers.0.1.0.weight",
        "pre_feature.transition2.2.0.0.weight",
        "pre_feature.stage3.3.fuse_layers.0.2.1.weight",
        "transformer.keypoint_token",
        "transformer.transformer.layers.0.0.fn.fn.to_qkv.weight",
    ):
        assert key in b
    assert len(b) == 1074 - 10 * len(TOKENPOSE_LAYER)  # of the published file, which has twelve layers and not two


def test_a_group_of_tokenpose_l_goes_on_where_the_one_before_ended() -> None:
    model, (_, weights) = new(L, backbone="stem"), published(L, backbone="stem")
    weights["transformer.transformer2.layers.1.1.fn.norm.weight"].fill_(7.5)
    load_reference_checkpoint(model, weights)
    assert [bool((block.norm2.weight == 7.5).all()) for block in model.blocks] == [i == 3 for i in range(6)]


@pytest.mark.parametrize("name", ["sdpose_s_v1", "tokenpose_s_v1", "ppt_s"])
def test_models_that_differ_in_cycles_or_pruning_take_the_same_file(name: str) -> None:
    source, weights = published("mmpose-style SDPose or PPT")
    model = tiny(name, prune_at=(1,) if name == "ppt_s" else ())
    load_reference_checkpoint(model, weights)
    assert same_weights(model, source)


def test_a_wrapped_model_has_the_cycles_of_the_model_that_was_published() -> None:
    source, weights = published("mmpose-style SDPose or PPT")
    model = new("mmpose-style SDPose or PPT")
    load_reference_checkpoint(model, weights)
    images = torch.rand(1, 3, 64, 48)
    for ours, theirs in zip(run_cycles(model, images).outputs, run_cycles(source, images).outputs, strict=True):
        assert torch.equal(ours, theirs) and ours.isfinite().all()


# -- where the weights lie ---------------------------------------------------------------------------------------------

WRAPPINGS: dict[str, Callable[[Weights], Any]] = {
    "mmcv": lambda weights: {"meta": {"epoch": 210}, "state_dict": weights, "optimizer": {"state": {0: torch.ones(2)}}},
    "official training": lambda weights: {
        "epoch": 300,
        "model": "pose_tokenpose_s",
        "state_dict": {f"module.{key}": value for key, value in weights.items()},
        "best_state_dict": weights,
        "perf": torch.tensor(0.7),
    },
    "best alone": lambda weights: {"best_state_dict": weights, "optimizer": {}},
    "nested": lambda weights: {"model": {"state_dict": weights}},
    "bare": lambda weights: weights,
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_whatever_they_were_saved_with(wrapping: str, tmp_path: Path) -> None:
    source, weights = published("official TokenPose-S")
    torch.save(WRAPPINGS[wrapping](weights), tmp_path / "best.pth")
    model = new("official TokenPose-S")
    assert load_reference_checkpoint(model, str(tmp_path / "best.pth")).fits
    assert same_weights(model, source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_safetensors_file_of_fewer_bits_loads_as_its_rounded_values(dtype: torch.dtype, tmp_path: Path) -> None:
    source, weights = published("mmpose-style TokenPose")
    save_file({key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()},
              tmp_path / "small.safetensors")  # fmt: skip
    model = new("mmpose-style TokenPose")
    load_reference_checkpoint(model, tmp_path / "small.safetensors")
    assert torch.equal(model.patch_embed.weight, source.patch_embed.weight.to(dtype).float())
    assert model.patch_embed.weight.dtype == torch.float32


def test_a_file_without_batch_counts_is_whole() -> None:
    _, weights = published("mmpose-style TokenPose")
    old = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert load_reference_checkpoint(new("mmpose-style TokenPose"), old).fits


def test_a_file_with_objects_beside_tensors_is_not_unpickled(tmp_path: Path) -> None:
    _, weights = published("mmpose-style TokenPose")
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "run.pth")
    refused(
        new("mmpose-style TokenPose"),
        tmp_path / "run.pth",
        "run.pth holds an object of argparse.Namespace beside tensors, and to load it could run code",
        "save its state_dict alone",
    )


@pytest.mark.parametrize("name", ["torn.pth", "torn.safetensors"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"hello world")
    refused(new("mmpose-style TokenPose"), tmp_path / name, f"{name} cannot be read as a checkpoint")


def test_files_that_are_not_there_or_hold_no_weights_are_named(tmp_path: Path) -> None:
    model = new("mmpose-style TokenPose")
    refused(model, tmp_path / "none.pth", "none.pth: there is no such file")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(model, tmp_path / "list.pth", "list.pth holds a list, where a dict of tensors by name was expected")
    refused(model, {"epoch": 3}, "the mapping holds no tensors", "1: epoch")
    for source in (None, 5, ["best.pth"]):
        refused(model, source, f"a file or a dict of tensors by name, and not a {type(source).__name__}")


def test_a_dict_that_holds_itself_is_not_followed_for_ever() -> None:
    endless: dict[str, Any] = {"epoch": 3}
    endless["state_dict"] = endless
    refused(new("mmpose-style TokenPose"), endless, "the mapping holds no tensors")


# -- what does not fit -------------------------------------------------------------------------------------------------


def refused(model: nn.Module, source: Any, *messages: str, strict: bool = True) -> str:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PoseError) as caught:
        load_reference_checkpoint(model, source, strict=strict)
    for message in messages:
        assert message in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


OFFICIAL_S, MMPOSE, L = "official TokenPose-S", "mmpose-style TokenPose", "official TokenPose-L"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("layout", "name", "seen", "call"),
    [
        (
            OFFICIAL_S,
            "tokenpose_s_v1",
            "dim^-0.5, and tokenpose_s_v1 by (dim / heads)^-0.5",
            ', attention_scale="dim")',
        ),
        (
            "official PPT-S",
            "ppt_s",
            "dim^-0.5, and ppt_s by (dim / heads)^-0.5",
            ', attention_scale="dim", prune_at=(1,))',
        ),
    ],
)
def test_another_attention_scale_is_refused(layout: str, name: str, seen: str, call: str, strict: bool) -> None:
    _, weights = published(layout)
    message = refused(
        new(layout, attention_scale="head"), weights, f"{layout}, which scales attention by {seen}", strict=strict
    )
    assert f'Write create_model("{name}", ' in message and message.endswith(call)


def test_a_model_of_the_official_scale_refuses_mmpose_weights() -> None:
    _, weights = published(MMPOSE)
    message = refused(new(MMPOSE, attention_scale="dim"), weights, "(dim / heads)^-0.5, and tokenpose_s_v1 by dim^-0.5")
    assert 'create_model("tokenpose_s_v1"' in message and message.count("attention_scale") == 0


@pytest.mark.parametrize("strict", [True, False])
def test_another_number_of_heads_is_refused(strict: bool) -> None:
    _, weights = published(MMPOSE, dim=192, heads=8)
    seen = "has 8 heads wherever it was published, and tokenpose_s_v1 has 12: it would load and predict something else"
    message = refused(new(MMPOSE, dim=192, heads=12), weights, seen, strict=strict)
    assert 'Write create_model("tokenpose_s_v1", ' in message and message.count("heads") == 1


def without(weights: Weights, *keys: str) -> Weights:
    return {key: value for key, value in weights.items() if key not in keys}


HEAD = "keypoint_head.tokenpose."


def test_missing_and_surplus_tensors_are_counted_and_named() -> None:
    _, weights = published(MMPOSE)
    less = without(weights, HEAD + "mlp_head.3.bias", "backbone.bn1.weight")
    refused(
        new(MMPOSE), less, "missing 2: backbone.bn1.weight, head.mlp.3.bias", "strict=False to load what fits, 121 t"
    )
    more = weights | {HEAD + "extra.weight": torch.ones(2), "ema.decay": torch.ones(1)}
    refused(new(MMPOSE), more, f"surplus 2: {HEAD}extra.weight, ema.decay")
    layer = HEAD + "transformer.layers.1.0.fn.norm."
    refused(new(MMPOSE, depth=1), weights, f"surplus 11: {layer}weight, {layer}bias, ...")


DIFFERENT = {
    "keypoints": ({"num_keypoints": 14}, {}, "num_keypoints is 14 there and 17 here", "num_keypoints=14"),
    "depth": ({}, {"depth": 1}, "depth is 2 there and 1 here", "depth=2"),
    "patch": (
        {"patch_size": (2, 2)},
        {},
        "patch_size is (2, 2) there and (4, 3) here",
        'create_model("tokenpose_s_v2"',
    ),
    "size": ({"input_size": (128, 96)}, {}, "input_size is (128, 96) there and (64, 48) here", "input_size=(128, 96)"),
    "head": ({"head": "rle"}, {}, "head is 'rle' there and 'heatmap' here", 'head="rle"'),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_model_of_other_sizes_is_told_how_to_create_the_right_one(what: str) -> None:
    theirs, ours, seen, call = DIFFERENT[what]
    _, weights = published(MMPOSE, **theirs)
    message = refused(new(MMPOSE, **ours), weights, "(mmpose-style TokenPose) does not fit tokenpose_s_v1", seen)
    assert call in message.split("Write ")[1]


def test_of_calls_of_one_length_the_model_that_was_asked_for_is_named() -> None:
    _, weights = published(MMPOSE, depth=12, **{**FULL, "input_size": (64, 48)})
    message = refused(tiny("sdpose_t", **{**FULL, "input_size": (64, 48)}, depth=6), weights)
    assert 'Write create_model("sdpose_t", input_size=(64, 48), depth=12), or' in message


def test_a_narrow_first_stage_is_told_from_the_original() -> None:
    _, narrow = published("official TokenPose-B", stage1_width=32)
    message = refused(tiny("sdpose_b"), narrow, "stage1_width is 32 there and 64 here")
    assert 'Write create_model("sdpose_b_narrow", ' in message
    _, original = published("official TokenPose-B")
    message = refused(tiny("tokenpose_b_narrow"), original, "stage1_width is 64 there and 32 here")
    assert 'Write create_model("tokenpose_b", ' in message


def test_backbones_and_groups_are_told_apart() -> None:
    _, large = published(L)
    message = refused(new("official TokenPose-B"), large, "groups is 3 there and 1 here", "'hrnet_w48' there")
    assert 'Write create_model("tokenpose_l_d24", ' in message
    _, small = published("official TokenPose-B")
    message = refused(new(MMPOSE), small, "backbone is 'hrnet_w32' there and 'stem' here", "surplus")
    assert 'Write create_model("tokenpose_b", ' in message


def test_the_hidden_width_of_a_regression_head_is_told() -> None:
    _, weights = published("mmpose-style DistilPose or SDPose-Reg", head_hidden=48)
    refused(
        new("mmpose-style DistilPose or SDPose-Reg"), weights, "head_hidden is 48 there and 64 here", "head_hidden=48"
    )


def test_a_published_file_with_one_layer_in_its_head_does_not_fit_one_of_two() -> None:
    _, weights = published(MMPOSE)
    shallow = without(weights, *(f"{HEAD}mlp_head.{name}" for name in ("2.weight", "2.bias", "3.weight", "3.bias")))
    shallow[HEAD + "mlp_head.1.weight"], shallow[HEAD + "mlp_head.1.bias"] = torch.rand(192, 8), torch.rand(192)
    refused(new(MMPOSE), shallow, "missing 4: head.mlp.2.weight", "head.mlp.1.weight is (192, 8) in the file, (24, 8)")


POSITIONS = {
    "learnable": (torch.rand(1, 17 + 16, 8), "rows for keypoint tokens: a learnable table"),
    "of other values": (torch.rand(1, 16, 8), "pos_embedding is not the sine table of (4, 4) tokens"),
    "of another size": (torch.rand(1, 64, 8), "pos_embedding is (1, 64, 8) and the sine table (1, 16, 8)"),
}


@pytest.mark.parametrize("what", POSITIONS)
def test_positions_other_than_the_sine_table_are_refused(what: str) -> None:
    table, message = POSITIONS[what]
    _, weights = published(MMPOSE)
    refused(new(MMPOSE), weights | {HEAD + "pos_embedding": table}, message)
    report = load_reference_checkpoint(new(MMPOSE), weights | {HEAD + "pos_embedding": table}, strict=False)
    assert not report.fits and message in report.mismatched["positions"]


def test_a_model_trained_without_positions_is_refused() -> None:
    _, weights = published(MMPOSE)
    refused(new(MMPOSE), without(weights, HEAD + "pos_embedding"), "there is no pos_embedding")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_always_refused(value: float, strict: bool) -> None:
    _, weights = published(MMPOSE)
    weights["backbone.layer1.2.conv2.weight"][3, 1, 0, 0] = value
    refused(new(MMPOSE), weights, "NaN or infinity in 1: backbone.layer1.2.conv2.weight", strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_whole_numbers_are_no_weights(strict: bool) -> None:
    _, weights = published(MMPOSE)
    whole = {key: value.long() for key, value in weights.items()}
    refused(new(MMPOSE), whole, "has no floating-point numbers in 108: backbone.conv1.weight", strict=strict)


def test_an_empty_tensor_is_of_another_shape() -> None:
    _, weights = published(MMPOSE)
    weights["backbone.layer1.0.conv1.weight"] = torch.zeros(0, 3)
    refused(new(MMPOSE), weights, "backbone.layer1.0.conv1.weight is (0, 3) in the file")


@pytest.mark.parametrize("strict", [True, False])
def test_other_layouts_are_refused_with_what_was_seen_and_what_can_be_read(strict: bool) -> None:
    source, weights = published(MMPOSE)
    backbone = {key: value for key, value in weights.items() if key.startswith("backbone.")}
    refused(
        new(MMPOSE),
        backbone | {"keypoint_head.final_layer.weight": torch.ones(17, 32, 1, 1)},
        "of no layout known here: it has 91: backbone.conv1.weight, ",
        "mmpose-style SDPose or PPT (keypoint_head.tokenpose.keypoint_token)",
        strict=strict,
    )
    bare = {key.removeprefix("backbone."): value for key, value in backbone.items()}
    refused(new(MMPOSE), bare, "a bare backbone; create_model(..., pretrained_backbone=True)", strict=strict)
    refused(new(MMPOSE), source.state_dict(), "this package's own names, which model.load_state_dict", strict=strict)


def test_a_file_without_a_backbone_is_taken_for_tokenpose_t() -> None:
    _, weights = published("official TokenPose-B", backbone="stem")
    pixels = {key: value for key, value in weights.items() if key.startswith("transformer.")}
    refused(
        new("official TokenPose-B", backbone="stem"),
        pixels,
        "it has no backbone, as TokenPose-T, which is not among the models",
    )


def test_other_models_are_refused() -> None:
    _, weights = published(MMPOSE)
    holder = nn.Sequential(new(MMPOSE))
    holder.config = holder[0].config  # as a compiled model answers for the one inside of it
    for model in (nn.Linear(2, 2), create_model("simplebaseline_r50", input_size=(64, 64)), holder):
        with pytest.raises(PoseError, match=rf"load_reference_checkpoint\({type(model).__name__}, ...\) takes a model"):
            load_reference_checkpoint(model, weights, strict=False)


def test_a_partial_load_takes_what_fits_and_reports_the_rest() -> None:
    source, weights = published(MMPOSE, num_keypoints=14)
    weights = without(weights, HEAD + "mlp_head.3.bias") | {HEAD + "extra": torch.ones(1)}
    model = new(MMPOSE)
    tokens, bias = model.keypoint_tokens.clone(), model.head.mlp[3].bias.clone()
    report = load_reference_checkpoint(model, weights, strict=False)
    assert report.missing == ("head.mlp.3.bias",) and report.surplus == (HEAD + "extra",)
    assert report.mismatched == {"keypoint_tokens": "(1, 14, 8) in the file, (1, 17, 8) in the model"}
    assert torch.equal(model.keypoint_tokens, tokens) and torch.equal(model.head.mlp[3].bias, bias)
    own, theirs = model.state_dict(), source.state_dict()
    assert len(report.loaded) == 121 and all(torch.equal(own[name], theirs[name]) for name in report.loaded)


def test_a_report_prints_a_line_for_each_thing_that_became_of_tensors() -> None:
    _, weights = published(MMPOSE, num_keypoints=14)
    weights = without(weights, HEAD + "mlp_head.3.bias") | {HEAD + "extra": torch.ones(1)}
    weights["keypoint_head.kpt_loss.flow_model.loc"] = torch.zeros(2)
    report = load_reference_checkpoint(new(MMPOSE), weights, strict=False)
    assert str(report).splitlines() == [
        "layout           mmpose-style TokenPose",
        "attention scale  head: (dim / heads)^-0.5",
        "loaded           121 tensors",
        "left out         1: keypoint_head.kpt_loss.flow_model.loc: RLE's flow is for training only; "
        "load_reference_flow reads it",
        f"left out         1: {HEAD}pos_embedding: the fixed sine table, which is computed here",
        "missing          1: head.mlp.3.bias",
        f"surplus          1: {HEAD}extra",
        "does not fit     keypoint_tokens: (1, 14, 8) in the file, (1, 17, 8) in the model",
    ]
    assert isinstance(report, LoadReport)


# -- RLE's flow --------------------------------------------------------------------------------------------------------

FLOW = "keypoint_head.kpt_loss.flow_model."


def published_flow() -> tuple[RealNVP, Weights]:
    flow = RealNVP()
    nets = [(net, i, layer) for net in "st" for i in range(6) for layer in (0, 2, 4)]
    weights = {
        f"{FLOW}{net}.{i}.{layer}.{name}": torch.rand_like(getattr(getattr(flow, net)[i][layer], name))
        for net, i, layer in nets
        for name in ("weight", "bias")
    }
    weights |= {FLOW + "loc": torch.zeros(2), FLOW + "cov": torch.eye(2)}
    weights[FLOW + "mask"] = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 3)
    return flow, weights


def test_a_regression_model_leaves_the_flow_to_its_own_loader() -> None:
    flow, flow_weights = published_flow()
    _, weights = published("mmpose-style DistilPose or SDPose-Reg", head="rle")
    checkpoint = {"state_dict": weights | flow_weights}
    model = tiny("sdpose_reg")
    report = load_reference_checkpoint(model, checkpoint)
    assert report.fits and len(report.left_out) == 75 + 1  # 72 tensors and three buffers, and the sine table
    load_reference_flow(flow, checkpoint)
    for net in "st":
        for i in range(6):
            for layer in (0, 2, 4):
                assert torch.equal(getattr(flow, net)[i][layer].weight, flow_weights[f"{FLOW}{net}.{i}.{layer}.weight"])


FLOW_FAULTS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "no flow": (lambda weights: {"backbone.conv1.weight": torch.ones(1)}, "has no flow: no key with flow_model. in it"),
    "other order": (
        lambda w: w | {FLOW + "mask": torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 3)},
        "flow_model.mask is not",
    ),
    "other prior": (lambda w: w | {FLOW + "cov": 2 * torch.eye(2)}, "flow_model.cov is not [[1.0, 0.0], [0.0, 1.0]]"),
    "missing": (lambda w: without(w, FLOW + "s.0.0.bias"), "does not fit RealNVP(6 couplings): 1: s.0.0.bias"),
    "other width": (lambda w: w | {FLOW + "t.2.0.bias": torch.ones(32)}, "1: t.2.0.bias"),
    "surplus": (lambda w: w | {FLOW + "s.6.0.bias": torch.ones(64)}, "1: s.6.0.bias"),
    "not finite": (
        lambda w: w | {FLOW + "t.2.0.bias": torch.full((64,), torch.nan)},
        "NaN or infinity in 1: t.2.0.bias",
    ),
}


@pytest.mark.parametrize("fault", FLOW_FAULTS)
def test_another_flow_is_refused(fault: str) -> None:
    make, message = FLOW_FAULTS[fault]
    flow, weights = published_flow()
    before = copy.deepcopy(flow.state_dict())
    with pytest.raises(PoseError) as caught:
        load_reference_flow(flow, make(weights))
    assert message in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flow.state_dict().items())


# -- which model a file is of ------------------------------------------------------------------------------------------


def test_a_file_tells_its_model_where_only_one_has_such_weights() -> None:
    _, weights = published(OFFICIAL_S, **FULL, depth=12, num_keypoints=14)
    assert reference_model(weights) == ("tokenpose_s_v1", {"attention_scale": "dim", "num_keypoints": 14})


def test_a_file_of_several_models_or_of_none_needs_a_name() -> None:
    _, weights = published("mmpose-style DistilPose or SDPose-Reg")
    with pytest.raises(
        PoseError, match=r"is none of the presets: say which model it is, .*depth=2, head=\"distilpose\""
    ):
        reference_model(weights)


# -- the published numbers ---------------------------------------------------------------------------------------------


def canonical(layout: str | None) -> Weights:
    weights = golden("weights_s_v1")
    if layout is None:
        return weights
    names = golden_json("keymap_s_v1")
    return {names[key][layout]: value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("layout", "name", "scale", "expected"),
    [
        (None, "mmpose-style SDPose or PPT", "head", "heatmap_scale_head"),
        ("tokenpose_s_mmpose", "mmpose-style TokenPose", "head", "heatmap_scale_head"),
        ("tokenpose_s_official", "official TokenPose-S", "dim", "heatmap_official_scale_dim"),
        (
            "ppt_s_official",
            "official PPT-S",
            "dim",
            "heatmap_official_scale_dim",
        ),  # without pruning, as tokens all stay
    ],
)
def test_published_weights_give_the_published_heat_maps(
    layout: str | None, name: str, scale: str, expected: str
) -> None:
    weights = canonical(layout)
    model = create_model("tokenpose_s_v1", attention_scale=scale).eval()
    report = load_reference_checkpoint(model, weights)
    assert len(weights) == 234 and len(report.loaded) == 233 and len(report.left_out) == 1
    assert report.fits and report.layout == name
    with torch.no_grad():
        heat_maps = model(golden("input_common")["input"][:1])
    assert (heat_maps - golden("tokenpose_s_v1")[expected][:1]).abs().max() < 1e-4


def test_published_weights_are_told_apart_or_said_to_be_of_several_models() -> None:
    assert reference_model(canonical("tokenpose_s_official")) == ("tokenpose_s_v1", {"attention_scale": "dim"})
    assert reference_model(canonical("tokenpose_s_mmpose")) == ("tokenpose_s_v1", {})
    assert reference_model(canonical("ppt_s_official")) == ("ppt_s", {"attention_scale": "dim"})
    with pytest.raises(PoseError, match="could be sdpose_s_v1 or ppt_s or sdpose_s_v1_ppt, whose weights are alike"):
        reference_model(canonical(None))


def test_the_published_flow_loads() -> None:
    flow, weights = RealNVP(), golden("weights_reg_heads")
    load_reference_flow(flow, weights)
    assert torch.equal(flow.s[3][2].weight, weights["rle.flow_model.s.3.2.weight"])
