"""What the rules get wrong about single model types of vision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from benchmarks.matrix import hf_loops_vision as loops
from benchmarks.matrix.hf_inputs import BATCH, Keywords, image_size
from benchmarks.matrix.row import noise


def last_maps(output: Any, times: int) -> Any:
    """Of the lists with one entry per block of a kind, those of the last round."""
    for name, value in output.items():
        if isinstance(value, (list, tuple)):
            output[name] = value[len(value) - len(value) // times :]
    return output


def last_stacked(output: torch.Tensor, times: int) -> torch.Tensor:
    """Of the outputs of all blocks, one above the other, those of the last round."""
    return output[len(output) - len(output) // times :]


def later_taps(field: str) -> Callable[[nn.Module, int], None]:
    """The blocks named by a config's list of indexes are those of the last round."""

    def lengthen(model: nn.Module, times: int) -> None:
        for module in model.modules():  # the blocks are shared, and report to all models what is asked of one
            if isinstance(module, hf.PreTrainedModel) and times > 1:
                module._output_capturing_hooks_installed = True
        config = model.config
        later = config.num_hidden_layers - config.num_hidden_layers // times
        setattr(config, field, [index + later for index in getattr(config, field)])

    return lengthen


def later_stage_ends(model: nn.Module, times: int) -> None:
    """Hiera hands on what leaves the last block of a stage, the third of which is made longer."""
    for module in model.modules():
        if hasattr(module, "stage_ends"):
            first, second, *rest = module.stage_ends
            later = len(module.blocks) - 1 - rest[-1]
            module.stage_ends = [first, second, *(end + later for end in rest)]


# -- inputs ------------------------------------------------------------------------------------------------------------


def square(config: hf.PretrainedConfig, width: int) -> Keywords:
    """Images as four by four patches, all in one row of them."""
    return {"pixel_values": noise(BATCH * 16, width), "grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}


def flat(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return square(config, 3 * config.patch_size**2)


def flat_in_time(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return square(config, 3 * config.patch_size**2 * 2)


def with_shapes(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """Siglip 2 takes patches and how many there are in either direction."""
    part = getattr(config, "vision_config", config)
    shapes = {"pixel_attention_mask": torch.ones(BATCH, 16), "spatial_shapes": torch.tensor([[4, 4]] * BATCH)}
    return given | {"pixel_values": noise(BATCH, 16, 3 * part.patch_size**2), **shapes}


def numbered(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """Pix2Struct's patches begin with their row and column, counted from 1."""
    places = 1 + torch.cartesian_prod(torch.arange(4), torch.arange(4))
    return {
        "flattened_patches": torch.cat(
            [places.expand(BATCH, 16, 2), noise(BATCH, 16, config.patch_embed_hidden_size)], -1
        )
    }


def placed(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, 16, 2)
    return {"pixel_values": noise(BATCH, 16, 3 * config.patch_size**2), "pixel_position_ids": places}


def merged(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return flat(config, given) | {"merge_sizes": torch.tensor([2] * BATCH)}


def cut_out(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """Patches as small images."""
    return flat(config, given) | {"pixel_values": noise(1, BATCH * 16, 3, config.patch_size, config.patch_size)}


def strip(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """Images of four by four patches, which are laid out in one row."""
    side = config.patch_size
    return {"pixel_values": noise(1, 3, side, BATCH * 16 * side), "target_sizes": torch.tensor([[4, 4]] * BATCH)}


def tiles(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    count = config.max_num_tiles
    pixels = noise(BATCH, 1, count, 3, config.image_size, config.image_size)
    ids, mask = torch.ones(BATCH, 1, dtype=torch.long), torch.ones(BATCH, 1, count)
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def a_point(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return given | {"input_points": torch.full((BATCH, 1, 1, 2), 9.0)}


def images(side: int, contrast: float = 1.0) -> Callable[[hf.PretrainedConfig, Keywords], Keywords]:
    """Larger ones, where the deepest feature maps would be single pixels; with more contrast, where little of it lasts.

    In evaluation the normalisations of a convolutional network divide by 1, and its activations halve what passes.
    """
    return lambda config, given: given | {"pixel_values": contrast * noise(BATCH, 3, side, side)}


def two_frames_each(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {"pixel_values": noise(BATCH * config.num_frames, 3, config.image_size, config.image_size)}


def a_task(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return given | {"task_inputs": torch.arange(config.task_seq_len).expand(BATCH, -1) % 50}


def unlabelled(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {name: value for name, value in given.items() if name != "labels"}


def small_images(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return flat(config, given) | {"pixel_values": noise(BATCH * 16, 3, config.patch_size, config.patch_size)}


def an_image(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {"image": noise(BATCH, 3, config.image_size, config.image_size)}


def squares(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """Inkling 2 takes what becomes one token of text as a small image, its channels last."""
    side = config.patch_size * config.spatial_merge_size
    return {"pixel_values": noise(BATCH * 4, side, side, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * BATCH)}


def embedded_patches(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {"patch_embeds": noise(BATCH, config.hidden_size, 4, 4)}


def for_detr_encoder(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    width = config.hidden_size
    maps = {"vision_features": [noise(BATCH, width, 4, 4)], "vision_pos_embeds": [noise(BATCH, width, 4, 4)]}
    return maps | {"text_features": noise(BATCH, 7, width)}


def for_detr_decoder(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    width = config.hidden_size
    tokens = {"vision_features": noise(BATCH, 16, width), "vision_pos_encoding": noise(BATCH, 16, width)}
    return tokens | {"text_features": noise(BATCH, 7, width), "spatial_shapes": torch.tensor([[4, 4]])}


HIERA = {
    "hidden_size": 8,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 4, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "window_size_per_stage": [4, 4, 4, 2],
    "global_attention_blocks": [4],
}
PYRAMID = {
    "backbone_config": HIERA,
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}


def frames(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    rest = {name: value for name, value in given.items() if name != "pixel_values"}
    count = getattr(config, "num_frames", 4)
    return rest | {"pixel_values_videos": noise(BATCH, count, 3, 32, 32)}


def one_frame(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """A loop over frames would enter the stack once for each."""
    return {"pixel_values_videos": noise(BATCH, 1, 3, *image_size(config))}


MERGED_EARLY = {
    "config": {"insert_layer_id": 0, "num_hidden_layers": 4},
    "inputs": strip,
    "path": "encoder.layers.1:4",
}
"""Four tokens become one after block 0."""

TWO_STAGES = {
    "kernel_sizes": [3, 3],
    "in_channels": [32, 16],
    "out_channels": [16, 32],
    "strides": [1, 2],
    "num_block_repeats": [1, 4],
    "expand_ratios": [1, 6],
    "hidden_dim": 1280,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
}
"""Of EfficientNet; of an image that has passed all seven, nothing is left where weights are drawn at random."""

READING_ORDER = {
    "start_token_id": 0,
    "pad_token_id": 1,
    "end_token_id": 2,
    "pred_token_id": 3,
    "max_2d_position_embeddings": 1024,
}
"""All words of the part of PP-DocLayoutV2 that sorts what was found."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "align_vision_model": {"inputs": images(128)},
    "beit/semantic-segmentation": {
        "config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
        "loop": loops.beit_taps,
    },
    "bridgetower_vision_model": {"config": {"hidden_size": 128}, "inputs": an_image, "last_round": last_stacked},
    "chmv2": {"config": {"backbone_config": {"return_class_token": True}}, "path": "backbone.model.layer"},
    "conditional_detr": {"loop": loops.conditional_detr_decoder},
    "cosmos3_edge_vision": {"inputs": flat},
    "cvt": {"config": {"depth": [1, 2, 3], "embed_dim": [16, 32, 64], "num_heads": [1, 2, 4]}},
    "dab-detr": {"loop": loops.dab_detr_decoder},
    "data2vec-vision/semantic-segmentation": {
        "config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
        "loop": loops.data2vec_taps,
    },
    "deepseek_ocr2_sam_vision_model": {"config": {"downsample_channels": [32, 32]}},
    "deepseek_ocr2_vision": {"config": {"sam_config": {"downsample_channels": [32, 32]}}},
    "deformable_detr": {"inputs": images(128), "loop": loops.deformable_decoder},
    "depth_pro": {
        "config": {"patch_size": 32, "intermediate_hook_ids": [2, 1]},
        "inputs": images(128),
        "path": "depth_pro.encoder.patch_encoder.model.encoder.layer",
        "loop": loops.depth_pro_patches,
    },
    "dots3_note_vision_encoder": {"inputs": flat},
    "dpt": {"lengthen": later_taps("backbone_out_indices")},
    "efficientnet": {"config": TWO_STAGES},
    "eomt": {"config": {"num_blocks": 2}, "path": "layers.1:3", "loop": loops.eomt_queries},
    "eomt_dinov3": {"config": {"num_blocks": 2}, "path": "layers.1:3", "loop": loops.eomt_queries},
    "flava_image_codebook": {"config": {"freeze": False}, "path": "blocks.group_1.group.0:2"},
    "gemma4_vision": {"config": {"pooling_kernel_size": 2}, "inputs": placed},
    "glpn": {"config": {"num_encoder_blocks": 4, "depths": [1, 1, 3, 1]}},
    "granite_docling_vision": {
        "config": {"deepstack_visual_indexes": [0, 1, 2]},
        "lengthen": later_taps("deepstack_visual_indexes"),
    },
    "groupvit_vision_model": {"config": {"depths": [1, 1, 3]}},
    "hgnet_v2": {"inputs": images(64, 1e2)},
    "hunyuan_vl_vision": {"inputs": flat},
    "inkling2_vision": {"inputs": squares},
    "kimi_k25_vision": {"config": {"pos_emb_height": 8, "pos_emb_width": 8}, "inputs": small_images},
    "kosmos_2_5_vision_model": {"inputs": numbered},
    "levit": {"config": {"patch_size": 16}},
    "lfm3_vl_vision": {"inputs": flat_in_time},
    "llama4_vision_model": {"config": {"intermediate_size": 128}},
    "lw_detr": {"config": {"projector_scale_factors": [1.0], "group_detr": 1}},
    "minicpm_ocr_vision": MERGED_EARLY,
    "minicpmv4_6_vision": MERGED_EARLY,
    "minicpmv4_7_vision": MERGED_EARLY,
    "minimax_m3_vl_vision": {"inputs": flat_in_time},
    "mllama_vision_model": {
        "config": {"intermediate_layers_indices": [0, 1, 2], "num_global_layers": 1},
        "inputs": tiles,
        "loop": loops.mllama_encoder,
    },
    "mobilenet_v1": {"config": {"hidden_act": "relu"}, "inputs": images(64, 1e12)},
    "mobilevit": {"config": {"hidden_sizes": [32, 48, 64], "initializer_range": 1.0}, "inputs": images(128)},
    "mobilevitv2": {
        "config": {"width_multiplier": 0.25, "initializer_range": 1.0},
        "inputs": images(64, 1e2),
        "path": "mobilevitv2.encoder.layer.4.transformer.layer",
    },
    "muse_glimmer_vision": {"inputs": flat_in_time},
    "muse_spark_vision": {"inputs": flat_in_time},
    "oneformer": {"inputs": a_task, "path": "model.transformer_module.decoder.layers", "loop": loops.oneformer_decoder},
    "paddleocr_vl_vision": {"inputs": cut_out},
    "perceiver/image-classification": {"config": {"num_self_attends_per_block": 3, "d_latents": 32}},
    "pix2struct_vision_model": {"inputs": numbered},
    "poolformer": {"config": {"num_encoder_blocks": 4}},
    "pp_doclayout_v2": {
        "config": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1], "reading_order_config": READING_ORDER},
        "inputs": unlabelled,
        "path": "model.decoder.layers",
        "loop": loops.deformable_decoder,
    },
    "pp_doclayout_v3": {"inputs": unlabelled, "path": "model.decoder.layers", "loop": loops.deformable_decoder},
    "pp_doclayout_v4": {"inputs": unlabelled, "path": "model.decoder.layers", "loop": loops.deformable_decoder},
    "pp_lcnet": {"inputs": images(64, 1e14)},
    "pvt": {"config": {"num_encoder_blocks": 4, "depths": [1, 1, 3, 1]}},
    "pvt_v2": {"config": {"num_encoder_blocks": 4}},
    "regnet": {"config": {"groups_width": 8}, "path": "regnet.encoder.stages.2.layers.1:3"},
    "rf_detr": {"config": {"group_detr": 1}},
    "rt_detr": {"path": "model.decoder.layers", "loop": loops.deformable_decoder},
    "rt_detr_v2": {"path": "model.decoder.layers", "loop": loops.deformable_decoder},
    "sam": {"config": {"vision_config": {"num_pos_feats": 16}}, "inputs": a_point},
    "sam2": {"config": {"vision_config": PYRAMID}, "inputs": a_point},
    "sam2_hiera_det_model": {"config": HIERA, "lengthen": later_stage_ends},
    "sam2_vision_model": {"config": PYRAMID, "lengthen": later_stage_ends},
    "sam3_detr_decoder": {"inputs": for_detr_decoder, "path": "layers", "loop": loops.sam3_decoder},
    "sam3_detr_encoder": {"inputs": for_detr_encoder},
    "sam3_lite_text_detr_decoder": {"inputs": for_detr_decoder, "path": "layers", "loop": loops.sam3_decoder},
    "sam3_lite_text_detr_encoder": {"inputs": for_detr_encoder},
    "sam_hq": {"config": {"vision_config": {"num_pos_feats": 16}}, "inputs": a_point},
    "sam_hq_vision_model": {"last_round": last_maps},
    "sapiens2": {
        "config": {
            "head_config": {
                "upsample_out_channels": [16],
                "upsample_kernel_sizes": [4],
                "conv_out_channels": [16],
                "conv_kernel_sizes": [1],
            }
        }
    },
    "siglip2": {"inputs": with_shapes},
    "siglip2_vision_model": {"inputs": with_shapes},
    "superpoint": {"config": {"keypoint_decoder_dim": 65}},
    "unlimited_ocr_vision_encoder": {"inputs": embedded_patches},
    "video_llama_3_vision": {"inputs": merged},
    "videomt": {"config": {"num_blocks": 2}, "inputs": one_frame, "path": "layers.1:3", "loop": loops.eomt_queries},
    "videoprism_vision_model": {
        "config": {"tubelet_size": [1, 8, 8]},
        "inputs": frames,
        "path": "vision_model.spatial_layers",
    },
    "vitmatte": {
        "config": {"backbone_config": {"patch_size": 16, "image_size": 64}, "initializer_range": 1.0},
        "inputs": images(64),
    },
    "vjepa2": {"config": {"frames_per_clip": 4}, "inputs": frames, "path": "vjepa2.encoder.layer"},
    "xclip_vision_model": {"inputs": two_frames_each},
    "yolos": {"loop": loops.yolos_encoder},
}
