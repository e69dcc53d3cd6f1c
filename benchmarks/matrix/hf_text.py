"""What the rules get wrong about single model types of text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from benchmarks.matrix.hf_configs import HIDDEN
from benchmarks.matrix.hf_inputs import BATCH, words
from benchmarks.matrix.row import noise

Keywords = dict[str, Any]

# -- what a longer list needs to be told -------------------------------------------------------------------------------


def more_rotations(model: nn.Module, times: int) -> None:
    """Granite names the base of the rotary embedding of every layer in a list of its own."""
    model.config.layer_rope_theta = model.config.layer_rope_theta * times


def same_numbers(name: str) -> Callable[[nn.Module, int], None]:
    """Layers chosen by their numbers, as those that read an image, are the same ones in every round."""

    def lengthen(model: nn.Module, times: int) -> None:
        for module in model.modules():
            if hasattr(module, name):
                depth = len(module.layers) // times
                numbers = [number + depth * each for each in range(times) for number in getattr(module, name)]
                setattr(module, name, numbers)

    return lengthen


def same_adapters(model: nn.Module, times: int) -> None:
    """Zamba2's shared blocks look up by the number of the layer which adapter is its own."""
    depth = len(model.model.layers) // times
    for module in model.modules():
        if hasattr(module, "layer_dic"):
            own = [(layer, adapter) for layer, adapter in module.layer_dic.items() if layer < depth]
            module.layer_dic = {layer + depth * each: adapter for each in range(times) for layer, adapter in own}


def same_embeddings_by_layer(model: nn.Module, times: int) -> None:
    """Gemma embeds the words once more for every layer: a later round's layers get those of the first."""
    for module in model.modules():
        if hasattr(module, "get_per_layer_inputs"):
            short = copy.copy(module)
            short.config = copy.copy(module.config)
            short.config.num_hidden_layers = len(module.layers) // times
            module.get_per_layer_inputs = short.get_per_layer_inputs
            module.project_per_layer_inputs = lambda *args, short=short: short.project_per_layer_inputs(*args).repeat(
                1, 1, times, 1
            )
            if hasattr(module, "first_kv_shared_layer_idx"):
                module.first_kv_shared_layer_idx *= times


def nothing_else(model: nn.Module, times: int) -> None:
    """Where a depth by kind of layer is no number."""


def later_skip(model: nn.Module, times: int) -> None:
    """Funnel's decoder adds what left the first stage, found by the number of its blocks."""
    model.config.block_sizes = [len(model.funnel.encoder.blocks[0]), *model.config.block_sizes[1:]]


# -- inputs ------------------------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[hf.PretrainedConfig, Keywords], Keywords]:
    return lambda config, given: {name: value for name, value in given.items() if name not in names}


MEDIA = ("pixel_values", "input_features", "input_features_mask", "feature_attention_mask")


def words_alone(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {name: value for name, value in given.items() if name not in MEDIA}


def with_image_states(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return given | {"cross_attention_states": noise(BATCH, 5, HIDDEN)}


def with_language(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return given | {"lang_ids": torch.zeros(BATCH, dtype=torch.long)}


def words_of(length: int) -> Callable[[hf.PretrainedConfig, Keywords], Keywords]:
    """Where the length of the text has to be a certain one, or labels have to be as many as the words."""

    def change(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
        ids = words(length)
        changed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if given.get("labels", ids).ndim == 2:
            changed["labels"] = ids
        return given | changed

    return change


def with_decoder_words(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return given | {"decoder_input_ids": words(5)}


def with_regions(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    regions = {"visual_feats": noise(BATCH, 4, config.visual_feat_dim), "visual_pos": noise(BATCH, 4, 4).abs()}
    return given | regions


def series_by_itself(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """A list of series, and the future of each."""
    return {"past_values": list(noise(BATCH, 64)), "future_values": noise(BATCH, config.horizon_length)}


def codes(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """The codebooks stand among the samples of the batch."""
    ids = words(high=config.vocab_size).repeat(config.num_codebooks, 1)
    labels = words(high=config.vocab_size)[..., None].repeat(1, 1, config.num_codebooks)
    return {"input_ids": ids, "labels": labels, "use_cache": False}


OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"path": "model.global_transformer.layers"},
    "bros": {"config": {"hidden_size": 64}},
    "codegen": {"config": {"n_head": 4}},
    "cohere_compass_text": {
        "config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    },
    "dbrx": {"config": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}}},
    "fsmt": {"inputs": with_decoder_words},
    "funnel": {"path": "funnel.encoder.blocks.0", "lengthen": later_skip},
    "gemma3n_text": {"config": {"num_kv_shared_layers": 0}, "lengthen": same_embeddings_by_layer},
    "gemma4_text": {"lengthen": same_embeddings_by_layer},
    "glmasr": {"inputs": words_alone},
    "gpt_neo": {"config": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]}},
    "granite_speech": {"inputs": words_alone},
    "granite_speech_plus": {"inputs": words_alone},
    "granite_swa": {"lengthen": more_rotations},
    "granitemoe_swa": {"lengthen": more_rotations},
    "hrm_text": {"path": "model.H_module.layers"},
    "jamba": {
        "config": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 3, "expert_layer_offset": 1}
    },
    "layoutlmv3": {"config": {"coordinate_size": 4, "shape_size": 8, "input_size": 64}},
    "lfm2_moe": {"config": {"layer_types": ["conv", "full_attention", "conv"]}},
    "lilt": {"config": {"hidden_size": 48}},
    "longcat_flash": {"config": {"head_dim": 8}},
    "lxmert": {"inputs": with_regions, "lengthen": nothing_else},
    "mllama_text_model": {
        "path": "model.layers",
        "config": {"cross_attention_layers": [1]},
        "inputs": with_image_states,
        "lengthen": same_numbers("cross_attention_layers"),
    },
    "mobilebert": {"config": {"embedding_size": 16}},
    "modernvbert": {"inputs": words_alone},
    "moss_transcribe_diarize": {"inputs": words_alone},
    "musicflamingo": {"inputs": words_alone},
    "musicgen_decoder": {"inputs": codes},
    "musicgen_melody_decoder": {"inputs": codes},
    "neomme": {"inputs": words_alone, "lengthen": same_numbers("value_embedding_layers")},
    "perceiver": {"config": {"num_self_attends_per_block": 3}},
    "perceiver/masked-lm": {"inputs": words_of(64)},
    "qwen2_audio": {"inputs": words_alone},
    "qwen4_exp_text": {
        "config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        }
    },
    "reformer": {
        "config": {
            "axial_pos_embds": False,
            "attn_layers": ["local", "lsh", "local"],
            "hash_seed": 1,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
        },
        "inputs": words_of(8),
    },
    "rwkv": {"config": {"rescale_every": 0}},
    "splinter": {"inputs": without("start_positions", "end_positions", "attention_mask")},
    "timesfm": {"inputs": series_by_itself},
    "timesfm2_5": {"inputs": series_by_itself, "config": {"force_flip_invariance": False}},
    "ultravbert": {"inputs": words_alone},
    "voxtral": {"inputs": words_alone},
    "xmod": {"inputs": with_language},
    "zamba": {"config": {"layers_block_type": ["hybrid", "linear_attention", "hybrid"]}},
    "zamba2": {"lengthen": same_adapters},
}
