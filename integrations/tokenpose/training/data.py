"""Whom a run learns from and is evaluated on: people of COCO's files or synthetic figures, and views of them."""

from __future__ import annotations

import argparse
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RUNS, RunFolder
from cyclekd.integrations.runs.processes import all_or_none, main_process_first
from cyclekd.integrations.runs.progress import Log
from cyclekd.integrations.tokenpose.data.crops import TrainingCrops
from cyclekd.integrations.tokenpose.data.people import DETECTOR, People, find_split, read_people
from cyclekd.integrations.tokenpose.data.views import ViewSettings
from cyclekd.integrations.tokenpose.evaluation.arguments import detected
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.shapes import Size
from cyclekd.integrations.tokenpose.skeletons import CROWDPOSE, Skeleton
from cyclekd.integrations.tokenpose.training.arguments import FIGURES, is_first_look

SYNTHETIC = RUNS / "synthetic-figures"

CACHE, OTHER_CACHE = ".cyclekd", RUNS / "cache"
"""The cache of people: a folder beside the annotations, or where that cannot be written."""


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
