"""What an evaluation is of: a model, and the people it is shown, as the arguments name them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from cyclekd.integrations.runs.arguments import workers_of
from cyclekd.integrations.tokenpose.data.annotations import read_annotations
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops
from cyclekd.integrations.tokenpose.data.people import People, find_split, read_people
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.evaluation.arguments import detected
from cyclekd.integrations.tokenpose.evaluation.precision import average_precision
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.weights.hub import from_pretrained, saved_model
from cyclekd.integrations.tokenpose.weights.reference import load_reference_checkpoint, reference_model


@dataclass(frozen=True)
class Evaluated:
    """Everything that was asked for, ready to run."""

    model: nn.Module
    name: str
    """Where the model is from, for people to read."""
    aligned: bool
    cycles: int
    people: People
    has_truth: bool
    """Whether the file has people to compare with; that of COCO's test-dev has not."""


def set_up(accelerator: Accelerator, args: argparse.Namespace) -> Evaluated:
    """Errors: RunError for whatever cannot work, before the first prediction."""
    annotations, images = (args.annotations, args.images) if args.data is None else find_split(args.data, "val")
    has_truth = bool(read_annotations(annotations).persons)
    if not has_truth and args.boxes is None:
        raise PoseError(f"{annotations} has images and no people: give a detector's boxes with --boxes")
    people = read_people(annotations, images, for_training=False, sigmas=args.sigmas, **detected(args))
    if has_truth:
        average_precision(people, [])
    model, name, aligned = load_model(args, len(people.skeleton.names))
    keypoints = model.config.num_keypoints
    if keypoints != len(people.skeleton.names):
        raise PoseError(
            f"{name} predicts {keypoints} key points, and {annotations} has {len(people.skeleton.names)}: evaluate on "
            "the data set that the model is for"
        )
    model = model.to(accelerator.device).eval()
    return Evaluated(model, name, aligned, model.config.cycles, people, has_truth)


def cut(this: Evaluated, args: argparse.Namespace) -> EvaluationCrops:
    """The people as the network sees them; with a cache, which the first process fills."""
    size, workers = this.model.config.input_size, max(1, workers_of(args))
    return EvaluationCrops(this.people, size, cache=args.cache_dir, workers=workers, exact=args.exact_crops)


def load_model(args: argparse.Namespace, num_keypoints: int) -> tuple[nn.Module, str, bool]:
    """The model, where it is from, and whether its maps are aligned as TokenPose's own code has them."""
    settings = dict(args.model_args)
    if args.cycles is not None:
        settings["cycles"] = args.cycles
    if args.checkpoint is None:
        model = from_pretrained(saved_model(args.model), **settings)
        return model, f"{model.config.name} of {args.model}", bool(args.aligned)
    name, seen = (args.preset, {"num_keypoints": num_keypoints}) if args.preset else reference_model(args.checkpoint)
    model = create_model(name, **{**seen, **settings})
    layout = load_reference_checkpoint(model, args.checkpoint).layout
    aligned = layout.startswith("official") if args.aligned is None else args.aligned
    return model, f"{name} of {args.checkpoint} ({layout})", aligned
