"""DeiT's training recipe for any timm model, each number an argument with its reason.

The defaults are those of DeiT (arXiv:2012.12877, table 9, and its released code), which SDPose took for its DeiT-Tiny.
Model, optimizer, schedule and mixup are timm's.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from cyclekd import CycleLoss, wrap_multicycle
from cyclekd.integrations.deit.augment import AugmentSettings
from cyclekd.integrations.deit.distillation import DistillationLoss, Teacher
from cyclekd.integrations.runs.errors import RunError

RECIPE_BATCH = 1024
"""The global batch that the recipe was found with."""

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
        nargs="+",
        default={},
        action=_KeyValues,
        metavar="NAME=VALUE",
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
        default=0.3,
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
    add(
        "--teacher-args", nargs="+", default={}, action=_KeyValues, metavar="NAME=VALUE", help="as --model-args, for it"
    )
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
    add("--mixup-switch", type=float, default=0.5, metavar="P", help="of cutmix, where both are on (default: 0.5)")
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


class _KeyValues(argparse.Action):
    """`depth=4 global_pool=avg` as a dict; values are Python literals where they are, else text."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for each in values:
            name, found, value = each.partition("=")
            if not found:
                parser.error(f"{option_string}: {each!r} is not of the form name=value")
            try:
                pairs[name] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                pairs[name] = value
        setattr(namespace, self.dest, pairs)


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


def check_ranges(args: argparse.Namespace) -> None:
    """Errors: RunError for a number out of range, and for arguments that say nothing together."""
    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
            raise RunError(f"--{name.replace('_', '-')} {value}: has to be {bounds}")
    if args.new_head and args.init_from is None:
        raise RunError("--new-head: goes with --init-from; without it every head is new")
    if args.pretrained and args.init_from is not None:
        raise RunError("--pretrained, --init-from: both name weights to start from; leave one out")


def augment_settings(args: argparse.Namespace) -> AugmentSettings:
    """As the arguments say, with the mean and standard deviation that timm has for the model."""
    require_model(args.model, "--model")
    pretrained = timm.models.get_pretrained_cfg(args.model)
    return AugmentSettings(
        mean=tuple(pretrained.mean),
        std=tuple(pretrained.std),
        size=args.input_size,
        scale=tuple(args.scale),
        hflip=args.hflip,
        rand_augment=None if args.rand_augment == "none" else args.rand_augment,
        erase=args.erase,
        crop=args.crop,
        crop_pct=args.crop_pct,
    )


def build_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """A stock timm model on the CPU, before cycles.

    Errors: RunError for an unknown name or arguments that it does not take, and for weights that do not fit.
    """
    options = {"num_classes": classes, "drop_path_rate": args.drop_path}
    taken = sorted(options.keys() & args.model_args.keys())
    if taken:
        raise RunError(f"--model-args {' '.join(taken)}: the data says how many classes, and --drop-path the rate")
    model = _create(args.model, "--model", pretrained=args.pretrained, **options, **args.model_args)
    if args.init_from is not None:
        load_weights(model, args.init_from, "--init-from", new_head=args.new_head)
    if args.teacher is not None and hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    return model


def add_cycles(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The same object, wrapped where `--cycles` is more than 1."""
    return wrap_multicycle(model, cycles=args.cycles) if args.cycles > 1 else model


def build_criterion(model: nn.Module, args: argparse.Namespace) -> CycleLoss:
    """The loss on labels (soft ones under mixup) and on the teacher if there is one, for every cycle; token terms."""
    task: Callable[..., Tensor] = F.cross_entropy
    if args.mixup > 0 or args.cutmix > 0:
        task = SoftTargetCrossEntropy()
    elif args.smoothing > 0:
        task = LabelSmoothingCrossEntropy(args.smoothing)
    if args.teacher is not None:
        hard = args.distillation == "hard"
        default = {"alpha": 0.5, "temperature": 1.0} if hard else {"alpha": 0.1, "temperature": 3.0}
        asked = {"alpha": args.distillation_alpha, "temperature": args.distillation_temperature}
        chosen = {name: default[name] if value is None else value for name, value in asked.items()}
        task = DistillationLoss(task, hard=hard, **chosen)
    return CycleLoss(task, rho=args.rho, alpha=args.alpha, groups=token_groups(model, args))


def token_groups(model: nn.Module, args: argparse.Namespace) -> dict[str, tuple[slice, float]] | None:
    """Class and patch tokens with their factors; None, all tokens alike, where neither factor is given."""
    if args.class_weight == args.patch_weight == 1:
        return None
    prefix = getattr(model, "num_prefix_tokens", 0)
    if prefix == 0:
        raise RunError(
            f"--class-weight, --patch-weight: {args.model} has no class token, so there is one group of tokens alone: "
            "weigh it with --rho"
        )
    return {"class": (slice(0, prefix), args.class_weight), "patch": (slice(prefix, None), args.patch_weight)}


def build_teacher(args: argparse.Namespace, classes: int, device: torch.device) -> Teacher | None:
    """The frozen teacher on `device`, or None without `--teacher`."""
    if args.teacher is None:
        return None
    hub = args.teacher_from is None
    model = _create(args.teacher, "--teacher", pretrained=hub, num_classes=classes, **args.teacher_args)
    if not hub:
        load_weights(model, args.teacher_from, "--teacher-from")
    elif model.pretrained_cfg["num_classes"] != classes:
        raise RunError(
            f"--teacher {args.teacher}: was trained on {model.pretrained_cfg['num_classes']} classes, and the data has "
            f"{classes}; give one trained on this data with --teacher-from"
        )
    student = timm.models.get_pretrained_cfg(args.model)
    expected, given = ((tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in (model.pretrained_cfg, student.to_dict()))
    if expected != given:
        raise RunError(
            f"--teacher {args.teacher}: expects images of mean and deviation {expected}, and {args.model} {given}: "
            "choose a teacher of the same normalisation"
        )
    return Teacher(model.to(device))


def check_forward(model: nn.Module, args: argparse.Namespace, argument: str) -> None:
    """Errors: RunError where the model does not take images of `--input-size`."""
    images = torch.zeros(1, 3, args.input_size, args.input_size, device=next(model.parameters()).device)
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RunError(
            f"{argument}: does not take --input-size {args.input_size} ({error}): give the model's own, or make "
            "the model for this one with img_size=... among its arguments"
        ) from error
    model.train(was_training)


def build_mixup(args: argparse.Namespace, classes: int) -> Mixup | None:
    if not (args.mixup > 0 or args.cutmix > 0):
        return None
    if args.batch_size % 2:
        raise RunError(f"--batch-size {args.batch_size}: mixup pairs images, so it has to be even")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        switch_prob=args.mixup_switch,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )


def scaled_lr(lr: float, global_batch: int) -> float:
    """DeiT's linear rule: `lr` is for a global batch of 512."""
    return lr * global_batch / 512


def lr_warning(args: argparse.Namespace, global_batch: int) -> str | None:
    """What to know where the global batch is not the recipe's."""
    if global_batch == RECIPE_BATCH:
        return None
    lr = scaled_lr(args.lr, global_batch)
    return (
        f"the global batch is {global_batch}, the recipe's is {RECIPE_BATCH}: the rate is scaled linearly to {lr:.3g} "
        f"(= {args.lr:g} x {global_batch} / 512), as in DeiT; results at other batch sizes can differ"
    )


def build_optimizer(model: nn.Module, args: argparse.Namespace, global_batch: int) -> torch.optim.Optimizer:
    """AdamW by timm: no weight decay on biases, norms and what the model itself exempts."""
    fused = {"fused": True} if next(model.parameters()).is_cuda else {}
    lr = scaled_lr(args.lr, global_batch)
    return create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=args.weight_decay, **fused)


def build_schedule(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up from 1e-6 to the scaled rate, then cosine to 1e-5 if that is less; of the step alone."""
    return CosineLRScheduler(
        optimizer,
        t_initial=args.epochs * steps_per_epoch,
        lr_min=min(1e-5, optimizer.param_groups[0]["lr"]),
        warmup_t=min(args.warmup_epochs, args.epochs) * steps_per_epoch,
        warmup_lr_init=1e-6,
        t_in_epochs=False,
    )


def load_weights(model: nn.Module, path: Path, argument: str, *, new_head: bool | None = None) -> None:
    """Put a .safetensors file into the model; all of it has to fit, with `new_head` all but the classifier.

    None is for models whose classifier cannot be left out, such as teachers.

    Errors: RunError naming the tensors that do not fit.
    """
    if not path.is_file():
        raise RunError(f"{argument} {path}: there is no such file")
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{argument} {path}: cannot be read as safetensors ({error})") from error
    own = model.state_dict()
    head = _classifier_names(model) if new_head else set()
    missing = sorted(own.keys() - saved.keys() - head)
    surplus = sorted(saved.keys() - own.keys())
    shapes = {n: (saved[n].shape, own[n].shape) for n in own.keys() & saved.keys() if saved[n].shape != own[n].shape}
    shapes = {name: pair for name, pair in shapes.items() if name not in head}
    heads = sorted(n for n in shapes.keys() & _classifier_names(model) if shapes[n][0][0] != shapes[n][1][0])
    if heads:
        name = heads[0]
        way_out = "add --new-head to start with a new classifier, or give" if new_head is not None else "give"
        raise RunError(
            f"{argument} {path}: has {shapes[name][0][0]} classes in {name}, and the data has {shapes[name][1][0]}: "
            f"{way_out} the data that it was trained on"
        )
    if missing or surplus or shapes:
        wrong = [f"{n} is {tuple(a)} and should be {tuple(b)}" for n, (a, b) in sorted(shapes.items())]
        wrong += [f"{n} is missing" for n in missing] + [f"{n} is not in the model" for n in surplus]
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise RunError(f"{argument} {path}: does not fit the model: {'; '.join(wrong[:4])}{more}")
    model.load_state_dict({name: value for name, value in saved.items() if name not in head}, strict=not head)


def _classifier_names(model: nn.Module) -> set[str]:
    found = model.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    modules = {id(module): name for name, module in model.named_modules()}
    return {f"{modules[id(head)]}.{name}" for head in heads for name in head.state_dict()}


def require_model(name: str, argument: str) -> None:
    """Errors: RunError for a name that timm does not know, with those that are near."""
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        hint = f"; near are {', '.join(near)}" if near else "; timm.list_models() has them all"
        raise RunError(f"{argument} {name}: timm has no model of this name{hint}")


def _create(name: str, argument: str, **options: Any) -> nn.Module:
    require_model(name, argument)
    try:
        return timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise RunError(f"{argument} {name}: timm cannot make it with {given}: {error}") from error
