"""Evaluate a pose model on COCO, CrowdPose or your own people: AP of every cycle, PCK, speed, and a result file.

    python examples/evaluate_pose.py --model runs/mine --data coco
    python examples/evaluate_pose.py --model MODEL --data coco --boxes COCO_val2017_detections_AP_H_56_person.json
    python examples/evaluate_pose.py --checkpoint tokenpose_s_v1.pth --data coco --exact-crops       # as published
    accelerate launch examples/evaluate_pose.py --model MODEL --annotations image_info_test-dev2017.json \\
        --images test2017 --boxes COCO_test-dev2017_detections_AP_H_609_person.json          # for COCO's server

MODEL is the folder of a training, a folder of save_pretrained, or such a repository on the hub. The saved model is a
plain one; its cycles stand in its config, and all of them are evaluated unless --cycles says otherwise. Cycle 1 is the
single pass that is deployed.

With ground-truth boxes a model does better than with a detector's, so every line says whose they were; published
figures on COCO are with a detector's. The folder gets results.json with all figures, and in COCO's result format
predictions.json of cycle 1, predictions_2.json of cycle 2, and so on. Nothing is written over.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cyclekd.integrations.runs.arguments import KeyValues, require_ranges, workers_of
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder, write_json
from cyclekd.integrations.runs.processes import main_process_first, on_main_process
from cyclekd.integrations.runs.start import precision_of, run_command
from cyclekd.integrations.tokenpose import (
    People,
    PoseError,
    create_model,
    from_pretrained,
    load_reference_checkpoint,
    read_people,
)
from cyclekd.integrations.tokenpose.data.annotations import read_annotations
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops
from cyclekd.integrations.tokenpose.data.people import DETECTOR, find_split
from cyclekd.integrations.tokenpose.evaluation.precision import Predictions, average_precision, pck_of, write_results
from cyclekd.integrations.tokenpose.evaluation.predicting import evaluate_cycles, predict_cycles, results_of
from cyclekd.integrations.tokenpose.models.config import TokenPoseConfig
from cyclekd.integrations.tokenpose.training.pictures import draw_predictions
from cyclekd.integrations.tokenpose.weights.reference import reference_model

COLUMNS = ("AP", "AP50", "AP75", "APM", "APL", "AP_easy", "AP_medium", "AP_hard", "AR", "PCK@0.1", "PCK@0.05")
"""What the table shows of what there is; results.json has all figures."""

PCK_THRESHOLDS = (0.1, 0.05)
WARM_UP, FEWEST, MOST, SECONDS = 2, 3, 30, 5.0
"""Passes before those that are timed; how many these are at least and at most, and after how long they end."""


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


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for what a user can put right."""
    args = parse_arguments(arguments)

    def make() -> Accelerator:
        check_arguments(args)
        return Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)

    return run_command(make, lambda accelerator: evaluate(accelerator, args))


def evaluate(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Set up, predict, measure, write; the exit code."""
    this = main_process_first(accelerator, lambda: set_up(accelerator, args))
    folder = on_main_process(accelerator, lambda: RunFolder.create(args.out, "evaluate_pose").path)
    if accelerator.is_main_process:
        print(introduction(this, accelerator, args), flush=True)
    crops = main_process_first(accelerator, lambda: cut(this, args))
    start = time.perf_counter()
    predictions = predict_cycles(
        this.model,
        crops,
        cycles=this.cycles,
        batch=args.batch_size,
        workers=workers_of(args),
        accelerator=accelerator,
        flip_test=not args.no_flip_test,
        method=args.decoding,
        aligned=this.aligned,
        progress=accelerator.is_main_process,
    )
    seconds = time.perf_counter() - start

    def finish() -> None:
        result = {
            **whose(this, crops, predictions),
            "cycles": figures_by_cycle(this, predictions),
            "speed": speed(this, seconds, accelerator, args),
            "settings": {**vars(args), "aligned": this.aligned, "workers": workers_of(args)},
            "config": asdict(this.model.config),
            "environment": {"pycocotools": version("pycocotools"), **describe_environment(accelerator.device)},
        }
        write_files(folder, this, crops, predictions, args)
        write_json(folder / "results.json", result)
        print(summary(result, folder), flush=True)

    on_main_process(accelerator, finish)
    return 0


# -- what is evaluated -------------------------------------------------------------------------------------------------


def set_up(accelerator: Accelerator, args: argparse.Namespace) -> Evaluated:
    """Errors: RunError for whatever cannot work, before the first prediction."""
    annotations, images = (args.annotations, args.images) if args.data is None else find_split(args.data, "val")
    has_truth = bool(read_annotations(annotations).persons)
    if not has_truth and args.boxes is None:
        raise PoseError(f"{annotations} has images and no people: give a detector's boxes with --boxes")
    detected = {} if args.boxes is None else {"boxes": args.boxes, "least_score": args.box_score or 0.0}
    people = read_people(annotations, images, for_training=False, sigmas=args.sigmas, **detected)
    if has_truth:
        average_precision(people, [])
    model, name, aligned = load_model(args, len(people.skeleton.names))
    keypoints = model.config.num_keypoints
    if keypoints != len(people.skeleton.names):
        raise PoseError(
            f"{name} predicts {keypoints} key points, and {annotations} has {len(people.skeleton.names)}: evaluate on "
            "the data set that the model is for"
        )
    cycles = model.config.cycles if isinstance(model.config, TokenPoseConfig) else 1
    model = model.to(accelerator.device).eval()
    return Evaluated(model, name, aligned, cycles, people, has_truth)


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
        run = Path(args.model) / "model"  # where a training leaves it
        model = from_pretrained(run if run.is_dir() else args.model, **settings)
        return model, f"{model.config.name} of {args.model}", bool(args.aligned)
    name, seen = (args.preset, {"num_keypoints": num_keypoints}) if args.preset else reference_model(args.checkpoint)
    model = create_model(name, **{**seen, **settings})
    layout = load_reference_checkpoint(model, args.checkpoint).layout
    aligned = layout.startswith("official") if args.aligned is None else args.aligned
    return model, f"{name} of {args.checkpoint} ({layout})", aligned


# -- what is measured --------------------------------------------------------------------------------------------------


def whose(this: Evaluated, crops: EvaluationCrops, predictions: Sequence[Predictions]) -> dict[str, Any]:
    """Which model, which people, and who of them was left out. Errors: PoseError where nobody is left."""
    people, predicted = this.people, set(predictions[0].rows.tolist())
    unreadable = [row for row in range(len(people)) if row not in predicted]
    if not predicted:
        raise PoseError(f"none of the {len(people)} people can be predicted: {crops.problem(0)}")
    return {
        "model": this.name,
        "annotations": people.annotations,
        "boxes": people.source,
        "people": len(people),
        "images": len(people.images),
        "skipped": people.skipped.counts,
        "unreadable": len(unreadable),
        "first_unreadable": crops.problem(unreadable[0]) if unreadable else None,
    }


def figures_by_cycle(this: Evaluated, predictions: Sequence[Predictions]) -> list[dict[str, Any]]:
    """AP and what comes with it, and PCK where the boxes are of people with key points; nothing without truth."""
    if not this.has_truth:
        return []
    rows: list[dict[str, Any]] = []
    for found, evaluation in zip(
        predictions, evaluate_cycles(this.people, predictions, this.model.config), strict=True
    ):
        rows.append({"boxes": evaluation.boxes, "cycle": len(rows) + 1, "people": evaluation.persons})
        rows[-1] |= evaluation.figures
        if this.people.source != DETECTOR:
            rows[-1] |= {f"PCK@{t:g}": float(pck_of(this.people, found, t).mean) for t in PCK_THRESHOLDS}
    return rows


def speed(this: Evaluated, seconds: float, accelerator: Accelerator, args: argparse.Namespace) -> dict[str, Any]:
    """People per second: of everything, which took `seconds`, and of the network in one pass, as it is deployed."""
    network = []
    for size in [] if args.no_speed else sorted({1, args.batch_size}):
        passes = seconds_per_pass(this.model, size, accelerator)
        network.append({"batch": size, "passes": len(passes), "people/s": size / statistics.median(passes)})
    return {
        "device": device_of(accelerator),
        "precision": precision_of(accelerator),
        "network": network,
        "everything": {
            "processes": accelerator.num_processes,
            "passes per person": this.cycles * (1 if args.no_flip_test else 2),
            "people/s": len(this.people) / seconds,
            "images/s": len(this.people.images) / seconds,
        },
    }


@torch.no_grad()
def seconds_per_pass(model: nn.Module, batch: int, accelerator: Accelerator) -> list[float]:
    """Of every timed pass of that many images."""
    images = torch.randn(batch, 3, *model.config.input_size, device=accelerator.device)
    for _ in range(WARM_UP):
        timed_pass(model, images, accelerator)
    seconds: list[float] = []
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < SECONDS):
        seconds.append(timed_pass(model, images, accelerator))
    return seconds


def timed_pass(model: nn.Module, images: Tensor, accelerator: Accelerator) -> float:
    start = time.perf_counter()
    with accelerator.autocast():
        model(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)
    return time.perf_counter() - start


# -- what is left behind -----------------------------------------------------------------------------------------------


def write_files(
    folder: Path, this: Evaluated, crops: EvaluationCrops, predictions: Sequence[Predictions], args: argparse.Namespace
) -> None:
    """The result files, and a picture where one is wanted."""
    for cycle, found in enumerate(predictions, start=1):
        name = "predictions.json" if cycle == 1 else f"predictions_{cycle}.json"
        write_results(folder / name, results_of(this.people, found, this.model.config))
    if args.picture:
        title = f"{this.name}: annotated (left) and predicted in one pass (right), {this.people.source} boxes"
        decoding = {"method": args.decoding, "aligned": this.aligned}
        draw_predictions(folder / "predictions.png", this.model, crops, title, **decoding)


def introduction(this: Evaluated, accelerator: Accelerator, args: argparse.Namespace) -> str:
    """What is about to happen."""
    height, width = this.model.config.input_size
    how = [
        f"{height}x{width}",
        f"{this.cycles} cycle{'s' * (this.cycles > 1)}",
        "no flip test" if args.no_flip_test else "flip test",
        f"{args.decoding} decoding{', aligned' * this.aligned}" if this.model.config.head == "heatmap" else "",
        f"{precision_of(accelerator)} on {device_of(accelerator)}",
        f"{counted(accelerator.num_processes, 'process')} of batch {args.batch_size}",
    ]
    people, boxes = this.people, this.people.source + (f" ({args.boxes})" if args.boxes else "")
    return (
        f"{people.annotations}: {len(people):,} people in {len(people.images):,} images; boxes: {boxes}; "
        f"{people.skipped}\n{this.name}: {'; '.join(filter(None, how))}"
    )


def summary(result: Mapping[str, Any], folder: Path) -> str:
    """The figures as a table, how fast, and which files there are."""
    lines = ["", *table(result["cycles"])]
    if not result["cycles"]:
        lines.append(
            f"no figures: {Path(result['annotations']).name} has nobody to compare with. COCO's server takes "
            "predictions.json as person_keypoints_test-dev2017_NAME_results.json in a zip file of that name"
        )
    if result["unreadable"]:
        lines.append(f"{result['unreadable']} people without prediction, not found in AP: {result['first_unreadable']}")
    speed, everything = result["speed"], result["speed"]["everything"]
    device = f"{speed['precision']} on {speed['device']}"
    for each in speed["network"]:
        rate = f"{each['people/s']:,.1f} people/s"
        lines.append(f"network, one pass of batch {each['batch']}: {rate} (median of {each['passes']}; {device})")
    lines.append(
        f"file to key points, {counted(everything['passes per person'], 'pass')} each: {everything['people/s']:,.1f} "
        f"people/s, {everything['images/s']:,.1f} images/s ({device}, {counted(everything['processes'], 'process')})"
    )
    return "\n".join([*lines, "", f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}"])


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per cycle under a heading; "-" for a figure of nobody, which is -1 in pycocotools and NaN here."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [["boxes", "cycles", "people", *names]] if rows else []
    for row in rows:
        values = ["-" if row[name] == -1 or isnan(row[name]) else f"{row[name]:.4f}" for name in names]
        cycle = f"{row['cycle']}{' (deployed)' * (row['cycle'] == 1)}"
        lines.append([row["boxes"], cycle, str(row["people"]), *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'es' * (count != 1)}"


def device_of(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    threads = torch.get_num_threads()
    return f"{accelerator.device.type} with {threads} thread{'s' * (threads > 1)}"


# -- arguments ---------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument_group("the model").add_argument
    add("--model", metavar="FOLDER|NAME", help="of a training, of save_pretrained, or a repository on the hub")
    add("--checkpoint", type=Path, metavar="FILE", help="published weights of TokenPose, SDPose, PPT or DistilPose")
    add("--preset", metavar="NAME", help="of list_models(), that --checkpoint is of (default: what its tensors tell)")
    add(
        "--model-args",
        nargs="+",
        default={},
        action=KeyValues,
        metavar="NAME=VALUE",
        help="fields of its config to change, such as keep_rate=0.5, or for a preset input_size=384,288",
    )
    add("--cycles", type=int, metavar="N", help="to evaluate, each on its own (default: as many as it was trained in)")
    add = parser.add_argument_group("the data").add_argument
    add("--data", type=Path, metavar="FOLDER", help="in COCO's or CrowdPose's layout: its val, or test, split")
    add("--annotations", type=Path, metavar="FILE", help="any COCO key point file, or a list of images, instead")
    add("--images", type=Path, metavar="FOLDER", help="and its images")
    add("--boxes", type=Path, metavar="FILE", help="a detector's, in COCO's result format (default: ground truth)")
    add("--box-score", type=float, metavar="X", help="least score of --boxes that count (default: 0, as in the paper)")
    add("--sigmas", type=float, nargs="+", metavar="X", help="of OKS, one per key point (default: the file's)")
    add(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="keep people there cut out, as JPEG files of quality 95, for the next time (default: read photographs)",
    )
    add(
        "--exact-crops",
        action="store_true",
        help="interpolate on the CPU, from whole photographs, as the published code does with OpenCV, in place of the "
        "device: slower, for weights as published",
    )
    add = parser.add_argument_group("how").add_argument
    add("--no-flip-test", action="store_true", help="do not average with the mirrored image, a second pass")
    add(
        "--decoding",
        choices=["dark", "quarter", "argmax"],
        default="dark",
        help="of heat maps; dark is what the papers report (default)",
    )
    add(
        "--aligned",
        action=argparse.BooleanOptionalAction,
        help="for models trained by TokenPose's own code, whose maps lie differently (default: as --checkpoint's "
        "layout says, else not)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="people per process (default: 64)")
    add("--workers", type=int, metavar="N", help="per process, that read (default: its share of the cores)")
    add(
        "--mixed-precision",
        choices=["no", "bf16"],
        help="default: what accelerate launch says, else no, which is fp32",
    )
    add("--cpu", action="store_true", help="use the CPU where a GPU is there too")
    add = parser.add_argument_group("what to write").add_argument
    add("--out", type=Path, metavar="FOLDER", help="new or empty (default: first free of runs/evaluate_pose, ...-2)")
    add("--picture", action="store_true", help="draw twelve people, annotated and predicted, into predictions.png")
    add("--no-speed", action="store_true", help="do not time the network alone")
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> None:
    """Errors: RunError for a number out of range, and for arguments that say nothing together."""
    limits = {"cycles": (1, 64), "batch_size": (1, 2**16), "workers": (0, 2**10)}
    require_ranges(args, limits)
    if (args.model is None) == (args.checkpoint is None):
        raise RunError("which model? Give --model or --checkpoint, and one of them")
    if args.preset and args.checkpoint is None:
        raise RunError("--preset: goes with --checkpoint; a model of --model has a config that says what it is")
    if (args.annotations is None) != (args.images is None):
        raise RunError("--annotations and --images go together: give both")
    if (args.data is None) == (args.annotations is None):
        raise RunError("which people? Give --data, or --annotations and --images")
    if args.box_score is not None and args.boxes is None:
        raise RunError("--box-score: goes with --boxes, a detector's; those of the ground truth have no scores")
    if args.exact_crops and args.cache_dir is not None:
        raise RunError(
            "--exact-crops, --cache-dir: exact crops are of whole photographs, not of a cache; leave one out"
        )


if __name__ == "__main__":
    sys.exit(main())
