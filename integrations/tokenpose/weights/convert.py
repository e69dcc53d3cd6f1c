"""Turn a published checkpoint into a folder that `from_pretrained` reads.

    python -m cyclekd.integrations.tokenpose.weights.convert FILE FOLDER --model NAME [--set attention_scale=dim]

Seconds, on a CPU; nothing is downloaded, and no code out of the file is run.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.models.config import changed, config_for
from cyclekd.integrations.tokenpose.models.create import build
from cyclekd.integrations.tokenpose.weights.hub import save_pretrained
from cyclekd.integrations.tokenpose.weights.reference import load_reference_checkpoint, reference_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the arguments say; the exit code, 2 where the file cannot be converted."""
    args = parse_arguments(arguments)
    try:
        convert(args.file, args.folder, args.model, dict(args.set), partial=args.partial)
    except PoseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(file: Path, folder: Path, name: str | None, overrides: dict[str, Any], *, partial: bool = False) -> None:
    """Load, report on stdout, save. Errors: PoseError; then nothing is written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PoseError(f"{folder} is there already and not empty: give a new folder")
    if name is None:
        name, seen = reference_model(file)
        overrides = seen | overrides
    model = build(changed(config_for(name), overrides))
    settings = "".join(f", {field}={value!r}" for field, value in overrides.items())
    print(f'model            create_model("{name}"{settings})')
    print(load_reference_checkpoint(model, file, strict=not partial))
    save_pretrained(model, folder)
    print(f'written          {folder}: load it with from_pretrained("{folder}")')


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cyclekd.integrations.tokenpose.weights.convert",
        description="Turn a published checkpoint of TokenPose, SDPose, PPT or DistilPose into config.json and "
        "model.safetensors, and say what became of every tensor.",
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help=".pth or .safetensors, also a whole training checkpoint"
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write; must be new or empty")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the model it is of, as in create_model, such as sdpose_s_v1 (default: read from the tensors, where one "
        "alone has such; SDPose and PPT share theirs)",
    )
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="a setting in which it differs, and again for each: attention_scale=dim for the official S models, "
        "num_keypoints=14, input_size=384,288",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="write it even where tensors are missing, surplus or of another shape; these begin at random",
    )
    return parser.parse_args(arguments)


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE, such as num_keypoints=14")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value  # a word, such as dim


if __name__ == "__main__":
    sys.exit(main())
