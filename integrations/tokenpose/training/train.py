"""One pose training from its arguments to its saved model; `examples/train_tokenpose.py` is the command."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.scheduler import MultiStepLRScheduler
from torch import Tensor, nn

from cyclekd import CycleError, CycleLoss
from cyclekd.integrations.runs.arguments import make_accelerator, rhythm_of, workers_of
from cyclekd.integrations.runs.card import model_card
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder, write_text_atomically
from cyclekd.integrations.runs.loading import load_batches
from cyclekd.integrations.runs.processes import main_process_first
from cyclekd.integrations.runs.progress import duration
from cyclekd.integrations.runs.sampling import TrainingBatches
from cyclekd.integrations.runs.start import open_run, report
from cyclekd.integrations.runs.training import Outcome, Training
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops, TrainingCrops
from cyclekd.integrations.tokenpose.data.people import People, find_split, read_people
from cyclekd.integrations.tokenpose.data.views import ViewSettings
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.losses.supervised import HeatmapLoss
from cyclekd.integrations.tokenpose.models.config import TokenPoseConfig
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.models.tokenpose import token_groups
from cyclekd.integrations.tokenpose.shapes import Size
from cyclekd.integrations.tokenpose.training.arguments import FIGURES, check_arguments, parse_arguments
from cyclekd.integrations.tokenpose.training.task import PoseEstimation
from cyclekd.integrations.tokenpose.weights.hub import from_pretrained, save_pretrained

CACHE = ".cyclekd"
"""Folder beside the annotations for the cache of people."""

SHOWN = ("AP", "AP50", "AR")


@dataclass(frozen=True)
class PoseData:
    """Whom a run learns from, and whom it is evaluated on."""

    train: People
    validation: People


def main(description: str, arguments: list[str] | None = None) -> int:
    """Train as the arguments say; the exit code: 0, 2 for bad input, 128 + n after signal n."""
    args = parse_arguments(description, arguments)
    accelerator = None
    try:
        accelerator = make_accelerator(args)
        return train(accelerator, args)
    except (RunError, CycleError) as error:
        return report(error, accelerator)
    finally:
        if accelerator is not None:
            accelerator.end_training()


def train(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Set up, train, save; the exit code."""
    check_arguments(args)
    data = read_data(accelerator, args)
    training = set_up(accelerator, args, data)
    if accelerator.is_main_process:
        print(introduction(training, data, args), flush=True)
    outcome = training.run()
    if outcome.finished:
        weights = training.deployable_weights()  # gathered by all processes
        if accelerator.is_main_process:
            save_plain_model(training, weights)
            write_card(training.folder, outcome, args, accelerator)
    if accelerator.is_main_process:
        print(summary(training, outcome), flush=True)
    return outcome.exit_code


def read_data(accelerator: Accelerator, args: argparse.Namespace) -> PoseData:
    """The people of both splits; without --data, of synthetic figures that are drawn first."""
    data = args.data
    if data is None:
        data = args.cache_dir or Path("runs") / "synthetic-figures"
        main_process_first(accelerator, lambda: write_figures(data, **FIGURES, seed=0))
    splits = {}
    for split in ("train", "val"):
        annotations, images = getattr(args, f"{split}_annotations"), getattr(args, f"{split}_images")
        if annotations is None:
            annotations, images = find_split(data, split)
        boxes = args.boxes if split == "val" else None
        splits[split] = read_people(annotations, images, boxes=boxes, for_training=split == "train")
    train, validation = splits["train"], splits["val"]
    if train.skeleton.names != validation.skeleton.names:
        raise RunError(
            f"the key points of {train.annotations} are {', '.join(train.skeleton.names)}, and of "
            f"{validation.annotations} {', '.join(validation.skeleton.names)}: both splits need the same"
        )
    return PoseData(train, validation)


def set_up(accelerator: Accelerator, args: argparse.Namespace, data: PoseData) -> Training:
    """Everything between the arguments and the first step; whatever cannot work fails here."""
    rhythm, workers = rhythm_of(args), workers_of(args)
    set_seed(args.seed)  # the same initial weights on every process
    model = build_model(args, len(data.train.skeleton.names))
    config = model.config
    if config.head != "heatmap":
        raise RunError(f"--model {args.model}: predicts coordinates; this training is for heat maps")
    model = model.to(accelerator.device)
    order = TrainingBatches(
        len(data.train),
        batch=args.batch_size,
        epochs=args.epochs,
        seed=args.seed,
        accumulate=args.accumulate,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    crops = training_crops(accelerator, args, data.train, config.input_size, workers)
    validation = EvaluationCrops(data.validation, config.input_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=accelerator.device.type == "cuda")
    schedule = build_schedule(optimizer, args, order.steps_per_epoch)
    criterion = build_criterion(model, args)
    cycles = config.cycles if isinstance(config, TokenPoseConfig) else 1
    if args.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    task = PoseEstimation(
        accelerator,
        criterion,
        config=config,
        validation=validation,
        people=data.validation,
        batch=args.batch_size,
        workers=workers,
        cycles=cycles,
        sigma=args.sigma,
        flip_test=not args.no_flip_test,
    )
    saved = {**vars(args), "processes": accelerator.num_processes, "global_batch": order.global_batch}
    saved["precision"] = accelerator.mixed_precision
    return Training(
        accelerator,
        folder=open_run(accelerator, args, name=f"{args.model}-cycles{cycles}", settings=saved),
        task=task,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        order=order,
        load=lambda: load_batches(crops, order, workers, accelerator.device),
        seed=args.seed,
        clip_norm=args.clip_grad,
        rhythm=rhythm,
        problem_of=crops.problem,
    )


def build_model(args: argparse.Namespace, num_keypoints: int) -> nn.Module:
    """The model for that many key points, wrapped where it has several cycles.

    Errors: PoseError for an unknown name or fields, and for weights that do not fit.
    """
    settings = {**args.model_args, "num_keypoints": num_keypoints}
    if args.cycles is not None:
        settings["cycles"] = args.cycles
    if args.init_from is not None:
        return from_pretrained(args.init_from, strict=not args.new_head, **settings).train()
    return create_model(args.model, pretrained_backbone=args.pretrained_backbone, **settings)


def build_criterion(model: nn.Module, args: argparse.Namespace) -> CycleLoss:
    """The heat-map loss of every cycle and the token terms; a model without tokens has none."""
    groups = token_groups(model) if isinstance(model.config, TokenPoseConfig) else None
    if args.rho is not None:
        return CycleLoss(HeatmapLoss(), rho=args.rho, groups=groups)
    return CycleLoss(HeatmapLoss(), alpha=args.alpha, groups=groups)


def build_schedule(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps_per_epoch: int
) -> MultiStepLRScheduler:
    """A rate that rises for `--warmup-steps`, and is a tenth after each of `--lr-drop-epochs`; of the step alone."""
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[epoch * steps_per_epoch for epoch in args.lr_drop_epochs],
        decay_rate=0.1,
        warmup_t=args.warmup_steps,
        warmup_lr_init=args.lr * 1e-3,
        t_in_epochs=False,
    )


def training_crops(
    accelerator: Accelerator, args: argparse.Namespace, people: People, input_size: Size, workers: int
) -> TrainingCrops:
    """Random views of the people; the main process makes the cache for all."""
    settings = ViewSettings(
        shift_probability=args.shift,
        flip=args.flip,
        half_body=args.half_body,
        scale=args.scale,
        rotation=args.rotation,
    )
    cache = None if args.no_cache else args.cache_dir or people.annotations.parent / CACHE

    def make() -> TrainingCrops:
        return TrainingCrops(people, input_size, settings, cache=cache, workers=workers)

    return main_process_first(accelerator, make)


def save_plain_model(training: Training, weights: dict[str, Tensor]) -> None:
    """`model/` in the run folder, as `save_pretrained` writes it; `from_pretrained` reads it."""
    model = training.accelerator.unwrap_model(training.model)
    model.load_state_dict(weights)
    save_pretrained(model, training.folder.final)


def introduction(training: Training, data: PoseData, args: argparse.Namespace) -> str:
    """What is about to happen, in a few lines."""
    order, accelerator, task = training.order, training.accelerator, training.task
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    shares = f"{args.batch_size} x {accelerator.num_processes} processes x {args.accumulate} accumulated"
    lines = [
        f"{data.train.annotations}: {len(data.train):,} people, {len(data.train.skeleton.names)} key points, "
        f"{data.train.skipped}",
        f"{data.validation.annotations}: {len(data.validation):,} {data.validation.source} boxes, "
        f"{data.validation.skipped}",
        f"{task.config.name} at {task.config.input_size[0]}x{task.config.input_size[1]}, {task.cycles} cycles, "
        f"{precision} on {accelerator.device}",
        f"{args.epochs} epochs of {order.steps_per_epoch:,} steps; global batch {order.global_batch} ({shares})",
        f"run folder: {training.folder.path}",
    ]
    return "\n".join(lines)


def write_card(folder: RunFolder, outcome: Outcome, args: argparse.Namespace, accelerator: Accelerator) -> None:
    text = model_card(
        args.model,
        library="cyclekd",
        base_model=None,
        datasets=[str(args.data or "synthetic figures")],
        metrics={name: value for name, value in outcome.metrics.items() if name not in ("epoch", "people")},
        settings={name: value for name, value in vars(args).items() if value not in (None, False, [], {})},
        environment=describe_environment(accelerator.device),
        usage="from cyclekd.integrations.tokenpose import KeypointModel, from_pretrained\n\n"
        'model = KeypointModel(from_pretrained("model"))\n'
        "keypoints, scores = model(images)  # one pass; pixels of the crop",
        notes=[f"Evaluated on {outcome.metrics['people']} people, flip test: {not args.no_flip_test}."],
    )
    write_text_atomically(folder.card, text)


def summary(training: Training, outcome: Outcome) -> str:
    """How it ended: AP per cycle, time, files."""
    lines = ["", f"{outcome.why} after {outcome.step:,} of {training.order.steps:,} steps, {duration(outcome.seconds)}"]
    for cycle in range(1, training.task.cycles + 1):
        found = [f"{name} {outcome.metrics.get(f'{name}_{cycle}', float('nan')):.4f}" for name in SHOWN]
        lines.append(f"  {'one pass, as deployed' if cycle == 1 else f'{cycle} cycles':32} {'  '.join(found)}")
    if outcome.best:
        deciding = training.deciding
        lines.append(f"  best {deciding} {outcome.best[deciding]:.4f} in epoch {outcome.best['epoch']}")
    if training.skipped:
        lines.append(f"  {len(training.skipped)} people with unreadable images were replaced: see log.jsonl")
    if not outcome.finished:
        lines.append(f"stopped by {outcome.why}: go on with --out {training.folder.path} --resume")
    return "\n".join([*lines, "", f"in {training.folder.path}:", *(f"  {path}" for path in training.folder.files())])
