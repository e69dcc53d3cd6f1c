"""Tiny, randomly initialised models of many families, for comparing cycles with a longer block list.

Every row builds and runs in milliseconds and has at least three blocks in its stack. Its rates of dropout, drop path
and LayerDrop are 0, so that its training arithmetic can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers as hf
from timm.models import focalnet, gcvit, maxxvit, metaformer, mlp_mixer, mvitv2, nest, volo
from torch import Tensor, nn

from benchmarks.matrix.row import Inputs, Row, seeded

BATCH = 3


# -- timm --------------------------------------------------------------------------------------------------------


def images(size: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(BATCH, 3, size, size, generator=seeded()),), {})


def timm_row(name: str, path: str = "blocks", size: int = 32, **config: Any) -> Row:
    return Row(name, lambda: timm.create_model(name, num_classes=10, **config), images(size), path)


def timm_class_row(name: str, path: str, size: int, make: Callable[..., nn.Module], **config: Any) -> Row:
    """For names that take no other sizes: the class itself, with the arguments that the name stands for."""
    return Row(name, lambda: make(num_classes=10, **config), images(size), path)


ViT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
Mixer = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 3}
Swin = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}
Stages = {"depths": (1, 1, 3, 1), "dims": (8, 16, 32, 48)}
MaxxBlocks = {"depths": (1, 1, 4, 1), "embed_dim": (8, 16, 32, 64), "stem_width": 8}


def local_part(model: nn.Module, times: int) -> None:
    """ConViT adds its class token after so many blocks: after all the local ones, however many there are."""
    model.local_up_to_layer *= times


TIMM = [
    timm_row("deit_tiny_patch16_224", **ViT),
    timm_row("deit_tiny_distilled_patch16_224", **ViT),
    timm_row("deit3_small_patch16_224", **ViT),
    timm_row("vit_medium_patch16_reg4_gap_256", **ViT),
    timm_row("vit_small_patch14_dinov2", **ViT),
    timm_row("vit_base_patch16_rope_reg1_gap_256", **ViT),
    timm_row("vit_relpos_small_patch16_224", **ViT),
    timm_row("flexivit_small", **ViT),
    timm_row("beit_base_patch16_224", **ViT),
    timm_row("cait_xxs24_224", **ViT),
    timm_row("eva02_tiny_patch14_224", **ViT),
    timm_row("xcit_tiny_12_p8_224", **ViT),
    timm_row("convit_tiny", "blocks.0:3", **{**ViT, "depth": 4}, local_up_to_layer=3)._replace(lengthen=local_part),
    timm_row("samvit_base_patch16", **ViT, neck_chans=16, global_attn_indexes=(1,), window_size=2),
    timm_row("swin_tiny_patch4_window7_224", "layers.2.blocks", 64, **Swin),
    timm_row("swinv2_tiny_window8_256", "layers.2.blocks", 64, **Swin),
    timm_row("swinv2_cr_tiny_224", "stages.2.blocks", 64, **Swin),
    timm_class_row(
        "mvitv2_tiny",
        "stages.2.blocks.1:4",
        32,
        lambda **k: mvitv2.MultiScaleVit(
            mvitv2.MultiScaleVitCfg(depths=(1, 1, 4, 1), embed_dim=(8, 16, 32, 64), num_heads=(1, 1, 2, 2)),
            img_size=32,
            **k,
        ),
    ),
    timm_row(
        "pvt_v2_b0",
        "stages.2.blocks",
        embed_dims=(8, 16, 32, 64),
        depths=(1, 1, 3, 1),
        num_heads=(1, 1, 2, 2),
    ),
    timm_row("hiera_tiny_224", "blocks.3:6", img_size=(32, 32), embed_dim=16, stages=(1, 1, 4, 1), num_heads=1),
    timm_row(
        "crossvit_9_240",
        img_size=32,
        img_scale=(1.0, 1.0),
        patch_size=(8, 16),
        embed_dim=(16, 32),
        num_heads=(2, 2),
        depth=((1, 1, 0), (1, 1, 0), (1, 1, 0)),
    )._replace(tokens=tuple),
    timm_row(
        "tnt_s_patch16_224",
        img_size=32,
        embed_dim=32,
        inner_dim=8,
        depth=3,
        num_heads_inner=2,
        num_heads_outer=2,
    )._replace(tokens=tuple),
    timm_class_row("mixer_s16_224", "blocks", 32, mlp_mixer.MlpMixer, **Mixer),
    timm_class_row(
        "gmlp_s16_224",
        "blocks",
        32,
        mlp_mixer.MlpMixer,
        **Mixer,
        mlp_ratio=6,
        block_layer=mlp_mixer.SpatialGatingBlock,
        mlp_layer=mlp_mixer.GatedMlp,
    ),
    timm_class_row(
        "resmlp_12_224",
        "blocks",
        32,
        mlp_mixer.MlpMixer,
        **Mixer,
        mlp_ratio=4,
        block_layer=mlp_mixer.ResBlock,
        norm_layer=mlp_mixer.Affine,
    ),
    timm_row(
        "levit_128s",
        "stages.1.blocks",
        64,
        img_size=64,
        embed_dim=(16, 32, 48),
        depth=(1, 3, 1),
        num_heads=(1, 2, 3),
        key_dim=8,
    ),
    timm_row(
        "pit_ti_224",
        "transformers.1.blocks",
        img_size=32,
        patch_size=8,
        stride=4,
        base_dims=(8, 16, 16),
        depth=(1, 3, 1),
        heads=(1, 1, 2),
    ),
    timm_class_row(
        "volo_d1_224",
        "network.2:5",
        32,
        volo.VOLO,
        img_size=32,
        embed_dims=(16, 32, 32, 32),
        layers=(1, 1, 3, 1),
        num_heads=(1, 2, 2, 2),
    ),
    timm_class_row(
        "nest_tiny",
        "levels.1.transformer_encoder",
        32,
        nest.Nest,
        img_size=32,
        patch_size=2,
        num_levels=2,
        embed_dims=(16, 32),
        num_heads=(1, 2),
        depths=(1, 3),
    ),
    timm_class_row(
        "poolformer_s12",
        "stages.2.blocks",
        64,
        metaformer.MetaFormer,
        **Stages,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=metaformer.GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
    ),
    timm_class_row(
        "caformer_s18",
        "stages.2.blocks",
        64,
        metaformer.MetaFormer,
        **{**Stages, "dims": (8, 16, 32, 64)},
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    ),
    timm_class_row(
        "maxvit_tiny_rw_224",
        "stages.2.blocks.1:4",
        64,
        lambda **k: maxxvit.MaxxVit(
            maxxvit.MaxxVitCfg(
                **MaxxBlocks,
                block_type=("M",) * 4,
                transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=(2, 2)),
            ),
            img_size=64,
            **k,
        ),
    ),
    timm_class_row(
        "coatnet_nano_rw_224",
        "stages.2.blocks.1:4",
        64,
        lambda **k: maxxvit.MaxxVit(maxxvit.MaxxVitCfg(**MaxxBlocks), img_size=64, **k),
    ),
    timm_row(
        "davit_tiny",
        "stages.2.blocks",
        depths=(1, 1, 3, 1),
        embed_dims=(8, 16, 32, 48),
        num_heads=(1, 2, 2, 4),
        window_size=2,
    ),
    timm_class_row(
        "focalnet_tiny_srf",
        "layers.2.blocks",
        32,
        focalnet.FocalNet,
        embed_dim=8,
        depths=(1, 1, 3, 1),
    ),
    timm_row("efficientformer_l1", "stages.2.blocks", 224, depths=(1, 1, 3, 1), embed_dims=(8, 16, 32, 48)),
    timm_row(
        "tiny_vit_5m_224",
        "stages.2.blocks",
        64,
        embed_dims=(8, 16, 32, 48),
        depths=(1, 1, 3, 1),
        num_heads=(1, 1, 2, 2),
        window_sizes=(2, 2, 2, 2),
    ),
    timm_class_row(
        "gcvit_xxtiny",
        "stages.2.blocks",
        64,
        gcvit.GlobalContextVit,
        img_size=64,
        embed_dim=8,
        depths=(1, 1, 3, 1),
        num_heads=(1, 1, 2, 2),
    ),
    timm_row("convnext_atto", "stages.2.blocks", 64, **Stages),
    timm_row("edgenext_xx_small", "stages.2.blocks", 64, **{**Stages, "depths": (1, 1, 4, 1)}),
    timm_row("inception_next_atto", "stages.2.blocks", 64, **{**Stages, "dims": (16, 32, 32, 48)}),
    timm_row("mambaout_femto", "stages.2.blocks", 64, **Stages),
    timm_row(
        "sequencer2d_s",
        "stages.2.blocks",
        64,
        img_size=64,
        layers=(1, 1, 3, 1),
        embed_dims=(8, 16, 16, 16),
        hidden_sizes=(4, 4, 4, 4),
    ),
    timm_row("repvit_m0_9", "stages.2.blocks", 64, embed_dim=(8, 16, 32, 48), depth=(1, 1, 3, 1)),
]

# -- Hugging Face ------------------------------------------------------------------------------------------------

Keywords = dict[str, Any]
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 8}
WORDS = 99
TOKENS = 7


def still(config: hf.PretrainedConfig) -> hf.PretrainedConfig:
    """Every rate of dropout, drop path and LayerDrop at 0, and no masking drawn in the forward."""
    for part in [config, *(v for v in vars(config).values() if isinstance(v, hf.PretrainedConfig))]:
        for name, value in list(vars(part).items()):
            if ("drop" in name or name.startswith("mask_time_prob")) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def hf_row(
    model: type[hf.PreTrainedModel], path: str, inputs: Callable[[], Keywords], config: Keywords, **more: Any
) -> Row:
    return Row(
        model.__name__,
        lambda: model(still(model.config_class(**config))),
        lambda: ((), inputs()),
        path,
        **more,
    )


def classes(count: int = 2) -> Tensor:
    return torch.randint(count, (BATCH,), generator=seeded())


def words(length: int = TOKENS, low: int = 3) -> Tensor:
    return torch.randint(low, WORDS, (BATCH, length), generator=seeded())


def text(**labels: Callable[[], Any]) -> Callable[[], Keywords]:
    """Token ids, the last sequence padded by two."""

    def inputs() -> Keywords:
        mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
        mask[-1, -2:] = 0
        return {
            "input_ids": words(),
            "attention_mask": mask,
            **{name: make() for name, make in labels.items()},
        }

    return inputs


def pixels(**labels: Callable[[], Any]) -> Callable[[], Keywords]:
    return lambda: {
        "pixel_values": torch.randn(BATCH, 3, 32, 32, generator=seeded()),
        **{name: make() for name, make in labels.items()},
    }


def sound(name: str, *shape: int, **labels: Callable[[], Any]) -> Callable[[], Keywords]:
    return lambda: {
        name: torch.randn(BATCH, *shape, generator=seeded()),
        **{label: make() for label, make in labels.items()},
    }


def video() -> Keywords:
    return {"pixel_values": torch.randn(BATCH, 2, 3, 16, 16, generator=seeded()), "labels": classes()}


def no_cache() -> bool:
    return False


Text = {**SIZE, "vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 0}
Decoder = {**Text, "num_key_value_heads": 1, "head_dim": 16}
Seq2Seq = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
Speech = {
    **SIZE,
    "vocab_size": 20,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
BertText = text(labels=classes)
TaggedText = text(labels=lambda: torch.randint(2, (BATCH, TOKENS), generator=seeded()))
MaskedText = text(labels=words)
CausalText = text(labels=words, use_cache=no_cache)
Seq2SeqText = text(labels=lambda: words(5), use_cache=no_cache)
LabelledImage = pixels(labels=classes)


def deepen_backbone(model: nn.Module, times: int) -> None:
    """The feature map that the head reads is the last one, wherever the list ends."""
    backbone = model.backbone
    last = (len(backbone.stage_names) - 1) * times
    backbone.stage_names = backbone.config.stage_names = ["stem", *(f"stage{i}" for i in range(1, last + 1))]
    backbone.out_features = [f"stage{last}"]


HF = [
    hf_row(hf.ViTForImageClassification, "vit.layers", LabelledImage, {**SIZE, **IMAGE}),
    hf_row(hf.DeiTForImageClassification, "deit.layers", LabelledImage, {**SIZE, **IMAGE}),
    hf_row(hf.Dinov2ForImageClassification, "dinov2.encoder.layer", LabelledImage, {**SIZE, **IMAGE}),
    hf_row(hf.BeitForImageClassification, "beit.layers", LabelledImage, {**SIZE, **IMAGE}),
    hf_row(
        hf.YolosForObjectDetection,
        "vit.encoder.layer",
        pixels(),
        {**SIZE, "image_size": (32, 32), "patch_size": 8, "use_mid_position_embeddings": False},
    ),
    hf_row(hf.CLIPVisionModel, "encoder.layers", pixels(), {**SIZE, **IMAGE}),
    hf_row(hf.BlipVisionModel, "encoder.layers", pixels(), {**SIZE, **IMAGE}),
    hf_row(
        hf.SiglipForImageClassification,
        "vision_model.encoder.layers",
        LabelledImage,
        {"vision_config": {**SIZE, **IMAGE}, "text_config": Text},
    ),
    hf_row(
        hf.SwinForImageClassification,
        "swin.encoder.layers.1.blocks",
        LabelledImage,
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": (1, 3),
            "num_heads": (1, 2),
            "window_size": 2,
        },
    ),
    hf_row(
        hf.SegformerForImageClassification,
        "segformer.stages.1.blocks",
        LabelledImage,
        {
            "num_encoder_blocks": 2,
            "depths": (1, 3),
            "sr_ratios": (4, 2),
            "hidden_sizes": (16, 32),
            "patch_sizes": (7, 3),
            "strides": (4, 2),
            "num_attention_heads": (1, 2),
            "mlp_ratios": (2, 2),
        },
    ),
    hf_row(
        hf.VitPoseForPoseEstimation,
        "backbone.encoder.layer",
        pixels(),
        {
            "backbone_config": hf.VitPoseBackboneConfig(
                **SIZE, image_size=(32, 32), patch_size=(8, 8), out_indices=[3]
            ),
            "num_labels": 5,
            "use_simple_decoder": False,
        },
        lengthen=deepen_backbone,
    ),
    hf_row(
        hf.VideoMAEForVideoClassification,
        "videomae.encoder.layer",
        video,
        {**SIZE, "image_size": 16, "patch_size": 8, "num_frames": 2, "tubelet_size": 1},
    ),
    hf_row(hf.BertForSequenceClassification, "bert.encoder.layer", BertText, Text),
    hf_row(hf.RobertaForMaskedLM, "roberta.encoder.layer", MaskedText, Text),
    hf_row(hf.ElectraForTokenClassification, "electra.encoder.layer", TaggedText, {**Text, "embedding_size": 16}),
    hf_row(
        hf.DistilBertForSequenceClassification,
        "distilbert.transformer.layer",
        BertText,
        {
            "vocab_size": WORDS,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    hf_row(hf.MPNetForSequenceClassification, "mpnet.encoder.layer", BertText, {**Text, "pad_token_id": 1}),
    hf_row(
        hf.AlbertForSequenceClassification,
        "albert.encoder.albert_layer_groups",
        BertText,
        {**Text, "embedding_size": 16},
    ),
    hf_row(
        hf.DebertaV2ForSequenceClassification,
        "deberta.encoder.layer",
        BertText,
        {
            **Text,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "type_vocab_size": 0,
        },
    ),
    hf_row(
        hf.ModernBertForMaskedLM,
        "model.layers",
        MaskedText,
        {
            **Text,
            "local_attention": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    hf_row(hf.T5ForConditionalGeneration, "decoder.block", Seq2SeqText, T5),
    hf_row(hf.MT5ForConditionalGeneration, "decoder.block", Seq2SeqText, {**T5, "pad_token_id": 0}),
    hf_row(hf.BartForConditionalGeneration, "model.decoder.layers", Seq2SeqText, Seq2Seq),
    hf_row(hf.PegasusForConditionalGeneration, "model.decoder.layers", Seq2SeqText, Seq2Seq),
    hf_row(
        hf.WhisperForConditionalGeneration,
        "model.decoder.layers",
        sound("input_features", 8, 32, labels=lambda: words(5), use_cache=no_cache),
        {**Seq2Seq, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
    hf_row(
        hf.GPT2LMHeadModel,
        "transformer.h",
        CausalText,
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64},
    ),
    hf_row(hf.GPTNeoXForCausalLM, "gpt_neox.layers", CausalText, Text),
    hf_row(
        hf.OPTForCausalLM,
        "model.decoder.layers",
        CausalText,
        {**Text, "ffn_dim": 64, "word_embed_proj_dim": 32, "bos_token_id": 1, "eos_token_id": 2},
    ),
    hf_row(hf.FalconForCausalLM, "transformer.h", CausalText, {**SIZE, "vocab_size": WORDS, "alibi": False}),
    hf_row(hf.LlamaForCausalLM, "model.layers", CausalText, Decoder),
    hf_row(hf.MistralForCausalLM, "model.layers", CausalText, {**Decoder, "sliding_window": 4}),
    hf_row(hf.PhiForCausalLM, "model.layers", CausalText, Text),
    hf_row(hf.Qwen2ForCausalLM, "model.layers", CausalText, Decoder),
    hf_row(hf.Qwen3ForCausalLM, "model.layers", CausalText, Decoder),
    hf_row(hf.Gemma2ForCausalLM, "model.layers", CausalText, {**Decoder, "sliding_window": 4}),
    hf_row(
        hf.Gemma3ForCausalLM,
        "model.layers",
        CausalText,
        {**Decoder, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    hf_row(
        hf.Wav2Vec2ForSequenceClassification,
        "wav2vec2.encoder.layers",
        sound("input_values", 400, labels=classes),
        Speech,
    ),
    hf_row(
        hf.HubertForCTC,
        "hubert.encoder.layers",
        sound("input_values", 400, labels=lambda: torch.randint(1, 20, (BATCH, 4), generator=seeded())),
        {**Speech, "ctc_loss_reduction": "mean"},
    ),
    hf_row(
        hf.ASTForAudioClassification,
        "audio_spectrogram_transformer.layers",
        sound("input_values", 32, 16, labels=classes),
        {
            **SIZE,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 16,
        },
    ),
    hf_row(
        hf.DINOv3ViTModel,
        "model.layer",
        pixels(),
        # no rotary embeddings drawn at random in training
        {**SIZE, **IMAGE, "pos_embed_rescale": None, "pos_embed_shift": None, "pos_embed_jitter": None},
    ),
    hf_row(
        hf.SamVisionModel,
        "vision_encoder.layers",
        pixels(),
        {**SIZE, **IMAGE, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64},
    ),
    hf_row(
        hf.FocalNetForImageClassification,
        "focalnet.encoder.stages.1.layers",
        LabelledImage,
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": (1, 3),
            "hidden_sizes": (16, 32),
            "focal_levels": (2, 2),
            "focal_windows": (3, 3),
        },
    ),
    hf_row(
        hf.HieraForImageClassification,
        "hiera.encoder.stages.1.layers.1:4",
        LabelledImage,
        {
            "image_size": (32, 32),
            "patch_size": (3, 3),
            "patch_stride": (4, 4),
            "patch_padding": (1, 1),
            "embed_dim": 16,
            "depths": (1, 4),
            "num_heads": (1, 2),
            "masked_unit_size": (2, 2),
            "query_stride": (2, 2),
            "num_query_pool": 1,
        },
    ),
    hf_row(
        hf.TimesformerForVideoClassification,
        "timesformer.encoder.layer",
        video,
        {**SIZE, "image_size": 16, "patch_size": 8, "num_frames": 2},
    ),
    hf_row(
        hf.DetrModel,
        "decoder.layers",
        pixels(),
        {
            **Seq2Seq,
            "num_queries": 5,
            "use_timm_backbone": False,
            "backbone_config": hf.ResNetConfig(
                embedding_size=8, hidden_sizes=(8, 8, 8, 16), depths=(1, 1, 1, 1), out_features=["stage4"]
            ),
        },
    ),
    hf_row(
        hf.FNetForSequenceClassification,
        "fnet.encoder.layer",
        lambda: {"input_ids": words(), "labels": classes()},
        Text,
    ),
    hf_row(
        hf.LongformerForSequenceClassification,
        "longformer.encoder.layer",
        BertText,
        {**Text, "attention_window": [4, 4, 4]},
    ),
    hf_row(
        hf.MobileBertForSequenceClassification,
        "mobilebert.encoder.layer",
        BertText,
        {
            **Text,
            "embedding_size": 32,
            "true_hidden_size": 32,
            "intra_bottleneck_size": 32,
            "num_feedforward_networks": 2,
        },
    ),
    hf_row(
        hf.XLNetForSequenceClassification,
        "transformer.layer",
        text(labels=classes, use_mems=no_cache),
        {"vocab_size": WORDS, "d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 64, "pad_token_id": 0},
    ),
    hf_row(
        hf.BloomForCausalLM,
        "transformer.h",
        CausalText,
        {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 3, "n_head": 2},
    ),
    hf_row(hf.MixtralForCausalLM, "model.layers", CausalText, {**Decoder, "num_local_experts": 4}),
    hf_row(
        hf.GptOssForCausalLM,
        "model.layers",
        CausalText,
        {**Decoder, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    hf_row(
        hf.WavLMForSequenceClassification, "wavlm.encoder.layers", sound("input_values", 400, labels=classes), Speech
    ),
    hf_row(
        hf.PerceiverModel,
        "encoder.self_attends",
        sound("inputs", 7, 16),
        {
            "d_model": 16,
            "d_latents": 32,
            "num_latents": 4,
            "num_blocks": 1,
            "num_self_attends_per_block": 3,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
        },
    ),
    hf_row(
        hf.PatchTSTForPrediction,
        "model.encoder.layers",
        lambda: {
            name: torch.randn(BATCH, steps, 2, generator=seeded())
            for name, steps in (("past_values", 32), ("future_values", 4))
        },
        {
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
            "num_input_channels": 2,
            "d_model": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "prediction_length": 4,
        },
    ),
]
