"""The arguments of an evaluation, each with its reason.

A training evaluates too: what both say of boxes and crops is checked and read here for both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cyclekd.integrations.runs.arguments import KeyValues, refuse_given, require_ranges
from cyclekd.integrations.runs.errors import RunError


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """What is evaluated, how, and what is written."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_arguments_of_prediction(parser)
    add_output_arguments(parser)
    return parser.parse_args(arguments)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add("--model", metavar="FOLDER|NAME", help="of a training, of save_pretrained, or a repository on the hub")
    add("--checkpoint", type=Path, metavar="FILE", help="published weights of TokenPose, SDPose, PPT or DistilPose")
    add("--preset", metavar="NAME", help="of list_models(), that --checkpoint is of (default: what its tensors tell)")
    add(
        "--model-args",
        action=KeyValues,
        help="fields of its config to change, such as keep_rate=0.5, or for a preset input_size=384,288",
    )
    add("--cycles", type=int, metavar="N", help="to evaluate, each on its own (default: as many as it was trained in)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the data").add_argument
    add("--data", type=Path, metavar="FOLDER", help="in COCO's or CrowdPose's layout: its val, or test, split")
    add("--annotations", type=Path, metavar="FILE", help="any COCO key point file, or a list of images, instead")
    add("--images", type=Path, metavar="FOLDER", help="and its images")
    add("--boxes", type=Path, metavar="FILE", help="a detector's, in COCO's result format (default: ground truth)")
    add("--box-score", type=float, metavar="X", help="least score of --boxes that count (default: 0, as in the paper)")
    add("--sigmas", type=float, nargs="+", metavar="X", help="of OKS, one per key point (default: the file's)")
    add(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="keep people there cut out, as JPEG files of quality 95, for the next time (default: read photographs)",
    )
    add(
        "--exact-crops",
        action="store_true",
        help="interpolate on the CPU, from whole photographs, as the published code does with OpenCV, in place of the "
        "device: slower, for weights as published",
    )


def add_arguments_of_prediction(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how").add_argument
    add("--no-flip-test", action="store_true", help="do not average with the mirrored image, a second pass")
    add(
        "--decoding",
        choices=["dark", "quarter", "argmax"],
        default="dark",
        help="of heat maps; dark is what the papers report (default)",
    )
    add(
        "--aligned",
        action=argparse.BooleanOptionalAction,
        help="for models trained by TokenPose's own code, whose maps lie differently (default: as --checkpoint's "
        "layout says, else not)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="people per process (default: 64)")
    add("--workers", type=int, metavar="N", help="per process, that read (default: its share of the cores)")
    add(
        "--mixed-precision",
        choices=["no", "bf16"],
        help="default: what accelerate launch says, else no, which is fp32",
    )
    add("--cpu", action="store_true", help="use the CPU where a GPU is there too")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to write").add_argument
    add("--out", type=Path, metavar="FOLDER", help="new or empty (default: first free of runs/evaluate_pose, ...-2)")
    add("--picture", action="store_true", help="draw twelve people, annotated and predicted, into predictions.png")
    add("--no-speed", action="store_true", help="do not time the network alone")


RANGES = {"cycles": (1, 64), "batch_size": (1, 2**16), "workers": (0, 2**10)}


def check_arguments(args: argparse.Namespace) -> None:
    """Errors: RunError for a number out of range, and for arguments that say nothing together."""
    require_ranges(args, RANGES)
    if (args.model is None) == (args.checkpoint is None):
        raise RunError("which model? Give --model or --checkpoint, and one of them")
    if args.preset and args.checkpoint is None:
        raise RunError("--preset: goes with --checkpoint; a model of --model has a config that says what it is")
    if (args.annotations is None) != (args.images is None):
        raise RunError("--annotations and --images go together: give both")
    if (args.data is None) == (args.annotations is None):
        raise RunError("which people? Give --data, or --annotations and --images")
    check_shared_arguments(args)


def check_shared_arguments(args: argparse.Namespace) -> None:
    """Errors: RunError where cycles are not given by --cycles, and where boxes or crops say nothing together."""
    if "cycles" in args.model_args:
        raise RunError(f"--model-args cycles={args.model_args['cycles']}: write --cycles {args.model_args['cycles']}")
    if args.boxes is None:
        refuse_given(
            args, {"box_score": None}, "goes with --boxes, a detector's; those of the ground truth have no scores"
        )
    if args.exact_crops and args.cache_dir is not None:
        raise RunError(
            "--exact-crops, --cache-dir: exact crops are of whole photographs, not of a cache; leave one out"
        )


def detected(args: argparse.Namespace) -> dict[str, Any]:
    """What `read_people` is to know of --boxes and --box-score; nothing where boxes are the ground truth's."""
    return {} if args.boxes is None else {"boxes": args.boxes, "least_score": args.box_score or 0.0}
