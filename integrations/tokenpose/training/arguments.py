"""The arguments of a pose training, each with its reason.

The defaults are those of the paper's code (SDPose, CVPR 2024, section 4.1.2, and its released settings for COCO).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from cyclekd.integrations.runs.arguments import KeyValues, add_run_arguments, require_ranges
from cyclekd.integrations.runs.errors import RunError

FIRST_LOOK: dict[str, Any] = {
    "model": "sdpose_t",
    "model_args": {"input_size": (64, 48), "depth": 4, "stage1_width": 32},
    "cycles": 2,
    "epochs": 10,
    "lr_drop_epochs": [7, 9],
    "warmup_steps": 50,
    "batch_size": 32,
    "log_every": 20,
    "sigma": 1.0,
    "rotation": 20.0,
    "half_body": 0.0,
}
"""Without `--data`: a model and a length for the synthetic figures, on two CPU cores."""

FIGURES = {"train": 4000, "val": 300}
"""Synthetic images in the first look."""


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """All settings of a run; without `--data` those not given are of the first look, with it of the recipe."""
    parser = argparse.ArgumentParser(
        usage="accelerate launch %(prog)s [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_cycle_arguments(parser)
    add_optimisation_arguments(parser)
    add_augmentation_arguments(parser)
    add_evaluation_arguments(parser)
    add_run_arguments(parser)
    known, _ = parser.parse_known_args(arguments)
    if known.data is None:
        parser.set_defaults(**FIRST_LOOK)
    return parser.parse_args(arguments)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the data").add_argument
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="in COCO's layout: annotations/person_keypoints_train2017.json, ..._val2017.json, train2017, val2017; or "
        "CrowdPose's (default: synthetic figures, drawn into the run folder, with settings to fit: "
        + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in FIRST_LOOK.items())
        + ")",
    )
    for split, what in (("train", "to learn from"), ("val", "to evaluate on after each epoch")):
        name = f"--{split}-annotations"
        add(name, type=Path, metavar="FILE", help=f"any COCO key point file {what}, instead of the one in --data")
        add(f"--{split}-images", type=Path, metavar="FOLDER", help="and its images")
    add("--cache-dir", type=Path, metavar="FOLDER", help="of the cut people (default: --data's .cyclekd)")
    add("--no-cache", action="store_true", help="cut people from the photographs in every epoch")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add("--model", default="sdpose_s_v1", metavar="NAME", help="of list_models() (default: sdpose_s_v1)")
    add(
        "--model-args",
        nargs="+",
        default={},
        action=KeyValues,
        metavar="NAME=VALUE",
        help="fields of its preset to change, such as input_size=128,96 depth=6; how many key points the data says",
    )
    add("--pretrained-backbone", action="store_true", help="ImageNet weights for HRNet and ResNet, from the hub")
    add(
        "--init-from",
        type=Path,
        metavar="FOLDER",
        help="start from a model of save_pretrained, such as the model/ of an earlier run",
    )
    add("--new-head", action="store_true", help="take over what fits of --init-from, for other key points")


def add_cycle_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cycles").add_argument
    add(
        "--cycles",
        type=int,
        metavar="N",
        help="passes through the blocks in training, each learning from the next; the saved model makes one. 1 is the "
        "plain baseline (default: the model's, 2 or 3 for sdpose_* and else 1)",
    )
    add(
        "--alpha",
        type=float,
        default=5e-6,
        help="weight of the token term, for keypoint and visual tokens alike; the paper's, and right for heat maps "
        "alone (default: 5e-6)",
    )
    add("--rho", type=float, help="weight relative to task loss and token variance, instead of --alpha")


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimisation", "Adam, a rate in three steps.").add_argument
    add("--epochs", type=int, default=300, metavar="N", help="CrowdPose is mostly trained for 210 (default: 300)")
    add("--batch-size", type=int, default=64, metavar="N", help="people per process; the paper had 8 (default: 64)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step, where memory is short (default: 1)")
    add("--lr", type=float, default=1e-3, help="for whatever global batch: the paper does not scale it (default: 1e-3)")
    add(
        "--lr-drop-epochs",
        type=int,
        nargs="*",
        default=[200, 260],
        metavar="N",
        help="after which the rate is a tenth (default: 200 260)",
    )
    add("--warmup-steps", type=int, default=500, metavar="N", help="of a rate that rises from 0 (default: 500)")
    add(
        "--sigma",
        type=float,
        default=2.0,
        metavar="PIXELS",
        help="of the heat maps' Gaussians, in their pixels; less for maps smaller than 64x48 (default: 2)",
    )
    add("--clip-grad", type=float, metavar="X", help="largest norm of the gradient (default: none, as in the paper)")


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation", "Of a person's box, in this order.").add_argument
    add("--shift", type=float, default=0.3, metavar="P", help="probability of up to 0.16 of the box (default: 0.3)")
    add("--flip", type=float, default=0.5, metavar="P", help="probability; left becomes right (default: 0.5)")
    add("--half-body", type=float, default=0.3, metavar="P", help="probability of one half alone (default: 0.3)")
    add("--scale", type=float, default=0.35, metavar="X", help="largest change of the size (default: 0.35)")
    add("--rotation", type=float, default=45.0, metavar="DEGREES", help="deviation, 6 times in 10 (default: 45)")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation", "Of every cycle, on ground-truth boxes unless others are given.")
    add = add.add_argument
    add("--boxes", type=Path, metavar="FILE", help="a detector's, COCO's result format; the figures then say so")
    add("--no-flip-test", action="store_true", help="do not average with the mirrored image: half the time")


RANGES = {
    "epochs": (1, math.inf),
    "cycles": (1, math.inf),
    "lr": (0, math.inf),
    "alpha": (0, math.inf),
    "rho": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "sigma": (0.1, math.inf),
    "shift": (0, 1),
    "flip": (0, 1),
    "half_body": (0, 1),
    "scale": (0, 0.99),
    "rotation": (0, 180),
}
"""Least and largest value of arguments that nothing else checks before the first step."""


def check_arguments(args: argparse.Namespace) -> None:
    """Errors: RunError for a number out of range, and for arguments that say nothing together."""
    require_ranges(args, RANGES)
    for split in ("train", "val"):
        given = [getattr(args, f"{split}_{what}") for what in ("annotations", "images")]
        if (given[0] is None) != (given[1] is None):
            raise RunError(f"--{split}-annotations and --{split}-images go together: give both")
        if args.data is None and given[0] is not None:
            raise RunError(f"--{split}-annotations: goes with --data, the folder that the rest is in")
    if args.new_head and args.init_from is None:
        raise RunError("--new-head: goes with --init-from; without it every head is new")
    if args.pretrained_backbone and args.init_from is not None:
        raise RunError("--pretrained-backbone, --init-from: both name weights to start from; leave one out")
