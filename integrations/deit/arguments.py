"""The arguments of the DeiT recipe, each with its reason.

The defaults are those of DeiT (arXiv:2012.12877, table 9, and its released code), which SDPose took for its DeiT-Tiny.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from cyclekd.integrations.runs.arguments import KeyValues, add_run_arguments, refuse_given, require_ranges
from cyclekd.integrations.runs.errors import RunError

FIRST_LOOK: dict[str, Any] = {
    "model_args": {"img_size": 8, "patch_size": 4, "embed_dim": 96, "depth": 4},
    "input_size": 8,
    "crop": "pad",
    "crop_pct": 1.0,
    "hflip": 0.0,
    "rand_augment": "none",
    "erase": 0.0,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "smoothing": 0.0,
    "repeated_augmentation": 1,
    "epochs": 12,
    "warmup_epochs": 1,
    "batch_size": 32,
    "lr": 0.048,
    "log_every": 10,
    "workers": 0,
}
"""Without `--data`: a model and a length for the embedded digits, on one CPU core."""

RHO, IMAGES_PER_EPOCH, MIXUP_SWITCH = 0.3, 1_281_167, 0.5


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """All settings of a run; without `--data` those not given are of the first look, with it of the recipe."""
    parser = argparse.ArgumentParser(
        usage="accelerate launch %(prog)s [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data_arguments(parser)
    add_recipe_arguments(parser)
    add_run_arguments(parser)
    known, _ = parser.parse_known_args(arguments)
    if known.data is None:
        parser.set_defaults(**FIRST_LOOK)
    return parser.parse_args(arguments)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """`--data` and what tells its parts apart, under the heading "the data"."""
    data = parser.add_argument_group("the data")
    data.add_argument(
        "--data",
        metavar="FOLDER|NAME",
        help="a folder with class folders, parquet files or webdataset shards in train and val, one saved by datasets, "
        "or a name on the hub such as imagenet-1k (default: the handwritten digits inside scikit-learn, with a model, "
        "epochs and rates to fit: "
        + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in FIRST_LOOK.items())
        + ")",
    )
    data.add_argument("--train-split", default="train", metavar="NAME", help="images to learn from (default: train)")
    data.add_argument(
        "--validation-split",
        default="validation",
        metavar="NAME",
        help="images to evaluate on after each epoch (default: validation, else val or test)",
    )
    data.add_argument("--image-column", metavar="NAME", help="where the data has several, as in detection data")
    data.add_argument("--label-column", metavar="NAME", help="where the data has several, as CIFAR-100 on the hub")
    data.add_argument(
        "--num-classes", type=int, metavar="N", help="where labels are bare numbers, of which the last may not occur"
    )
    data.add_argument("--streaming", action="store_true", help="read the training images as they come, store none here")
    data.add_argument(
        "--images-per-epoch",
        type=int,
        default=IMAGES_PER_EPOCH,
        metavar="N",
        help="with --streaming, which cannot count them (default: 1281167, ImageNet's)",
    )
    data.add_argument("--cache-dir", metavar="FOLDER", help="for what `datasets` downloads and converts")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, cycles, teacher, optimisation and augmentation, each under a heading of its own."""
    add_model_arguments(parser)
    add_cycle_arguments(parser)
    add_teacher_arguments(parser)
    add_optimisation_arguments(parser)
    add_augmentation_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add("--model", default="deit_tiny_patch16_224", metavar="NAME", help="of timm (default: deit_tiny_patch16_224)")
    add(
        "--model-args",
        action=KeyValues,
        help="more arguments for timm.create_model, such as img_size=32 patch_size=4 depth=4",
    )
    add("--pretrained", action="store_true", help="start from timm's own weights, which come from the hub")
    add("--init-from", type=Path, metavar="FILE", help="start from a .safetensors file of this model")
    add("--new-head", action="store_true", help="leave out the classifier of --init-from, for other classes")
    add(
        "--drop-path",
        type=float,
        default=0.1,
        metavar="P",
        help="stochastic depth: probability, rising to this in the last block, of leaving a block out for an image; "
        "DeiT found that it eases convergence (default: 0.1)",
    )


def add_cycle_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cycles").add_argument
    add(
        "--cycles",
        type=int,
        default=2,
        metavar="N",
        help="passes through the blocks in training, each learning from the next; the saved model makes one. 1 is the "
        "plain baseline. N costs about N times the training (default: 2, the paper's)",
    )
    add(
        "--rho",
        type=float,
        default=RHO,
        help="weight of the token term relative to task loss and token variance; chosen on small experiments, lower it "
        "where the tokens of all cycles become the same (default: 0.3)",
    )
    add("--alpha", type=float, help="fixed weight instead of --rho; the paper's 5e-6 is for heat maps of poses")
    add(
        "--class-weight",
        type=float,
        default=1.0,
        metavar="X",
        help="factor of the term of class and other prefix tokens; one that is not 1 makes two groups, each relative "
        "to its own variance (default: 1)",
    )
    add("--patch-weight", type=float, default=1.0, metavar="X", help="the same of the patch tokens (default: 1)")


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    text = "DeiT's distillation; every cycle learns from the teacher, through the distillation token if there is one."
    add = parser.add_argument_group("an external teacher", text).add_argument
    add("--teacher", metavar="NAME", help="of timm; DeiT took regnety_160, since convolutional teachers worked better")
    add("--teacher-from", type=Path, metavar="FILE", help="its weights, .safetensors (default: timm's, from the hub)")
    add("--teacher-args", action=KeyValues, help="as --model-args, for it")
    add(
        "--distillation",
        choices=["hard", "soft"],
        default="hard",
        help="learn its first choice, which worked better for DeiT, or its whole distribution (default: hard)",
    )
    add(
        "--distillation-alpha",
        type=float,
        metavar="X",
        help="share of the loss (default: 0.5 hard, 0.1 soft, DeiT's)",
    )
    add(
        "--distillation-temperature",
        type=float,
        metavar="X",
        help="that softens both (default: 3, DeiT's)",
    )


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimisation", "AdamW, cosine schedule over steps.").add_argument
    add("--epochs", type=int, default=300, metavar="N", help="ViTs need long trainings on ImageNet-1k (default: 300)")
    add("--batch-size", type=int, default=256, metavar="N", help="per process; 4 x 256 is DeiT's 1024 (default: 256)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step, where memory is short (default: 1)")
    add(
        "--lr",
        type=float,
        default=5e-4,
        help="at a global batch of 512, and scaled linearly with it, so that the recipe carries over to other numbers "
        "of GPUs (default: 5e-4, that is 1e-3 at DeiT's 1024)",
    )
    add(
        "--weight-decay",
        type=float,
        default=0.05,
        metavar="X",
        help="not on biases, norms, class token and positions (default: 0.05)",
    )
    add("--warmup-epochs", type=int, default=5, metavar="N", help="of a rate that rises from 1e-6 (default: 5)")
    add("--clip-grad", type=float, metavar="X", help="largest norm of the gradient (default: none, as in DeiT)")
    add(
        "--ema",
        type=float,
        metavar="DECAY",
        help="also keep a moving average of the weights; it is evaluated too, and is what is saved as the model "
        "(DeiT: 0.99996, for 300 epochs of 1,251 steps; less for shorter runs)",
    )
    add("--smoothing", type=float, default=0.1, metavar="X", help="of labels, against overconfidence (default: 0.1)")
    add("--channels-last", action="store_true", help="memory format that pays for convolutions, not for plain ViTs")


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    text = "Without it ViTs need far more images than ImageNet-1k has: DeiT's point."
    add = parser.add_argument_group("augmentation", text).add_argument
    add("--input-size", type=int, default=224, metavar="PIXELS", help="side of the images (default: 224)")
    add(
        "--crop",
        choices=["random-resized", "pad"],
        default="random-resized",
        help="a random part, resized; or, for images of about the size of the input, a small random shift "
        "(default: random-resized)",
    )
    add("--scale", type=float, nargs=2, default=(0.08, 1), help="least and most area of the part (default: 0.08 1)")
    add("--hflip", type=float, default=0.5, metavar="P", help="0 where left and right mean something (default: 0.5)")
    add(
        "--rand-augment",
        default="rand-m9-n2-mstd0.5-inc1",
        metavar="TEXT",
        help="two random operations of magnitude 9 with deviation 0.5, in timm's words; none leaves them out "
        "(default: rand-m9-n2-mstd0.5-inc1)",
    )
    add("--erase", type=float, default=0.25, metavar="P", help="of a box of noise, against occlusion (default: 0.25)")
    add(
        "--mixup",
        type=float,
        default=0.8,
        metavar="X",
        help="beta distribution of shares; 0: none (default: 0.8)",
    )
    add("--cutmix", type=float, default=1.0, metavar="X", help="the same of pasted areas; 0: none (default: 1.0)")
    add(
        "--mixup-switch",
        type=float,
        default=MIXUP_SWITCH,
        metavar="P",
        help="of cutmix, where both are on (default: 0.5)",
    )
    add(
        "--repeated-augmentation",
        type=int,
        default=3,
        metavar="R",
        help="copies of an image in a global batch, each augmented anew; an epoch then has 1/R of the images. A key "
        "ingredient for DeiT (default: 3; 1: none)",
    )
    add("--crop-pct", type=float, default=0.875, metavar="X", help="central part used in evaluation (default: 0.875)")
    add(
        "--augment-on",
        choices=["auto", "device", "host"],
        default="auto",
        help="device: workers decode and crop, all else is done in batches there. host: timm does all of it in the "
        "workers, which few CPUs can do as fast as a GPU trains (default: device where there is a GPU)",
    )


RANGES = {
    "epochs": (1, math.inf),
    "cycles": (1, math.inf),
    "repeated_augmentation": (1, math.inf),
    "images_per_epoch": (1, math.inf),
    "drop_path": (0, 0.99),
    "smoothing": (0, 0.99),
    "mixup_switch": (0, 1),
    "distillation_alpha": (0, 1),
    "distillation_temperature": (1e-3, math.inf),
    "lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_epochs": (0, math.inf),
    "mixup": (0, math.inf),
    "cutmix": (0, math.inf),
    "rho": (0, math.inf),
    "alpha": (0, math.inf),
}
"""Least and largest value of arguments that nothing else checks before the first step."""


def check_arguments(args: argparse.Namespace) -> None:
    """Errors: RunError for a number out of range, and for arguments that say nothing together."""
    require_ranges(args, RANGES)
    if args.init_from is None:
        refuse_given(args, {"new_head": False}, "goes with --init-from; without it every head is new")
    if args.pretrained and args.init_from is not None:
        raise RunError("--pretrained, --init-from: both name weights to start from; leave one out")
    if args.cycles == 1:
        weights = {"rho": RHO, "alpha": None, "class_weight": 1, "patch_weight": 1}
        why = "weighs the tokens of one cycle against the next one's, and --cycles is 1: leave it out"
        refuse_given(args, weights, why)
    if args.alpha is not None and args.rho != RHO:
        raise RunError("--alpha, --rho: both weigh the tokens; leave one out")
    if args.teacher is None:
        of_teacher = {"teacher_from": None, "teacher_args": {}, "distillation": "hard"}
        of_teacher |= {"distillation_alpha": None, "distillation_temperature": None}
        refuse_given(args, of_teacher, "for an external teacher; name it with --teacher, or leave that out")
    if args.distillation == "hard":
        why = "softens a distribution, and hard distillation learns a first choice: add --distillation soft"
        refuse_given(args, {"distillation_temperature": None}, why)
    if not args.streaming:
        why = "goes with --streaming; else the images are counted"
        refuse_given(args, {"images_per_epoch": IMAGES_PER_EPOCH}, why)
    if args.mixup == 0 or args.cutmix == 0:
        why = "chooses between --mixup and --cutmix, and one of them is 0; leave it out"
        refuse_given(args, {"mixup_switch": MIXUP_SWITCH}, why)
