"""One training from its arguments to its saved model; `examples/train_deit.py` is the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cyclekd.integrations.deit.arguments import check_arguments, parse_arguments
from cyclekd.integrations.deit.augment import (
    AugmentSettings,
    DeviceAugment,
    EvaluationTransform,
    HostAugment,
    PlanAugment,
    normalise,
)
from cyclekd.integrations.deit.data import EvaluationImages, ImageData, ImageTable, TrainingImages, load_data
from cyclekd.integrations.deit.deploy import save_plain_model, usage_of
from cyclekd.integrations.deit.recipe import (
    add_cycles,
    augment_settings,
    build_criterion,
    build_mixup,
    build_model,
    build_optimizer,
    build_schedule,
    build_teacher,
    check_forward,
    lr_warning,
)
from cyclekd.integrations.deit.streams import StreamedImages
from cyclekd.integrations.deit.task import Classification
from cyclekd.integrations.runs.arguments import make_accelerator, rhythm_of, workers_of
from cyclekd.integrations.runs.card import model_card, settings_given
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder, write_text_atomically
from cyclekd.integrations.runs.loading import Batch, load_batches, load_stream
from cyclekd.integrations.runs.processes import all_or_none, main_process_first
from cyclekd.integrations.runs.progress import duration
from cyclekd.integrations.runs.sampling import TrainingBatches
from cyclekd.integrations.runs.start import check_out, open_run, precision_of, run_command
from cyclekd.integrations.runs.training import Order, Outcome, Training


def main(description: str, arguments: list[str] | None = None) -> int:
    """Train as the arguments say; the exit code: 0, 2 for bad input, 128 + n after signal n."""
    args = parse_arguments(description, arguments)

    def make() -> Accelerator:
        check_arguments(args)
        return make_accelerator(args)

    return run_command(make, lambda accelerator: train(accelerator, args))


def train(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Set up, train, save; the exit code."""
    check_out(accelerator, args)
    with all_or_none():
        settings = augment_settings(args)
    data = read_data(accelerator, args)
    training = set_up(accelerator, args, data, settings)
    if accelerator.is_main_process:
        print(introduction(training, data, args), flush=True)
    outcome = training.run()
    if outcome.finished:
        weights = training.deployable_weights()  # gathered by all processes
        if accelerator.is_main_process:
            save_plain_model(training.folder, weights, args, data.classes, settings)
            write_card(training.folder, outcome, args, len(data.classes), accelerator)
    if accelerator.is_main_process:
        print(summary(training, outcome), flush=True)
    return outcome.exit_code


def read_data(accelerator: Accelerator, args: argparse.Namespace) -> ImageData:
    def read() -> ImageData:
        return load_data(
            args.data,
            train_split=args.train_split,
            validation_split=args.validation_split,
            image_column=args.image_column,
            label_column=args.label_column,
            num_classes=args.num_classes,
            cache_dir=args.cache_dir,
            streaming=args.streaming,
        )

    return main_process_first(accelerator, read)  # for the cache of `datasets`


def set_up(accelerator: Accelerator, args: argparse.Namespace, data: ImageData, settings: AugmentSettings) -> Training:
    """Everything between the arguments and the first step; whatever cannot work fails here."""
    workers, classes = workers_of(args), len(data.classes)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    with all_or_none():
        rhythm = rhythm_of(args)
        transform, augment = training_augmentation(accelerator, args, settings)
        order, load, problem_of = training_batches(accelerator, args, data, transform, workers)
        mixup = build_mixup(args, classes)
        teacher = build_teacher(args, classes, accelerator.device)
        set_seed(args.seed)  # the same initial weights on every process
        model = add_cycles(build_model(args, classes), args)
        model = model.to(accelerator.device, memory_format=memory_format)
        check_forward(model, args, f"--model {args.model}")
        if teacher is not None:
            check_forward(teacher.model, args, f"--teacher {args.teacher}")
        criterion = build_criterion(model, args)
        average = make_average(model, accelerator, args)
    optimizer = build_optimizer(model, args, order.global_batch)
    schedule = build_schedule(optimizer, args, order.steps_per_epoch)
    if args.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    task = Classification(
        accelerator,
        criterion,
        augment=augment,
        normalise=lambda images: normalise(images, settings.mean, settings.std),
        validation=EvaluationImages(data.validation, EvaluationTransform(settings)),
        batch=args.batch_size,
        workers=workers,
        cycles=args.cycles,
        seed=args.seed,
        mixup=mixup,
        teacher=teacher,
        memory_format=memory_format,
    )
    processes = accelerator.num_processes
    saved = {**vars(args), "processes": processes, "global_batch": order.global_batch}
    saved["precision"] = accelerator.mixed_precision
    if args.streaming:  # the order of streamed images depends on who reads them
        saved["readers"] = f"{processes} x {workers}, {args.accumulate} x {args.batch_size} images each"
    return Training(
        accelerator,
        folder=open_run(accelerator, args, name=f"{args.model}-cycles{args.cycles}", settings=saved),
        task=task,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        order=order,
        load=load,
        seed=args.seed,
        clip_norm=args.clip_grad,
        average=average,
        rhythm=rhythm,
        problem_of=problem_of,
    )


def training_batches(
    accelerator: Accelerator,
    args: argparse.Namespace,
    data: ImageData,
    transform: Callable[[Image.Image, int], dict[str, Tensor]],
    workers: int,
) -> tuple[Order, Callable[[], Iterable[Batch]], Callable[[int], str] | None]:
    """The order of training, how it is loaded, and what to say of an image that was skipped."""
    shares = {
        "batch": args.batch_size,
        "epochs": args.epochs,
        "seed": args.seed,
        "accumulate": args.accumulate,
        "processes": accelerator.num_processes,
        "rank": accelerator.process_index,
    }
    if isinstance(data.train, ImageTable):
        order = TrainingBatches(len(data.train), repeats=args.repeated_augmentation, **shares)
        images = TrainingImages(data.train, transform)
        return order, lambda: load_batches(images, order, workers, accelerator.device), data.train.problem
    stream = StreamedImages(
        data.train, transform, classes=len(data.classes), images_per_epoch=args.images_per_epoch, **shares
    )
    return stream, lambda: load_stream(stream, args.batch_size, workers, accelerator.device), None


def training_augmentation(
    accelerator: Accelerator, args: argparse.Namespace, settings: AugmentSettings
) -> tuple[Callable[[Image.Image, int], dict[str, Tensor]], Callable[[Batch], Tensor]]:
    """What the workers do to an image, and what is left to do with a batch on the device."""
    on_device = {"device": True, "host": False, "auto": accelerator.device.type == "cuda"}[args.augment_on]
    if not on_device:
        return HostAugment(settings), lambda batch: batch["image"]
    rest = DeviceAugment(settings)

    def augment(batch: Batch) -> Tensor:
        return rest(batch["image"], batch["plan"])

    return PlanAugment(settings), augment


def make_average(model: nn.Module, accelerator: Accelerator, args: argparse.Namespace) -> ModelEmaV3 | None:
    """The running average of the weights, or None without `--ema`."""
    if args.ema is None:
        return None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise RunError("--ema: averages whole weights, and this launch shards them: leave it out, or launch with DDP")
    if not 0 < args.ema < 1:
        raise RunError(f"--ema {args.ema}: a decay is between 0 and 1")
    return ModelEmaV3(model, decay=args.ema)


def introduction(training: Training, data: ImageData, args: argparse.Namespace) -> str:
    """What is about to happen, in a few lines."""
    order, accelerator = training.order, training.accelerator
    images = f"{len(data.train):,} images" if isinstance(data.train, ImageTable) else "streamed images"
    shares = f"{args.batch_size} x {accelerator.num_processes} processes x {args.accumulate} accumulated"
    lines = [
        f"{data.train.name}: {images} of {len(data.classes)} classes",
        f"{data.validation.name}: {len(data.validation):,} images",
        f"{args.model}, {args.cycles} cycles, {precision_of(accelerator)} on {accelerator.device}",
        f"{args.epochs} epochs of {order.steps_per_epoch:,} steps; global batch {order.global_batch} ({shares})",
        f"run folder: {training.folder.path}",
    ]
    if args.data is not None and (warning := lr_warning(args, order.global_batch)):
        lines.append(f"note: {warning}")
    if args.streaming and args.repeated_augmentation > 1:
        lines.append("note: streamed images come once per epoch; --repeated-augmentation is left out")
    return "\n".join(lines)


def write_card(
    folder: RunFolder, outcome: Outcome, args: argparse.Namespace, classes: int, accelerator: Accelerator
) -> None:
    weights = "averaged" if args.ema else "last"
    text = model_card(
        f"{args.model}, {args.cycles} cycles in training" if args.cycles > 1 else args.model,
        library="timm",
        base_model=f"timm/{args.model}" if args.pretrained else None,
        datasets=[args.data or "digits (scikit-learn)"],
        metrics={name: value for name, value in outcome.metrics.items() if not name.startswith(("epoch", "images"))},
        settings=settings_given(args),
        environment=describe_environment(accelerator.device),
        usage=usage_of(args, classes),
        notes=[
            f"`model/` has the {weights} weights. In use the model makes one pass, whose figures are those of cycle 1"
            + (", ema." if args.ema else "."),
            f"Validation images: {outcome.metrics['images']}.",
        ],
    )
    write_text_atomically(folder.card, text)


def summary(training: Training, outcome: Outcome) -> str:
    """How it ended: accuracy per cycle, time, files."""
    lines = [
        "",
        f"{outcome.why} after {outcome.step:,} of {training.order.steps:,} steps, {duration(outcome.seconds)}",
    ]
    suffixes = ("", "_ema") if training.average is not None else ("",)
    for suffix in suffixes:
        for cycle in range(1, training.task.cycles + 1):
            found = [f"{name} {outcome.metrics.get(f'{name}_{cycle}{suffix}', float('nan')):.2f}" for name in METRICS]
            which = ("one pass, as deployed" if cycle == 1 else f"{cycle} cycles") + suffix.replace("_", ", ")
            lines.append(f"  {which:32} {'  '.join(found)}")
    if outcome.best:
        deciding = training.deciding
        lines.append(f"  best {deciding} {outcome.best[deciding]:.2f} in epoch {outcome.best['epoch']}")
    if training.skipped:
        lines.append(f"  {len(training.skipped)} unreadable training images were replaced: see log.jsonl")
    missed = len(training.task.validation) - outcome.metrics.get("images", len(training.task.validation))
    if missed:
        lines.append(f"  {missed} unreadable validation images do not count")
    if not outcome.finished:
        lines.append(f"stopped by {outcome.why}: go on with --out {training.folder.path} --resume")
    lines += ["", f"in {training.folder.path}:", *(f"  {path}" for path in training.folder.files())]
    return "\n".join(lines)


METRICS = ("top1", "top5", "loss")
