"""What a run says of itself: before its first step, at its end, and on the card of its model."""

from __future__ import annotations

import argparse

from cyclekd.integrations.runs.card import model_card, settings_given
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.folder import write_text_atomically
from cyclekd.integrations.runs.progress import duration
from cyclekd.integrations.runs.start import precision_of
from cyclekd.integrations.runs.training import Outcome
from cyclekd.integrations.tokenpose.training.arguments import is_first_look, recipe_warnings
from cyclekd.integrations.tokenpose.training.data import PoseData
from cyclekd.integrations.tokenpose.training.model import unlike
from cyclekd.integrations.tokenpose.training.task import PoseTraining
from cyclekd.integrations.tokenpose.weights.hub import from_pretrained, saved_model
from cyclekd.integrations.tokenpose.weights.layouts import some

SHOWN = ("AP", "AP50", "AR")


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
