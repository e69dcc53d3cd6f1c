"""What the rules get wrong about single multimodal model types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.matrix.hf_inputs import BATCH, PLAIN_WORDS, TOKENS, features, image_size, patches, special_token, words
from benchmarks.matrix.hf_loops_multimodal import images_between_blocks
from benchmarks.matrix.row import noise

Config = hf.PretrainedConfig
Keywords = dict[str, Any]


# -- what they are fed -------------------------------------------------------------------------------------------------


def text_with(config: Config, count: int, kind: str = "image", **media: Any) -> Keywords:
    """A text to be continued with `count` placeholders in it, beside what takes their places."""
    text = words()
    if count:
        text = torch.cat([text[:, :1], torch.full((BATCH, count), special_token(config, kind)), text[:, 1:]], 1)
    mask = torch.ones_like(text)
    mask[-1, -2:] = 0
    labels = torch.where(text < PLAIN_WORDS[1], text, -100)
    return {"input_ids": text, "attention_mask": mask, "labels": labels, "use_cache": False, **media}


def asked(
    name: str, media: Callable[[Config], Keywords], kind: str = "image"
) -> Callable[[Config, Keywords], Keywords]:
    """Inputs with as many placeholders as the model of this name says that it makes tokens of `media`."""

    def inputs(config: Config, found: Keywords) -> Keywords:
        made = media(config)
        return text_with(config, features(getattr(hf, name), config, kind, made), kind, **made)

    return inputs


def images(config: Config) -> Tensor:
    return noise(BATCH, 3, *image_size(config))


def one_of_several_images(config: Config) -> Keywords:
    return {"pixel_values": images(config).unsqueeze(1)}


def sized_images(config: Config) -> Keywords:
    return {"pixel_values": images(config), "image_sizes": torch.tensor([image_size(config)] * BATCH)}


def image_and_views(config: Config) -> Keywords:
    """The whole image and four crops of it, two by two."""
    height, width = image_size(config)
    crops = noise(BATCH, 5, 3, height, width)
    return {"pixel_values": crops, "image_sizes": torch.tensor([[2 * height, 2 * width]] * BATCH)}


def rows_of_patches(config: Config) -> Keywords:
    part = config.vision_config
    return {
        "pixel_values": noise(BATCH, 16, part.num_channels * part.patch_size**2),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
    }


def tiles(config: Config, found: Keywords) -> Keywords:
    part = config.vision_config
    media = {
        "pixel_values": noise(BATCH, 1, part.max_num_tiles, 3, *image_size(config)),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, part.max_num_tiles, dtype=torch.long),
    }
    text = text_with(config, 0, **media)
    return text | {"cross_attention_mask": torch.ones(*text["input_ids"].shape, 1, part.max_num_tiles)}


def attended_images(config: Config, found: Keywords) -> Keywords:
    text = text_with(config, 0, **one_of_several_images(config))
    return text | {"image_attention_mask": torch.ones(*text["input_ids"].shape, 1, dtype=torch.long)}


def marked_places(config: Config, found: Keywords) -> Keywords:
    text = text_with(config, 0, pixel_values=images(config))
    places = torch.zeros_like(text["input_ids"])
    places[:, : config.latent_query_num] = 1
    return text | {"image_embeds_position_mask": places}


def merging(config: Config, found: Keywords) -> Keywords:
    return text_with(config, 4, image_merge_sizes=torch.full((BATCH,), 2), **patches(config))


def quartered(config: Config, found: Keywords) -> Keywords:
    return text_with(config, 4, pixel_values=images(config))


def queried(config: Config, found: Keywords) -> Keywords:
    return text_with(config, config.num_query_tokens, pixel_values=images(config), qformer_input_ids=words())


def queried_film(config: Config, found: Keywords) -> Keywords:
    film = noise(BATCH, 2, 3, *image_size(config))
    return text_with(config, 2 * config.num_query_tokens, "video", pixel_values=film, qformer_input_ids=words())


def square_patches(config: Config, found: Keywords) -> Keywords:
    size = config.vision_config.patch_size
    text = text_with(config, 4, **patches(config) | {"pixel_values": noise(BATCH * 16, 3, size, size)})
    return text | {"mm_token_type_ids": (text["input_ids"] == special_token(config, "image")).long()}


def padded_patches(config: Config, found: Keywords) -> Keywords:
    made = patches(config)
    return text_with(config, 4, **made | {"pixel_values": made["pixel_values"].view(BATCH, 16, -1)})


def every_patch(config: Config, found: Keywords) -> Keywords:
    text = text_with(config, 16, pixel_values=images(config))
    del text["labels"]
    return text


def one_token_for_an_image(config: Config, found: Keywords) -> Keywords:
    text = text_with(config, 1, **one_of_several_images(config))
    del text["labels"]
    return text


def unmasked(config: Config, found: Keywords) -> Keywords:
    """Words that are padded, or missing, are scored with minus infinity."""
    return {**found, "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}


def words_alone(config: Config, found: Keywords) -> Keywords:
    return {"input_ids": words(), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}


def embedded_tokens(config: Config, found: Keywords) -> Keywords:
    return {"hidden_states": noise(BATCH, TOKENS, config.hidden_size)}


def queries(config: Config, found: Keywords) -> Keywords:
    return {
        "query_embeds": noise(BATCH, 6, config.hidden_size),
        "encoder_hidden_states": noise(BATCH, TOKENS, config.encoder_hidden_size),
    }


def perceived(config: Config, found: Keywords) -> Keywords:
    return {
        "context": noise(BATCH, TOKENS, config.hidden_size),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
    }


def two_resolutions(config: Config) -> Keywords:
    size = config.high_res_vision_config.image_size
    return {"pixel_values": images(config), "high_res_pixel_values": noise(BATCH, 3, size, size)}


def flattened_patches(config: Config, found: Keywords) -> Keywords:
    """Each with its row and its column in front."""
    places = torch.tensor([[row, column] for row in range(1, 5) for column in range(1, 5)]).repeat(BATCH, 1, 1)
    made = torch.cat([places, noise(BATCH, 16, config.vision_config.patch_embed_hidden_size)], -1)
    return {"flattened_patches": made, "labels": words(5), "use_cache": False}


def words_after_others(config: Config, found: Keywords) -> Keywords:
    return {"input_ids": words(), "encoder_hidden_states": noise(BATCH, TOKENS, config.hidden_size)}


def embeddings_alone(config: Config, found: Keywords) -> Keywords:
    return {"inputs_embeds": noise(BATCH, TOKENS, config.hidden_size), "use_cache": False}


def film_and_words(config: Config, found: Keywords) -> Keywords:
    return {"input_ids": words(), "pixel_values_videos": noise(BATCH, 2, 3, *image_size(config))}


def plain_text(config: Config, found: Keywords) -> Keywords:
    return text_with(config, 0)


def episode(config: Config, found: Keywords) -> Keywords:
    return {
        "states": noise(BATCH, 5, config.state_dim),
        "actions": noise(BATCH, 5, config.act_dim),
        "rewards": noise(BATCH, 5, 1),
        "returns_to_go": noise(BATCH, 5, 1),
        "timesteps": torch.arange(5).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, 5, dtype=torch.long),
    }


def typed_text(config: Config, found: Keywords) -> Keywords:
    return text_with(config, 0, mm_token_type_ids=torch.zeros(BATCH, TOKENS, dtype=torch.long))


# -- longer lists ------------------------------------------------------------------------------------------------------


def images_in_every_round(model: nn.Module, times: int) -> None:
    """The first blocks add what the image tower's blocks made: those of every round."""
    decoder = model.model.language_model

    def repeat(module: nn.Module, args: Any, kwargs: Keywords) -> tuple[Any, Keywords]:
        made = kwargs["deepstack_visual_embeds"]
        rest = [torch.zeros_like(made[0])] * (len(module.layers) // times - len(made))
        return args, kwargs | {"deepstack_visual_embeds": [*made, *rest] * times}

    decoder.register_forward_pre_hook(repeat, with_kwargs=True)


def towers_as_deep_as_before(model: nn.Module, times: int) -> None:
    """Which hidden state is the last but one is counted from the depth in a config, and every config was told more."""
    towers = [module for name, module in model.named_modules() if name.endswith(("_tower", "qformer"))]
    for config in {id(tower.config): tower.config for tower in towers}.values():
        config.num_hidden_layers //= times


def cross_attention_in_every_round(model: nn.Module, times: int) -> None:
    decoder = model.model.language_model
    blocks = len(decoder.layers) // times
    decoder.cross_attention_layers = [i + k * blocks for k in range(times) for i in decoder.cross_attention_layers]


def rope_in_every_round(model: nn.Module, times: int) -> None:
    decoder = model.model.language_model if hasattr(model, "model") else model
    for name in ("layer_rope_theta", "rope_types"):
        for owner in (decoder.config, decoder):
            if hasattr(owner, name):
                setattr(owner, name, getattr(owner, name) * times)


def nothing_shared(model: nn.Module, times: int) -> None:
    """The blocks behind the last would share keys with one before."""
    model.model.language_model.first_kv_shared_layer_idx *= times


def layer_inputs_in_every_round(model: nn.Module, times: int) -> None:
    for module in model.modules():
        if hasattr(module, "per_layer_model_projection"):
            module.register_forward_hook(lambda module, args, made: made.repeat(1, 1, times, 1))


def last_states_of_text(output: Any, times: int) -> Any:
    states = output.text_output.hidden_states
    output.text_output["hidden_states"] = states[:1] + states[1 + (len(states) - 1) * (times - 1) // times :]
    return output


def rope_by_axis(*section: int, **more: float) -> Keywords:
    """The parts of half a head that turn with time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"rope_parameters": {**rope, **more}}


OVERRIDES: dict[str, dict[str, Any]] = {
    "flava": {"last_round": last_states_of_text},
    "cosmos3_omni": {"lengthen": images_in_every_round},
    "qwen3_vl": {"lengthen": images_in_every_round},
    "qwen3_vl_moe": {"lengthen": images_in_every_round},
    "janus": {"path": "model.language_model.layers"},
    "mgp-str": {"config": {"num_bpe_labels": 40, "num_wordpiece_labels": 40}},
    "xclip": {"path": "vision_model.encoder.layers"},
    "muse_spark_text": {"lengthen": rope_in_every_round},
    "muse_glimmer_text": {"lengthen": rope_in_every_round},
    "molmo2_text": {"lengthen": rope_in_every_round},
    # -- images in a text
    "llava": {"lengthen": towers_as_deep_as_before},
    "video_llava": {"lengthen": towers_as_deep_as_before},
    "vipllava": {"config": {"vision_feature_layers": [-1, -2]}, "lengthen": towers_as_deep_as_before},
    "idefics": {
        "config": {"freeze_text_layers": False, "freeze_vision_layers": False},
        "inputs": attended_images,
        "path": "model.layers",
        "loop": images_between_blocks,
    },
    "idefics2": {"inputs": asked("Idefics2ForConditionalGeneration", one_of_several_images)},
    "idefics3": {"inputs": asked("Idefics3ForConditionalGeneration", one_of_several_images)},
    "smolvlm": {"inputs": asked("SmolVLMForConditionalGeneration", one_of_several_images)},
    "lfm2_vl": {"inputs": asked("Lfm2VlForConditionalGeneration", rows_of_patches)},
    "llava_next": {
        "config": {"image_grid_pinpoints": [[64, 64]]},
        "inputs": asked("LlavaNextForConditionalGeneration", image_and_views),
        "lengthen": towers_as_deep_as_before,
    },
    "llava_next_video": {
        "config": {"image_grid_pinpoints": [[64, 64]]},
        "inputs": asked("LlavaNextVideoForConditionalGeneration", image_and_views),
        "lengthen": towers_as_deep_as_before,
    },
    "mistral3": {
        "inputs": asked("Mistral3ForConditionalGeneration", sized_images),
        "lengthen": towers_as_deep_as_before,
    },
    "mistral_large4": {
        "inputs": asked("MistralLarge4ForConditionalGeneration", sized_images),
        "lengthen": towers_as_deep_as_before,
    },
    "mllama": {
        "config": {
            "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96},
            "text_config": {"cross_attention_layers": [1]},
        },
        "inputs": tiles,
        "path": "model.language_model.layers",
        "lengthen": cross_attention_in_every_round,
    },
    "video_llama_3": {"inputs": merging},
    "aria": {"config": {"projector_patch_to_query_dict": {16: 8}}, "lengthen": towers_as_deep_as_before},
    "blip-2": {"config": {"image_token_index": 98}, "lengthen": towers_as_deep_as_before},
    "instructblip": {
        "config": {"image_token_index": 98},
        "inputs": queried,
        "lengthen": towers_as_deep_as_before,
    },
    "instructblipvideo": {
        "config": {"video_token_index": 98},
        "inputs": queried_film,
        "lengthen": towers_as_deep_as_before,
    },
    "llama4": {"config": {"vision_config": {"intermediate_size": 128}}, "inputs": quartered},
    "gemma4": {
        "config": {"text_config": {"hidden_size_per_layer_input": 0}},
        "inputs": plain_text,
        "lengthen": nothing_shared,
    },
    "gemma4_unified": {"config": {"text_config": {"hidden_size_per_layer_input": 0}}, "inputs": plain_text},
    "paddleocr_vl": {"config": {"text_config": rope_by_axis(4, 2, 2)}, "inputs": square_patches},
    "paddleocr_vl_text": {"config": rope_by_axis(4, 2, 2)},
    "ernie4_5_vl_moe": {"config": {"text_config": rope_by_axis(3, 3, 2)}},
    "ernie4_5_vl_moe_text": {"config": rope_by_axis(3, 3, 2)},
    "glm4v_moe": {"config": {"text_config": rope_by_axis(2, 1, 1, partial_rotary_factor=0.5)}},
    "glm4v_moe_text": {"config": rope_by_axis(2, 1, 1, partial_rotary_factor=0.5)},
    "kimi_k25": {"config": {"vision_config": {"pos_emb_width": 64}}, "inputs": square_patches},
    "colqwen2": {"inputs": padded_patches},
    "colpali": {"inputs": every_patch},
    "colmodernvbert": {"inputs": one_token_for_an_image},
    "t5gemma2_text": {"config": {"dropout_rate": 0.0}},
    "t5gemma2_encoder": {"config": {"text_config": {"dropout_rate": 0.0}}},
    "t5gemma2_decoder": {"config": {"dropout_rate": 0.0}, "inputs": words_after_others},
    "grounding-dino": {"config": {"max_text_len": TOKENS}, "inputs": unmasked},
    "mm-grounding-dino": {"config": {"max_text_len": TOKENS}, "inputs": unmasked},
    "chameleon": {"config": {"vocabulary_map": {"<image>": 98}}, "inputs": plain_text, "path": "model.layers"},
    "emu3": {
        "config": {"vocabulary_map": {"<|extra_200|>": 97, "<image>": 98}},
        "inputs": plain_text,
        "path": "model.text_model.layers",
    },
    "pix2struct": {"inputs": flattened_patches},
    "pix2struct_text_model": {"config": {"initializer_range": 0.02}},
    "molmo2": {
        "config": {"adapter_config": {"vision_feature_layer": [1, 0]}},
        "inputs": typed_text,
        "lengthen": rope_in_every_round,
    },
    "muse_glimmer": {"inputs": plain_text, "lengthen": rope_in_every_round},
    "inkling_mm_model": {"inputs": plain_text},
    "inkling2": {"inputs": plain_text},
    "qwen3_omni_moe_thinker": {"config": {"vision_start_token_id": 90}, "inputs": plain_text},
    "qwen2_5_omni_thinker": {"config": {"vision_start_token_id": 90}, "inputs": plain_text},
    "qwen3_omni_moe_talker_code_predictor": {"inputs": embeddings_alone},
    "step3p5": {"config": {"sliding_window": 4}},
    "step3p7": {"config": {"text_config": {"sliding_window": 4}}, "inputs": plain_text},
    "glm5_next_text": {"config": {"qk_rope_head_dim": 0}},
    "glm5_next": {"config": {"text_config": {"qk_rope_head_dim": 0}}, "inputs": plain_text},
    "gemma3n": {"config": {"text_config": {"num_kv_shared_layers": 0}}, "inputs": plain_text},
    "videoprism": {"inputs": film_and_words},
    "deepseek_vl_hybrid": {"inputs": asked("DeepseekVLHybridForConditionalGeneration", two_resolutions)},
    "flava_multimodal_model": {"inputs": embedded_tokens},
    "blip_2_qformer": {"inputs": queries},
    "idefics2_perceiver": {"inputs": perceived},
    "embedding_gemma2": {"inputs": words_alone, "lengthen": layer_inputs_in_every_round},
    "decision_transformer": {"inputs": episode},
    "kosmos-2": {"inputs": marked_places},
    "fuyu": {"inputs": plain_text},
    "align": {"config": {"projection_dim": 256}, "path": "text_model.encoder.layer"},
    "embedding_gemma2_text": {"lengthen": layer_inputs_in_every_round},
}
