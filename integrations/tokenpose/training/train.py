"""One pose training from its arguments to its saved model; `examples/train_tokenpose.py` is the command."""

from __future__ import annotations

import argparse
import os
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.scheduler import MultiStepLRScheduler
from torch import Tensor, nn

from cyclekd.integrations.runs.arguments import make_accelerator, rhythm_of, workers_of
from cyclekd.integrations.runs.card import model_card, settings_given
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RUNS, RunFolder, write_text_atomically
from cyclekd.integrations.runs.loading import load_batches
from cyclekd.integrations.runs.processes import all_or_none, main_process_first, on_main_process
from cyclekd.integrations.runs.progress import Log, duration
from cyclekd.integrations.runs.sampling import TrainingBatches
from cyclekd.integrations.runs.start import check_out, open_run, precision_of, run_command
from cyclekd.integrations.runs.training import Outcome, Training
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops, TrainingCrops
from cyclekd.integrations.tokenpose.data.people import DETECTOR, People, find_split, read_people
from cyclekd.integrations.tokenpose.data.views import ViewSettings
from cyclekd.integrations.tokenpose.evaluation.arguments import detected
from cyclekd.integrations.tokenpose.evaluation.pictures import draw_predictions
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.models.config import PoseConfig, TokenPoseConfig, config_for
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.shapes import Size
from cyclekd.integrations.tokenpose.skeletons import CROWDPOSE, Skeleton
from cyclekd.integrations.tokenpose.training.arguments import (
    FIGURES,
    check_arguments,
    check_token_weight,
    is_first_look,
    parse_arguments,
    recipe_warnings,
)
from cyclekd.integrations.tokenpose.training.objective import Supervised, make_criterion, weights_of_model
from cyclekd.integrations.tokenpose.training.task import PoseEstimation
from cyclekd.integrations.tokenpose.weights.hub import from_pretrained, read_config, save_pretrained, saved_model
from cyclekd.integrations.tokenpose.weights.layouts import some

MODEL = "sdpose_s_v1"
SYNTHETIC = RUNS / "synthetic-figures"

CACHE, OTHER_CACHE = ".cyclekd", RUNS / "cache"
"""The cache of people: a folder beside the annotations, or where that cannot be written."""

SHOWN = ("AP", "AP50", "AR")


@dataclass(frozen=True)
class PoseData:
    """Whom a run learns from, and whom it is evaluated on."""

    train: People
    validation: People
    boxes: Path | None
    """The detector's file, where those are its boxes..."""
    least_score: float
    """... and the score from which on they count."""

    def records(self) -> dict[str, object]:
        """For the log."""
        return {
            "train": self.train.annotations,
            "train_people": len(self.train),
            "train_skipped": dict(self.train.skipped.counts),
            "validation": self.validation.annotations,
            "validation_people": len(self.validation),
            "validation_skipped": dict(self.validation.skipped.counts),
            "boxes": self.validation.source,
            "boxes_file": self.boxes,
            "least_box_score": self.least_score,
            "keypoints": len(self.train.skeleton.names),
        }

    def boxes_in_words(self) -> str:
        """Whose boxes the figures hold for."""
        if self.validation.source != DETECTOR:
            return f"{self.validation.source} boxes"
        return f"{DETECTOR} boxes of {self.boxes} with scores from {self.least_score:g}"


class PoseTraining(Training):
    """Of a `Supervised`, whose model alone is deployed."""

    def deployable_weights(self) -> dict[str, Tensor]:
        return weights_of_model(super().deployable_weights())


def main(description: str, arguments: list[str] | None = None) -> int:
    """Train as the arguments say; the exit code: 0, 2 for bad input, 128 + n after signal n."""
    args = parse_arguments(description, arguments)

    def make() -> Accelerator:
        check_arguments(args)
        return make_accelerator(args)

    return run_command(make, lambda accelerator: train(accelerator, args))


def train(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Set up, train, save; the exit code."""
    with all_or_none():
        check_token_weight(args, named_config(args))
    check_out(accelerator, args)
    data = read_data(accelerator, args)
    training = set_up(accelerator, args, data)
    if accelerator.is_main_process:
        print(introduction(training, data, args), flush=True)
    outcome = training.run()
    if outcome.finished:
        weights = training.deployable_weights()  # gathered by all processes
        if accelerator.is_main_process:
            finish(training, outcome, weights, data, args)
    if accelerator.is_main_process:
        print(summary(training, outcome, data), flush=True)
    return outcome.exit_code


def read_data(accelerator: Accelerator, args: argparse.Namespace) -> PoseData:
    """The people of both splits; of synthetic figures, which are drawn first, where no other data are given."""
    data = args.data
    if is_first_look(args):
        data = main_process_first(accelerator, lambda: write_figures(SYNTHETIC, **FIGURES, seed=0))
    splits = {}
    with all_or_none():
        for split in ("train", "val"):
            annotations, images = getattr(args, f"{split}_annotations"), getattr(args, f"{split}_images")
            if annotations is None:
                annotations, images = find_split(data, split)
            boxes = detected(args) if split == "val" else {}
            splits[split] = read_people(annotations, images, for_training=split == "train", **boxes)
        check_skeletons(splits["train"], splits["val"])
    return PoseData(splits["train"], splits["val"], args.boxes, args.box_score or 0.0)


def check_skeletons(train: People, validation: People) -> None:
    """Errors: RunError where the splits have other key points, or AP cannot be measured."""
    one, other = train.skeleton, validation.skeleton
    if one.names != other.names:
        raise RunError(
            f"the {len(one.names)} key points of {train.annotations} are {', '.join(one.names)}, and the "
            f"{len(other.names)} of {validation.annotations} {', '.join(other.names)}: both splits need the same"
        )
    if {frozenset(pair) for pair in one.flip_pairs} != {frozenset(pair) for pair in other.flip_pairs}:
        raise RunError(
            f"a mirrored image exchanges the key points {one.flip_pairs} by {train.annotations}, and "
            f"{other.flip_pairs} by {validation.annotations}: both splits need the same flip_pairs"
        )
    if not other.sigmas:
        raise RunError(
            f"{validation.annotations}: AP needs the category's sigmas, how far annotators' clicks spread relative to "
            f'a person\'s size, one per key point: add "sigmas": {[0.05] * len(other.names)} to treat all alike'
        )


def set_up(accelerator: Accelerator, args: argparse.Namespace, data: PoseData) -> PoseTraining:
    """Everything between the arguments and the first step; whatever cannot work fails here."""
    workers, views = workers_of(args), view_settings(args, data.train.skeleton)
    with all_or_none():
        rhythm = rhythm_of(args)
        order = TrainingBatches(
            len(data.train),
            batch=args.batch_size,
            epochs=args.epochs,
            seed=args.seed,
            accumulate=args.accumulate,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
        )
        set_seed(args.seed)  # the same initial weights on every process
        model = build_model(args, len(data.train.skeleton.names))
        criterion = make_criterion(model, alpha=args.alpha, rho=args.rho)
    config = model.config
    crops = training_crops(accelerator, args, data.train, config.input_size, views, workers)
    supervised = Supervised(model, criterion).to(accelerator.device)
    fused = accelerator.device.type in {"cpu", "cuda"}
    optimizer = torch.optim.Adam(supervised.parameters(), lr=args.lr, fused=fused)
    schedule = build_schedule(optimizer, args, order.steps_per_epoch)
    if args.compile:
        model.compile()
    supervised, optimizer = accelerator.prepare(supervised, optimizer)
    task = PoseEstimation(
        accelerator,
        config=config,
        validation=EvaluationCrops(data.validation, config.input_size, exact=args.exact_crops),
        batch=args.batch_size,
        workers=workers,
        cycles=config.cycles,
        sigma=args.sigma,
        flip_test=not args.no_flip_test,
    )
    saved = {**vars(args), "views": asdict(views), "processes": accelerator.num_processes}
    saved |= {"global_batch": order.global_batch, "precision": accelerator.mixed_precision}
    folder = open_run(accelerator, args, name=f"{config.name}-cycles{config.cycles}", settings=saved)
    on_main_process(accelerator, lambda: log_data(folder, data))
    return PoseTraining(
        accelerator,
        folder=folder,
        task=task,
        model=supervised,
        optimizer=optimizer,
        schedule=schedule,
        order=order,
        load=lambda: load_batches(crops, order, workers, accelerator.device),
        seed=args.seed,
        clip_norm=args.clip_grad,
        rhythm=rhythm,
        problem_of=crops.problem,
        measures=SHOWN,
    )


def build_model(args: argparse.Namespace, num_keypoints: int) -> nn.Module:
    """The model for that many key points, wrapped where it has several cycles; in training mode.

    Errors: PoseError for an unknown name or fields, and for weights that do not fit.
    """
    settings = {**args.model_args, "num_keypoints": num_keypoints}
    if args.init_from is not None:
        model = load_model(args, settings)
    else:
        name = args.model or MODEL
        settings |= cycles_of(args, isinstance(config_for(name), TokenPoseConfig))
        model = create_model(name, pretrained_backbone=args.pretrained_backbone, **settings)
    return model.train()


def named_config(args: argparse.Namespace) -> PoseConfig:
    """Of the model that is asked for, before other arguments change it. Errors: PoseError where there is none."""
    return config_for(args.model or MODEL) if args.init_from is None else read_config(saved_model(args.init_from))


def load_model(args: argparse.Namespace, settings: dict[str, object]) -> nn.Module:
    """That of --init-from, with these settings. Errors: RunError where it is not the --model, and PoseError."""
    before = from_pretrained(saved_model(args.init_from))
    config = before.config
    if args.model not in (None, config.name):
        raise RunError(f"--init-from {args.init_from}: holds {config.name} and not --model {args.model}; leave one out")
    if config.num_keypoints != settings["num_keypoints"] and not args.new_head:
        raise RunError(
            f"--init-from {args.init_from}: predicts {config.num_keypoints} key points, and the data have "
            f"{settings['num_keypoints']}: add --new-head to take over all weights but those that depend on it"
        )
    settings |= cycles_of(args, isinstance(config, TokenPoseConfig))
    model = from_pretrained(saved_model(args.init_from), strict=False, **settings)
    if (others := unlike(model, before)) and not args.new_head:
        raise RunError(
            f"--init-from {args.init_from}: has other weights than --model-args ask for, {some(others)}: leave these "
            "arguments out, or add --new-head to begin at random there and to take over all others"
        )
    return model


def unlike(model: nn.Module, other: nn.Module) -> list[str]:
    """Names of weights that one of the two models has alone, or in another shape."""
    one, two = ({name: value.shape for name, value in each.state_dict().items()} for each in (model, other))
    return [name for name in one | two if one.get(name) != two.get(name)]


def cycles_of(args: argparse.Namespace, has_blocks: bool) -> dict[str, int]:
    """The field of a config that --cycles sets; a model without blocks makes one pass anyway."""
    return {} if args.cycles is None or (args.cycles == 1 and not has_blocks) else {"cycles": args.cycles}


def build_schedule(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps_per_epoch: int
) -> MultiStepLRScheduler:
    """A rate that rises for `--warmup-steps`, and is a tenth after each of `--lr-drop-epochs`; of the step alone.

    As mmcv's, which begins at a thousandth and counts the warm-up to the epochs.
    """
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[epoch * steps_per_epoch + 1 for epoch in args.lr_drop_epochs],  # timm drops one step early
        decay_rate=0.1,
        warmup_t=args.warmup_steps,
        warmup_lr_init=args.lr * 1e-3,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def view_settings(args: argparse.Namespace, skeleton: Skeleton) -> ViewSettings:
    """What was given, and else the recipe of the data set."""
    given = {
        "shift_probability": args.shift,
        "flip": args.flip,
        "half_body": args.half_body,
        "scale": args.scale,
        "rotation": args.rotation,
    }
    recipe = ViewSettings.crowdpose() if skeleton.names == CROWDPOSE.names else ViewSettings()
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def training_crops(
    accelerator: Accelerator,
    args: argparse.Namespace,
    people: People,
    input_size: Size,
    views: ViewSettings,
    workers: int,
) -> TrainingCrops:
    """Random views of the people; one process of each machine makes the cache for all."""
    cache = None if args.no_cache or args.exact_crops else args.cache_dir or default_cache(people)

    def make() -> TrainingCrops:
        stored = {"cache": cache, "workers": workers, "compress": not args.cache_pixels}
        return TrainingCrops(people, input_size, views, exact=args.exact_crops, **stored)

    return main_process_first(accelerator, make)


def default_cache(people: People) -> Path:
    beside = people.annotations.parent / CACHE
    folder = beside if beside.is_dir() else beside.parent
    protected = not folder.stat().st_mode & stat.S_IWUSR  # root could write there, and should not
    return beside if os.access(folder, os.W_OK) and not protected else OTHER_CACHE


def log_data(folder: RunFolder, data: PoseData) -> None:
    """The first record of a run: who takes part in it."""
    log = Log(folder.log)
    if not log.read():
        log.write("data", 0, **data.records())


def finish(
    training: PoseTraining, outcome: Outcome, weights: dict[str, Tensor], data: PoseData, args: argparse.Namespace
) -> None:
    """The plain model in `model/`, as `save_pretrained` writes it, a picture of what it predicts, and its card."""
    model = training.accelerator.unwrap_model(training.model).model
    model.load_state_dict(weights)
    save_pretrained(model, training.folder.final)
    draw_predictions(pictures_of(training.folder), model, training.task.validation, model.config.name)
    write_card(training, outcome, data, args)


def pictures_of(folder: RunFolder) -> Path:
    return folder.path / "predictions.png"


def introduction(training: PoseTraining, data: PoseData, args: argparse.Namespace) -> str:
    """What is about to happen, in a few lines."""
    order, accelerator, config = training.order, training.accelerator, training.task.config
    shares = f"{args.batch_size} x {accelerator.num_processes} processes x {args.accumulate} accumulated"
    cycles, precision = training.task.cycles, precision_of(accelerator)
    people, size = "synthetic figures" if is_first_look(args) else "people", "x".join(map(str, config.input_size))
    lines = [
        f"training on {len(data.train):,} {people} of {data.train.annotations}, {len(data.train.skeleton.names)} key "
        f"points; {data.train.skipped}",
        f"evaluating on {len(data.validation):,} {people} of {data.validation.annotations}, {data.boxes_in_words()}; "
        f"{data.validation.skipped}",
        f"{config.name} at {size} pixels, {cycles} cycle{'s' * (cycles > 1)}, {precision} on {accelerator.device}",
        f"{args.epochs} epochs of {order.steps_per_epoch:,} steps; global batch {order.global_batch} ({shares})",
        f"run folder: {training.folder.path}",
    ]
    if args.new_head:
        model, before = accelerator.unwrap_model(training.model).model, from_pretrained(saved_model(args.init_from))
        lines.append(f"begins with the weights of {args.init_from}, and at random with {some(unlike(model, before))}")
    warnings = recipe_warnings(args, config.name, order.global_batch, order.steps)
    return "\n".join([*lines, *(f"note: {warning}" for warning in warnings)])


def write_card(training: PoseTraining, outcome: Outcome, data: PoseData, args: argparse.Namespace) -> None:
    task, config = training.task, training.task.config
    averaged = "averaged with the mirrored image" if task.flip_test else "without the mirrored image"
    text = model_card(
        f"{config.name}, {task.cycles} cycles in training" if task.cycles > 1 else config.name,
        library="cyclekd",
        base_model=None,
        datasets=["synthetic figures" if is_first_look(args) else str(data.train.annotations)],
        metrics={name: value for name, value in outcome.metrics.items() if name not in ("epoch", "people")},
        settings=settings_given(args),
        environment=describe_environment(training.accelerator.device),
        usage="from cyclekd.integrations.tokenpose import KeypointModel, from_pretrained\n\n"
        'model = KeypointModel(from_pretrained("model")).eval()\n'
        f"keypoints, scores = model(images)  # normalised crops [B, 3, {config.input_size[0]}, {config.input_size[1]}]"
        " to their pixels, in one pass",
        notes=[
            f"Evaluated on {outcome.metrics['people']} people of {data.validation.annotations}, "
            f"{data.boxes_in_words()}, {averaged}.",
            "`model/` has the last weights, `best/` those of the highest AP of cycle 1.",
        ],
    )
    write_text_atomically(training.folder.card, text)


def summary(training: PoseTraining, outcome: Outcome, data: PoseData) -> str:
    """How it ended: AP per cycle, time, files."""
    lines = ["", f"{outcome.why} after {outcome.step:,} of {training.order.steps:,} steps, {duration(outcome.seconds)}"]
    if outcome.metrics:
        lines.append(f"  {outcome.metrics['people']:,} people, {data.boxes_in_words()}")
        for cycle in range(1, training.task.cycles + 1):
            found = [f"{name} {outcome.metrics[f'{name}_{cycle}']:.4f}" for name in SHOWN]
            lines.append(f"  {'one pass, as deployed' if cycle == 1 else f'{cycle} cycles':32} {'  '.join(found)}")
        missed = len(data.validation) - outcome.metrics["people"]
        if missed:
            lines.append(f"  {missed} people in unreadable validation images count as not found")
    if outcome.best:
        deciding = training.deciding
        lines.append(f"  best {deciding} {outcome.best[deciding]:.4f} in epoch {outcome.best['epoch']}")
    if training.skipped:
        lines.append(f"  {len(training.skipped)} people with unreadable images were replaced: see log.jsonl")
    if not outcome.finished:
        lines.append(f"stopped by {outcome.why}: go on with --out {training.folder.path} --resume")
    return "\n".join([*lines, "", f"in {training.folder.path}:", *(f"  {path}" for path in training.folder.files())])
