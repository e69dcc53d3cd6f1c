"""The timm rows: the smallest variant of every family that `timm.list_models()` names, made smaller still.

A family is a module and a kind: what is left of a name without its size, its resolution and its way of pooling. So
vit_small_patch16_rope_mixed_224 is a vit_rope_mixed of the module eva, and resnet50d a resnet of the module resnet.
New names show up by themselves; the tables below hold what is known of a module, or of one kind as "module/kind".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import timm
import torch
from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_builder import round_channels
from timm.models._registry import _model_to_module  # there is no public way from all names to their modules
from torch import nn

from benchmarks.matrix.row import Inputs, Row, noise
from benchmarks.matrix.timm_loops import twins

TASK = "image-classification"
BATCH = 2
SIDE = 64
"""Of the images, where a model takes any size: two tokens across in the last stage of most."""

Keywords = dict[str, Any]
Change = Callable[[Any], Any]


# -- not evaluated -----------------------------------------------------------------------------------------------------

NO_LIST = "its blocks stand in no list, so that no path names several of them"
PAIRS = "two blocks in each stage, the first of which changes width or resolution"

WITHOUT_STACK = {
    "byoanet/eca_botnext": PAIRS,
    "byoanet/eca_halonext": PAIRS,
    "byobnet/bat_resnext": PAIRS,
    "byobnet/eca_resnext": PAIRS,
    "byobnet/resnext": PAIRS,
    "byobnet/seresnext": PAIRS,
    "densenet": "every block gets what all before it returned, so that each is wider than the one before",
    "dla": "a tree of blocks, which are joined in pairs",
    "dpn": "what passes from block to block is wider after each",
    "inception_v3": NO_LIST,
    "nasnet": "every cell gets what the two before it returned",
    "pnasnet": "every cell gets what the two before it returned",
    "rexnet": "every block is wider than the one before",
    "vgg": "single convolutions, no blocks",
    "vovnet/eca_vovnet": PAIRS,
    "vovnet/ese_vovnet_dw": "one block in each stage",
    "vovnet/ese_vovnet_evos": PAIRS,
    "vovnet/ese_vovnet_slim": "one block in each stage",
    "vovnet/ese_vovnet_slim_dw": "one block in each stage",
    "xception": NO_LIST,
}
"""Why no variant has two blocks in a row that hand on tokens of one shape, with a share in the parameters that counts;
each was looked up in the source."""


# -- smaller models ----------------------------------------------------------------------------------------------------

FOUR = (1, 1, 3, 1)
"""Blocks in each of four stages: the third holds the stack."""
LED = (1, 1, 4, 1)
"""The same where the first block of a stage is another than those after it."""
WIDTHS = (16, 32, 64, 128)
HEADS = (1, 2, 4, 8)

ViT: Keywords = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
Stages: Keywords = {"depths": FOUR, "dims": WIDTHS}
ResNet: Keywords = {"layers": LED, "channels": (32, 64, 128, 256)}
Windows: Keywords = {"img_size": 64, "embed_dim": 16, "depths": FOUR, "num_heads": HEADS, "window_size": 2}


def config(**changes: Any) -> Change:
    """A config dataclass with other fields; a dict of changes goes into a config inside."""

    def changed(old: Any) -> Any:
        news = {k: config(**new)(getattr(old, k)) if isinstance(new, dict) else new for k, new in changes.items()}
        return replace(old, **news)

    return changed


def byob(width: float) -> Change:
    """At most five blocks in each stage, and this share of the channels."""

    def fewer(stage: Any) -> Any:
        return stage[:5] if isinstance(stage, (tuple, list)) else replace(stage, d=min(stage.d, 5))

    return lambda old: replace(old, blocks=tuple(map(fewer, old.blocks)), width_factor=width * old.width_factor)


def quarter(old: Keywords) -> Keywords:
    """A config in a dict with a quarter of the channels; those of a stage of HGNet stand before its other settings."""

    def fewer(name: str, value: Any) -> Any:
        if name.endswith("chs"):
            return [number // 4 for number in value]
        return [number // 4 for number in value[:3]] + value[3:] if name.startswith("stage") else value

    return {name: fewer(name, value) for name, value in old.items()}


def few(count: int) -> Change:
    """So many blocks of each stage, its last one among them, off which the features are read."""
    return lambda stages: [[*blocks[:-1][: count - 1], blocks[-1]] for blocks in stages]


SMALLER: dict[str, Keywords] = {
    "beit": ViT,
    "byoanet": {"model_cfg": byob(0.25), "img_size": 128},
    "byoanet/halonet": {"img_size": 256},
    "byoanet/haloregnetz": {"model_cfg": byob(1), "img_size": 224},
    "byoanet/sehalonet": {"img_size": 256},
    "byobnet": {"model_cfg": byob(0.5)},
    "byobnet/regnetz": {"model_cfg": byob(1)},
    "byobnet/regnetz_evos": {"model_cfg": byob(1)},
    "cait": ViT,
    "coat": {"img_size": 64, "serial_depths": FOUR, "embed_dims": (32, 32, 32, 32)},
    "convit": {**ViT, "depth": 4, "local_up_to_layer": 3},
    "convmixer": {"dim": 64, "depth": 3},
    "convnext": Stages,
    "cpubone": {"depth_list": (0, 1, 1, 4, 4), "width_list": (12, 24, 48, 96, 192)},
    "crossvit": {
        "img_size": 48,
        "img_scale": (1.0, 1.0),
        "patch_size": (12, 16),
        "embed_dim": (16, 32),
        "num_heads": (2, 2),
        "depth": ((1, 1, 0),) * 3,
    },
    "cspnet": {"model_cfg": config(stages={"depth": FOUR, "out_chs": WIDTHS})},
    "cspnet/cs3sedarknet_xdw": {
        "model_cfg": config(stages={"depth": FOUR, "out_chs": WIDTHS, "groups": (1, 1, 16, 32)})
    },
    "cspnet/cspresnext": {"model_cfg": config(stages={"depth": FOUR, "out_chs": (64, 128, 256, 512)})},
    "csatv2": {"depths": (1, 1, 3, 4), "transformer_depths": (0, 0, 1, 2)},
    "davit": {"depths": FOUR, "embed_dims": WIDTHS, "num_heads": HEADS, "window_size": 2},
    "deepseek_vit": {"img_size": 84, "depth": 3, "embed_dim": 64, "num_heads": 2, "out_features": 64},
    "deit": ViT,
    "edgenext": {"depths": LED, "dims": WIDTHS},
    "edgenext/edgenext_rw": {"depths": (2, 2, 4, 2)},
    "efficientformer": {"depths": FOUR, "embed_dims": WIDTHS},
    "efficientformer_v2": {"img_size": 64, "depths": (1, 1, 3, 3), "embed_dims": WIDTHS},
    "efficientnet": {"block_args": few(5)},
    "efficientvim": {"depths": (1, 3, 1), "embed_dim": (16, 32, 48)},
    "efficientvit_mit": {"depths": (1, 1, 3, 3), "widths": (8, 16, 32, 48, 64)},
    "efficientvit_msra": {"img_size": 128},  # at 64 the batch norms of the stack have one token per image
    "eva": ViT,
    "eva/vit_sapiens": {"num_kv_heads": 1},
    "fasternet": {"depths": FOUR, "embed_dim": 16},
    "fastvit": {"layers": FOUR, "embed_dims": WIDTHS},
    "focalnet": {"depths": FOUR, "embed_dim": 16},
    "gcvit": {"img_size": 64, "depths": FOUR, "embed_dim": 16, "num_heads": HEADS},
    "gemma4_vit": {"img_size": 96, "depth": 3, "embed_dim": 64, "num_heads": 2, "intermediate_size": 128},
    "hardcorenas": {"block_args": few(5)},
    "hgnet": {"model_cfg": quarter},
    "hiera": {"img_size": (64, 64), "embed_dim": 16, "stages": LED},
    "hieradet_sam2": {"embed_dim": 16, "stages": LED},
    "iformer": {"depths": (1, 1, 6, 4), "attn_groups": (0, 0, 1, 1), "dims": WIDTHS},
    "inception_next": Stages,
    "levit": {"img_size": 64, "depth": (1, 3, 1), "embed_dim": (16, 32, 48), "num_heads": (1, 2, 3), "key_dim": 8},
    "lowformer": {"depth_list": (0, 1, 1, 4, 4), "width_list": (12, 24, 48, 96, 192)},
    "mambaout": Stages,
    "maxxvit": {"img_size": 64, "depths": LED, "embed_dim": (32, 64, 128, 256), "stem_width": 32},
    "metaformer": Stages,
    "mlp_mixer": {"img_size": 32, "patch_size": 8, "num_blocks": 3, "embed_dim": 64},
    "mobilenetv3": {"block_args": few(5)},
    "mobilenetv5": {"block_args": few(7), "round_chs_fn": partial(round_channels, multiplier=0.25)},
    "mvitv2": {"img_size": 64, "model_cfg": config(depths=LED, embed_dim=WIDTHS, num_heads=HEADS)},
    "naflexvit": ViT,
    "nest": {"img_size": 32, "patch_size": 2, "depths": (1, 1, 3), "embed_dims": (16, 32, 48), "num_heads": (1, 2, 3)},
    "nfnet": {"model_cfg": config(depths=LED, channels=(256, 256, 512, 512))},
    "pit": {
        "img_size": 32,
        "patch_size": 8,
        "stride": 4,
        "base_dims": (8, 16, 16),
        "depth": (1, 3, 1),
        "heads": (1, 1, 2),
    },
    "pvt_v2": {"depths": FOUR, "embed_dims": WIDTHS, "num_heads": HEADS},
    "qwen3_vit": {"img_size": 64, "depth": 3, "embed_dim": 64, "num_heads": 2},
    "repvit": {"depth": FOUR, "embed_dim": WIDTHS},
    "res2net": ResNet,
    "resnest": ResNet,
    "resnet": ResNet,
    "resnetv2": {"layers": LED},
    "senet": {"layers": LED},
    "sequencer": {"img_size": 64, "layers": FOUR, "embed_dims": (16, 32, 32, 32), "hidden_sizes": (8, 8, 8, 8)},
    "sknet": ResNet,
    "starnet": {"depths": FOUR},
    "swiftformer": {"img_size": 64, "layers": FOUR, "embed_dims": WIDTHS},
    "swin_transformer": Windows,
    "swin_transformer_v2": Windows,
    "swin_transformer_v2_cr": Windows,
    "tiny_vit": {"depths": FOUR, "embed_dims": WIDTHS, "num_heads": HEADS, "window_sizes": (2,) * 4},
    "tnt": {"img_size": 32, "embed_dim": 32, "inner_dim": 8, "depth": 3, "num_heads_inner": 2, "num_heads_outer": 2},
    "tresnet": {"layers": LED, "width_factor": 0.5},
    "twins": {"img_size": 64, "depths": FOUR, "embed_dims": WIDTHS, "num_heads": HEADS},
    "visformer": {"img_size": 64},
    "vision_transformer": ViT,
    "vision_transformer_hybrid": {"img_size": 64, "depth": 3, "embed_dim": 192, "num_heads": 2},
    "vision_transformer_hybrid/vit_mci": {"embed_dim": 768},
    "vision_transformer_relpos": ViT,
    "vision_transformer_sam": {**ViT, "neck_chans": 16, "global_attn_indexes": (1,), "window_size": 2},
    "vitamin": {"img_size": 64, "depth": 3},
    "vovnet": {"model_cfg": quarter},
    "volo": {"img_size": 64, "layers": FOUR, "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)},
    "xcit": ViT,
}
"""What the models are built with instead of their own sizes; a function is given what stood there."""

SIDES = {"efficientformer": 224, "inception_resnet_v2": 96, "inception_v4": 96}
"""Of the images, where 64 pixels are too few."""

CHOSEN = {
    "byoanet/botnet": "botnet50ts_256",
    "byoanet/halonet": "halonet50ts",
    "byoanet/lambda_resnet": "lambda_resnet50ts",
    "byobnet/gcresnext": "gcresnext50ts",
    "hgnet/hgnet": "hgnet_base",
    "hgnet/hgnetv2": "hgnetv2_b4",
    "lowformer": "lowformer_b0",  # e1 has no attention
    "rdnet": "rdnet_small",
    "selecsls": "selecsls60",
    "vovnet/ese_vovnet": "ese_vovnet57b",
    "vovnet/vovnet": "vovnet57a",
}
"""The variant, where the smallest has no stack and a larger one has."""


# -- what a longer list needs to be told -------------------------------------------------------------------------------


def more_local_blocks(model: nn.Module, times: int) -> None:
    """ConViT adds its class token after so many blocks: after all the local ones, however many there are."""
    model.local_up_to_layer *= times


def more_rotations(model: nn.Module, times: int) -> None:
    """EVA's mixed rotary embeddings are made for all blocks at once, and each block takes its own by its index."""
    made = model.rope.get_embed
    model.rope.get_embed = lambda *args, **kwargs: torch.cat([made(*args, **kwargs)] * times)


ASIDE: dict[str, Keywords] = {
    "convit": {"lengthen": more_local_blocks},
    "eva/vit_rope_mixed": {"lengthen": more_rotations},
    "eva/vit_rope_mixed_ape": {"lengthen": more_rotations},
    "nextvit": {"path": "stages.2.blocks.1:4"},  # one of two equal ones
    "twins": {"loop": twins},
}
"""What else a Row is told."""


# -- the listing -------------------------------------------------------------------------------------------------------


def rows() -> list[Row]:
    """One row per family, in the order of the modules; nothing is built yet."""
    return [_row(module, kind, names) for (module, kind), names in sorted(families().items())]


def families() -> dict[tuple[str, str], list[str]]:
    """Every name by its module and kind; timm's own test models, which are of other proportions, left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in timm.list_models(exclude_filters="test_*"):
        found.setdefault((_model_to_module[name], kind_of(name)), []).append(name)
    return found


SIZES = (
    "zepto atto femto pico nano xxs xxsmall xxtiny xx xs xsmall xtiny ti tiny t mini wee pwee dwee dpwee little dlittle"
    " es s small so em m medium mediumd betwixt b base plus el l large big x xl xxl xlarge xxlarge h huge giant"
    " giantopt gigantic enormous"
).split()
"""Words for a size, smallest first."""

OTHER = "patch window reg ks short tall wide ms ts ns gap cls map tv jx ssld miil pruned".split()
"""Words that tell less than a kind: of pooling, of a training."""


def kind_of(name: str) -> str:
    """The name without sizes and the like: resnet50d is a resnet, and eva02 no eva."""
    first, *rest = name.split("_")
    words = [re.sub(r"(?<=[a-z])(?<!v)\d.*", "", word) for word in rest]
    kinds = [word for word in words if re.fullmatch(r"v\d|[a-z]{2,}(v\d)?", word) and word not in SIZES + OTHER]
    return "_".join([re.sub(r"(?<=[a-z])[1-9]\d.*", "", first), *kinds])


def _size(name: str) -> tuple[int, list[tuple[int, int]]]:
    """Sorts by the word for the size, a middling one where there is none, then by each number: b0 before l0."""
    words = [re.sub(r"^\d+b$", "giant", word) for word in name.split("_")[1:]]
    sizes = [SIZES.index(word) for word in words if word in SIZES]
    numbers = [(SIZES.index(a) if a in SIZES else 0, int(n)) for a, n in re.findall(r"([a-z]*)(\d+)", name)]
    return min(sizes, default=SIZES.index("base")), numbers


def _row(module: str, kind: str, names: list[str]) -> Row:
    def known(table: dict[str, Any], default: Any) -> Any:
        return table.get(f"{module}/{kind}", table.get(module, default))

    name = known(CHOSEN, min(names, key=_size))
    smaller = SMALLER.get(module, {}) | SMALLER.get(f"{module}/{kind}", {})
    side = smaller.get("img_size", known(SIDES, SIDE))
    make = partial(build, module, name, smaller)
    return Row(name, make, _images(side), task=TASK, without_stack=known(WITHOUT_STACK, ""), **known(ASIDE, {}))


def _images(side: int | tuple[int, int]) -> Callable[[], Inputs]:
    height, width = (side, side) if isinstance(side, int) else side
    return lambda: ((noise(BATCH, 3, height, width),), {})


# -- building ----------------------------------------------------------------------------------------------------------


def build(module: str, name: str, smaller: Keywords) -> nn.Module:
    """A model with random weights, nothing of which is dropped.

    Many factories refuse to be told a size that they name themselves, so it is exchanged on the way to the builder.
    """

    def build_smaller(*args: Any, **kwargs: Any) -> nn.Module:
        changes = {key: new(kwargs[key]) if key in ("model_cfg", "block_args") else new for key, new in smaller.items()}
        return build_model_with_cfg(*args, **{**kwargs, **changes})

    with mock.patch.object(import_module(f"timm.models.{module}"), "build_model_with_cfg", build_smaller):
        model = timm.create_model(name, num_classes=10)
    for part in model.modules():
        if hasattr(part, "drop_rate"):
            part.drop_rate = 0.0  # of F.dropout
    return model
