"""The results file, one row per run, and the tables made of it. Rows are added and never changed."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import timm
import torch

from benchmarks.experiment.runs import Job, Measured, Settings
from benchmarks.experiment.statistics import Interval, paired_difference, retention
from benchmarks.records import origin, read_rows, write_rows
from cyclekd.integrations.runs.errors import RunError

PLAIN, EQUAL = "plain", "equal compute"


@dataclass(frozen=True)
class Row:
    """A finished run, as the file has it."""

    arm: str
    seed: int
    passes: int
    one_pass: float
    all_cycles: float | None
    token_distance: tuple[float, ...]
    seconds: float
    images_per_s: float
    curve: tuple[tuple[float, float], ...]
    metric: str


class Results:
    """The CSV file at `path`; RunError where its rows come from other settings than `settings`."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        for row in self.read():
            refuse_other_settings(row, settings, path)

    def read(self) -> list[dict[str, str]]:
        return read_rows(self.path) if self.path.exists() else []

    def rows(self) -> list[Row]:
        return [parse(row) for row in self.read()]

    def holds(self, job: Job) -> bool:
        return any((row.arm, row.seed) == (job.arm.name, job.seed) for row in self.rows())

    def append(self, job: Job, measured: Measured, jobs: int) -> None:
        """Whole or not at all: a new file takes the place of the old one."""
        rows = [*self.read(), self.as_row(job, measured, jobs)]
        new = self.path.with_suffix(".new")
        new.unlink(missing_ok=True)
        write_rows(new, rows)
        new.replace(self.path)

    def as_row(self, job: Job, measured: Measured, jobs: int) -> dict[str, object]:
        cuda = self.settings.device == "cuda"
        return {
            "arm": job.arm.name,
            "seed": job.seed,
            **self.settings.columns(),
            "training passes": self.settings.epochs * job.arm.passes,
            "steps": measured.steps,
            "metric": measured.metric,
            "one pass": measured.one_pass,
            "all cycles": "" if measured.all_cycles is None else measured.all_cycles,
            "token distance": json.dumps(measured.token_distance),
            "seconds": f"{measured.seconds:.2f}",
            "images/s": f"{measured.images / measured.seconds:.0f}",
            "runs at once": jobs,
            "curve": json.dumps(measured.curve),
            "device name": torch.cuda.get_device_name() if cuda else platform.machine(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            **origin(),
        }


def parse(row: dict[str, str]) -> Row:
    return Row(
        row["arm"],
        int(row["seed"]),
        int(row["training passes"]),
        float(row["one pass"]),
        float(row["all cycles"]) if row["all cycles"] else None,
        tuple(json.loads(row["token distance"])),
        float(row["seconds"]),
        float(row["images/s"]),
        tuple((passes, value) for passes, value in json.loads(row["curve"])),
        row["metric"],
    )


def refuse_other_settings(row: dict[str, str], settings: Settings, path: Path) -> None:
    for name, value in settings.columns().items():
        if row.get(name) != value:
            raise RunError(
                f"{path} holds runs with {name} {row.get(name)!r}, and {value!r} was asked: such runs are not paired. "
                "Give the settings of those runs, or another folder with --results"
            )


# -- comparisons -------------------------------------------------------------------------------------------------------


def by_arm(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """Arm to seed to row; plain and equal compute first."""
    arms: dict[str, dict[int, Row]] = {PLAIN: {}, EQUAL: {}}
    for row in rows:
        arms.setdefault(row.arm, {})[row.seed] = row
    return {name: dict(sorted(runs.items())) for name, runs in arms.items() if runs}


def difference(
    arms: dict[str, dict[int, Row]], arm: str, other: str, value: Callable[[Row], float | None]
) -> Interval | None:
    """`value` of an arm minus one pass of another, over the seeds that both have; None where there is none."""
    if arm == other:
        return None
    seeds = [seed for seed in arms[arm] if seed in arms.get(other, {})]
    values = [value(arms[arm][seed]) for seed in seeds]
    if not seeds or None in values:
        return None
    return paired_difference(values, [arms[other][seed].one_pass for seed in seeds])


def one_pass(row: Row) -> float:
    return row.one_pass


def all_cycles(row: Row) -> float | None:
    return row.all_cycles


def kept(arms: dict[str, dict[int, Row]], arm: str) -> str:
    seeds = [seed for seed in arms[arm] if seed in arms.get(PLAIN, {})]
    every = [arms[arm][seed].all_cycles for seed in seeds]
    if None in every or not seeds:
        return ""
    found = retention([arms[PLAIN][s].one_pass for s in seeds], [arms[arm][s].one_pass for s in seeds], every)
    return "n/a" if found is None else str(found)


# -- tables ------------------------------------------------------------------------------------------------------------


def accuracy_table(rows: Sequence[Row]) -> list[list[str]]:
    arms = by_arm(rows)
    header = ["", "seeds", "one pass", "all cycles", "one pass - plain", "one pass - equal compute"]
    return [[*header, "all cycles - plain", "retention"]] + [
        [
            arm,
            str(len(runs)),
            f"{fmean(map(one_pass, runs.values())):.2f}",
            mean_or_blank([row.all_cycles for row in runs.values()], ".2f"),
            shown(difference(arms, arm, PLAIN, one_pass)),
            shown(difference(arms, arm, EQUAL, one_pass)) if arm != PLAIN else "",
            shown(difference(arms, arm, PLAIN, all_cycles)),
            kept(arms, arm),
        ]
        for arm, runs in arms.items()
    ]


def cost_table(rows: Sequence[Row]) -> list[list[str]]:
    return [["", "training passes", "seconds", "images/s", "token distance"]] + [
        [
            arm,
            str(next(iter(runs.values())).passes),
            f"{fmean(row.seconds for row in runs.values()):.1f}",
            f"{fmean(row.images_per_s for row in runs.values()):.0f}",
            ", ".join(
                f"{fmean(distances):.3g}"
                for distances in zip(*(row.token_distance for row in runs.values()), strict=True)
            ),
        ]
        for arm, runs in by_arm(rows).items()
    ]


def mean_or_blank(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(fmean(known), form) if known else ""


def shown(interval: Interval | None) -> str:
    return "" if interval is None or math.isnan(interval.mean) else str(interval)


def print_table(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *rest in table:
        print("  ".join([f"{first:{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=True))]))
