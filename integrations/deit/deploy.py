"""The finished model: stock timm, safetensors, loadable without this library."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor

from cyclekd.integrations.deit.augment import AugmentSettings
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder, write_atomically


def save_plain_model(
    folder: RunFolder,
    weights: Mapping[str, Tensor],
    args: argparse.Namespace,
    classes: Sequence[str],
    settings: AugmentSettings,
) -> Path:
    """`model/` with model.safetensors and the config.json of timm's hub layout, in the run folder; its path.

    The weights go through a stock timm model with strict=True, which is what a user will do with them.
    Errors: RunError where the files cannot be written.
    """
    model = timm.create_model(args.model, num_classes=len(classes), **args.model_args)
    model.load_state_dict(dict(weights), strict=True)
    data = {
        "input_size": (3, settings.size, settings.size),
        "mean": settings.mean,
        "std": settings.std,
        "interpolation": settings.interpolation,
        "crop_pct": settings.crop_pct,
        "tag": None,  # timm's own, of weights that these are not
        "license": None,
    }
    model.pretrained_cfg = {**model.pretrained_cfg, **data}
    config = {"label_names": list(classes)}
    try:
        with TemporaryDirectory(prefix=".partial-", dir=folder.path) as partial:
            save_for_hf(model, partial, model_config=config, model_args=args.model_args, safe_serialization=True)
            folder.final.mkdir(exist_ok=True)
            for file in sorted(Path(partial).iterdir()):
                write_atomically(folder.final / file.name, file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder.final} could not be written: {error}; the checkpoints are as they were") from error
    return folder.final


def usage_of(args: argparse.Namespace, classes: int) -> str:
    """Code that loads the model with timm alone."""
    options = "".join(f", {name}={value!r}" for name, value in args.model_args.items())
    return (
        "import timm\n\n"
        f'model = timm.create_model("{args.model}", num_classes={classes}{options}, '
        'checkpoint_path="model/model.safetensors")\n'
        "logits = model.eval()(images)  # one pass, as in any timm model"
    )
