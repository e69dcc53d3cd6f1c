"""One pose training from its arguments to its saved model; `examples/train_tokenpose.py` is the command."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.scheduler import MultiStepLRScheduler
from torch import Tensor

from cyclekd.integrations.runs.arguments import make_accelerator, rhythm_of, workers_of
from cyclekd.integrations.runs.folder import RunFolder
from cyclekd.integrations.runs.loading import load_batches
from cyclekd.integrations.runs.processes import all_or_none, on_main_process
from cyclekd.integrations.runs.sampling import TrainingBatches
from cyclekd.integrations.runs.start import check_out, open_run, run_command
from cyclekd.integrations.runs.training import Outcome
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops
from cyclekd.integrations.tokenpose.evaluation.pictures import draw_predictions
from cyclekd.integrations.tokenpose.training.arguments import check_arguments, check_objective, parse_arguments
from cyclekd.integrations.tokenpose.training.data import (
    PoseData,
    log_data,
    read_data,
    training_crops,
    view_settings,
)
from cyclekd.integrations.tokenpose.training.model import build_model, named_config
from cyclekd.integrations.tokenpose.training.objective import Supervised, make_criterion
from cyclekd.integrations.tokenpose.training.report import SHOWN, introduction, summary, write_card
from cyclekd.integrations.tokenpose.training.task import PoseEstimation, PoseTraining
from cyclekd.integrations.tokenpose.weights.hub import save_pretrained


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
        check_objective(args, named_config(args))
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
    saved |= {"global_batch": order.global_batch, "precision": accelerator.mixed_precision, "target_sigma": task.sigma}
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
