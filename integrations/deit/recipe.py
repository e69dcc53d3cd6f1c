"""What the arguments ask for, made of timm's parts: model, loss, teacher, mixup, optimizer, schedule."""

from __future__ import annotations

import argparse
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
