"""Pose models in folders and on the Hugging Face hub: config.json and model.safetensors, and no code.

A model of several cycles is saved as the plain model that it is, with its cycles in the config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import write_atomically
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.models.baselines import ConvPose
from cyclekd.integrations.tokenpose.models.config import ConvPoseConfig, PoseConfig, TokenPoseConfig, changed
from cyclekd.integrations.tokenpose.models.create import build
from cyclekd.integrations.tokenpose.models.tokenpose import TokenPose
from cyclekd.integrations.tokenpose.weights.layouts import check_numbers, some

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_CONFIG_CLASSES: dict[str, type[PoseConfig]] = {"TokenPose": TokenPoseConfig, "ConvPose": ConvPoseConfig}


def save_pretrained(model: nn.Module, folder: str | Path) -> Path:
    """config.json and model.safetensors of a pose model in `folder`, which is made where there is none; its path.

    The config holds every field, with the cycles and the `keep_rate` that the model has now. What was there before
    stays whole until it is replaced.
    Errors: PoseError for another kind of model, one wrapped in a way that the config cannot say, or where the folder
    cannot be written.
    """
    config = _current_config(model)
    architecture = next(name for name, cls in _CONFIG_CLASSES.items() if isinstance(config, cls))
    description = {"architecture": architecture, **asdict(config)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG, (json.dumps(description, indent=2) + "\n").encode())
    except (OSError, RunError) as error:
        raise PoseError(f"save_pretrained: {folder} cannot be written: {error}") from error
    return folder


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    strict: bool = True,
    **overrides: Any,
) -> nn.Module:
    """The model of a folder of `save_pretrained`, or of such a repository on the hub; in evaluation mode.

    `overrides` replace fields of its config, such as `cycles=1`, `cycles=3` or `keep_rate=0.5`. Those that change the
    shape of a tensor, such as `num_keypoints=14`, need `strict=False`: then such tensors begin at random, as in a new
    model. `revision` is a branch, tag or commit of a repository, and `cache_dir` where downloads are kept.
    Errors: PoseError for files that are missing, cannot be had or cannot be read, unknown fields, weights that do not
    fit the config, NaN and infinity.
    """
    config = changed(read_config(source, revision=revision, cache_dir=cache_dir), overrides)
    weights = _read_weights(_find(source, WEIGHTS, revision, cache_dir))
    model = build(config)
    own = model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if strict and (fitting.keys() != own.keys() or fitting.keys() != weights.keys()):
        raise PoseError(_why_not(source, weights, own, config, overrides))
    model.load_state_dict(fitting, strict=False)
    return model.eval()


def read_config(source: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None) -> PoseConfig:
    """The config alone of what `from_pretrained` loads; errors as there."""
    return _config_of(_find(source, CONFIG, revision, cache_dir))


def saved_model(source: str | Path) -> str | Path:
    """Of the folder of a training the one in it that has the model; any other source of a model as it is."""
    inside = Path(source) / "model"
    return inside if inside.is_dir() else source


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Add model",
) -> str:
    """Upload what `save_pretrained` writes to a repository on the hub, made where there is none; its address.

    `token` is that of the login where it is None. Errors: PoseError where it cannot be uploaded.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        api = HfApi(token=token)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise PoseError(f"push_to_hub: cannot upload to {repo_id}: {_first_line(error)}") from error
    return str(url)


def _current_config(model: nn.Module) -> PoseConfig:
    if not isinstance(model, TokenPose | ConvPose):
        raise PoseError(
            f"save_pretrained takes a model of create_model or from_pretrained, and got a {type(model).__name__}: "
            "take it out of DDP (model.module) or torch.compile (model._orig_mod)"
        )
    if isinstance(model.config, ConvPoseConfig):
        return model.config
    wrapped = getattr(model, "_cyclekd", None)  # set by wrap_multicycle
    if wrapped is None:
        return replace(model.config, cycles=1, keep_rate=model.keep_rate)
    if wrapped.paths != ["blocks"] or wrapped.inference_cycles != 1:
        raise PoseError(
            "save_pretrained saves cycles of stack='blocks' with inference_cycles=1, and this model has "
            f"{wrapped.paths} and {wrapped.inference_cycles}: unwrap_multicycle(model) first, and wrap the loaded one "
            "alike"
        )
    return replace(model.config, cycles=wrapped.cycles, keep_rate=model.keep_rate)


def _find(source: str | Path, name: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """The file of that name in a folder, or downloaded from a repository."""
    if not isinstance(source, str | Path):
        raise PoseError(f"from_pretrained({source!r}) takes a folder, or the name of a repository such as me/pose")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise PoseError(f"from_pretrained: {folder} has no {name}; save_pretrained writes {CONFIG} and {WEIGHTS}")
        return folder / name
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise PoseError(f"from_pretrained: there is no folder {source}, and no repository can be called so")
    try:
        return Path(hf_hub_download(source, name, revision=revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError as error:
        raise PoseError(
            f"from_pretrained: there is no folder {source}, and {name} of a repository of that name is not in the "
            "cache; the hub cannot be reached, or HF_HUB_OFFLINE is set"
        ) from error
    except EntryNotFoundError as error:
        raise PoseError(f"from_pretrained: the repository {source} has no {name}, as push_to_hub writes it") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise PoseError(
            f"from_pretrained: there is no folder {source}, and {name} of a repository of that name cannot be had: "
            f"{_first_line(error)}"
        ) from error


def _config_of(path: Path) -> PoseConfig:
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PoseError(f"{path} cannot be read as JSON: {error}") from error
    seen = description.get("architecture") if isinstance(description, dict) else description
    if not isinstance(seen, str) or seen not in _CONFIG_CLASSES:
        raise PoseError(f'{path}: "architecture" has to be one of {", ".join(_CONFIG_CLASSES)}, and is {seen!r}')
    cls = _CONFIG_CLASSES[description.pop("architecture")]
    names = {each.name for each in fields(cls)}
    if unknown := sorted(description.keys() - names):
        raise PoseError(
            f"{path} has {', '.join(unknown)}, which no {cls.__name__} has: was it saved by a later version?"
        )
    if not isinstance(description.get("name"), str):
        raise PoseError(f"{path} has no name, such as tokenpose_s_v1")
    try:
        return cls(**description)
    except PoseError as error:
        raise PoseError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PoseError(f"{path} cannot be read as safetensors: {error}") from error
    check_numbers(weights, str(path))
    return weights


def _why_not(
    source: str | Path,
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    config: PoseConfig,
    overrides: Mapping[str, Any],
) -> str:
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    counts = {
        "missing": [name for name in own if name not in weights],
        "surplus": [name for name in weights if name not in own],
        "of another shape": shapes,
    }
    wrong = "; ".join(f"{what} {some(names, most=2)}" for what, names in counts.items() if names)
    if not overrides:
        return f"the weights of {source} do not fit the {CONFIG} beside them, which is of {config.name}: {wrong}"
    asked = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
    return (
        f"from_pretrained({str(source)!r}, {asked}) makes other tensors than there are weights for: {wrong}. Leave "
        "that out, or add strict=False to begin with random weights in these and to take over all others"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
