"""Configs of Hugging Face models shrunk by rules: a few small layers, and nothing drawn at random in a forward.

The rules read the names of a config's fields, since hundreds of configs share a few dozen names. What a config derives
from its fields (`head_dim`, `layer_types`, `stage_names`) is left to it: a shrunk config is constructed anew.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import transformers as hf

Values = dict[str, Any]

LAYERS = 3
HIDDEN = 32
HEADS = 2
WORDS = 99


# -- one config --------------------------------------------------------------------------------------------------------


def tiny_config(config_class: type[hf.PretrainedConfig], given: Values | None = None) -> hf.PretrainedConfig:
    """The smallest config of its class the rules know; `given` has the last word, nested dicts reach sub-configs."""
    required = {name: value for name, value in (given or {}).items() if isinstance(value, hf.PretrainedConfig)}
    default = config_class(**required)
    return _shrunk(default, given or {}, LAYERS, Whole(special_tokens(default), list_widths(default)))


class Whole(NamedTuple):
    """What has to be the same in all parts of a config."""

    tokens: dict[str, int]
    widths: dict[int, int]


def _shrunk(default: hf.PretrainedConfig, given: Values, layers: int, whole: Whole) -> hf.PretrainedConfig:
    layers = _layers(default, layers)
    values: Values = {}
    for name, explicit in _fields(default).items():
        value = vars(default).get(name, explicit)  # an attribute that differs by layer cannot be asked for
        if isinstance(value, hf.PretrainedConfig):
            values[name] = _sub_config(default, name, value, given, layers, whole)
        elif (small := _small(name, value, explicit, default, layers, whole)) != explicit:
            values[name] = small
    values |= _feature_maps(default, layers)
    if getattr(default, "is_encoder_decoder", False):
        values |= {"decoder_start_token_id": 1, "pad_token_id": 0}
    values |= {name: value for name, value in given.items() if not _reaches_in(value, values.get(name))}
    return type(default)(**values)


def _sub_config(
    owner: hf.PretrainedConfig,
    name: str,
    value: hf.PretrainedConfig,
    given: Values,
    layers: int,
    whole: Whole,
) -> hf.PretrainedConfig:
    if isinstance(given.get(name), hf.PretrainedConfig):
        return given[name]
    inside = given.get(name) or {}
    if value.model_type == "timm_backbone":
        return _resnet(value, inside)
    return _shrunk(value, inside, 2 if _is_side(owner, name) else layers, whole)


def _reaches_in(given: Any, there: Any) -> bool:
    return isinstance(given, dict) and isinstance(there, hf.PretrainedConfig)


def _is_side(owner: hf.PretrainedConfig, name: str) -> bool:
    """Whether another part holds the stack that is meant: one block less makes that one the larger."""
    main = [other for other, _ in sub_configs(owner) if re.search("text|decoder|llm|thinker", other)]
    return bool(main) and name not in main


def _resnet(value: hf.PretrainedConfig, given: Values) -> hf.PretrainedConfig:
    """In place of a convolutional backbone of timm's, with as many feature maps."""
    maps = len(getattr(value, "out_indices", None) or (1, 2, 3, 4))
    sizes = {"embedding_size": 8, "hidden_sizes": (8, 16, 32, 32), "depths": (1, 1, 1, 1)}
    features = [f"stage{number}" for number in range(5 - min(maps, 4), 5)]
    return hf.ResNetConfig(**sizes, out_features=features, **given)


def _fields(config: hf.PretrainedConfig) -> Values:
    """What can be passed to the constructor, and what it is if it is not."""
    if dataclasses.is_dataclass(config):
        base = {field.name for field in dataclasses.fields(hf.PretrainedConfig)} - {"is_encoder_decoder"}
        own = {f.name: f.default for f in dataclasses.fields(config) if f.name not in base}
        return {name: value for name, value in own.items() if not name.startswith("_")}
    parameters = inspect.signature(type(config).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def sub_configs(config: hf.PretrainedConfig) -> Iterator[tuple[str, hf.PretrainedConfig]]:
    for name, value in vars(config).items():
        if isinstance(value, hf.PretrainedConfig):
            yield name, value


def every_config(config: hf.PretrainedConfig) -> Iterator[hf.PretrainedConfig]:
    """It, and all that it is composed of, the outermost first."""
    yield config
    for _, part in sub_configs(config):
        yield from every_config(part)


def lookup(config: hf.PretrainedConfig, *names: str) -> Any:
    """The first of these that the config or one of its parts has; None where none does."""
    for name in names:
        for part in every_config(config):
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


# -- token ids ---------------------------------------------------------------------------------------------------------

FIRST_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "unk": 3, "mask": 4, "cls": 5, "sep": 6, "decoder_start": 1}
"""Ids of their own, below all words; the placeholders of images and sounds are counted from the vocabulary's end."""


def special_tokens(config: hf.PretrainedConfig) -> dict[str, int]:
    """The same small id for a token wherever in the config it is named, `image_token_index` or `image_token_id`."""
    names = {_token(name) for part in every_config(config) for name in vars(part)} - {"", *FIRST_TOKENS}
    return FIRST_TOKENS | {name: WORDS - 1 - number for number, name in enumerate(sorted(names))}


def _token(field: str) -> str:
    found = re.fullmatch(r"(\w+?)_token_(id|index)", field)
    return found[1] if found else ""


# -- rules -------------------------------------------------------------------------------------------------------------

Rule = tuple[str, Callable[[int], int] | int]


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


UNTOUCHED = (
    r"num_labels|num_conv_layers|.*_loss_.*|num_feat_extract_layers|num_feature_levels|iou_head_depth"
    r"|.*_(std|idx)|(?!time|freq).*(kernel|stride).*"
)

INTEGERS: list[Rule] = [
    (r".*vocab.*|.*num_embeddings", at_most(WORDS)),
    (r"n_group|num_expert_group|topk_group", at_most(1)),
    (r"codebook_size", at_most(64)),
    (r".*(experts_per_tok|moe_top_?k|^top_?k|moe_k|num_selected_experts).*", at_most(2)),
    (r".*shared_experts", at_most(1)),
    (r".*experts?", at_most(4)),
    (r"index_topk|index_kpool", at_most(4)),
    (r".*expand", 1),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 8),
    (r"(mamba_)?d_head", 16),
    (r".*(head_dim|dim_head|head_size)|d_kv|kv_channels", at_most(16)),
    (r".*d_ssm", HIDDEN),
    (r".*(d_state|state_size|context_size)", at_most(16)),
    (r".*attention_head_size", at_most(16)),
    (r".*groups?|.*n_groups|o_groups", at_most(2)),
    (
        r".*(intermediate|ffn?|feed_?forward|mlp)_?(size|dim|hidden_size|hidden_dim).*|d_ff|dff|dim_ff|d_inner",
        at_most(64),
    ),
    (r"dim_feedforward|inner_dim|n_inner", at_most(64)),
    (r".*patch_size|time_stride|frequency_stride|encoder_stride", at_most(8)),
    (r".*(position|n_ctx|max_len|seq_len|max_seq|model_max|source_length).*", at_most(64)),
    (r".*(mel_bins|n_mels|num_mel)", at_most(16)),
    (r".*lora_rank|.*_rank", at_most(16)),
    (r"num_denoising|.*denoising_queries", 0),
    (r".*(num_queries|num_query_tokens|num_latents|n_latents|num_proposals|latent_query_num)", at_most(6)),
    (r"train_num_points", at_most(16)),
    (r"num_frames|max_num_frames", at_most(2)),
    (r"num_conv_pos_embeddings", at_most(8)),
    (r"(mm_tokens_per_image|image_seq_length|default_output_length)", at_most(16)),
]
"""The first that matches a field's name whole decides."""

WIDTH = (
    r".*(hidden_size|d_model|n_embd|dim|channels|filters|units|features|hidden|width).*"
    r"|.*(projection|embedding|output|proj|inner|pooler|feature|coordinate|shape|out|state)_size"
)
IMAGE = r".*(image|img|crop|input|spec)_size|resolution"
WINDOW = r".*window.*|local_attention|attention_chunk_size"
HEAD_COUNT = r"(.*_)?(n_head|num_head|heads)"
LAYER_COUNT = r"(n|num)?_?(\w*_)?(layers?|blocks)|(\w+_)?depth"
FEW_LAYERS = r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers"
ENCODER_DEPTH = r".*(encoder|speech|t2u|projector|adapter|predictor|resampler|fusion).*"

DEPTHS = r"depths?|num_blocks?_?(repeats)?|stage_num_blocks|layers|num_layers|\w*depths"
WIDTHS = r".*(hidden_sizes|dims?|channels|filters|widths|channel_list|dim_list|feature_dims).*|hidden_size"
"""Of lists with one entry per stage."""

RANDOM = r".*(drop|mask_time_prob|mask_feature_prob|jitter|noise|skip_prob).*"
OFF = ("use_cache", "apply_spec_augment", "use_timm_backbone", "use_pretrained_backbone")
UNSET = {
    "vocab_size": WORDS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "n_shared_experts": 1,
    "prediction_length": 4,
    "context_length": 16,
}
"""Fields whose default is None, and no model can be built without a value."""


def _small(name: str, value: Any, explicit: Any, config: hf.PretrainedConfig, layers: int, whole: Whole) -> Any:
    token = _token(name)
    if token:
        return _small_token(token, value, whole.tokens)
    if value is None:
        return UNSET.get(name)
    if isinstance(value, bool):
        return value and name not in OFF
    if isinstance(value, (int, float)) and re.fullmatch(RANDOM, name):
        return 0.0
    if isinstance(value, int) and explicit is not None:
        return _small_integer(name, value, config, layers, whole.widths)
    if isinstance(value, (list, tuple)) and value:
        return _small_list(name, value, explicit, config, layers, whole.widths)
    if isinstance(value, dict) and name == "rope_parameters":
        return _small_rope(value, explicit, getattr(config, "ignore_keys_at_rope_validation", None) or ())
    return explicit if explicit is None else value


def _small_token(token: str, value: Any, tokens: dict[str, int]) -> Any:
    if value is None and token not in ("pad", "bos", "eos", "decoder_start"):
        return None
    if isinstance(value, str):
        return value
    return [tokens[token]] if isinstance(value, list) else tokens[token]


def _small_integer(name: str, value: int, config: hf.PretrainedConfig, layers: int, widths: dict[int, int]) -> int:
    if re.fullmatch(UNTOUCHED, name) and value != getattr(config, "patch_size", None):
        return value
    if re.fullmatch(r".*(kv|key_value)_heads", name):
        return HEADS if value >= (getattr(config, "num_attention_heads", None) or value) else 1
    if re.fullmatch(HEAD_COUNT, name):
        return min(value, HEADS)
    if re.fullmatch(FEW_LAYERS, name):
        return min(value, 1)
    if re.fullmatch(LAYER_COUNT, name) and value > 1:
        return min(2, layers) if re.fullmatch(ENCODER_DEPTH, name) and _has_decoder(config) else layers
    if re.fullmatch(IMAGE, name):
        return min(value, 64 if hasattr(config, "depths") else 32)
    if re.fullmatch(WINDOW, name):
        return 32 if value > 55 and hasattr(config, "patch_size") else min(value, 2 if hasattr(config, "depths") else 4)
    for rule, small in INTEGERS:
        if re.fullmatch(rule, name):
            return small(value) if callable(small) else small
    return widths.get(value, min(value, HIDDEN)) if re.fullmatch(WIDTH, name) else value


def _has_decoder(config: hf.PretrainedConfig) -> bool:
    return any("decoder" in name and re.fullmatch(LAYER_COUNT, name) for name in vars(config))


def _layers(config: hf.PretrainedConfig, layers: int) -> int:
    """More than asked for where a head reads more feature maps than that."""
    return max(layers, len(_maps_by_layer(config)), len(getattr(config, "backbone_out_indices", None) or ()))


def _maps_by_layer(config: hf.PretrainedConfig) -> list[int]:
    """The layers whose outputs a backbone returns; none of a hierarchical one, which returns those of whole stages."""
    depth, stages = getattr(config, "num_hidden_layers", None), getattr(config, "stage_names", None)
    return (
        list(config.out_indices or ()) if stages and len(stages) - 1 == depth and not hasattr(config, "depths") else []
    )


def _feature_maps(config: hf.PretrainedConfig, layers: int) -> Values:
    count = len(_maps_by_layer(config))
    if count:
        return {"out_indices": list(range(layers - count + 1, layers + 1))}
    return {"out_features": config.out_features} if getattr(config, "_out_features", None) else {}


def _small_list(
    name: str, value: Any, explicit: Any, config: hf.PretrainedConfig, layers: int, widths: dict[int, int]
) -> Any:
    per_layer = len(value) == getattr(config, "num_hidden_layers", None) and not hasattr(config, "depths")
    if per_layer and all(isinstance(each, str) for each in value):
        kinds = list(dict.fromkeys(value))
        return [kinds[i % len(kinds)] for i in range(layers)] if len(kinds) > 1 or explicit is not None else explicit
    if explicit is None:
        return None
    if isinstance(value[0], bool) or not all(isinstance(each, (int, float)) for each in value):
        return value
    if re.fullmatch(RANDOM, name):
        return [0.0] * len(value)
    if not all(isinstance(each, int) for each in value):
        return value[:layers] if per_layer else value
    return _small_integers(name, list(value), layers, per_layer, widths)


def _small_integers(name: str, value: list[int], layers: int, per_layer: bool, widths: dict[int, int]) -> list[int]:
    if re.fullmatch(DEPTHS, name):
        deepest = value.index(max(value))
        return [layers if stage == deepest else 1 for stage in range(len(value))]
    if re.fullmatch(HEAD_COUNT, name):
        return [min(each, (1, 2, 4, 8)[min(rank, 3)]) for rank, each in zip(_ranks(value), value, strict=True)]
    if re.fullmatch(IMAGE, name):
        return [min(each, 32) for each in value]
    if re.fullmatch(r"patch_size", name):
        return [min(each, 8) for each in value]
    if re.fullmatch(r".*out_indices", name):
        return list(range(len(value)))
    if re.fullmatch(r".*(indexes|indices|_ids|extract_layers)", name) and max(value) >= layers:
        return [1]
    if re.fullmatch(WIDTHS, name):
        value = [widths[each] for each in value]
    if per_layer:
        return value[:layers]
    return value


def _ranks(value: list[int]) -> list[int]:
    return [sorted(set(value)).index(each) for each in value]


def list_widths(config: hf.PretrainedConfig) -> dict[int, int]:
    """A small width for every one that a list names: what was equal stays equal, and nothing grows."""
    found = {
        each for part in every_config(config) for name, value in vars(part).items() for each in _widths(name, value)
    }
    wide = sorted(each for each in found if each > 8)
    return {each: each for each in found} | {each: min(each, 8 * 2 ** min(r, 4)) for r, each in enumerate(wide)}


def _widths(name: str, value: Any) -> list[int]:
    is_list = (
        isinstance(value, (list, tuple)) and re.fullmatch(WIDTHS, name) and all(type(each) is int for each in value)
    )
    return list(value) if is_list else []


def _small_rope(value: Values, explicit: Any, keys: Iterable[str]) -> Any:
    if explicit is None and ("mrope_section" not in keys or not value):
        return None
    small = copy.deepcopy(value)
    by_layer_type = [inner for inner in small.values() if isinstance(inner, dict)]
    for each in by_layer_type or [small]:
        if "mrope_section" in each or "mrope_section" in keys:
            each["mrope_section"] = [4, 2, 2]  # half of a head of 16
        for name in ("long_factor", "short_factor"):
            if name in each:
                each[name] = each[name][:8]
    return small
