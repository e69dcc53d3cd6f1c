"""DeiT's training recipe for any timm model, each number an argument with its reason.

The defaults are those of DeiT (arXiv:2012.12877, table 9, and its released code), which SDPose took for its DeiT-Tiny.
Model, optimizer, schedule and mixup are timm's.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
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
    """Model, cycles, optimisation and augmentation, each under a heading of its own."""
    model = parser.add_argument_group("the model")
    model.add_argument("--model", default="deit_tiny_patch16_224", help="a timm name (default: deit_tiny_patch16_224)")
    model.add_argument(
        "--model-args",
        nargs="+",
        default={},
        action=_KeyValues,
        metavar="NAME=VALUE",
        help="more arguments for timm.create_model, such as img_size=32 patch_size=4 depth=4",
    )
    model.add_argument("--pretrained", action="store_true", help="start from timm's weights, from the hub")
    model.add_argument("--init-from", type=Path, metavar="FILE", help="start from a .safetensors file of this model")
    model.add_argument("--new-head", action="store_true", help="with --init-from: without its classifier (fine-tuning)")
    model.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth (default: 0.1, DeiT's)")

    cycles = parser.add_argument_group("cycles")
    cycles.add_argument(
        "--cycles",
        type=int,
        default=2,
        help="passes through the blocks in training, each learning from the next; the saved model makes one. 1 is the "
        "plain baseline. N costs about N times the training (default: 2, the paper's)",
    )
    cycles.add_argument(
        "--rho",
        type=float,
        default=0.3,
        help="weight of the token term, relative to task loss and token variance (default: 0.3, chosen on small "
        "experiments; lower it where cycle_report says that cycles collapse)",
    )
    cycles.add_argument("--alpha", type=float, help="fixed weight, in place of --rho (the paper's 5e-6 is for poses)")
    cycles.add_argument(
        "--class-weight", type=float, default=1.0, help="factor of the class (prefix) tokens' term (default: 1)"
    )
    cycles.add_argument("--patch-weight", type=float, default=1.0, help="factor of the patch tokens' term (default: 1)")

    teacher = parser.add_argument_group("an external teacher", "DeiT's distillation; every cycle learns from it too.")
    teacher.add_argument("--teacher", metavar="MODEL", help="a timm name (DeiT: regnety_160)")
    teacher.add_argument("--teacher-from", type=Path, metavar="FILE", help="its weights (default: timm's hub)")
    teacher.add_argument("--teacher-args", nargs="+", default={}, action=_KeyValues, metavar="NAME=VALUE")
    teacher.add_argument(
        "--distillation", choices=["hard", "soft"], default="hard", help="(default: hard, DeiT's better one)"
    )
    teacher.add_argument("--distillation-alpha", type=float, help="(default: 0.5 hard, 0.1 soft, as in DeiT)")
    teacher.add_argument("--distillation-temperature", type=float, help="of the soft one (default: 3, DeiT's)")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=int, default=300, help="(default: 300)")
    optimisation.add_argument("--batch-size", type=int, default=256, help="per process and step (default: 256)")
    optimisation.add_argument(
        "--accumulate", type=int, default=1, help="batches per optimizer step, where memory is short (default: 1)"
    )
    optimisation.add_argument(
        "--lr",
        type=float,
        default=5e-4,
        help="at a global batch of 512; scaled linearly with it, as in DeiT (default: 5e-4, so 1e-3 at DeiT's 1024)",
    )
    optimisation.add_argument("--weight-decay", type=float, default=0.05, help="(default: 0.05)")
    optimisation.add_argument("--warmup-epochs", type=int, default=5, help="(default: 5)")
    optimisation.add_argument("--clip-grad", type=float, help="largest gradient norm (default: none, as in DeiT)")
    optimisation.add_argument(
        "--ema", type=float, metavar="DECAY", help="also average the weights, and deploy the average (DeiT: 0.99996)"
    )
    optimisation.add_argument("--smoothing", type=float, default=0.1, help="of labels (default: 0.1)")
    optimisation.add_argument("--channels-last", action="store_true", help="pays for convolutions, not for plain ViTs")

    augmentation = parser.add_argument_group("augmentation")
    augmentation.add_argument("--input-size", type=int, default=224, help="pixels (default: 224)")
    augmentation.add_argument(
        "--crop",
        choices=["random-resized", "pad"],
        default="random-resized",
        help="pad is a small random shift, for images of the size of the input (default: random-resized)",
    )
    augmentation.add_argument(
        "--scale", type=float, nargs=2, default=(0.08, 1), help="area of a crop (default: 0.08 1)"
    )
    augmentation.add_argument("--hflip", type=float, default=0.5, help="probability (default: 0.5)")
    augmentation.add_argument(
        "--rand-augment",
        default="rand-m9-n2-mstd0.5-inc1",
        help="timm's string, or none (default: m9 n2 mstd0.5)",
    )
    augmentation.add_argument("--erase", type=float, default=0.25, help="probability (default: 0.25)")
    augmentation.add_argument("--mixup", type=float, default=0.8, help="(default: 0.8; 0 is none)")
    augmentation.add_argument("--cutmix", type=float, default=1.0, help="(default: 1.0; 0 is none)")
    augmentation.add_argument("--mixup-switch", type=float, default=0.5, help="probability of cutmix (default: 0.5)")
    augmentation.add_argument(
        "--repeated-augmentation",
        type=int,
        default=3,
        metavar="R",
        help="copies of an image in a global batch; an epoch sees 1/R of the images (default: 3, DeiT's; 1 is none)",
    )
    augmentation.add_argument("--crop-pct", type=float, default=0.875, help="in evaluation (default: 0.875)")
    augmentation.add_argument(
        "--augment-on",
        choices=["auto", "device", "host"],
        default="auto",
        help="device: workers decode and crop, the rest is done in batches there; host: all by timm in the workers "
        "(default: device where a GPU is there)",
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


def augment_settings(args: argparse.Namespace) -> AugmentSettings:
    return AugmentSettings(
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
    model = _create(args.model, "--model", num_classes=classes, drop_path_rate=args.drop_path, **args.model_args)
    if args.pretrained:
        model = _create(
            args.model,
            "--model",
            pretrained=True,
            num_classes=classes,
            drop_path_rate=args.drop_path,
            **args.model_args,
        )
    if args.init_from is not None:
        load_weights(model, args.init_from, "--init-from", new_head=args.new_head)
    if args.teacher is not None and hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    return model


def add_cycles(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The same object, wrapped where `--cycles` is more than 1."""
    if args.cycles < 1:
        raise RunError(f"--cycles {args.cycles}: at least one pass, which is plain training")
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
    return Teacher(model.to(device))


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
    """Cosine from the scaled rate to 1e-5 after a linear warm-up from 1e-6, a pure function of the step."""
    return CosineLRScheduler(
        optimizer,
        t_initial=args.epochs * steps_per_epoch,
        lr_min=1e-5,
        warmup_t=min(args.warmup_epochs, args.epochs) * steps_per_epoch,
        warmup_lr_init=1e-6,
        t_in_epochs=False,
    )


def load_weights(model: nn.Module, path: Path, argument: str, *, new_head: bool = False) -> None:
    """Put a .safetensors file into the model; all of it has to fit, with `new_head` all but the classifier.

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
    if shapes.keys() & _classifier_names(model):
        name = min(shapes.keys() & _classifier_names(model))
        raise RunError(
            f"{argument} {path}: has {shapes[name][0][0]} classes in {name}, and the data has {shapes[name][1][0]}: "
            "add --new-head to start with a new classifier, or give the data that it was trained on"
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


def _create(name: str, argument: str, **options: Any) -> nn.Module:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise RunError(f"{argument} {name}: timm has no model of this name; some that are near: {close}")
    try:
        return timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise RunError(f"{argument} {name}: timm cannot make it with {given}: {error}") from error
