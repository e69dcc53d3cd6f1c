"""What the rules get wrong about single model types of audio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from benchmarks.matrix.hf_configs import lookup
from benchmarks.matrix.hf_inputs import BATCH, TOKENS, words
from benchmarks.matrix.hf_loops_multimodal import (
    guess_in_every_round,
    residual_units,
    residual_units_of_decoder,
    trend_of_last_round,
)
from benchmarks.matrix.row import noise

Config = hf.PretrainedConfig
Keywords = dict[str, Any]


def with_mask(config: Config, found: Keywords) -> Keywords:
    """A CTC loss counts the frames by the mask."""
    sound = found["input_features"]
    return {**found, "attention_mask": torch.ones(sound.shape[:2], dtype=torch.long)}


def projected(config: Config, found: Keywords) -> Keywords:
    return {**found, "input_features": noise(BATCH, 24, config.feature_projection_input_dim)}


def square_spectrogram(config: Config, found: Keywords) -> Keywords:
    return {**found, "input_features": noise(BATCH, 1, 128, 32)}


def series(config: Config, found: Keywords) -> Keywords:
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": noise(BATCH, past),
        "past_time_features": noise(BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": noise(BATCH, future),
        "future_time_features": noise(BATCH, future, config.num_time_features),
        "use_cache": False,
    }


def codes(config: Config, length: int) -> torch.Tensor:
    """One id of each codebook at a time."""
    return torch.stack([words(length)] * config.num_channels, -1)


def dialogue(config: Config, found: Keywords) -> Keywords:
    decoder = config.decoder_config
    labels = words(5).repeat_interleave(decoder.num_channels, 0)
    return {"input_ids": words(), "decoder_input_ids": codes(decoder, 5), "labels": labels, "use_cache": False}


def dialogue_codes(config: Config, found: Keywords) -> Keywords:
    return {"input_ids": codes(config, 5), "encoder_hidden_states": noise(BATCH, 7, config.cross_hidden_size)}


def text_and_codes(config: Config, found: Keywords) -> Keywords:
    text = torch.stack([words()] * (config.num_codebooks + 1), -1)
    return {"input_ids": text, "labels": words(), "use_cache": False}


def embedded_sound(config: Config, found: Keywords) -> Keywords:
    return {"input_features": noise(BATCH, 7, config.d_model), "labels": words(5), "use_cache": False}


def frames(name: str, width: str, channels_first: bool = False) -> Callable[[Config, Keywords], Keywords]:
    """Inputs of one argument: sound in frames, as wide as a field of the config says."""

    def inputs(config: Config, found: Keywords) -> Keywords:
        sound = noise(BATCH, 32, getattr(config, width))
        return {name: sound.transpose(1, 2) if channels_first else sound}

    return inputs


def mel_and_mask(config: Config, found: Keywords) -> Keywords:
    mask = torch.zeros(BATCH, 32, dtype=torch.bool)
    return {"audio_mel": noise(BATCH, 32, config.input_feat_size), "audio_mel_mask": mask}


def wave(name: str) -> Callable[[Config, Keywords], Keywords]:
    return lambda config, found: {name: noise(BATCH, 1, 3200)}


def wave_and_words(config: Config, found: Keywords) -> Keywords:
    return {"input_values": noise(BATCH, 3200), "labels": words(5), "use_cache": False}


def in_one_row(config: Config, found: Keywords) -> Keywords:
    """The frames of all sounds after each other."""
    return {"input_features": noise(config.num_mel_bins, BATCH * 32), "feature_lens": torch.full((BATCH,), 32)}


def spoken(config: Config, found: Keywords) -> Keywords:
    """Every sound of a text lasts two frames."""
    return {
        "input_ids": words(),
        "duration_labels": torch.full((BATCH, TOKENS), 2),
        "spectrogram_labels": noise(BATCH, 2 * TOKENS, lookup(config, "num_mel_bins")),
        "pitch_labels": noise(BATCH, TOKENS, 1),
        "energy_labels": noise(BATCH, TOKENS, 1),
    }


def text_as_deep_as_before(model: nn.Module, times: int) -> None:
    """Which of its hidden states is the last is counted from the depth in its config, which was told more."""
    model.text_model.config.num_hidden_layers //= times


FEW_FILTERS = {"num_filters": 4}
SQUARE = {"audio_config": {"hidden_size": 256, "num_mel_bins": 32, "spec_size": 64, "window_size": 2}}

OVERRIDES: dict[str, dict[str, Any]] = {
    "mimi": {"path": "decoder.decoder_transformer.layers"},
    "mimi_encoder": {"path": "encoder_transformer.layers"},
    "pocket_tts_audio_tokenizer": {"path": "decoder.decoder_transformer.layers"},
    "vibevoice_acoustic_tokenizer": {"config": FEW_FILTERS, "path": "decoder.stem.stage"},
    "dac": {"loop": residual_units},
    "xcodec": {"path": "acoustic_decoder.block.0.2:5", "loop": residual_units_of_decoder},
    "pe_audio": {"path": "audio_encoder.layers", "lengthen": text_as_deep_as_before},
    "pe_audio_encoder": {"path": "layers"},
    "parakeet_ctc": {"inputs": with_mask},
    "lasr_ctc": {"inputs": with_mask},
    "wav2vec2-bert": {"inputs": projected},
    "clap": {"config": SQUARE, "inputs": square_spectrogram},
    "clap_audio_model": {"config": SQUARE["audio_config"], "inputs": square_spectrogram},
    "dia": {"inputs": dialogue},
    "dia_decoder": {"inputs": dialogue_codes},
    "kyutai_speech_to_text": {"path": "model.layers", "config": {"num_codebooks": 2}, "inputs": text_and_codes},
    "pop2piano": {"inputs": embedded_sound},
    "moonshine_streaming": {"config": {"num_key_value_heads": 2}},
    "clvp_encoder": {"config": {"hidden_size": 64, "projection_dim": 64}},
    "speech-encoder-decoder": {"inputs": wave_and_words},
    "vibevoice_acoustic_tokenizer_encoder": {"config": FEW_FILTERS, "inputs": wave("hidden_states")},
    "vibevoice_acoustic_tokenizer_decoder": {
        "config": FEW_FILTERS,
        "path": "stem.stage",
        "inputs": frames("hidden_states", "hidden_size", channels_first=True),
    },
    "mimi_decoder": {
        "path": "decoder_transformer.layers",
        "inputs": frames("latents", "hidden_size", channels_first=True),
    },
    "pocket_tts_audio_tokenizer_decoder": {"inputs": frames("latents", "hidden_size", channels_first=True)},
    "granite_speech_encoder": {"inputs": frames("hidden_states", "input_dim"), "loop": guess_in_every_round},
    "granite_speech_plus_encoder": {"inputs": frames("hidden_states", "input_dim"), "loop": guess_in_every_round},
    "gemma3n_audio": {"inputs": mel_and_mask},
    "glmasr_encoder": {"inputs": frames("input_features", "num_mel_bins", channels_first=True)},
    "voxtral_realtime_encoder": {"inputs": frames("input_features", "num_mel_bins", channels_first=True)},
    "qwen2_5_omni_audio_encoder": {"inputs": in_one_row},
    "fastspeech2_conformer": {"inputs": spoken},
    "fastspeech2_conformer_with_hifigan": {
        "config": {"vocoder_config": {"model_in_dim": 16}},
        "path": "model.decoder.conformer_layers",
        "inputs": spoken,
    },
    "speecht5_hifigan": {"inputs": frames("spectrogram", "model_in_dim")},
    "fastspeech2_conformer_hifigan": {"inputs": frames("spectrogram", "model_in_dim")},
    "vits": {"config": {"vocab_size": 99}, "path": "text_encoder.encoder.layers"},
    "time_series_transformer": {"config": {"num_time_features": 1}, "inputs": series},
    "informer": {"config": {"num_time_features": 1, "attention_type": "full"}, "inputs": series},
    "autoformer": {"config": {"num_time_features": 1}, "inputs": series, "loop": trend_of_last_round},
}
