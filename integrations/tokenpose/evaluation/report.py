"""What an evaluation says of itself: what it is about to do, and its figures as a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cyclekd.integrations.runs.start import precision_of
from cyclekd.integrations.tokenpose.evaluation.speed import device_of
from cyclekd.integrations.tokenpose.evaluation.subject import Evaluated

COLUMNS = ("AP", "AP50", "AP75", "APM", "APL", "AP_easy", "AP_medium", "AP_hard", "AR", "PCK@0.1", "PCK@0.05")
"""What the table shows of what there is; results.json has all figures."""


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
