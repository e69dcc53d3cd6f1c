"""What a Hugging Face model is fed, read off its forward's signature, its config and the task."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.matrix.hf_configs import FIRST_TOKENS, every_config, lookup
from benchmarks.matrix.row import noise, seeded

Keywords = dict[str, Any]
BATCH = 3
TOKENS = 7
PLAIN_WORDS = (len(FIRST_TOKENS), 60)
"""Ids from the first to below the second stand for no special token."""


def inputs(model_class: type[nn.Module], config: hf.PretrainedConfig, task: str) -> Keywords:
    """Keyword arguments of one training forward, labels among them where the class has any for this task."""
    accepted = inspect.signature(model_class.forward).parameters
    given = _main_inputs(model_class, accepted, config, task)
    given |= {name: value for name, value in CONSTANT.items() if name in accepted}
    for name in SOUND_MASKS:
        if name in accepted and "input_features" in given:
            given[name] = torch.ones(BATCH, frames(config, given["input_features"]), dtype=torch.long)
    if "input_ids" in given:
        given |= _with_images(model_class, accepted, config, given)
    for name, parameter in accepted.items():
        if name in EXTRAS and name not in given and (parameter.default is parameter.empty or name in ALWAYS):
            given[name] = EXTRAS[name](config, given)
    if task == "sequence-classification" and getattr(config, "is_encoder_decoder", False):
        given["input_ids"][:, -1] = FIRST_TOKENS["eos"]  # what is classified
    given |= _masks(accepted, given)
    labels = LABELS.get(task)
    if labels is not None:
        given |= {name: value for name, value in labels(config, given).items() if name in accepted}
    return given


SOUND_MASKS = ("input_features_mask", "feature_attention_mask")
CONSTANT: Keywords = {"use_cache": False, "use_mems": False, "return_loss": True}


# -- the kinds of things they are fed ----------------------------------------------------------------------------------


def _main_inputs(model_class: Any, accepted: Any, config: hf.PretrainedConfig, task: str) -> Keywords:
    given = {name: make(config) for name, make in MAIN.items() if name in accepted}
    if model_class.main_input_name != "input_ids" and lookup(config, "vocab_size") is None:
        given.pop("input_ids", None)
    if "pixel_values" in given and lookup(config, "audio_config") is None:
        given.pop("input_features", None)
    if "decoder_input_ids" in accepted and not ("labels" in accepted and task in LABELS):
        given["decoder_input_ids"] = words()
    return given


def words(length: int = TOKENS, high: int = PLAIN_WORDS[1]) -> Tensor:
    return torch.randint(PLAIN_WORDS[0], high, (BATCH, length), generator=seeded())


def classes(count: int = 2) -> Tensor:
    return torch.randint(count, (BATCH,), generator=seeded())


def vision_part(config: hf.PretrainedConfig) -> hf.PretrainedConfig:
    """The part of a config which says what images look like."""
    parts = list(every_config(config))
    named = [getattr(config, name, None) for name in ("vision_config", "vision", "encoder")]
    candidates = [part for part in [*named, *parts] if part is not None]
    return next((part for part in candidates if hasattr(part, "patch_size") or hasattr(part, "image_size")), config)


def image_size(config: hf.PretrainedConfig) -> tuple[int, int]:
    part = vision_part(config)
    size = getattr(part, "image_size", None) or lookup(config, "image_size", "img_size") or 64
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def channels(config: hf.PretrainedConfig) -> int:
    part = vision_part(config)
    found = next((getattr(part, n) for n in ("num_channels", "in_channels", "in_chans") if hasattr(part, n)), None)
    return found if isinstance(found, int) else 3


def pixels(config: hf.PretrainedConfig) -> Tensor:
    frames = lookup(config, "num_frames")
    shape = (BATCH, channels(config), *image_size(config))
    if frames and getattr(config, "model_type", "") in VIDEO:
        return noise(BATCH, frames, *shape[1:])
    return noise(*shape)


VIDEO = {"videomae", "timesformer", "vivit", "vjepa2", "tvp", "xclip"}


def waveform(config: hf.PretrainedConfig) -> Tensor:
    if lookup(config, "max_length") and lookup(config, "num_mel_bins"):
        return noise(BATCH, config.max_length, config.num_mel_bins)
    if lookup(config, "audio_channels", "upsampling_ratios", "downsampling_ratios"):
        return noise(BATCH, 1, 3200)
    return noise(BATCH, 3200)


def spectrogram(config: hf.PretrainedConfig) -> Tensor:
    if lookup(config, "max_source_positions") and lookup(config, "input_feat_per_channel") is None:
        return noise(BATCH, bins(config), 2 * lookup(config, "max_source_positions"))
    return noise(BATCH, 64, bins(config))


def bins(config: hf.PretrainedConfig) -> int:
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "n_mels")
    return lookup(config, *names) or 16


def frames(config: hf.PretrainedConfig, sound: Tensor) -> int:
    return sound.shape[-1] if sound.shape[-1] != bins(config) else sound.shape[-2]


MAIN: dict[str, Callable[[hf.PretrainedConfig], Tensor]] = {
    "input_ids": lambda config: words(),
    "pixel_values": pixels,
    "input_values": waveform,
    "input_features": spectrogram,
    "past_values": lambda config: noise(
        BATCH, lookup(config, "context_length") or 32, lookup(config, "num_input_channels") or 1
    ),
}


# -- images in a text --------------------------------------------------------------------------------------------------


def _with_images(model_class: Any, accepted: Any, config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """The text with as many placeholders as the model makes tokens of its images and sounds; asked of the model."""
    found: Keywords = {}
    if "image_grid_thw" in accepted and "pixel_values" in given:
        found |= patches(config)
    if "image_sizes" in accepted and lookup(config, "image_grid_pinpoints"):
        found["image_sizes"] = torch.tensor([image_size(config)] * BATCH)
    if getattr(model_class.main_input_name, "__len__", None) is None:
        return found
    media = {**given, **found}
    text = media["input_ids"]
    for kind, name in (("image", "pixel_values"), ("audio", "input_features")):
        token = special_token(config, kind)
        if token is None or name not in media:
            continue
        count = features(model_class, config, kind, media)
        if count:
            text = torch.cat([text[:, :1], torch.full((BATCH, count), token), text[:, 1:]], 1)
    if "mm_token_type_ids" in accepted:
        token = special_token(config, "image")
        found["mm_token_type_ids"] = (text == token).long() if token is not None else torch.zeros_like(text)
    return {**found, "input_ids": text}


def special_token(config: hf.PretrainedConfig, kind: str) -> int | None:
    return lookup(config, f"{kind}_token_id", f"{kind}_token_index")


def patches(config: hf.PretrainedConfig) -> Keywords:
    """Images as rows of patches, four by four of them."""
    part = vision_part(config)
    per_patch = channels(config) * (getattr(part, "temporal_patch_size", None) or 1) * part.patch_size**2
    return {"pixel_values": noise(BATCH * 16, per_patch), "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}


def features(model_class: Any, config: hf.PretrainedConfig, kind: str, media: Keywords) -> int:
    """Tokens that the model makes of one image, or of one sound; 0 where it does not say."""
    model = model_class(copy.deepcopy(config)).eval()
    ask = getattr(model, f"get_{kind}_features", None) or getattr(
        getattr(model, "model", None), f"get_{kind}_features", None
    )
    if ask is None:
        return 0
    accepted = inspect.signature(ask).parameters
    try:
        with torch.no_grad():
            made = ask(**{name: value for name, value in media.items() if name in accepted and name != "input_ids"})
    except Exception:  # the rules do not know its media; an entry that feeds words alone needs none
        return 0
    made = getattr(made, "pooler_output", made)
    found = sum(t.numel() for t in made) if isinstance(made, (list, tuple)) else made.numel()
    last = (made[0] if isinstance(made, (list, tuple)) else made).shape[-1]
    return found // last // BATCH


# -- what else a forward asks for --------------------------------------------------------------------------------------


def _masks(accepted: Any, given: Keywords) -> Keywords:
    """The last sequence is padded by two."""
    found: Keywords = {}
    if "attention_mask" in accepted and "input_ids" in given:
        mask = torch.ones_like(given["input_ids"])
        mask[-1, -2:] = 0
        found["attention_mask"] = mask
    return found


def boxes(config: hf.PretrainedConfig, given: Keywords) -> Tensor:
    corner = torch.randint(0, 8, (*given["input_ids"].shape, 2), generator=seeded())
    return torch.cat([corner, corner + 5], -1)


def embedded(config: hf.PretrainedConfig, given: Keywords) -> Tensor:
    return noise(BATCH, TOKENS, lookup(config, "hidden_size", "d_model"))


EXTRAS: dict[str, Callable[[hf.PretrainedConfig, Keywords], Any]] = {
    "bbox": boxes,
    "future_values": lambda config, given: noise(
        BATCH, lookup(config, "prediction_length") or 4, given["past_values"].shape[-1]
    ),
    "qformer_input_ids": lambda config, given: words(),
    "hidden_states": lambda config, given: patches(config)["pixel_values"],
    "inputs_embeds": embedded,
    "query_embeds": embedded,
    "encoder_hidden_states": embedded,
    "past_time_features": lambda config, given: noise(BATCH, given["past_values"].shape[1], 1),
    "past_observed_mask": lambda config, given: torch.ones_like(given["past_values"]),
    "grid_thw": lambda config, given: torch.tensor([[1, 4, 4]] * BATCH),
}
ALWAYS = {"bbox", "future_values"}


# -- labels ------------------------------------------------------------------------------------------------------------


def _label_words(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {"labels": torch.where(given["input_ids"] < PLAIN_WORDS[1], given["input_ids"], -100)}


def _other_words(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    """Of a decoder of its own; one that continues the text given is told that."""
    if "input_ids" in given and not getattr(config, "is_encoder_decoder", False):
        return _label_words(config, given)
    return {"labels": words(5, min(PLAIN_WORDS[1], lookup(config, "vocab_size") or PLAIN_WORDS[1]))}


def _label_class(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {"labels": classes(getattr(config, "num_labels", 2) or 2)}


def _label_tokens(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {"labels": given["input_ids"] % 2}


def _span(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    return {"start_positions": classes(3), "end_positions": classes(3) + 2}


def _objects(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    box = torch.rand(2, 4, generator=seeded()) * 0.3 + 0.3
    return {"labels": [{"class_labels": torch.tensor([0, 1]), "boxes": box} for _ in range(BATCH)]}


def _segments(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    size = given["pixel_values"].shape[-2:]
    return {"labels": torch.randint(2, (BATCH, *size), generator=seeded())}


def _masked_patches(config: hf.PretrainedConfig, given: Keywords) -> Keywords:
    part = vision_part(config)
    count = math.prod(image_size(config)) // part.patch_size**2
    return {"bool_masked_pos": torch.rand(BATCH, count, generator=seeded()) < 0.5}


LABELS: dict[str, Callable[[hf.PretrainedConfig, Keywords], Keywords]] = {
    "masked-lm": _label_words,
    "causal-lm": _label_words,
    "seq2seq-lm": _other_words,
    "image-text-to-text": _label_words,
    "multimodal-lm": _label_words,
    "speech-seq2seq": _other_words,
    "ctc": _other_words,
    "image-classification": _label_class,
    "video-classification": _label_class,
    "audio-classification": _label_class,
    "sequence-classification": _label_class,
    "token-classification": _label_tokens,
    "question-answering": _span,
    "object-detection": _objects,
    "semantic-segmentation": _segments,
    "masked-image-modeling": _masked_patches,
}
