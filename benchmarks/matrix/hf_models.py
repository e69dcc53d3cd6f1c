"""Every Hugging Face model type whose model can be built tiny, one row for each kind of head it has.

Configs are shrunk by the rules of `hf_configs`, inputs follow from the forward as `hf_inputs` says; what the rules get
wrong about a single type stands in one entry of `OVERRIDES`, in the file of its domain.
"""

from __future__ import annotations

import copy
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from benchmarks.matrix import hf_audio, hf_multimodal, hf_text, hf_vision
from benchmarks.matrix.hf_configs import tiny_config
from benchmarks.matrix.hf_inputs import inputs
from benchmarks.matrix.hf_parts import PARTS
from benchmarks.matrix.row import Inputs, Row

OVERRIDES: dict[str, dict[str, Any]] = (
    hf_text.OVERRIDES | hf_vision.OVERRIDES | hf_audio.OVERRIDES | hf_multimodal.OVERRIDES
)
"""By model type, or by model type and task as "bert/masked-lm".

`config` holds fields with their values, and a dict of them for a sub-config; `inputs` is called with the config and
what the rules would feed, and returns what is fed; `tasks` lists the tasks, `classes` names the class of a task which
no auto class knows; `path`, `lengthen`, `last_round` and `loop` are those of a Row.
"""


def rows() -> list[Row]:
    return [_row(kind, task, name) for kind in CONFIG_MAPPING_NAMES for task, name in heads(kind).items()]


# -- heads -------------------------------------------------------------------------------------------------------------

LANGUAGE = {
    "seq2seq-lm": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech-seq2seq": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "image-text-to-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "multimodal-lm": auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "masked-lm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ctc": auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "rnnt": auto.MODEL_FOR_RNNT_MAPPING_NAMES,
    "tdt": auto.MODEL_FOR_TDT_MAPPING_NAMES,
    "text-to-spectrogram": auto.MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES,
    "text-to-waveform": auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
    "text-recognition": auto.MODEL_FOR_TEXT_RECOGNITION_MAPPING_NAMES,
    "time-series-prediction": auto.MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES,
}
CLASSES = {
    "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "video-classification": auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    "audio-classification": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "sequence-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "time-series-classification": auto.MODEL_FOR_TIME_SERIES_CLASSIFICATION_MAPPING_NAMES,
}
PLACES = {
    "pose-estimation": auto.MODEL_FOR_POSE_ESTIMATION_MAPPING_NAMES,
    "object-detection": auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    "universal-segmentation": auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
    "instance-segmentation": auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
    "semantic-segmentation": auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    "depth-estimation": auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,
    "normal-estimation": auto.MODEL_FOR_NORMAL_ESTIMATION_MAPPING_NAMES,
    "pointmap-estimation": auto.MODEL_FOR_POINTMAP_ESTIMATION_MAPPING_NAMES,
    "keypoint-detection": auto.MODEL_FOR_KEYPOINT_DETECTION_MAPPING_NAMES,
    "keypoint-matching": auto.MODEL_FOR_KEYPOINT_MATCHING_MAPPING_NAMES,
    "image-matting": auto.MODEL_FOR_IMAGE_MATTING_MAPPING_NAMES,
    "table-recognition": auto.MODEL_FOR_TABLE_RECOGNITION_MAPPING_NAMES,
    "image-to-image": auto.MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES,
    "zero-shot-object-detection": auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
    "mask-generation": auto.MODEL_FOR_MASK_GENERATION_MAPPING_NAMES,
    "masked-image-modeling": auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
    "backbone": auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
}
OTHERS = {
    "base": auto.MODEL_MAPPING_NAMES,
    "zero-shot-image-classification": auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "pretraining": auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
}


def heads(kind: str) -> dict[str, str]:
    """Class names by task: the first of each group that this model type has, its bare model where it has none."""
    entry = OVERRIDES.get(kind, {})
    chosen = dict(entry.get("classes", {}))
    if not chosen:
        chosen = dict(first for group in (LANGUAGE, CLASSES, PLACES) if (first := _first(kind, group)))
    if not chosen and (other := _first(kind, OTHERS)):
        chosen = dict([other])
    if not chosen and kind in PARTS:
        chosen = {"causal-lm" if PARTS[kind].endswith("CausalLM") else "base": PARTS[kind]}
    return {task: name for task, name in chosen.items() if task in entry.get("tasks", chosen)}


def _first(kind: str, group: dict[str, Any]) -> tuple[str, str] | None:
    for task, names in group.items():
        if kind in names:
            return task, names[kind] if isinstance(names[kind], str) else names[kind][0]
    return None


# -- rows --------------------------------------------------------------------------------------------------------------


def _row(kind: str, task: str, name: str) -> Row:
    entry = override(kind, task)
    return Row(
        kind,
        partial(_make, kind, task, name),
        partial(_inputs, kind, task, name),
        entry.get("path", ""),
        lengthen=entry.get("lengthen", later_feature_maps),
        last_round=entry.get("last_round"),
        task=task,
        loop=entry.get("loop"),
    )


def later_feature_maps(model: nn.Module, times: int) -> None:
    """What single blocks made and a backbone or a head reads is read from the last cycle's."""
    for module in model.modules():
        blocks = getattr(getattr(module, "config", None), "num_hidden_layers", None)
        if blocks not in {len(each) for each in module.modules() if isinstance(each, nn.ModuleList)}:
            continue  # the list that was made longer is elsewhere, although all configs say they are deeper
        later = blocks - blocks // times
        if len(getattr(module, "stage_names", None) or ()) == blocks // times + 1:
            names = ["stem", *(f"stage{number}" for number in range(1, blocks + 1))]
            module.stage_names = module.config.stage_names = names
            module.config.out_indices = [index + later if index else 0 for index in module.config.out_indices]
        if hasattr(module, "deepstack_visual_indexes"):
            module.deepstack_visual_indexes = [index + later for index in module.deepstack_visual_indexes]


def override(kind: str, task: str) -> dict[str, Any]:
    return OVERRIDES.get(kind, {}) | OVERRIDES.get(f"{kind}/{task}", {})


def _make(kind: str, task: str, name: str) -> nn.Module:
    return _class(kind, name)(_config(kind, task))


def _inputs(kind: str, task: str, name: str) -> Inputs:
    return (), copy.deepcopy(_keywords(kind, task, name))


@lru_cache(maxsize=4)
def _keywords(kind: str, task: str, name: str) -> dict[str, Any]:
    change = override(kind, task).get("inputs")
    config = _config(kind, task)
    try:
        found = inputs(_class(kind, name), config, task)
    except Exception:  # the rules do not know this one, its entry does
        if change is None:
            raise
        found = {}
    return change(config, found) if change else found


def _config(kind: str, task: str) -> hf.PretrainedConfig:
    return tiny_config(getattr(hf, CONFIG_MAPPING_NAMES[kind]), override(kind, task).get("config"))


def _class(kind: str, name: str) -> type[nn.Module]:
    if hasattr(hf, name):
        return getattr(hf, name)
    config_module = getattr(hf, CONFIG_MAPPING_NAMES[kind]).__module__
    return getattr(import_module(config_module.replace(".configuration_", ".modeling_")), name)
