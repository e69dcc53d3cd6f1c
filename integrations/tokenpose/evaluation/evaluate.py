"""One evaluation from its arguments to its result files; `examples/evaluate_pose.py` is the command."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cyclekd.integrations.runs.arguments import workers_of
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.folder import RunFolder, write_json
from cyclekd.integrations.runs.processes import main_process_first, on_main_process
from cyclekd.integrations.runs.start import run_command
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops
from cyclekd.integrations.tokenpose.data.people import DETECTOR
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.evaluation.arguments import check_arguments, parse_arguments
from cyclekd.integrations.tokenpose.evaluation.pictures import draw_predictions
from cyclekd.integrations.tokenpose.evaluation.precision import Predictions, pck_of, write_results
from cyclekd.integrations.tokenpose.evaluation.predicting import evaluate_cycles, predict_cycles, results_of
from cyclekd.integrations.tokenpose.evaluation.report import introduction, summary
from cyclekd.integrations.tokenpose.evaluation.speed import speed
from cyclekd.integrations.tokenpose.evaluation.subject import Evaluated, cut, set_up

PCK_THRESHOLDS = (0.1, 0.05)


def main(description: str, arguments: list[str] | None = None) -> int:
    """Evaluate as the arguments say; the exit code: 0, or 2 for what a user can put right."""
    args = parse_arguments(description, arguments)

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


def write_files(
    folder: Path, this: Evaluated, crops: EvaluationCrops, predictions: Sequence[Predictions], args: argparse.Namespace
) -> None:
    """The result files, and a picture where one is wanted."""
    for cycle, found in enumerate(predictions, start=1):
        name = "predictions.json" if cycle == 1 else f"predictions_{cycle}.json"
        write_results(folder / name, results_of(this.people, found, this.model.config))
    if args.picture:
        decoding = {"method": args.decoding, "aligned": this.aligned}
        draw_predictions(folder / "predictions.png", this.model, crops, this.name, **decoding)
