"""The arguments of a pose training, each with its reason.

The defaults are those of the paper's code (SDPose, CVPR 2024, section 4.1.2, and its released settings for COCO).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from textwrap import wrap
from typing import Any

from cyclekd.integrations.runs.arguments import KeyValues, add_run_arguments, option, refuse_given, require_ranges
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.tokenpose.evaluation.arguments import check_shared_arguments
from cyclekd.integrations.tokenpose.models.config import PRESETS, PoseConfig, TokenPoseConfig

FIRST_LOOK: dict[str, Any] = {
    "model": "sdpose_t",
    "model_args": {
        "input_size": (64, 48),
        "backbone": "hrnet_w18_small",
        "stage1_width": 32,
        "depth": 3,
        "dim": 96,
        "heads": 4,
    },
    "cycles": 2,
    "epochs": 16,
    "lr_drop_epochs": [12, 15],
    "evaluate_every": 4,
    "warmup_steps": 50,
    "batch_size": 32,
    "log_every": 20,
    "threads": 2,
    "shift": 0.0,
    "half_body": 0.0,
    "scale": 0.1,
    "rotation": 0.0,
}
"""Without `--data`: a model and a length for the synthetic figures, on two CPU cores."""

FIGURES = {"train": 3000, "val": 200, "calm": True}
"""Synthetic images in the first look."""


RECIPE_BATCH = {"sdpose_s_v2": 8 * 24, "sdpose_b": 8 * 32, "sdpose_b_narrow": 8 * 32}
"""The paper's global batches where they are not 8 x 64, as in its released settings; the text has 8 x 64 for all."""


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """All settings of a run; without `--data` those not given are of the first look, with it of the recipe."""
    parser = argparse.ArgumentParser(
        usage="accelerate launch %(prog)s [options]",
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=112),
    )
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_cycle_arguments(parser)
    add_optimisation_arguments(parser)
    add_augmentation_arguments(parser)
    add_evaluation_arguments(parser)
    add_run_arguments(parser)
    known, _ = parser.parse_known_args(arguments)
    defaults = first_look(known) if is_first_look(known) else {}
    parser.set_defaults(**defaults)
    args = parser.parse_args(arguments)
    args.model_args = {**defaults.get("model_args", {}), **args.model_args}  # a field that is given leaves the others
    return args


def first_look(args: argparse.Namespace) -> dict[str, Any]:
    """`FIRST_LOOK`, without what belongs to its small model where another is asked for."""
    another = args.model is not None or args.init_from is not None
    of_model = ("model", "model_args", "cycles")
    return {name: value for name, value in FIRST_LOOK.items() if not (another and name in of_model)}


def is_first_look(args: argparse.Namespace) -> bool:
    """Whether it is about synthetic figures, as neither a folder nor files are given."""
    return args.data is None and args.train_annotations is None and args.val_annotations is None


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    text = (
        "A folder in COCO's layout has annotations/person_keypoints_train2017.json and ..._val2017.json beside the\n"
        "images in train2017/ and val2017/; in CrowdPose's, crowdpose_trainval.json and ..._test.json beside images/.\n"
        "The annotations say what the key points are: names, flip pairs, sigmas for AP.\n"
        "Without --data figures are drawn into runs/synthetic-figures, and these settings take the place of the\n"
        "defaults below: " + ", ".join(f"{option(name)} {_shown(value)}" for name, value in FIRST_LOOK.items()) + ".\n"
        "Another --model, or one of --init-from, comes without this --model-args and --cycles."
    )
    add = parser.add_argument_group("the data", fill(text)).add_argument
    add("--data", type=Path, metavar="FOLDER", help="with annotations and images of both splits")
    for split, what in (("train", "to learn from"), ("val", "to evaluate on")):
        add(f"--{split}-annotations", type=Path, metavar="FILE", help=f"of the people {what}, in place of --data's")
        add(f"--{split}-images", type=Path, metavar="FOLDER", help="that goes with it")
    add(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="where people are kept who were cut out of the photographs, once for all runs (default: .cyclekd beside "
        "the annotations, or runs/cache where that cannot be written)",
    )
    add(
        "--cache-pixels",
        action="store_true",
        help="keep them as pixels, not as JPEG files: 3 to 4.5 times as fast to read, in five to seven times the space",
    )
    add("--no-cache", action="store_true", help="cut people out of the photographs again in every epoch")
    add(
        "--exact-crops",
        action="store_true",
        help="interpolate on the CPU, from whole photographs, as the paper's code does with OpenCV, in place of the "
        "cache and the device: slow, to compare with",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add(
        "--model",
        metavar="NAME",
        help=f"one of {', '.join(PRESETS)} (default: sdpose_s_v1, or what --init-from holds). Those that predict "
        "coordinates learn with RLE; tokenreg_s does with --model-args head=rle",
    )
    add(
        "--model-args",
        action=KeyValues,
        help="fields of it to change, such as input_size=128,96 (height, width) or depth=6",
    )
    add(
        "--pretrained-backbone",
        action="store_true",
        help="begin with ImageNet weights in HRNet or ResNet, from the hub",
    )
    add(
        "--init-from",
        type=Path,
        metavar="FOLDER",
        help="of an earlier run, or of save_pretrained, with whose weights to begin",
    )
    add(
        "--new-head",
        action="store_true",
        help="of these weights take over those that fit, for other key points or --model-args; the others are listed",
    )


def add_cycle_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cycles").add_argument
    add(
        "--cycles",
        type=int,
        metavar="N",
        help="passes through the blocks in training, each learning from the next; the saved model makes one. 1 is the "
        "plain baseline (default: the model's, 2 or 3 for sdpose_* and 1 for others)",
    )
    add(
        "--alpha",
        type=float,
        metavar="X",
        help="weight of the distance between cycles' tokens, for keypoint and for visual tokens (default: 5e-6, as "
        "in the paper; right for heat maps of 64x48)",
    )
    add(
        "--rho",
        type=float,
        metavar="X",
        help="in place of --alpha: relative to task loss and token variance, about 0.3",
    )


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    text = "Adam without weight decay. The paper has a global batch of 512 (8 GPUs) and one rate for every batch."
    add = parser.add_argument_group("optimisation", text).add_argument
    add(
        "--epochs", type=int, default=300, metavar="N", help="300 in the paper; CrowdPose has mostly 210 (default: 300)"
    )
    add("--batch-size", type=int, default=64, metavar="N", help="people per process and batch (default: 64)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step, in place of more GPUs (default: 1)")
    add("--lr", type=float, default=1e-3, metavar="X", help="not scaled with the batch (default: 1e-3)")
    add(
        "--lr-drop-epochs",
        type=int,
        nargs="*",
        default=[200, 260],
        metavar="N",
        help="after which the rate is a tenth of what it was (default: 200 260)",
    )
    add(
        "--warmup-steps",
        type=int,
        default=500,
        metavar="N",
        help="in which the rate rises from a thousandth (default: 500)",
    )
    add(
        "--sigma",
        type=float,
        metavar="PIXELS",
        help="of the Gaussians in the heat maps, in pixels of these (default: 2 for maps of 64x48, as in the paper, "
        "for others in proportion to their height, at least 1)",
    )
    add("--clip-grad", type=float, metavar="X", help="largest norm of the gradient (default: none, as in the paper)")


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    text = "Of a person's box, in this order. CrowdPose's defaults are mmpose's, as the paper does not tell its own."
    add = parser.add_argument_group("augmentation", text).add_argument
    add("--shift", type=float, metavar="P", help="probability of a shift by up to 0.16 of the box (default: 0.3)")
    add("--flip", type=float, metavar="P", help="probability of mirroring, which exchanges sides (default: 0.5)")
    add(
        "--half-body",
        type=float,
        metavar="P",
        help="probability of the upper or lower half alone, where more than 8 key points are labelled (CrowdPose: 6) "
        "(default: 0.3)",
    )
    add("--scale", type=float, metavar="X", help="deviation and limit of the zoom (default: 0.35, CrowdPose: 0.5)")
    add(
        "--rotation",
        type=float,
        metavar="DEGREES",
        help="deviation, and half the limit, in 6 of 10 cases (default: 45, CrowdPose: 40)",
    )


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    text = (
        "COCO's AP and AR of every cycle (CrowdPose's by crowding), after each --evaluate-every epochs. Figures of\n"
        "ground-truth boxes are higher than the published ones, which are of a detector's."
    )
    add = parser.add_argument_group("evaluation", fill(text)).add_argument
    add(
        "--boxes",
        type=Path,
        metavar="FILE",
        help="a detector's boxes of the validation images, a JSON list of {image_id, category_id, bbox, score} "
        "(default: the ground truth's)",
    )
    add("--box-score", type=float, metavar="X", help="least score of --boxes that count (default: 0, as in the paper)")
    add("--no-flip-test", action="store_true", help="do not average with the mirrored image, a second pass")


def fill(text: str) -> str:
    """In lines that fit a page; argparse leaves descriptions as they are."""
    return "\n".join(wrap(" ".join(text.split()), 108))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_shown(each).replace(' ', ',')}" for name, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


RANGES = {
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
    drops = args.lr_drop_epochs
    if sorted({*drops}) != drops or any(epoch < 1 for epoch in drops):
        raise RunError(f"--lr-drop-epochs {' '.join(map(str, drops))}: these are epochs from 1 on, in order")
    for split in ("train", "val"):
        given = [getattr(args, f"{split}_{what}") for what in ("annotations", "images")]
        if (given[0] is None) != (given[1] is None):
            raise RunError(f"--{split}-annotations and --{split}-images go together: give both")
    missing = [split for split in ("train", "val") if getattr(args, f"{split}_annotations") is None]
    if args.data is not None and not missing:
        raise RunError(f"--data {args.data}: the annotations and images of both splits are given too; leave it out")
    if args.data is None and len(missing) == 1:
        raise RunError(
            f"--{missing[0]}-annotations, --{missing[0]}-images: give them too, or --data, which has both splits"
        )
    if args.init_from is None:
        refuse_given(args, {"new_head": False}, "goes with --init-from; without it every head is new")
    if args.pretrained_backbone and args.init_from is not None:
        raise RunError("--pretrained-backbone, --init-from: both name weights to begin with; leave one out")
    if args.alpha is not None and args.rho is not None:
        raise RunError("--alpha, --rho: both weigh the tokens; leave one out")
    check_shared_arguments(args)
    if args.no_cache or args.exact_crops:
        of_cache = {"cache_pixels": False, "cache_dir": None}
        refuse_given(args, of_cache, "there is no cache with --no-cache or --exact-crops; leave these or those out")


def check_objective(args: argparse.Namespace, config: PoseConfig) -> None:
    """Errors: RunError for a weight of tokens where the model has one cycle, and for --sigma where it has no heat maps.

    `config` is that of the model before --cycles and --model-args.
    """
    if (args.cycles or config.cycles) == 1:
        way_out = "write --cycles 2, or leave it out" if isinstance(config, TokenPoseConfig) else "leave it out"
        why = f"weighs the tokens of one cycle against the next one's, and {config.name} has 1 here: {way_out}"
        refuse_given(args, {"alpha": None, "rho": None}, why)
    if (head := args.model_args.get("head", config.head)) != "heatmap":
        why = (
            f"is of the Gaussians in heat maps, and the {head} head of {config.name} predicts coordinates; leave it out"
        )
        refuse_given(args, {"sigma": None}, why)


def recipe_warnings(args: argparse.Namespace, name: str, global_batch: int, steps: int) -> list[str]:
    """What to know where a run on data of one's own is not as the paper's of the model called `name`."""
    found = []
    recipe = RECIPE_BATCH.get(name, 8 * 64)
    if global_batch != recipe and not is_first_look(args):
        more = "" if recipe % global_batch else f": --accumulate {args.accumulate * recipe // global_batch} makes it so"
        found.append(f"the global batch is {global_batch}, and the paper's {recipe} at a rate of 1e-3{more}")
    if args.warmup_steps >= steps:
        found.append(f"the rate rises for --warmup-steps {args.warmup_steps}, and the run ends after {steps}")
    if args.lr_drop_epochs and args.lr_drop_epochs[-1] >= args.epochs:
        found.append(f"--lr-drop-epochs {args.lr_drop_epochs[-1]} is not reached in {args.epochs} epochs")
    return found
